"""The choice of a device, copies, and tiles that shrink when a device's memory runs out."""

import pytest
import torch

from residua.cache.devices import (
    TileRows,
    choose_device,
    copy_to_device,
    copy_to_host,
    free_memory,
    is_out_of_memory,
    iterate_on_device,
    memory_budget,
    wide_dtype,
)
from residua.cache.errors import ModelError
from tests.support.pretended_device import DEVICE, DeviceTensor, pretended_device

CPU = torch.device("cpu")


def test_auto_is_the_cpu_without_a_gpu() -> None:
    if torch.accelerator.is_available():
        assert choose_device().type == torch.accelerator.current_accelerator().type  # pyright: ignore[reportOptionalMemberAccess]
    else:
        assert choose_device() == choose_device("auto") == choose_device(CPU) == CPU


@pytest.mark.parametrize("device", ["cuda:77", "meta", "gpu", "", "cpu:x"])
def test_a_device_that_cannot_compute_is_one_message(device: str) -> None:
    with pytest.raises(ModelError, match="expected auto, cpu, cuda") as caught:
        choose_device(device)
    assert "\n" not in str(caught.value)


def test_the_cpu_has_float64_and_copies_nothing() -> None:
    x = torch.ones(3)
    assert wide_dtype(CPU) == torch.float64
    assert copy_to_device(x, CPU) is x
    assert free_memory(CPU) is None
    assert memory_budget(CPU, 123) == 123
    batches = [x, x + 1]
    assert all(a is b for a, b in zip(iterate_on_device(batches, CPU, _copy), batches, strict=True))


def _copy(batch: torch.Tensor, copy: "object") -> torch.Tensor:
    return copy(batch)  # pyright: ignore[reportCallIssue]


def test_rows_go_to_a_device_and_come_back() -> None:
    with pretended_device():
        device = choose_device("meta")
        assert device == DEVICE
        moved = list(iterate_on_device([torch.ones(3), torch.arange(3.0)], device, _copy))
        assert all(isinstance(x, DeviceTensor) for x in moved)
        assert copy_to_host(moved[0] + moved[1]).numpy().tolist() == [1, 2, 3]
        assert wide_dtype(device) == torch.float64
    with pretended_device(float64=False):
        assert wide_dtype(DEVICE) == torch.float32


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    with pretended_device():
        x = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="on the device"):
            _ = x + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, generator=torch.Generator(), device=DEVICE)
        assert (x * torch.tensor(2.0))[torch.tensor([0, 2])].tolist() == [2, 2]
        linear = torch.nn.Linear(3, 2).to(DEVICE)
        loss = linear(x).square().sum()
        loss.backward()
        weight = linear.weight.detach().cpu()
        expected = 2 * (weight.sum(1) + linear.bias.detach().cpu())
        gradient = linear.bias.grad
        assert gradient is not None
        torch.testing.assert_close(gradient.cpu(), expected)


def test_tiles_cover_all_rows_in_order_and_are_about_equal() -> None:
    for total in range(12):
        tiles: list[slice] = []
        TileRows(5, CPU).run(total, tiles.append)
        assert [i for tile in tiles for i in range(tile.start, tile.stop)] == list(range(total))
        sizes = [tile.stop - tile.start for tile in tiles]
        assert len(sizes) == -(-total // 5)
        assert not sizes or max(sizes) - min(sizes) <= 1


def test_tiles_shrink_until_they_fit_and_stay_small() -> None:
    done, calls = [], []

    def compute(tile: slice) -> None:
        calls.append(tile.stop - tile.start)
        if tile.stop - tile.start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(range(tile.start, tile.stop))

    rows = TileRows(16, CPU)
    rows.run(20, compute)
    assert done == list(range(20))
    assert rows.rows <= 3
    assert sum(size > 3 for size in calls) <= 3
    with pytest.raises(torch.OutOfMemoryError):
        TileRows(16, CPU, fewest=8).run(20, compute)


def test_other_errors_pass_through_tiles() -> None:
    def compute(tile: slice) -> None:
        raise RuntimeError("expected scalar type Float")

    rows = TileRows(16, CPU)
    with pytest.raises(RuntimeError, match="scalar type"):
        rows.run(20, compute)
    assert rows.rows == 16


def test_products_that_do_not_fit_the_device_come_in_smaller_tiles() -> None:
    x, w = torch.randn(64, 8), torch.randn(8, 100)
    with pretended_device(largest=10 * 100 * 4) as device:
        parts: list[torch.Tensor] = []
        moved, weight = copy_to_device(x[:10], DEVICE), copy_to_device(w, DEVICE)
        assert moved.device == DEVICE
        rows = TileRows(64, DEVICE)
        rows.run(
            64, lambda tile: parts.append(copy_to_host(copy_to_device(x[tile], DEVICE) @ weight))
        )
    assert device.refused
    torch.testing.assert_close(torch.cat(parts), x @ w)


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_pretended_device_ends_with_its_context() -> None:
    with pretended_device():
        pass
    with pytest.raises(NotImplementedError):
        torch.ones(1, device=DEVICE).cpu()

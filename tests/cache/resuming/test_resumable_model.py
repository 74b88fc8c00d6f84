"""A model run on from a given layer gives the logits of a full run whose layer is overwritten."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import residua
from residua.cache.errors import InputTypeError, ModelError, UsageError
from residua.cache.model.block_search import find_blocks
from residua.cache.model.blocks import DecoderBlocks, run_model
from residua.cache.resuming.model_resuming import load_model
from residua.cache.resuming.resumable_model import ResumableModel

from ...support import models, toys


def random_ids(seed: int, rows: int = 2, length: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, models.VOCAB - 1, (rows, length), generator=generator)


def resumable(module: torch.nn.Module) -> ResumableModel:
    with torch.inference_mode():
        blocks = find_blocks(module, random_ids(1, 4, 48), random_ids(2, 4, 48))
    return ResumableModel(blocks)


def changed(hidden: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return 0.8 * hidden + 0.3 * hidden.std() * torch.randn(hidden.shape, generator=generator)


def hooked_logits(
    module: Any, block: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor, mask: Any = None
) -> torch.Tensor:
    """Logits of a plain run of transformers; a hook on `block` overwrites its output."""

    def overwrite(_: Any, __: Any, output: Any) -> Any:
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    handle = block.register_forward_hook(overwrite)
    try:
        return module(input_ids=ids, use_cache=False, attention_mask=mask).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "falcon", "llama", "gemma2"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_every_layer_resumes_as_a_plain_hook_does(kind: str, padded: bool) -> None:
    module = models.build_model(kind)
    model = resumable(module)
    ids, mask = random_ids(3, 3, 19), None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, -6:] = 0
    with torch.inference_mode():
        clean = model.run(ids, mask)
        assert torch.equal(clean, run_model(module, ids, mask).logits)
        for layer in range(model.depth + 1):
            stream = model.run_residual(layer, ids, mask)
            assert torch.equal(model.resume(layer, stream, ids, mask), clean)
            hidden = changed(stream)
            resumed = model.resume(layer, hidden, ids, mask)
            assert torch.equal(resumed, model.overwrite(layer, hidden, ids, mask))
            assert float((resumed - clean).abs().max()) > 1e-3
            if layer:
                block = model.blocks.blocks[layer - 1]
                assert torch.equal(resumed, hooked_logits(module, block, hidden, ids, mask))


@pytest.mark.parametrize(
    "toy",
    [toys.Looped, toys.InDictionary, toys.InDataclass, toys.PositionFirst, toys.StreamsInside,
     toys.StreamsFirst, toys.Repeated, toys.TwoStreams, toys.ByKeyword, toys.SkippedBlock],
)  # fmt: skip
def test_streams_of_any_layout_resume_without_the_blocks_below(toy: type[toys.Toy]) -> None:
    model = resumable(toy())
    ids = random_ids(6, 3, 17)
    with torch.inference_mode():
        for layer in range(model.depth + 1):
            hidden = changed(model.run_residual(layer, ids))
            assert torch.equal(
                model.resume(layer, hidden, ids), model.overwrite(layer, hidden, ids)
            )


def test_blocks_below_do_not_run() -> None:
    model = resumable(models.build_model("llama"))
    ids = random_ids(7)
    runs = [0] * model.depth
    for number, block in enumerate(model.blocks.blocks):

        def count(_: Any, __: Any, number: int = number) -> None:
            runs[number] += 1

        block.get_submodule("mlp").register_forward_pre_hook(count)
    hidden = changed(model.run_residual(2, ids))
    model.check(2)
    runs[:] = [0] * model.depth
    model.resume(2, hidden, ids)
    assert runs == [0, 0, 1]


def test_the_jacobian_flows_through_the_upper_blocks_alone() -> None:
    model = resumable(models.build_model("gemma2"))
    ids = random_ids(8, 1, 7)
    hidden = changed(model.run_residual(2, ids)).requires_grad_()
    model.resume(2, hidden, ids)[0, -1, 5].backward()
    gradient = hidden.grad
    assert gradient is not None
    # Central differences in the direction of a random stream.
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        step = 1e-2
        high, low = (
            model.resume(2, hidden + sign * step * direction, ids)[0, -1, 5] for sign in (1, -1)
        )
    expected = float(high - low) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=2e-2, abs=1e-4)


def test_a_stream_stops_at_the_layer_above() -> None:
    model = resumable(models.build_model("gpt2"))
    ids = random_ids(9)
    with torch.inference_mode():
        hidden = changed(model.run_residual(1, ids))
        full = model.run_residual(3, ids, changes={1: lambda _: hidden})
        assert torch.equal(model.resume_residual(1, hidden, ids), full)
        middle = model.resume_residual(1, hidden, ids, to_layer=2)
        assert torch.equal(model.resume(2, middle, ids), model.resume(1, hidden, ids))
        assert torch.equal(model.resume_residual(1, hidden, ids, to_layer=1), hidden)
        with pytest.raises(UsageError, match="layer 1 is below layer 2"):
            model.resume_residual(2, hidden, ids, to_layer=1)


def test_layers_above_are_changed_on_the_way() -> None:
    model = resumable(models.build_model("llama"))
    ids = random_ids(10)
    with torch.inference_mode():
        hidden = changed(model.run_residual(1, ids))
        middle = model.resume_residual(1, hidden, ids, to_layer=2)
        expected = model.resume(2, 2 * middle, ids)
        assert torch.equal(model.resume(1, hidden, ids, changes={2: lambda s: 2 * s}), expected)
        stopped = model.resume_residual(1, hidden, ids, to_layer=2, changes={2: lambda s: 2 * s})
        assert torch.equal(stopped, 2 * middle)
        with pytest.raises(UsageError, match="a change of layer 1 has no effect"):
            model.resume(1, hidden, ids, changes={1: lambda s: s})
        with pytest.raises(UsageError, match=r"gives a stream \(2, 3, 32\), expected \(2, 24, 32"):
            model.resume(1, hidden, ids, changes={2: lambda s: s[:, :3]})


def test_single_and_ragged_sequences_and_numpy_arrays() -> None:
    model = resumable(models.build_model("gpt2"))
    rows = [np.arange(3, 3 + n) for n in (5, 9, 5, 1)]
    with torch.inference_mode():
        streams = [model.run_residual(2, row).numpy() for row in rows]
        single = [model.resume(2, stream, row) for stream, row in zip(streams, rows, strict=True)]
        assert [tuple(logits.shape) for logits in single] == [(n, 300) for n in (5, 9, 5, 1)]
        together = model.resume(2, streams, rows)
        for one, other in zip(single, together, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        half = model.resume(2, streams[1].astype(np.float16), rows[1].astype(np.uint16))
        torch.testing.assert_close(half, single[1], rtol=1e-2, atol=1e-2)


def test_what_does_not_fit_is_said() -> None:
    model = resumable(models.build_model("gpt2"))
    ids = random_ids(10)
    hidden = model.run_residual(1, ids)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(UsageError, match=r"expected a residual stream \(2, 24, 32\)"):
        model.resume(1, hidden[:, :-1], ids)
    with pytest.raises(UsageError, match=r"expected a residual stream \(24, 32\)"):
        model.resume(1, hidden[0, :, :-1], ids[0])
    with pytest.raises(UsageError, match="0 to 3, there is no layer 4"):
        model.resume(4, hidden, ids)
    with pytest.raises(UsageError, match="there is no token 300"):
        model.resume(1, hidden, ids.clone().fill_(300))
    with pytest.raises(InputTypeError, match="whole numbers"):
        model.resume(1, hidden, ids.float())
    with pytest.raises(InputTypeError, match="real numbers"):
        model.resume(1, hidden.long(), ids)
    with pytest.raises(UsageError, match="padding on its right"):
        model.resume(1, hidden, ids, mask)
    with pytest.raises(UsageError, match="both must be equal"):
        model.resume(1, hidden, ids, mask[:, 1:])
    with pytest.raises(UsageError, match="token ids"):
        model.resume(1, hidden, ids[:0])


def test_a_nan_spoils_its_own_sequence_alone() -> None:
    model = resumable(models.build_model("llama"))
    ids = random_ids(10)
    with torch.inference_mode():
        hidden = model.run_residual(1, ids).clone()
        hidden[0, 10, 3] = float("nan")
        logits = model.resume(1, hidden, ids)
        assert logits[0, 10].isnan().all()
        assert torch.equal(logits[1], model.run(ids)[1])


def module_state(module: torch.nn.Module) -> list[tuple[Any, ...]]:
    return [
        (vars(part).keys(), *map(len, (part._forward_hooks, part._forward_pre_hooks)))
        for part in module.modules()
    ]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_behind_after_an_error_or_ctrl_c(error: type[BaseException]) -> None:
    module = models.build_model("gpt2")
    model = resumable(module)
    ids = random_ids(8)
    hidden = model.run_residual(1, ids)
    clean = model.run(ids)
    for layer in range(4):
        model.check(layer)

    def fail(*_: Any) -> Any:
        raise error("stopped")

    handle = model.blocks.blocks[2].register_forward_pre_hook(fail)
    before = module_state(module)
    for call in (
        lambda: model.resume(1, hidden, ids),
        lambda: model.resume_residual(0, hidden, ids),
        lambda: model.run(ids, changes={1: lambda s: s, 0: lambda s: s}),
        lambda: model.overwrite(1, hidden, ids),
    ):
        with pytest.raises(error, match="stopped"):
            call()
        assert module_state(module) == before
    handle.remove()
    assert torch.equal(model.run(ids), clean)


# Models that cannot be resumed


class Remembering(toys.Toy):
    """The second block adds the input of the first one, which its output does not carry."""

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        inputs: list[torch.Tensor] = []
        handle = self.blocks[0].embed_again.register_forward_hook(  # pyright: ignore
            lambda _, __, output: inputs.append(output)
        )
        try:
            hidden = self.blocks[0](hidden)
        finally:
            handle.remove()
        return self.blocks[1](hidden + sum(inputs))


class Inner(toys.Block):
    def __init__(self) -> None:
        super().__init__(16, 16)
        self.embed_again = torch.nn.Linear(16, 16)
        self.requires_grad_(False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + self.embed_again(input)


def test_a_model_whose_upper_blocks_read_more_is_refused_at_those_layers() -> None:
    toy = Remembering()
    toy.blocks[0] = Inner()
    axes = resumable(toys.Toy()).blocks.axes
    model = ResumableModel(DecoderBlocks(toy, "blocks", list(toy.blocks), axes, (0,)))
    ids = random_ids(12)
    hidden = model.run_residual(1, ids)
    assert [model.can_resume(layer) for layer in range(3)] == [True, False, True]
    with pytest.raises(ModelError, match=r"layer 1: .* differ from those of a full run by"):
        model.resume(1, hidden, ids)
    with pytest.raises(ModelError, match="layer 1"):
        model.drop_lower_blocks(1)
    assert not any(p.is_meta for p in toy.parameters())
    assert torch.equal(model.overwrite(1, hidden, ids), model.run(ids))


# Models whose lower blocks are not in memory


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "mixtral", "gemma2", "bloom"])
def test_lower_blocks_are_not_read(kind: str, tmp_path: Path) -> None:
    folder = models.save_model(tmp_path / "model", kind)
    whole = load_model(folder)
    ids = random_ids(13)
    with torch.inference_mode():
        streams = [whole.run_residual(layer, ids) for layer in range(whole.depth + 1)]
        expected = [whole.resume(layer, changed(s), ids) for layer, s in enumerate(streams)]
    # Numbers of the lower blocks are spoiled: reading them would show.
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    lower = [key for key in tensors if re.search(r"\.(h|layers)\.[01]\.", key)]
    assert lower
    save_file(
        {k: torch.full_like(t, float("nan")) if k in lower else t for k, t in tensors.items()},
        path,
        {"format": "pt"},
    )
    model = load_model(folder, layer=2)
    empty = [name for name, p in model.blocks.model.named_parameters() if p.is_meta]
    assert len(empty) == sum(len(list(block.parameters())) for block in whole.blocks.blocks[:2])
    with torch.inference_mode():
        for layer in (2, 3):
            assert torch.equal(model.resume(layer, changed(streams[layer]), ids), expected[layer])
    for call in (
        lambda: model.resume(1, streams[1], ids),
        lambda: model.run(ids),
        lambda: model.overwrite(2, streams[2], ids),
    ):
        with pytest.raises(UsageError, match="loaded from layer 2 on.*load it with layer"):
            call()


def test_a_half_precision_model_runs_in_its_own_dtype(tmp_path: Path) -> None:
    module = models.build_model("llama", torch.bfloat16)
    module.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    whole, upper = load_model(tmp_path), load_model(tmp_path, layer=2)
    ids = random_ids(14)
    with torch.inference_mode():
        hidden = whole.run_residual(2, ids)
        assert hidden.dtype == torch.bfloat16
        assert torch.equal(upper.resume(2, hidden.float(), ids), whole.run(ids))


def test_wrong_models_and_layers_are_said(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config.json"):
        load_model(tmp_path)
    for layer in (9, -1):
        with pytest.raises(UsageError, match="layer"):
            load_model(model_folder, layer=layer)
    module = models.build_model("llama").train()
    with pytest.raises(ModelError, match="training mode"):
        load_model(module)


def test_the_model_of_a_cache_is_found_and_compared(tiny_cache: residua.ActivationCache) -> None:
    model = residua.load_model(tiny_cache, layer=2)
    rows = tiny_cache.positions_of(np.array([0]))
    tokens = tiny_cache.tokens.take(rows)
    with torch.inference_mode():
        logits = model.resume(2, tiny_cache.residual_array(2).take(rows), tokens)
    expected = tiny_cache.head.logits(tiny_cache.residual_array(tiny_cache.n_blocks).take(rows))
    assert np.abs(logits.numpy() - expected).max() < 0.02 * np.abs(expected).max()

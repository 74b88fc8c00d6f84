"""A lens fit on a device, on a scratch file and with bfloat16 products: the lens of the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residua.cache.errors import ModelError, NoSpaceError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.lens import fit_groups
from residua.probes.lens.tuned_lens import FutureLens, TunedLens
from residua.probes.training.scratch_file import ScratchFile

from ...support.pretended_device import pretended_device
from ...support.synthetic import make_cache, random_head
from .test_tuned_lens import VOCAB, WIDTH, curved_layers

FAST: dict[str, Any] = {"steps": 40, "batch": 256, "products": "float32"}


@pytest.fixture(scope="module")
def curved(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, 150).tolist()
    folder, head = tmp_path_factory.mktemp("curved"), random_head(WIDTH, VOCAB)
    return make_cache(folder, curved_layers(rng, sum(lengths)), lengths, head)


@pytest.fixture(scope="module")
def future(curved: ActivationCache) -> TunedLens:
    return FutureLens(offsets=(0, 2), **FAST).fit(curved, device="cpu")


def check_same(found: TunedLens, expected: TunedLens) -> None:
    assert found.pairs() == expected.pairs()
    for pair, affine in expected.maps_.items():
        assert isinstance(found.maps_[pair].weight, np.ndarray)
        np.testing.assert_allclose(found.maps_[pair].weight, affine.weight, atol=2e-4)
        np.testing.assert_allclose(found.maps_[pair].bias, affine.bias, atol=2e-4)
    for row, expected_row in zip(found.metrics(), expected.metrics(), strict=True):
        np.testing.assert_allclose(row["kl"], expected_row["kl"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("float64", [True, False])
def test_a_fit_on_a_device_gives_the_lens_of_the_cpu(
    curved: ActivationCache, future: FutureLens, float64: bool
) -> None:
    with pretended_device(float64) as device:
        found = FutureLens(offsets=(0, 2), **FAST).fit(curved, device="meta")
    assert {"addmm.out", "cumsum.out"} <= device.operations
    check_same(found, future)


def test_a_tile_that_does_not_fit_the_device_is_halved(
    curved: ActivationCache, future: FutureLens
) -> None:
    # The rows of a batch fit, `(256, 10)` float32, their logits `(256, 24)` do not.
    with pretended_device(largest=12_000) as device:
        found = FutureLens(offsets=(0, 2), **FAST).fit(curved, device="meta")
    assert device.refused
    check_same(found, future)


def test_a_checkpoint_of_a_device_goes_on_there(
    curved: ActivationCache, future: FutureLens, tmp_path: Path
) -> None:
    def kill(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("lens", 25):
            raise KeyboardInterrupt

    lens = FutureLens(offsets=(0, 2), **FAST)
    with pretended_device():
        with pytest.raises(KeyboardInterrupt):
            lens.fit(curved, device="meta", checkpoint=tmp_path, progress=kill)
        assert list(tmp_path.rglob("fit.json"))
        lens.fit(curved, device="meta", checkpoint=tmp_path)
    check_same(lens, future)


def test_translators_beyond_the_memory_lie_in_a_file(
    curved: ActivationCache, future: FutureLens, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []

    class Counted(ScratchFile):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.copies = 0
            files.append(self)

        def copy(self, tensor: torch.Tensor) -> torch.Tensor:
            copied = super().copy(tensor)
            assert copied.data_ptr() % self.ALIGNMENT == 0
            self.copies += 1
            return copied

    monkeypatch.setattr(fit_groups, "ScratchFile", Counted)
    found = FutureLens(offsets=(0, 2), **FAST).fit(curved, memory=1, device="cpu")
    # One run for all translators, which share the model's distribution; all fit the file.
    (file,) = files
    assert file.copies >= 5 * len(fit_groups.fitted_pairs(curved, ((0, 1, 2), (0, 2))))
    assert file._used <= len(file._bytes)
    check_same(found, future)


def test_a_file_gives_zeros_copies_and_then_memory() -> None:
    file = ScratchFile(256)
    first, second = torch.arange(10.0), torch.arange(30, dtype=torch.int64).view(5, 6)
    copies = [file.copy(tensor) for tensor in (first, second, first, second)]
    for copied, tensor in zip(copies, (first, second, first, second), strict=True):
        assert torch.equal(copied, tensor)
        copied += 1
    assert torch.equal(copies[0] - 1, first)


def test_a_disk_without_space_is_said_before_the_fit(
    curved: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(NoSpaceError):
        TunedLens(**FAST).fit(curved, memory=1)


def test_bfloat16_products_change_the_kl_by_little(curved: ActivationCache) -> None:
    kl = {}
    for products in ("float32", "bfloat16"):
        lens = TunedLens(**{**FAST, "products": products}).fit(curved, device="cpu")
        kl[products] = [row["kl"] for row in lens.metrics()]
    np.testing.assert_allclose(kl["bfloat16"], kl["float32"], rtol=0.01, atol=1e-6)
    assert kl["bfloat16"] != kl["float32"]


def test_what_cannot_be_is_one_message(curved: ActivationCache) -> None:
    with pytest.raises(UsageError, match="products must be one of auto, float32, bfloat16"):
        TunedLens(products="float16").fit(curved)
    with pytest.raises(ModelError, match="device 'nowhere' cannot be used"):
        TunedLens().fit(curved, device="nowhere")

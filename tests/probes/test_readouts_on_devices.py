"""Probes read on a device what they read on the CPU; controls are fitted there."""

from typing import Any

import numpy as np
import pytest
import torch

from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.readout import ReadoutBatch
from residua.probes.base.resources import device_of_fit
from residua.probes.baselines.token_counts import unfitted_baselines
from residua.probes.controls.control_probe import ControlProbe
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.vocabulary import descent as descent_module
from residua.probes.vocabulary.vocab_probe import VocabProbe

from ..support.pretended_device import DEVICE, pretended_device
from ..support.synthetic import make_cache, random_head

WIDTH, VOCAB, ROWS = 6, 25, 40
KINDS = ("unigram", "bigram", "trigram", "lagged", "chain", "marginal")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 30, 80).tolist()
    layers = [rng.normal(size=(sum(lengths), WIDTH)).astype("f4") for _ in range(3)]
    folder = tmp_path_factory.mktemp("readouts")
    return make_cache(folder, layers, lengths, random_head(WIDTH, VOCAB))


def batch_on(cache: ActivationCache, device: torch.device, width: int = WIDTH) -> ReadoutBatch:
    """Random rows and tokens, as evaluation hands them to probes."""
    rng = np.random.default_rng(1)
    hidden = torch.from_numpy(rng.normal(size=(ROWS, width)).astype("f4")).to(device)
    tokens = [torch.from_numpy(rng.integers(0, VOCAB, ROWS)).to(device) for _ in range(3)]
    return ReadoutBatch(hidden, tokens[0], cache.head.torch(device), tokens[1], tokens[2])


def assert_reads_the_same(cache: ActivationCache, probe: Any, width: int = WIDTH) -> None:
    layer, offset = probe.pairs()[-1]
    expected = probe.logits(batch_on(cache, torch.device("cpu"), width), layer, offset)
    with pretended_device():
        logits = probe.logits(batch_on(cache, DEVICE, width), layer, offset)
        assert logits.device == DEVICE
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_baselines_give_their_logits_on_the_device_of_the_batch(
    cache: ActivationCache, kind: str
) -> None:
    (baseline,) = unfitted_baselines([kind], [1])
    assert_reads_the_same(cache, baseline.fit(cache))


@pytest.mark.parametrize("control", ["shuffled", "permuted", "next-token"])
def test_controls_are_fitted_and_read_on_the_device(
    cache: ActivationCache, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent_module, "LEAST_STEPS", 12)
    options: dict[str, Any] = {"offsets": [1], "layers": [1]}
    new_probes = (
        lambda: RidgeProbe(alphas=np.logspace(1, 5, 5), **options),
        lambda: VocabProbe(loss="kl", lr=0.05, epochs=1, products="float32", rank=3, **options),
    )
    for new_probe in new_probes:
        expected = ControlProbe(new_probe(), control).fit(cache, device="cpu")
        with pretended_device():
            ours = ControlProbe(new_probe(), control).fit(cache, device="meta")
        width = 2 * WIDTH if control == "next-token" else WIDTH
        batch = batch_on(cache, torch.device("cpu"), width)
        logits = ours.logits(batch, 1, 1)
        scale = float(logits.abs().max())
        torch.testing.assert_close(logits, expected.logits(batch, 1, 1), rtol=0, atol=2e-3 * scale)
        assert_reads_the_same(cache, ours, width)


def test_workers_take_their_cpus_unless_a_device_is_named() -> None:
    """The client's machine may have another device than the workers'."""
    assert device_of_fit("auto", client=object()) is None
    assert device_of_fit("cpu", client=object()) is None
    assert device_of_fit("cuda:1", client=object()) == torch.device("cuda:1")
    assert device_of_fit("cpu") is None

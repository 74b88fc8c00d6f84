"""Vocabulary probes on a device: the numbers of the CPU, checkpoints that change devices."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residua.cache.errors import ModelError
from residua.cache.head import row_buffers
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.training.top_tokens import find_top_tokens
from residua.probes.vocabulary import descent as descent_module
from residua.probes.vocabulary.vocab_probe import VocabProbe

from ...support.pretended_device import DEVICE, pretended_device
from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB = 8, 30
TOLERANCE = 2e-3
"""Largest difference of a parameter after some 24 steps, as a share of the largest one: products
add up in another order, and AdamW divides by the square roots of small gradients' squares.

Not after some 200 steps of `kl` through the head at layer 0, offset 2, where the model is met
exactly: its gradients are then rounding errors, which AdamW makes as long as any step, so that
parameters wander by 1e-4, and a bias of 0 differs by more than its size; losses stay below 1e-7."""


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits of at least 24 steps: an operation of the pretended device takes long."""
    monkeypatch.setattr(descent_module, "LEAST_STEPS", 24)


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """The model's top token two tokens on is a linear function of layer 0."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, 60).tolist()
    head = replace(random_head(WIDTH, VOCAB), norm="none")
    x, y = rng.normal(size=(2, sum(lengths), WIDTH)).astype(np.float32)
    y[2:] = x[:-2]
    ids = head.logits(y).argmax(-1)
    folder = tmp_path_factory.mktemp("echo")
    return make_cache(folder, [x, y], lengths, head, np.roll(ids, 1), dtype="bfloat16")


def assert_equal_probes(ours: VocabProbe, other: VocabProbe) -> None:
    assert ours.pairs() == other.pairs()
    for pair, fitted in other.fitted_.items():
        for name, value in fitted.parameters.items():
            mine = ours.fitted_[pair].parameters[name]
            assert mine.device.type == "cpu"
            difference = float((mine - value).abs().max())
            assert difference <= TOLERANCE * float(value.abs().max()), (pair, name, difference)
        for key in ("train", "validation", "lr"):
            expected = fitted.row[key]
            assert ours.fitted_[pair].row[key] == (
                None if expected is None else pytest.approx(expected, rel=TOLERANCE, abs=1e-5)
            )


@pytest.mark.parametrize(
    ("options", "float64"),
    [
        ({}, True),
        ({"loss": "text", "rank": 5}, False),
        ({"loss": "kl", "form": "head", "lr": 0.02, "layers": [0, 1]}, True),
    ],
)
def test_a_fit_equals_that_of_the_cpu(
    echo: ActivationCache, options: dict[str, Any], float64: bool
) -> None:
    def new_probe() -> VocabProbe:
        defaults = {"layers": [0], "lr": 0.05}
        return VocabProbe(
            (0, 2), epochs=2, batch=128, products="float32", **{**defaults, **options}
        )

    expected = new_probe().fit(echo, device="cpu")
    with pretended_device(float64=float64) as device:
        ours = new_probe().fit(echo, device="meta")
    assert any(name.startswith(("addmm", "mm")) for name in device.operations)
    assert_equal_probes(ours, expected)
    rows = echo.residual_array(0)[:9]
    assert ours.predict(rows, 0, 2).tolist() == expected.predict(rows, 0, 2).tolist()
    assert ours.score(echo, layer=0, offset=2) == pytest.approx(
        expected.score(echo, layer=0, offset=2), abs=0.01
    )


def test_the_sweep_of_learning_rates_runs_on_the_device(echo: ActivationCache) -> None:
    options: dict[str, Any] = {"epochs": 1, "batch": 128, "products": "float32"}
    expected = VocabProbe(2, [0], **options).fit(echo, device="cpu")
    with pretended_device():
        ours = VocabProbe(2, [0], **options).fit(echo, device="meta")
    for row, other in zip(ours.sweep_, expected.sweep_, strict=True):
        assert row["lr"] == other["lr"]
        assert row["validation"] == pytest.approx(other["validation"], rel=TOLERANCE)
    assert_equal_probes(ours, expected)


@pytest.mark.parametrize("first", ["cpu", "meta"])
def test_a_checkpoint_of_one_device_goes_on_on_another(
    echo: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    def new_probe() -> VocabProbe:
        return VocabProbe(2, [0], lr=0.05, epochs=2, batch=128, products="float32")

    expected = new_probe().fit(echo, device="cpu")
    save = descent_module.Descent._save
    steps: list[int] = []

    def save_and_die(self: Any, trainers: Any, step: int) -> None:
        save(self, trainers, step)
        steps.append(step)
        if step > 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(descent_module.Descent, "_save", save_and_die)
    second = "meta" if first == "cpu" else "cpu"
    with pretended_device():
        with pytest.raises(KeyboardInterrupt):
            new_probe().fit(echo, checkpoint=tmp_path / "c", checkpoint_seconds=0, device=first)
        monkeypatch.setattr(descent_module.Descent, "_save", save)
        ours = new_probe().fit(echo, checkpoint=tmp_path / "c", device=second)
    assert steps[-1] == 11
    assert_equal_probes(ours, expected)


def test_rows_are_fitted_on_the_device_and_passes_may_change_it() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(600, WIDTH)).astype(np.float32)
    y = (x @ rng.normal(size=(WIDTH, 4))).argmax(1)
    options: dict[str, Any] = {"lr": 0.05, "epochs": 4, "batch": 64, "products": "float32"}
    expected, ours = VocabProbe(**options).fit(x, y, device="cpu"), VocabProbe(**options)
    with pretended_device():
        ours.fit(x, y, device="meta")
    assert_equal_probes(ours, expected)

    expected, ours = VocabProbe(**options), VocabProbe(**options)
    for device in ("cpu", "meta", "cpu"):
        expected.partial_fit(x, y, np.arange(4), device="cpu")
        with pretended_device():
            ours.partial_fit(x, y, np.arange(4), device=device)
            _ = copy.deepcopy(ours.metrics())
    assert_equal_probes(ours, expected)


def test_top_tokens_of_a_device_are_those_of_the_cpu(echo: ActivationCache) -> None:
    sequences = echo.sequences("train")
    with pretended_device() as device:
        ours = find_top_tokens(echo, sequences, device=DEVICE)
    assert any(name.startswith("argmax") for name in device.operations)
    np.testing.assert_array_equal(ours, find_top_tokens(echo, sequences))


def test_memory_that_runs_out_halves_the_tiles(echo: ActivationCache) -> None:
    """The logits of 128 rows do not fit, those of 64 do."""
    # Memory of earlier fits would be used again.
    row_buffers.free_reused_rows()
    options: dict[str, Any] = {"lr": 0.05, "epochs": 1, "batch": 128, "products": "float32"}
    expected = VocabProbe(2, [0], loss="text", **options).fit(echo, device="cpu")
    with pretended_device(largest=4 * VOCAB * 100) as device:
        ours = VocabProbe(2, [0], loss="text", **options).fit(echo, device="meta")
    assert device.refused
    assert_equal_probes(ours, expected)


def test_a_device_that_is_not_here_is_one_message(echo: ActivationCache) -> None:
    with pytest.raises(ModelError, match="device 'meta' cannot be used"):
        VocabProbe(lr=0.1).fit(echo, device="meta")
    assert torch.device("meta") == DEVICE

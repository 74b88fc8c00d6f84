"""A fit whose validation gets worse gives the best weights that it had, not its last ones."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import residua
from residua.cache.head.head import TorchHead
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.lens import translator_fit
from residua.probes.lens.natural_gradient import InputWhitening, NaturalGradientMap
from residua.probes.lens.translator_fit import TranslatorState
from residua.probes.lens.tuned_lens import TunedLens
from residua.probes.vocabulary.vocab_probe import VocabProbe

from ...support.defined import not_none
from ...support.synthetic import make_cache, random_head
from ..training.test_checkpoint import Killed, kill_after_measurements

WIDTH, VOCAB = 10, 24
FORMS: dict[str, dict[str, Any]] = {
    "full": {"lr": 0.02},
    "low rank": {"rank": 4, "lr": 0.05},
    "head": {"form": "head", "lr": 0.15},
}


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """A cache of so few rows, with random tokens, that every fit overfits."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 30, 60).tolist()
    layers = [rng.normal(size=(sum(lengths), WIDTH)).astype("f4") for _ in range(2)]
    layers[1] += 0.5 * layers[0]
    return make_cache(tmp_path_factory.mktemp("rows"), layers, lengths, random_head(WIDTH, VOCAB))


def evaluation_row(cache: ActivationCache, probe: Any) -> Any:
    """The row of evaluation of a probe of layer 0, on the validation split."""
    evaluation = residua.evaluate(cache, [probe], split="validation", offsets=(0,))
    return evaluation.select(probe.kind, 0)[0]


@pytest.mark.parametrize("name", FORMS)
def test_a_vocabulary_probe_ends_at_its_best(few_rows: ActivationCache, name: str) -> None:
    options: dict[str, Any] = {"loss": "text", "epochs": 40, "batch": 64, **FORMS[name]}
    probe = VocabProbe(0, [0], **options).fit(few_rows)
    history = [not_none(row["validation"]) for row in probe.fitted_[0, 0].history]
    best = min(history)
    assert history[-1] > best + 1e-3
    assert history.index(best) < len(history) - 1
    (row,) = probe.metrics()
    assert row["validation"] == best
    assert row["steps"] == probe.fitted_[0, 0].history[history.index(best)]["step"]
    assert evaluation_row(few_rows, probe).nll_text == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("measurements", [2, 3])
def test_a_vocabulary_probe_that_is_resumed_ends_at_its_best(
    few_rows: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measurements: int
) -> None:
    options: dict[str, Any] = {"loss": "text", "epochs": 40, "batch": 64, **FORMS["low rank"]}
    whole = VocabProbe(0, [0], **options).fit(few_rows)
    probe, folder = VocabProbe(0, [0], **options), tmp_path / "fit"
    with monkeypatch.context() as patch:
        kill_after_measurements(measurements, patch)
        with pytest.raises(Killed):
            probe.fit(few_rows, checkpoint=folder, checkpoint_seconds=0)
    probe.fit(few_rows, checkpoint=folder, checkpoint_seconds=0)
    assert probe.fitted_[0, 0].history == whole.fitted_[0, 0].history
    best = min(not_none(row["validation"]) for row in whole.fitted_[0, 0].history)
    assert evaluation_row(few_rows, probe).nll_text == pytest.approx(best, abs=1e-5)


def test_a_lens_ends_at_its_best(
    few_rows: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The KL that is measured rises after step 100, not by so much that the translator goes back.
    measure = translator_fit.LensFitRun.validation_kl

    def rising_kl(run: translator_fit.LensFitRun, translate: Any) -> dict[Any, float]:
        factor = 1 + 1e-4 * max(0, run.step - 100)
        return {pair: factor * kl for pair, kl in measure(run, translate).items()}

    monkeypatch.setattr(translator_fit.LensFitRun, "validation_kl", rising_kl)
    lens = TunedLens(layers=[0], lr=0.2, steps=200, batch=128).fit(few_rows)
    (row,) = lens.metrics()
    assert 0 < row["steps"] <= 100 < row["taken"] <= 200
    assert row["backs"] == 0
    assert row["kl"] < 0.9 * min(row["kl_logit"], row["kl_ridge"])
    assert evaluation_row(few_rows, lens).kl == pytest.approx(row["kl"], rel=1e-5)


def test_a_lens_whose_steps_are_all_too_long_is_its_start(few_rows: ActivationCache) -> None:
    lens = TunedLens(layers=[0], lr=50.0, steps=20, batch=128).fit(few_rows)
    (row,) = lens.metrics()
    assert row["sweep"][0][1] > 1.1 * row["kl"]
    assert (row["steps"], row["backs"]) == (0, 1)
    assert row["kl"] == min(row["kl_logit"], row["kl_ridge"])
    assert evaluation_row(few_rows, lens).kl == pytest.approx(row["kl"], rel=1e-5)


def fisher_eigenvalues(
    head: TorchHead, x: torch.Tensor, state: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Mean of z^2 (g outputs)^2 over rows and over all tokens that the lens may say, by autograd.

    `z` are whitened inputs (and a one), `g` the gradient of -log q[token] in the translated rows.
    """
    z = (x - state["inputs.mean"]) @ state["inputs.whiten"]
    u = (z @ state["fit.weight"] + state["fit.bias"]).requires_grad_()
    log_q = head(u).log_softmax(-1)
    ones = torch.cat([z, torch.ones(len(z), 1)], 1).square()
    total = torch.zeros_like(state["fit.curvature"])
    for token in range(VOCAB):
        (slope,) = torch.autograd.grad(-log_q[:, token].sum(), u, retain_graph=True)
        weight = log_q[:, token].exp().detach()[:, None]
        total += ones.T @ (weight * (slope @ state["fit.outputs"]).square()) / len(x)
    return total


def test_the_curvature_of_a_lens_follows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lens that starts flat and ends sharp: eigenvalues of the start would be far off."""
    monkeypatch.setattr(translator_fit, "LEAST_GAIN", -1.0)  # takes all steps
    rng = np.random.default_rng(1)
    last = rng.normal(size=(6000, WIDTH)) * 3
    first = np.tanh(last) @ rng.normal(size=(WIDTH, WIDTH))
    head = random_head(WIDTH, VOCAB)
    layers = [first.astype("f4"), last.astype("f4")]
    cache = make_cache(tmp_path / "caches", layers, [50] * 120, head)
    states: dict[int, dict[str, torch.Tensor]] = {}

    def copy_state(stage: str, done: int, total: int) -> None:
        for file in (tmp_path / "fit").rglob("0*.safetensors"):
            tensors = load_file(shutil.copy(file, tmp_path / "copy"))
            states[int(file.stem)] = {
                k.removeprefix("0.0."): tensor.clone() for k, tensor in tensors.items()
            }

    lens = TunedLens(layers=[0], lr=0.15, steps=400, batch=256)
    lens.fit(cache, checkpoint=tmp_path / "fit", progress=copy_state)
    x = torch.from_numpy(cache.residual_array(0)[:])
    assert {10, 375} <= set(states)
    expected = fisher_eigenvalues(cache.head.torch(), x, states[375])
    at_the_start, now = (
        float((states[step]["fit.curvature"] - expected).norm() / expected.norm())
        for step in (10, 375)
    )
    assert now < 0.1
    assert at_the_start > 2 * now


def test_a_lens_whose_kl_has_stopped_falling_takes_no_more_steps(few_rows: ActivationCache) -> None:
    ends = []

    def count(stage: str, done: int, total: int) -> None:
        ends.append((done, total))

    lens = TunedLens(layers=[0], lr=0.2, steps=5000, batch=128).fit(few_rows, progress=count)
    (row,) = lens.metrics()
    assert 0 < row["steps"] <= row["taken"] < 1000
    assert row["taken"] % translator_fit.CHECK == 0
    # Progress ends at the total all the same.
    assert ends[-1] == (5000, 5000)
    assert evaluation_row(few_rows, lens).kl == pytest.approx(row["kl"], rel=1e-5)


def test_the_rate_falls_to_zero_at_a_check_or_at_the_last_step() -> None:
    inputs = InputWhitening(torch.zeros(2), torch.eye(2), torch.eye(2))
    translator = TranslatorState(NaturalGradientMap(inputs, 0.1), alpha=1.0, n=1, rate=2.0)

    def rates(*steps: int) -> list[float]:
        return [translator.rate_at(step, 300) for step in steps]

    expected = [2.0, 2.0, 1.0, 0.0]
    assert rates(0, 100, 200, 300) == expected
    # It does not rise where the KL stops falling late.
    translator.falls_from = 250
    assert rates(0, 100, 200, 300) == expected
    translator.falls_from = 50
    assert rates(0, 50, 100, 150, 300) == [2.0, 2.0, 1.0, 0.0, 0.0]


def test_a_translator_stops_by_itself(tmp_path: Path) -> None:
    """Beside a translator that stopped, another one is that of a fit of its own."""
    rng = np.random.default_rng(1)
    last = rng.normal(size=(6000, WIDTH)) * 3
    curved = np.tanh(last) @ rng.normal(size=(WIDTH, WIDTH))
    layers = [rng.normal(size=last.shape), curved, last]
    cache = make_cache(
        tmp_path, [layer.astype("f4") for layer in layers], [50] * 120, random_head(WIDTH, VOCAB)
    )
    options: dict[str, Any] = {"lr": 0.15, "steps": 1000, "batch": 256}
    both = TunedLens(layers=[0, 1], **options).fit(cache)
    taken = [row["taken"] for row in both.metrics()]
    assert taken[0] != taken[1]
    longer = int(np.argmax(taken))
    alone = TunedLens(layers=[longer], **options).fit(cache)
    assert alone.metrics()[0]["taken"] == taken[longer]
    np.testing.assert_allclose(alone.map(longer).weight, both.map(longer).weight, atol=1e-4)

"""VocabProbe: finds what is planted, equals plain torch, keeps scikit-learn's contract."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.nn import functional as F

import residua.probes.vocabulary.parametrizations as parametrizations
from residua import VocabProbe, evaluate, load_probe, save_probe
from residua.analysis.report.html_report import write_report
from residua.cache.errors import MismatchError, NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.readout import ReadoutBatch
from residua.probes.saved.save import check_geometry
from residua.probes.training.softmax_loss import PRODUCTS, Target, fast_products
from residua.probes.vocabulary.descent import EVALUATIONS
from residua.probes.vocabulary.learning_rate_sweep import distance, representatives
from residua.probes.vocabulary.parametrizations import (
    FullMatrix,
    LowRank,
    PrincipalAxes,
    ThroughHead,
    apply_parametrization,
    default_rank,
)

from ...support.defined import not_none
from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB = 8, 12
EXPECTED_FAILURES: dict[str, str] = {}
"""Checks of scikit-learn's that the probe does not pass, and why."""


@parametrize_with_checks(
    [VocabProbe(seed=1)], expected_failed_checks=lambda probe: EXPECTED_FAILURES
)
@pytest.mark.filterwarnings("default")
def test_scikit_learn_contract(estimator: VocabProbe, check: Any) -> None:
    check(estimator)


def planted(folder: Path, dtype: str = "float32", seed: int = 0) -> ActivationCache:
    """The model's top token two tokens on is a linear function of layer 0; others are not."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 60, 160).tolist()
    positions = sum(lengths)
    head = replace(random_head(WIDTH, VOCAB), norm="none")
    x, y = rng.normal(size=(2, positions, WIDTH)).astype(np.float32)
    y[2:] = x[:-2]
    ids = head.logits(y).argmax(-1)
    return make_cache(folder, [x, rng.normal(size=x.shape), y], lengths, head, np.roll(ids, 1),
                      dtype=dtype)  # fmt: skip


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return planted(tmp_path_factory.mktemp("echo"))


@pytest.mark.parametrize(
    "options",
    [{}, {"loss": "text"}, {"loss": "kl"}, {"form": "head", "lr": 0.02}, {"rank": WIDTH - 1}],
)
def test_it_finds_what_is_planted_and_nothing_else(
    echo: ActivationCache, options: dict[str, Any]
) -> None:
    probe = VocabProbe((1, 2), [0, 1], epochs=12, batch=256, **{"lr": 0.1, **options}).fit(echo)
    assert probe.pairs() == [(0, 1), (0, 2), (1, 1), (1, 2)]
    scores = {pair: probe.score(echo, layer=pair[0], offset=pair[1]) for pair in probe.pairs()}
    assert scores[0, 2] > 0.85
    assert max(score for pair, score in scores.items() if pair != (0, 2)) < 0.4
    best = min(probe.metrics(), key=lambda row: not_none(row["validation"]))
    assert (best["layer"], best["offset"]) == (0, 2)


def train_pairs(cache: ActivationCache, layer: int, offset: int) -> tuple[Any, Any]:
    """States and the model's tokens by a plain loop over the train split."""
    found = []
    for number in cache.sequences("train"):
        start, length = int(cache.sequence_start[number]), int(cache.sequence_length[number])
        found += [(t, t + offset) for t in range(start, start + length - offset)]
    rows = np.array(found)
    tokens = cache.head.logits(cache.residual_array(cache.n_blocks)[:]).argmax(-1)
    return cache.residual_array(layer)[:][rows[:, 0]], tokens[rows[:, 1]]


def test_it_reaches_the_minimum_of_the_same_loss(echo: ActivationCache) -> None:
    """Against L-BFGS on all rows in memory: multinomial regression has one minimum."""
    x, y = (torch.from_numpy(v) for v in train_pairs(echo, 0, 1))
    weight = torch.zeros(VOCAB, WIDTH, requires_grad=True)
    bias = torch.zeros(VOCAB, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y)
        loss.backward()
        return loss

    solver.step(closure)  # pyright: ignore[reportArgumentType]
    least = closure().item()
    probe = VocabProbe(1, [0], epochs=25, batch=512, lr=0.01).fit(echo)
    ours = float(F.cross_entropy(apply_parametrization(probe.map(), x), y))
    assert least <= ours <= least + 2e-3


def same(one: VocabProbe, other: VocabProbe) -> bool:
    return one.metrics() == other.metrics() and all(
        torch.equal(value, other.fitted_[pair].parameters[name])
        for pair, fitted in one.fitted_.items()
        for name, value in fitted.parameters.items()
    )


def test_pairs_together_equal_each_alone(echo: ActivationCache) -> None:
    options: dict[str, Any] = {"epochs": 2, "batch": 256, "lr": 0.01}
    together = VocabProbe((0, 2), [0, 1], **options).fit(echo)
    passes = VocabProbe((0, 2), [0, 1], **options).fit(echo, memory=1)
    assert same(together, passes)
    alone = VocabProbe(2, [1], **options).fit(echo)
    for name, value in alone.map().items():
        assert torch.equal(value, together.map(1, 2)[name])


def test_the_number_of_threads_changes_nothing(
    echo: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"epochs": 1, "batch": 256, "lr": 0.1}
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(VocabProbe((0, 2), [0, 1], **options).fit(echo))
    assert same(*found)


def test_the_sweep_is_reported_and_used(echo: ActivationCache) -> None:
    probe = VocabProbe(0, [0, 1, 2], epochs=1, batch=256).fit(echo)
    tried = {row["layer"] for row in probe.sweep_}
    assert tried == {0, 1, 2}
    shares = []
    for layer in tried:
        rows = [row for row in probe.sweep_ if row["layer"] == layer]
        assert len(rows) >= 3
        best = min(rows, key=lambda row: not_none(row["validation"]))["lr"]
        shares.append(next(r["lr"] for r in probe.metrics() if r["layer"] == layer) / best)
    assert shares == pytest.approx([shares[0]] * 3)
    assert 0 < shares[0] < 1


def test_rates_are_tried_on_a_few_pairs_and_taken_by_the_nearest() -> None:
    pairs = [(layer, offset) for layer in range(7) for offset in range(4)]
    some = representatives(pairs)
    assert some == [(0, 0), (3, 0), (6, 0), (0, 2), (3, 2), (6, 2)]
    nearest = {pair: min(some, key=lambda other: distance(pair, other)) for pair in pairs}
    assert nearest[1, 0] == (0, 0)
    assert nearest[5, 3] == (6, 2)
    assert representatives([(4, 1)]) == [(4, 1)]
    assert representatives([(2, 0), (1, 3)]) == [(2, 0), (1, 3)]


def test_a_fit_stops_when_it_learns_by_heart_and_keeps_the_best(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(400, WIDTH)) for _ in range(2)]
    tiny = make_cache(tmp_path, layers, [10] * 40, random_head(WIDTH, VOCAB))
    probe = VocabProbe(1, [0], epochs=200, lr=0.3).fit(tiny)
    history, row = probe.fitted_[0, 1].history, probe.metrics()[0]
    losses = [not_none(line["validation"]) for line in history]
    assert len(history) < EVALUATIONS
    assert losses[-1] > min(losses) == row["validation"]
    assert row["steps"] == history[int(np.argmin(losses))]["step"]
    assert probe.score(tiny, split="train") > probe.score(tiny, split="validation")


def test_products_in_bfloat16_change_little(echo: ActivationCache) -> None:
    def held_out(products: str) -> float:
        probe = VocabProbe(2, [0], epochs=5, batch=256, lr=0.02, products=products)
        return probe.fit(echo).metrics()[0]["validation"]

    exact = held_out("float32")
    assert held_out("bfloat16") == pytest.approx(exact, rel=1e-3)
    assert held_out("auto") == held_out(fast_products())
    assert fast_products() in PRODUCTS


def axes() -> PrincipalAxes:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return PrincipalAxes.of(torch.arange(WIDTH, dtype=torch.float64), root @ root.T, power=0.5)


@pytest.mark.parametrize("number", range(3))
def test_folding_gives_the_same_losses_on_raw_states(number: int) -> None:
    head, turned = random_head(WIDTH, VOCAB).torch(), axes()
    form = (FullMatrix(VOCAB, WIDTH), LowRank(VOCAB, WIDTH, 3), ThroughHead(head, WIDTH, 2.5))[
        number
    ]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, WIDTH, generator=generator) * 3 + 1
    token = torch.randint(VOCAB, (40,), generator=generator)
    target = Target(token=token)
    parameters = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in form.start(turned, torch.zeros(VOCAB)).items()
    }
    losses = form.losses(parameters, turned(x), target, None)
    folded = form.folded(parameters, turned)
    found = apply_parametrization(folded, x)
    logits = head(found) if number == 2 else found
    torch.testing.assert_close(
        F.cross_entropy(logits, token, reduction="none"), losses, rtol=1e-4, atol=1e-4
    )
    for name, value in form.unfolded(folded, turned).items():
        torch.testing.assert_close(value, parameters[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("number", range(3))
def test_forms_have_the_gradients_of_autograd(number: int) -> None:
    head = random_head(WIDTH, VOCAB).torch()
    form = (FullMatrix(VOCAB, WIDTH), LowRank(VOCAB, WIDTH, 3), ThroughHead(head, WIDTH, 2.5))[
        number
    ]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, WIDTH, generator=generator)
    token = torch.randint(VOCAB, (40,), generator=generator)
    parameters = {
        name: (value + 0.3 * torch.randn(value.shape, generator=generator)).requires_grad_()
        for name, value in form.start(axes(), torch.zeros(VOCAB)).items()
    }
    size = 2.5 if number == 2 else 1.0
    found = size * apply_parametrization(parameters, x)
    plain = F.cross_entropy(head(found) if number == 2 else found, token)
    expected = torch.autograd.grad(plain, list(parameters.values()))
    detached = {name: value.detach() for name, value in parameters.items()}
    grads = {name: torch.zeros_like(value) for name, value in detached.items()}
    losses = form.losses(detached, x, Target(token=token), grads)
    torch.testing.assert_close(losses.mean(), plain.detach(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(grads.values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def blobs(rows: int = 600) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(4, 5))
    y = rng.integers(4, size=rows)
    return centres[y] + rng.normal(size=(rows, 5)), np.array(["a", "b", "c", "d"])[y]


@pytest.mark.parametrize("chunks", [None, 37, 250])
def test_arrays_of_numpy_and_dask(chunks: int | None) -> None:
    import dask.array

    x, y = blobs()
    given: tuple[Any, Any] = (x, y)
    if chunks is not None:
        x_chunks: Any = (chunks, 2)
        given = dask.array.asarray(x).rechunk(x_chunks), dask.array.asarray(y).rechunk((100,))
    probe = VocabProbe(epochs=10, batch=64, lr=0.05).fit(*given)
    assert probe.classes_.tolist() == ["a", "b", "c", "d"]
    assert probe.score(*given) > 0.95
    lazy = probe.predict_proba(given[0]), probe.predict(given[0])
    assert all(hasattr(v, "dask") is (chunks is not None) for v in lazy)
    proba, predicted = (np.asarray(v) for v in lazy)
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(predicted, probe.classes_[proba.argmax(1)])
    np.testing.assert_allclose(np.exp(probe.predict_log_proba(given[0])), proba, rtol=1e-6)


def test_pipelines_grid_searches_and_clones() -> None:
    x, y = blobs()
    pipe = make_pipeline(StandardScaler(), VocabProbe(epochs=5, batch=64))
    search = GridSearchCV(pipe, {"vocabprobe__lr": [1e-5, 0.05]}, cv=3).fit(x, y)
    assert search.best_params_ == {"vocabprobe__lr": 0.05}
    assert search.best_score_ > 0.95
    probe = VocabProbe(range(2), rank=3, lr=0.1)
    copy: Any = clone(probe)
    assert copy.get_params() == probe.get_params()
    assert probe.set_params(rank=2).rank == 2


def test_partial_fit_learns_more_with_every_pass(echo: ActivationCache) -> None:
    x, y = blobs()
    probe = VocabProbe(batch=64, lr=0.01)
    with pytest.raises(UsageError, match="classes"):
        VocabProbe().partial_fit(x[:50], y[:50])
    scores = [probe.partial_fit(x, y, classes=["a", "b", "c", "d"]).score(x, y) for _ in range(9)]
    assert scores[-1] > 0.95
    assert scores[0] < scores[-1]
    with pytest.raises(UsageError, match="classes were"):
        probe.partial_fit(x, y, classes=["a", "z"])
    streamed = VocabProbe(2, [0], batch=256)
    losses = [streamed.partial_fit(echo).metrics()[0]["train"] for _ in range(12)]
    assert losses[-1] < 0.6 * losses[0]
    assert streamed.metrics()[0]["steps"] == streamed.steps_


def test_partial_fit_goes_on_from_a_fit(echo: ActivationCache) -> None:
    probe = VocabProbe(2, [0], epochs=12, batch=256, lr=0.05).fit(echo)
    before = probe.metrics()[0]["train"]
    assert probe.partial_fit(echo).metrics()[0]["train"] < before * 1.1


def test_a_saved_probe_reads_the_same(echo: ActivationCache, tmp_path: Path) -> None:
    hidden = torch.from_numpy(echo.residual_array(0)[:20])
    batch = ReadoutBatch(hidden, torch.zeros(20, dtype=torch.int64), echo.head.torch())
    forms: list[dict[str, Any]] = [{"lr": 0.1}, {"form": "head"}, {"rank": 3, "lr": 0.1}]
    probes = [VocabProbe((0, 2), [0], epochs=1, **form).fit(echo) for form in forms]
    for number, probe in enumerate(probes):
        loaded = load_probe(save_probe(probe, tmp_path / str(number)))
        for pair in probe.pairs():
            expected = probe.logits(batch, *pair)
            torch.testing.assert_close(loaded.logits(batch, *pair), expected)
            assert expected.shape == (20, VOCAB)
        assert (loaded.metrics(), loaded.sweep_) == (probe.metrics(), probe.sweep_)
        check_geometry(loaded, echo)
    config = json.loads((tmp_path / "0" / "config.json").read_text())
    assert {"cache", "geometry", "split", "params", "residua", "pairs"} <= set(config)
    assert config["pairs"][0]["history"]
    with pytest.raises(UsageError, match="needs its head"):
        load_probe(tmp_path / "1").predict(hidden.numpy(), 0, 0)
    loaded = load_probe(tmp_path / "1")
    assert loaded.score(echo, layer=0, offset=2) == probes[1].score(echo, layer=0, offset=2)
    assert (loaded.predict(hidden.numpy(), 0, 2) == probes[1].predict(hidden.numpy(), 0, 2)).all()


def test_a_saved_probe_of_arrays_keeps_its_labels(tmp_path: Path) -> None:
    x, y = blobs()
    probe = VocabProbe(epochs=3, batch=64, lr=0.05).fit(x, y)
    loaded = load_probe(save_probe(probe, tmp_path / "probe"))
    np.testing.assert_array_equal(loaded.predict(x), probe.predict(x))
    assert loaded.geometry_ is None


def test_it_is_measured_beside_the_others(echo: ActivationCache, tmp_path: Path) -> None:
    probe = VocabProbe((0, 2), [0, 1], epochs=12, batch=256, lr=0.1).fit(echo)
    found = evaluate(echo, [probe], split="validation")
    rows = {(r.layer, r.offset): r for r in found.select("vocab", 2)}
    precision = {pair: not_none(row.precision_at_1) for pair, row in rows.items()}
    assert precision[0, 2] > 0.85 > precision[1, 2]
    assert rows[0, 2].nll == pytest.approx(probe.metrics()[1]["validation"], rel=1e-4)
    page = write_report(found, tmp_path / "report.html").read_text()
    assert "vocab" in page


def test_a_probe_of_another_geometry_is_refused(echo: ActivationCache, tmp_path: Path) -> None:
    probe = VocabProbe(0, [0], epochs=1).fit(echo)
    other = make_cache(tmp_path, [np.ones((60, WIDTH))] * 2, [20] * 3, random_head(WIDTH, VOCAB, 5))
    with pytest.raises(MismatchError, match="head"):
        check_geometry(probe, other)


def test_a_large_matrix_has_a_lower_rank_that_is_said(
    echo: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_rank(50_257, 1600) is None
    assert default_rank(128_256, 4096) == 704
    assert default_rank(1_000_000, 8192) == 64
    assert default_rank(200_000_000, 3) is None
    assert "rank" not in VocabProbe(0, [0], epochs=1, lr=0.01).fit(echo).metrics()[0]
    # A limit so low that the matrix of this cache is a large one.
    monkeypatch.setattr(parametrizations, "LARGEST_MATRIX", 2 * (VOCAB + WIDTH) + 1)
    monkeypatch.setattr(parametrizations, "RANK_STEP", 2)
    chosen = VocabProbe(0, [0], epochs=1, lr=0.01).fit(echo)
    given = VocabProbe(0, [0], epochs=1, lr=0.01, rank=2).fit(echo)
    assert chosen.metrics()[0]["rank"] == 2
    assert "rank" not in given.metrics()[0]
    for name, tensor in given.map().items():
        assert torch.equal(chosen.map()[name], tensor)
    assert "down" not in VocabProbe(0, [0], epochs=1, lr=0.01, form="full").fit(echo).map()


def test_mistakes_are_named(echo: ActivationCache) -> None:
    x, y = blobs()
    wrong: dict[str, Any]
    for wrong in (
        {"loss": "hinge"}, {"form": "deep"}, {"products": "int8"}, {"epochs": 0}, {"lr": -1.0},
        {"rank": 0}, {"batch": 0}, {"validation": 1.0},
    ):  # fmt: skip
        with pytest.raises(UsageError, match=next(iter(wrong))):
            VocabProbe(**wrong).fit(echo)
    with pytest.raises(UsageError, match="offsets"):
        VocabProbe(-1).fit(echo)
    for wrong in ({"layers": []}, {"offsets": []}):
        with pytest.raises(UsageError, match="name at least one"):
            VocabProbe(**wrong).fit(echo)
    with pytest.raises(UsageError, match="rank is for"):
        VocabProbe(form="head", rank=2).fit(echo)
    for offset, loss in ((59, "model"), (58, "text")):
        with pytest.raises(UsageError, match=f"no pair at offset {offset}"):
            VocabProbe(offset, loss=loss).fit(echo)
    with pytest.raises(NotFoundError, match="layer 9"):
        VocabProbe(layers=[9]).fit(echo)
    for wrong in ({"loss": "kl"}, {"form": "head"}):
        with pytest.raises(UsageError, match="needs a cache"):
            VocabProbe(**wrong).fit(x, y)
    with pytest.raises(NotFittedError):
        VocabProbe().predict(x)
    with pytest.raises(NotFittedError):
        VocabProbe().metrics()
    probe = VocabProbe((0, 1), [0], epochs=1).fit(echo)
    with pytest.raises(UsageError, match="name a layer"):
        probe.map()
    with pytest.raises(NotFoundError, match="no map"):
        probe.map(3)


def test_progress_reaches_its_end(echo: ActivationCache) -> None:
    seen: list[tuple[int, int]] = []
    VocabProbe(0, [0, 1], epochs=2, batch=256, lr=0.01).fit(
        echo, memory=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1]
    assert all(a[0] <= b[0] for a, b in zip(seen, seen[1:], strict=False))

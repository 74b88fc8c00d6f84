"""Claims about logits and losses that are not finite: never a hit, None in a row, null in JSON."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import residua
from residua.analysis.evaluation.comparison import rank_of
from residua.analysis.evaluation.confidence_buckets import bucket_of
from residua.analysis.evaluation.distributions import Reference
from residua.analysis.evaluation.lens_heatmap import heatmap
from residua.analysis.evaluation.metrics import (
    COLUMNS,
    KS,
    measure_distribution,
)
from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.analysis.report.html_report import write_report
from residua.analysis.report.static_figures import confidence_figure, curves, heatmap_figure
from residua.analysis.report.tables import headlines
from residua.analysis.token_texts.token_names import UNDEFINED
from residua.cache.errors import ResiduaWarning, UsageError
from residua.cache.files.json_files import plain_value
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import main
from residua.probes.base.readout import ReadoutBatch
from residua.probes.lens.logit_lens import LogitLens
from residua.probes.lens.tuned_lens import TunedLens
from residua.probes.moments.moments import Moments
from residua.probes.ridge.solver import AffineMap, fit_ridge
from residua.probes.vocabulary.descent import Trainer
from residua.probes.vocabulary.learning_rate_sweep import BAD, rows_of
from residua.probes.vocabulary.parametrizations import FullMatrix, PrincipalAxes

from ..support.synthetic import make_cache, random_head

WIDTH, VOCAB, ALLOWED = 8, 23, 20
NAN, INF = float("nan"), float("inf")
NOT_JSON = re.compile(r"[\[,:'>]\s*-?(NaN|Infinity|nan)\b")
"""A number that is none, in the data of a figure or a cell of a table."""


def cache_of(root: Path, excluded: bool = False) -> ActivationCache:
    """Two hundred positions; `excluded` gives the last tokens of the vocabulary -inf."""
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(400, WIDTH)).astype(np.float32) for _ in range(3)]
    head = random_head(WIDTH, VOCAB)
    if excluded:
        bias = head.bias.copy()
        bias[ALLOWED:] = -np.inf
        head = dataclasses.replace(head, bias=bias)
    return make_cache(root, layers, [10] * 40, head, rng.integers(0, ALLOWED, 400))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> ActivationCache:
    return cache_of(tmp_path_factory.mktemp("finite"))


@pytest.fixture(scope="module")
def padded(tmp_path_factory) -> ActivationCache:
    return cache_of(tmp_path_factory.mktemp("excluded"), excluded=True)


class Spoiled(LogitLens):
    """The logit lens whose logits are `value` for the tokens `tokens` at the rows `rows`."""

    kind = "spoiled"

    def __init__(self, value: float, rows: Any, tokens: Any = slice(None)) -> None:
        super().__init__((0, 1), (0,))
        self.value, self.rows, self.tokens = value, rows, tokens

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> torch.Tensor:
        logits = super().logits(batch, layer, offset).clone()
        if layer == 1:
            logits[self.rows, self.tokens] = self.value
        return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("own", [NAN, 0.0, INF, -INF])
@pytest.mark.parametrize("other", [NAN, 0.0, INF, -INF])
def test_ranks_put_nan_before_numbers_and_a_token_that_is_nan_last(own, other):
    logits = torch.tensor([[other, own, other, other]])
    rank = int(rank_of(logits, torch.tensor([1]))[0])
    if own != own:
        assert rank == 4
    elif other != other or other > own:
        assert rank == 3
    else:
        assert rank == (1 if other == own else 0)


@pytest.mark.parametrize(
    "spoilt", [[NAN] * 6, [NAN, 0, 0, 0, 0, 0], [0, 0, INF, 0, 0, 0], [-INF] * 6]
)
def test_a_position_that_is_no_distribution_has_no_measure(spoilt):
    fine = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    bad = fine.clone()
    bad[1] = torch.tensor(spoilt)
    text = torch.tensor([1, 2, -1])
    of_text = [i for i, name in enumerate(COLUMNS) if name.endswith("_text")]
    of_text = [i for i in of_text if COLUMNS[i] != "n_text"]
    of_model = range(COLUMNS.index("kl"), COLUMNS.index("n_text"))
    whole = measure_distribution(Reference.of(fine, text), fine)
    probe = measure_distribution(Reference.of(fine, text), bad)
    model = measure_distribution(Reference.of(bad, text), fine)
    for found in (probe, model):
        assert found[:, COLUMNS.index("n")].tolist() == [1, 1, 1]
        assert found[:, COLUMNS.index("n_undefined")].tolist() == [0, 1, 0]
        assert found[1, list(of_model)].isnan().all()
        torch.testing.assert_close(found[[0, 2]], whole[[0, 2]])
    # What the probe says of the text needs no model.
    assert probe[1, of_text].isnan().all()
    torch.testing.assert_close(model[1, of_text], whole[1, of_text])


def test_tokens_that_are_excluded_leave_finite_measures():
    rng = np.random.default_rng(0)
    model, probe = rng.normal(size=(2, 40, VOCAB)).astype(np.float32)
    model[:, ALLOWED:] = probe[:, ALLOWED:] = -np.inf
    text = rng.integers(0, ALLOWED, 40)
    found = measure_distribution(
        Reference.of(torch.from_numpy(model), torch.from_numpy(text)), torch.from_numpy(probe)
    ).numpy()
    log_p, log_q = (log_softmax(logits[:, :ALLOWED]) for logits in (model, probe))
    rows, top = np.arange(40), model.argmax(-1)
    expected = {
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1),
        "kl_reverse": (np.exp(log_q) * (log_q - log_p)).sum(-1),
        "nll": -log_q[rows, top],
        "surprisal": -log_p[rows, probe.argmax(-1)],
        "nll_text": -log_q[rows, text],
        **{f"precision_at_{k}": [t in np.argsort(-q, kind="stable")[:k] for t, q in
                                 zip(top, probe, strict=True)] for k in KS},
    }  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_allclose(found[:, COLUMNS.index(name)], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [NAN, INF])
def test_one_undefined_position_makes_a_row_undefined_and_only_that(cache, value):
    with pytest.warns(ResiduaWarning, match=r"spoiled layer 1 N = 0 \(1 of \d+ pairs\)") as caught:
        found = evaluate(cache, Spoiled(value, 3, 5), split="train")
    assert len(caught) == 1
    assert any("spoiled layer 1" in note for note in found.notes)
    spoiled = found.select("spoiled", 0)
    plain_lens = {row.layer: row for row in found.select("logit", 0)}
    bad = spoiled[1]
    assert (bad.n, bad.n_undefined) == (plain_lens[1].n, 1)
    for name in ("kl", "kl_low", "precision_at_1", "precision_at_10", "precision_at_1_low", "nll",
                 "surprisal", "kl_reverse", "nll_text", "precision_at_1_text"):  # fmt: skip
        assert getattr(bad, name) is None, name
        assert getattr(spoiled[0], name) == getattr(plain_lens[0], name) is not None
    # The pair lies in one bucket; the others have their numbers.
    parts = [row for row in found.select_buckets("spoiled", 0) if row.layer == 1]
    assert sum(row.n_undefined for row in parts) == 1
    assert sum(row.kl is None for row in parts) == 1
    assert len(parts) > 1


def test_a_model_without_a_distribution_is_in_no_bucket():
    assert bucket_of(np.array([0.1, NAN, 0.95], np.float32)).tolist() == [0, 4, 3]


def test_pictures_and_reports_leave_undefined_numbers_out(cache, tmp_path):
    with pytest.warns(ResiduaWarning, match="leave measures undefined"):
        found = evaluate(cache, Spoiled(NAN, slice(None)), split="train")
    assert "the spoiled undefined (N = 0)" in headlines(found)[0]
    for figure in (curves(found, "kl"), curves(found, "precision_at_1"), confidence_figure(found)):
        figure.canvas.draw()
    page = write_report(found, tmp_path / "report.html").read_text()
    body = page[page.index("<main>") :]
    assert "spoiled layer 1" in body
    assert not NOT_JSON.search(body)


def test_a_cell_that_is_undefined_names_no_token(cache):
    readout = Spoiled(NAN, slice(2, 3), slice(4, 5))
    found = heatmap(cache, readout, split="all", sequence=0)
    assert found.layers == (0, 1)
    assert set(found.top[1][2]) == {UNDEFINED}
    assert UNDEFINED not in {*found.top[1][1], *found.top[0][2]}
    for values in (found.probability[..., 0], found.entropy, found.kl):
        assert np.isnan(values[1, 2])
        assert np.isnan(values).sum() == 1
    heatmap_figure(found).canvas.draw()


def refuse(word: str) -> Any:
    raise ValueError(f"not JSON: {word}")


def test_infinite_measures_are_null_and_the_others_right(padded):
    found = evaluate(padded, residua.Unigram((0,)).fit(padded), offsets=0)
    row = found.select("unigram", 0)[0]
    # The unigram gives mass to what the model excludes.
    assert row.kl_reverse == INF
    assert row.kl is not None
    assert 0 < row.kl < 10
    text = json.dumps([*found.to_dicts(), *found.bucket_dicts()], allow_nan=False)
    read = json.loads(text, parse_constant=refuse)
    mine = next(r for r in read if r["probe"] == "unigram")
    assert mine["kl_reverse"] is None
    assert mine["kl"] == row.kl


def test_json_of_the_command_line_is_json(padded, tmp_path):
    probe = residua.Unigram((0,)).fit(padded)
    folder = residua.save_probe(probe, tmp_path / "probe")
    call = ["evaluate", str(padded.path), str(folder), "--json", "--html", str(tmp_path / "r.html")]
    result = CliRunner().invoke(main, call)
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout, parse_constant=refuse)
    assert {r["kl_reverse"] is None for r in value["rows"] if r["probe"] == "unigram"} == {True}
    page = (tmp_path / "r.html").read_text()
    assert not NOT_JSON.search(page[page.index("<main>") :])


def test_a_ridge_without_folds_says_null(cache, tmp_path):
    ridge = ["fit", "ridge", str(cache.path), "--alpha", "1", "--folds", "1", "--json"]
    result = CliRunner().invoke(main, [*ridge, "--root", str(tmp_path), "--no-keep-moments"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout, parse_constant=refuse)["metrics"]
    assert {(row["r2"], row["mse"]) for row in rows} == {(None, None)}


def test_plain_is_json_whatever_it_is_given():
    value = {
        "a": np.float32(NAN), np.int64(3): (np.int64(1), INF), "b": np.array([[1.5, -INF]]),
        "c": [np.bool_(True), None, "NaN"], "d": range(2), "e": Path("x"),
    }  # fmt: skip
    found = {"a": None, 3: [1, None], "b": [[1.5, None]], "c": [True, None, "NaN"], "d": [0, 1],
             "e": "x"}  # fmt: skip
    assert plain_value(value) == found


@pytest.mark.parametrize("value", [NAN, INF])
def test_lenses_that_hold_no_finite_number_are_refused_by_name(cache, tmp_path, value):
    tensors = {}
    for layer in range(cache.n_blocks):
        tensors |= {
            f"{layer}.weight": torch.zeros(WIDTH, WIDTH),
            f"{layer}.bias": torch.zeros(WIDTH),
        }
    tensors["1.weight"][2, 3] = value
    torch.save(tensors, tmp_path / "params.pt")
    config = {"d_model": WIDTH, "num_hidden_layers": cache.n_blocks, "bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UsageError, match=r"tensor 1\.weight holds 1 values of 64 that are not fini"
    ):
        residua.read_tuned_lens(tmp_path, cache)
    bad = AffineMap(np.eye(WIDTH), np.full(WIDTH, value))
    with pytest.raises(UsageError, match=r"tensor 1\.0\.bias"):
        TunedLens.of({(1, 0): bad})


def fit_kind(kind: str, cache: ActivationCache) -> Any:
    if kind == "ridge":
        return residua.RidgeProbe(layers=[1], alpha=1.0, folds=1).fit(cache, keep=False)
    if kind == "lens":
        return TunedLens(layers=[1], steps=0).fit(cache)
    if kind == "control":
        probe = residua.RidgeProbe(layers=[1], alpha=1.0, folds=1)
        return residua.ControlProbe(probe).fit(cache)
    return residua.VocabProbe(layers=[1], epochs=1, batch=64, lr=0.01).fit(cache)


@pytest.mark.parametrize("kind", ["ridge", "lens", "vocab", "control"])
def test_probes_that_hold_no_finite_number_are_neither_saved_loaded_nor_evaluated(
    cache, tmp_path, kind, monkeypatch
):
    probe = fit_kind(kind, cache)
    inner = getattr(probe, "probe_", probe)
    weight: Any = inner.map(1, 0)
    weight = weight["weight"].numpy() if isinstance(weight, dict) else weight.weight
    residua.save_probe(probe, tmp_path / "fine")
    residua.load_probe(tmp_path / "fine")
    weight[0, 0] = NAN
    with pytest.raises(UsageError, match=r"tensor 1\.0\.weight holds 1 values"):
        residua.save_probe(probe, tmp_path / "bad")
    with pytest.raises(UsageError, match=r"tensor 1\.0\.weight holds 1 values"):
        evaluate(cache, probe)
    with pytest.raises(UsageError, match=r"tensor 1\.0\.weight holds 1 values"):
        heatmap(cache, probe, split="all")
    with monkeypatch.context() as patch:  # as an older version wrote it
        patch.setattr("residua.probes.saved.save.check_finite", lambda *_: None)
        residua.save_probe(probe, tmp_path / "old")
    with pytest.raises(UsageError, match=r"tensor 1\.0\.weight holds 1 values"):
        residua.load_probe(tmp_path / "old")
    result = CliRunner().invoke(
        main, ["evaluate", str(cache.path), str(tmp_path / "old"), "--json"]
    )
    assert result.exit_code == 2
    assert "1.0.weight" in json.loads(result.stdout)["message"]


def test_penalties_without_a_finite_error_are_not_chosen(monkeypatch):
    rng = np.random.default_rng(0)
    folds = [Moments.of(rng.normal(size=(30, 3)), rng.normal(size=(30, 2))) for _ in range(3)]
    monkeypatch.setattr(
        "residua.probes.ridge.solver.cross_validate", lambda *_: (np.array([NAN, 2.0, 1.0]), 90)
    )
    assert fit_ridge(folds, None, [1.0, 2.0, 3.0], "here").alpha == 3.0
    monkeypatch.setattr(
        "residua.probes.ridge.solver.cross_validate", lambda *_: (np.full(3, NAN), 90)
    )
    with pytest.raises(UsageError, match="no penalty gives a finite error"):
        fit_ridge(folds, None, [1.0, 2.0, 3.0], "here")


def test_losses_that_are_not_finite_never_are_the_best_and_can_be_kept():
    axes = PrincipalAxes.of(torch.zeros(2).double(), torch.eye(2).double())
    trainer = Trainer(FullMatrix(3, 2), axes, {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)})
    trainer.record_losses(1, 1.5)
    trainer.loss_sum, trainer.loss_rows = INF, 1
    trainer.parameters["bias"].fill_(NAN)
    trainer.record_losses(2, NAN)
    assert trainer.history[-1] == {"step": 2, "train": None, "validation": None}
    assert trainer.outcome().last == {"step": 1, "train": 0.0, "validation": 1.5}
    assert trainer.outcome().parameters["bias"].isfinite().all()
    trainer.loss_sum = NAN
    numbers, tensors = trainer.state()
    numbers = json.loads(json.dumps(numbers, allow_nan=False))
    other = Trainer(FullMatrix(3, 2), axes, {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)})
    other.restore(numbers, tensors)
    assert (other.best_loss, other.worse, other.history) == (1.5, 1, trainer.history)
    assert np.isnan(other.loss_sum)


def test_a_sweep_says_null_for_a_loss_that_is_not_finite():
    rows = rows_of({(1, 0): {0.1: BAD, 0.2: 3.0}})
    assert [row["validation"] for row in rows] == [None, 3.0]


def test_a_fit_that_diverged_says_so(cache):
    with pytest.raises(UsageError, match="the fit diverged at learning rate 1e\\+38"):
        residua.VocabProbe(layers=[1], lr=1e38, epochs=1, batch=64).fit(cache)


def test_warnings_of_the_command_line_are_lines(cache, tmp_path, monkeypatch):
    lens = residua.save_probe(TunedLens(layers=[1], steps=0).fit(cache), tmp_path / "lens")
    logits = TunedLens.logits
    monkeypatch.setattr(TunedLens, "logits", lambda *a: logits(*a) * NAN)
    result = CliRunner().invoke(main, ["evaluate", str(cache.path), str(lens), "--json"])
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("Warning: logits that are no distribution")
    assert result.stderr.count("\n") == 1
    value = json.loads(result.stdout, parse_constant=refuse)
    assert value["notes"]
    mine = [row for row in value["rows"] if row["probe"] == "lens"]
    assert {row["kl"] for row in mine} == {row["precision_at_10"] for row in mine} == {None}


def test_targets_of_a_model_without_a_distribution_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(400, WIDTH)).astype(np.float32) for _ in range(3)]
    head = random_head(WIDTH, VOCAB)
    head.unembedding[3] = 3e38
    cache = make_cache(tmp_path, layers, [10] * 40, head)
    for probe in (TunedLens(layers=[1]), *(residua.VocabProbe(layers=[1], loss=loss, lr=0.1)
                                           for loss in ("model", "kl"))):  # fmt: skip
        with pytest.raises(UsageError, match=r"own logits are not finite at \d+ of \d+ positions"):
            probe.fit(cache)

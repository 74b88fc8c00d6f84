"""The study finds planted future tokens at their layer and offset, and chance everywhere else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.analysis.studies.future_lens import study_future_lens
from residua.analysis.studies.future_lens.confidence_rows import (
    PUBLISHED,
    PUBLISHED_NAME,
    expected_calibration_error,
)
from residua.analysis.studies.future_lens.pair_filters import all_of_run, filter_masks
from residua.analysis.studies.future_lens.study_offsets import plan_floors
from residua.analysis.studies.results.study_figures import HeatPanel
from residua.cache.errors import UsageError
from residua.cache.head.head import Head
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.tokens.segments import PairScope
from residua.cache.tokens.token_stream import KeptRuns
from residua.cli import main
from residua.probes.controls.control_probe import ControlProbe
from residua.probes.lens.logit_lens import LogitLens
from residua.probes.ridge.ridge_probe import RidgeProbe

from ....support.synthetic import make_cache, random_head

VOCAB = 12
LENGTHS = [60] * 80
PLANTED = {1: 2, 2: 1}
"""Layer -> the offset whose token it holds."""


def planted_cache(root: Path, seed: int = 0, right: float = 0.7) -> ActivationCache:
    """A cache whose model says random tokens y; layer 1 holds y[t+2], layer 2 holds y[t+1].

    The text follows the model with the probability `right`. Layer 0 is noise, layer 3 is the last.
    """
    rng = np.random.default_rng(seed)
    n = sum(LENGTHS)
    y = rng.integers(0, VOCAB, n)
    code = np.eye(VOCAB)
    layers = [rng.normal(0, 0.12, (n, VOCAB)) for _ in range(4)]
    for layer, offset in PLANTED.items():
        layers[layer] += code[np.roll(y, -offset)]
    layers[3] = code[y] + rng.normal(0, 0.01, (n, VOCAB))
    follows = rng.random(n) < right
    ids = np.roll(np.where(follows, y, rng.integers(0, VOCAB, n)), 1)
    head = Head(
        norm="none",
        eps=1e-5,
        norm_weight=np.ones(VOCAB, np.float32),
        norm_bias=np.zeros(VOCAB, np.float32),
        unembedding=6 * np.eye(VOCAB, dtype=np.float32),
        bias=np.zeros(VOCAB, np.float32),
    )
    return make_cache(root, layers, LENGTHS, head, ids=ids)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return planted_cache(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def probes(planted: ActivationCache) -> dict[str, Any]:
    ridge = RidgeProbe(offsets=(0, 1, 2, 3), layers=(0, 1, 2))
    shuffled = ControlProbe(ridge, "shuffled")
    options: dict[str, Any] = {"progress": None}
    return {
        "ridge": ridge.fit(planted, keep=False, **options),
        "shuffled": shuffled.fit(planted, **options),
    }


@pytest.fixture(scope="module")
def result(planted: ActivationCache, probes: dict[str, Any]) -> Any:
    return study_future_lens(planted, probes, progress=None)


def rows_of(result: Any, table: str, **values: Any) -> list[Any]:
    return [
        row
        for row in result.table(table).rows
        if all(getattr(row, name) == value for name, value in values.items())
    ]


def test_a_planted_token_is_read_at_its_layer_and_offset_and_nowhere_else(result: Any) -> None:
    for layer in (0, 1, 2):
        for offset in (1, 2, 3):
            (row,) = rows_of(result, "measures", probe="ridge", layer=layer, offset=offset)
            assert row.n == sum(max(0, 60 - offset) for _ in range(row.n // (60 - offset)))
            if PLANTED.get(layer) == offset:
                assert row.precision_at_1 > 0.95
                assert row.surprisal < 0.2
            else:
                assert abs(row.precision_at_1 - 1 / VOCAB) < 0.06


def test_the_peak_of_each_planted_offset_is_certain_and_above_all_floors(result: Any) -> None:
    for layer, offset in PLANTED.items():
        (peak,) = rows_of(result, "peaks", probe="ridge", offset=offset)
        assert (peak.peak, peak.peak_interval) == (layer, (layer, layer))
        assert peak.beats_bigram_from == peak.beats_marginal_from == layer
        others = rows_of(result, "differences", probe="ridge", offset=offset)
        assert {row.other for row in others} == {"bigram", "marginal", "logit", "shuffled"}
        shuffled = next(row for row in others if row.other == "shuffled")
        assert shuffled.difference_interval[0] > 0.7
    (peak,) = rows_of(result, "peaks", probe="ridge", offset=3)
    assert peak.beats_bigram_from is None
    text = " ".join(result.says)
    assert "ridge reads N = 2 best at layer 1: precision@1 " in text
    assert "no clear difference" in text


def test_measures_are_those_of_evaluate(planted: ActivationCache, probes: dict[str, Any]) -> None:
    result = study_future_lens(planted, probes, progress=None, names=None)
    evaluation = evaluate(planted, probes, progress=None)
    for expected in evaluation.rows:
        (row,) = rows_of(
            result,
            "measures",
            probe=expected.probe,
            layer=expected.layer,
            offset=expected.offset,
        )
        for name in ("n", "n_text", "kl", "nll", "surprisal", "nll_text", "precision_at_5"):
            assert getattr(row, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
        assert row.precision_at_1_interval == (
            expected.precision_at_1_low,
            expected.precision_at_1_high,
        )


@pytest.mark.parametrize("keep", ["correct", "agree"])
def test_a_filter_measures_what_evaluate_measures_under_its_mask(
    planted: ActivationCache, probes: dict[str, Any], keep: str
) -> None:
    result = study_future_lens(planted, probes, keep=keep, progress=None, names=None)
    y = np.asarray(planted.residual_array(3)[:]).argmax(1)
    text = planted.following_tokens(np.arange(planted.positions))
    correct = y == text
    for offset in (0, 2):
        mask = correct.copy()
        if keep == "agree":
            for step in range(1, offset + 1):
                mask[step:] &= correct[:-step]
        (expected,) = [
            row
            for row in evaluate(planted, probes, offsets=offset, where=mask, progress=None).rows
            if (row.probe, row.layer) == ("ridge", 1)
        ]
        (row,) = rows_of(result, "measures", probe="ridge", layer=1, offset=offset)
        assert (row.n, row.kl) == (expected.n, pytest.approx(expected.kl, rel=1e-6))
        (kept,) = rows_of(result, "kept", offset=offset, keep=keep)
        assert kept.kept == row.n
        share = 0.72 ** (offset + 1 if keep == "agree" else 1)
        assert kept.share == pytest.approx(share, abs=0.08)
    assert "keeps" in result.says[0]


def test_filters_equal_plain_loops_also_where_documents_and_runs_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lengths, head = [7, 1, 9], random_head(5, 11)
    documents = np.repeat([0, 1, 2, 3], [4, 3, 1, 9])
    layers = [rng.normal(size=(17, 5)) for _ in range(2)]
    cache = make_cache(tmp_path, layers, lengths, head, documents=documents)
    correct = rng.random(17) < 0.6
    sequences = np.arange(3)
    starts = np.cumsum([0, *lengths])
    for keep in ("none", "correct", "agree"):
        for first_only in (False, True):
            masks = filter_masks(
                cache,
                sequences,
                PairScope(),
                (0, 1, 3),
                keep=keep,
                correct=correct,
                first_only=first_only,
            )
            for offset, mask in masks.items():
                for target in range(17):
                    source = target - offset
                    start = starts[np.searchsorted(starts, target, "right") - 1]
                    if source < start:
                        continue
                    expected = {
                        "none": True,
                        "correct": bool(correct[target]),
                        "agree": bool(correct[source : target + 1].all()),
                    }[keep] and (source == start or not first_only)
                    assert (mask is None or bool(mask[target])) == expected
    assert all_of_run(correct, 99).sum() == 0


def test_the_first_kept_positions_alone_are_sources_in_a_sparse_cache(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    lengths, head = [20] * 30, random_head(5, 11)
    runs = KeptRuns(np.arange(30), np.full(30, 12), np.full(30, 4))
    layers = [rng.normal(size=(120, 5)) for _ in range(3)]
    cache = make_cache(tmp_path, layers, lengths, head, runs=runs)
    result = study_future_lens(
        cache, [LogitLens([1], (0, 1, 2, 3))], split="all", first_only=True, progress=None
    )
    for offset in range(4):
        (row,) = rows_of(result, "measures", probe="logit", offset=offset)
        assert row.n == 30
    assert any("no table of names" in note for note in result.notes)
    assert any("marginalised bigram" in note for note in result.notes)


def test_calibration_error_equals_plain_bins() -> None:
    rng = np.random.default_rng(0)
    confidence = np.append(rng.random(500), [0.0, 1.0])
    hit = rng.random(502) < confidence**2
    expected = 0.0
    for number in range(15):
        inside = (confidence >= number / 15) & (confidence < (number + 1) / 15)
        if number == 14:
            inside |= confidence == 1.0
        if inside.any():
            gap = abs(hit[inside].mean() - confidence[inside].mean())
            expected += inside.sum() / 502 * gap
    assert expected_calibration_error(confidence, hit) == pytest.approx(expected, rel=1e-9)
    assert expected_calibration_error(np.array([1.0]), np.array([True])) == 0.0


def test_confidence_of_the_model_itself_is_calibrated_to_its_own_samples(tmp_path: Path) -> None:
    """The last layer at N = 0 says p; where the text is drawn from p, its error is noise."""
    rng = np.random.default_rng(5)
    head = random_head(6, 9)
    last = rng.normal(0, 1.5, (4000, 6))
    logits = head.logits(last.astype(np.float32)).astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    drawn = (p.cumsum(1) > rng.random((4000, 1))).argmax(1)
    layers = [rng.normal(size=(4000, 6)), last]
    cache = make_cache(tmp_path, layers, [100] * 40, head, ids=np.roll(drawn, 1))
    result = study_future_lens(cache, [LogitLens([1], (0,))], split="all", offsets=0, progress=None)
    (row,) = result.table("calibration").rows
    assert row.precision_at_1 == 1.0
    assert row.ece == pytest.approx(1 - row.confidence, abs=1e-6)
    assert row.ece_text < 0.04
    assert row.confidence == pytest.approx(p.max(1).mean(), abs=1e-5)


def test_buckets_hold_all_pairs_and_the_published_row_is_named(result: Any) -> None:
    rows = rows_of(result, "confidence", probe="ridge", offset=2)
    assert sum(row.share for row in rows) == pytest.approx(1)
    (peak,) = rows_of(result, "peaks", probe="ridge", offset=2)
    assert sum(row.n for row in rows) == peak.n
    published = rows_of(result, "confidence", probe=PUBLISHED_NAME)
    assert [row.precision_at_1 for row in published] == list(PUBLISHED)
    assert {(row.offset, row.n) for row in published} == {(1, None)}


def test_the_picture_shows_the_tokens_of_the_probe(
    planted: ActivationCache, probes: dict[str, Any]
) -> None:
    result = study_future_lens(
        planted,
        {"ridge": probes["ridge"]},
        progress=None,
        sequence=0,
        start=5,
        width=6,
        names=None,
    )
    (panel,) = result.figure("future-tokens").rows[0]
    assert isinstance(panel, HeatPanel)
    assert panel.hovers is not None
    assert panel.y_names == ["0", "1", "2"]
    assert len(panel.x_names) == 6
    y = np.asarray(planted.residual_array(3)[:]).argmax(1)
    for column in range(6):
        hover = panel.hovers[1][column].splitlines()
        assert len(hover) == 5
        assert hover[3].startswith(f"t+3: #{y[5 + column + 2]} ")
    mean = np.mean(
        [float(line.split()[2].strip(",")) for line in panel.hovers[1][0].split("\n")[1:]]
    )
    assert panel.values[1][0] == pytest.approx(mean, abs=1e-3)


def test_everything_is_json_and_undefined_rows_are_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    lengths, head = [30] * 20, random_head(5, 11)
    layers = [rng.normal(size=(600, 5)) for _ in range(3)]
    layers[1][::50] = np.nan
    layers[2][::70] = np.inf
    cache = make_cache(tmp_path, layers, lengths, head)
    result = study_future_lens(cache, split="all", progress=None)
    json.dumps(result.to_dict(), allow_nan=False)
    (row,) = rows_of(result, "measures", probe="logit", layer=1, offset=1)
    assert row.n_undefined > 0
    assert row.precision_at_1 is None
    assert any("undefined" in note for note in result.notes)


def test_a_cache_of_one_document_has_no_interval_of_the_peak(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    layers = [rng.normal(size=(30, 5)) for _ in range(2)]
    cache = make_cache(tmp_path, layers, [30], random_head(5, 11))
    result = study_future_lens(cache, split="all", offsets=[0, 1], progress=None)
    (peak, _) = rows_of(result, "peaks", probe="logit")
    assert peak.peak_interval == (None, None)
    assert result.says


def test_layers_that_were_not_asked_for_are_not_read_beside_the_floor(
    planted: ActivationCache, probes: dict[str, Any]
) -> None:
    plan, _ = plan_floors(
        planted, {"ridge": probes["ridge"]}, offsets=(0, 1), layers=(1,), split="test"
    )
    assert {(key.probe, key.layer) for key in plan.keys} == {
        ("ridge", 1),
        ("logit", 1),
        ("bigram", None),
        ("marginal", 3),
    }


def test_what_cannot_be_answered_is_said(planted: ActivationCache) -> None:
    with pytest.raises(UsageError, match="keep must be one of none, correct, agree"):
        study_future_lens(planted, keep="some", progress=None)
    with pytest.raises(UsageError, match="names must be one of document, data, any"):
        study_future_lens(planted, names="some", progress=None)
    nothing = np.zeros(planted.positions, bool)
    with pytest.raises(UsageError, match="no pair .* is kept by the mask `where`"):
        study_future_lens(planted, where=nothing, progress=None)
    with pytest.raises(UsageError, match="bool array"):
        study_future_lens(planted, names=np.zeros(3, bool), progress=None)


def test_the_command_gives_the_tables_as_json(planted: ActivationCache) -> None:
    root = planted.path.parent
    arguments = ["study", "future-lens", planted.id[:12], "--root", str(root), "--json"]
    arguments += ["--offsets", "1-2", "--layers", "1,-1", "--names", "none", "--keep", "correct"]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    value = json.loads(run.stdout)
    assert value["settings"]["layers"] == [1, 3]
    assert {row["probe"] for row in value["tables"]["measures"]} == {"logit", "bigram", "marginal"}
    assert value["tables"]["names"] == []
    assert {row["offset"] for row in value["tables"]["kept"]} == {1, 2}

"""First-correct and final layers are those of the definition; curves and intervals are exact."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import residua
from residua.analysis.studies.essential_layers import answer_depths
from residua.analysis.studies.essential_layers.answer_depths import (
    AnswerDepths,
    Answers,
    find_answers,
    measure_answer_depths,
)
from residua.analysis.studies.essential_layers.depth_study import (
    Cells,
    QuadraticFit,
    study_essential_layers,
)
from residua.analysis.studies.essential_layers.depth_texts import (
    depth_figure,
    depth_tables,
    describe_curve,
)
from residua.analysis.studies.results.study_files import write_table
from residua.analysis.studies.results.study_result import StudyResult, StudySubject
from residua.cache.devices import choose_device
from residua.cache.errors import NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import main
from residua.probes.base.resampling import resampling_counts

from ....support.synthetic import make_cache, random_head

LAYERS = (1, 2, 3, 5)


def depths_of(correct: Any, layers: tuple[int, ...] = LAYERS, lens: str = "lens") -> AnswerDepths:
    """Depths with the answer at rank 1 where `correct`, else 2."""
    right = np.array(correct, bool)
    log_p = np.where(right, -0.1, -3.0)
    return AnswerDepths(lens, layers, right, np.where(right, 1, 2), log_p)


def test_depths_are_those_of_the_definition_for_every_pattern() -> None:
    patterns = list(itertools.product([False, True], repeat=len(LAYERS)))
    found = depths_of(patterns)
    for number, pattern in enumerate(patterns):
        right = [layer for layer, is_right in zip(LAYERS, pattern, strict=True) if is_right]
        stays = [layer for place, layer in enumerate(LAYERS) if all(pattern[place:])]
        assert found.first[number] == right[0] if right else np.isnan(found.first[number])
        assert found.final[number] == stays[0] if stays else np.isnan(found.final[number])
        changes = sum(a != b for a, b in itertools.pairwise(pattern))
        assert found.flips[number] == changes
        if right:
            after = pattern[LAYERS.index(right[0]) :]
            assert found.stay[number] == sum(after) / len(after)
        else:
            assert np.isnan(found.stay[number])


@pytest.fixture(scope="module")
def random_cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(640, 8)).astype(np.float32) for _ in range(4)]
    return make_cache(tmp_path_factory.mktemp("root"), layers, [40] * 16, random_head(8, 32))


@pytest.mark.parametrize("block_bytes", [1, 4 * 32 * 7, 1 << 20])
def test_readings_are_those_of_the_logits_in_memory(
    random_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(answer_depths, "BLOCK_BYTES", block_bytes)
    cache = random_cache
    rows = cache.sequence_start.astype(np.int64) + 3
    tokens = np.asarray(cache.following_tokens(rows), np.int64)
    answers = Answers(np.arange(len(rows)), rows, tokens)
    ridge = residua.RidgeProbe([0]).fit(cache, progress=None, keep=False)
    lenses = {"logit": residua.LogitLens.of(cache, 0), "ridge": ridge}
    calls: list[tuple[int, int]] = []
    for name, lens in lenses.items():
        found = measure_answer_depths(
            cache, answers, name, lens, choose_device("cpu"), lambda *done: calls.append(done)
        )
        assert found.layers == (1, 2, 3)
        assert calls[-1] == (3 * len(rows), 3 * len(rows))
        for column, layer in enumerate(found.layers):
            hidden = cache.residual_array(layer)[rows]
            if name == "ridge" and layer < cache.n_blocks:
                hidden = ridge.map(layer, 0, None).astype(np.float32)(hidden)
            logits = np.asarray(cache.head.logits(hidden), np.float64)
            own = logits[np.arange(len(rows)), tokens]
            log_p = own - np.log(np.exp(logits).sum(1))
            rank = 1 + (logits > own[:, None]).sum(1)
            np.testing.assert_allclose(found.log_probability[:, column], log_p, atol=2e-5)
            assert (np.abs(found.rank[:, column] - rank) <= 1).all()
            assert (found.rank[:, column] == rank).mean() > 0.9
        np.testing.assert_array_equal(found.correct, found.rank == 1)


def test_rows_that_are_not_finite_are_wrong(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    layers = [rng.normal(size=(80, 8)).astype(np.float32) for _ in range(3)]
    layers[1][3] = np.nan
    cache = make_cache(tmp_path, layers, [40] * 2, random_head(8, 32))
    rows = np.array([3, 43])
    tokens = np.asarray(cache.following_tokens(rows), np.int64)
    lens = residua.LogitLens.of(cache, 0)
    found = measure_answer_depths(
        cache, Answers(np.arange(2), rows, tokens), "logit", lens, choose_device("cpu")
    )
    assert found.rank[0, 0] == 32
    assert not found.correct[0, 0]
    assert np.isnan(found.log_probability[0, 0])
    assert np.isfinite(found.log_probability[1]).all()


def planted(questions: int = 40, positions: int = 5, wrong: int = 0) -> tuple[Cells, AnswerDepths]:
    """Every question at every position; the gap is 0 at the ends and 2 in the middle."""
    gaps = np.array([0, 1, 2, 1, 0])
    layers = (1, 2, 3, 4)
    rows, gold, units = [], [], []
    for question in range(questions):
        for place in range(positions):
            right = np.ones(4, bool)
            right[1 : 1 + gaps[place]] = False
            if question < wrong and place == 2:
                right[-1] = False
            rows.append(right)
            gold.append(place)
            units.append(question)
    number = np.full(len(rows), float(positions))
    cells = Cells(number, np.array(gold, np.float64), np.array(units), seed=0)
    return cells, depths_of(rows, layers)


def test_a_planted_inverted_u_is_found() -> None:
    cells, depths = planted()
    rows = [row for row in cells.depth_rows(depths, True) if row.subset == "final"]
    assert [row.gap for row in rows] == [0, 2, 3, 2, 0]
    assert [row.kept for row in rows] == [40] * 5
    for curve in cells.curve_rows(depths, True):
        assert curve.quadratic is not None
        low, high = curve.interval
        assert high is not None
        assert curve.quadratic == pytest.approx(
            np.polyfit([0, 0.25, 0.5, 0.75, 1], [0, 2, 3, 2, 0], 2)[0]
        )
        assert high < 0


def test_subsets_hold_right_answers_and_whole_questions() -> None:
    cells, depths = planted(wrong=10)
    rows = cells.depth_rows(depths, True)
    kept = {row.gold: row.kept for row in rows if row.subset == "final"}
    assert kept == {0: 40, 1: 40, 2: 30, 3: 40, 4: 40}
    assert {row.kept for row in rows if row.subset == "everywhere"} == {30}
    middle = next(row for row in rows if row.gold == 2)
    assert middle.accuracy == 0.75
    assert middle.accuracy_interval[0] is not None
    alone = cells.depth_rows(depths, False)
    assert {row.subset for row in alone} == {"final"}


def test_where_nothing_is_planted_no_curve_is_claimed() -> None:
    rng = np.random.default_rng(2)
    correct = rng.random((400, 4)) < 0.5
    correct[:, -1] = True
    gold = np.tile(np.arange(4.0), 100)
    cells = Cells(np.full(400, 4.0), gold, np.repeat(np.arange(100), 4), seed=0)
    (curve,) = [c for c in cells.curve_rows(depths_of(correct), True) if c.subset == "final"]
    low, high = curve.interval
    assert low is not None
    assert high is not None
    assert low < 0 < high


@pytest.mark.parametrize("paired", [True, False])
def test_the_quadratic_term_is_that_of_least_squares_and_of_real_resamples(paired: bool) -> None:
    rng = np.random.default_rng(3)
    units = np.repeat(np.arange(30), 5)
    x = np.tile(np.linspace(0, 1, 5), 30)
    y = rng.normal(size=150) + 3 * x - 2 * x**2 + rng.normal(size=30)[units]
    keep = rng.random(150) < 0.8
    x, y, units = x[keep], y[keep], units[keep]

    def by_least_squares(x: np.ndarray, y: np.ndarray, units: np.ndarray) -> float:
        ones = np.eye(units.max() + 1)[units] if paired else np.ones((len(x), 1))
        return float(np.linalg.lstsq(np.column_stack([x, x * x, ones]), y, rcond=None)[0][1])

    fit = QuadraticFit(x, y, units, paired)
    assert fit.term() == pytest.approx(by_least_squares(x, y, units), rel=1e-9)
    names = np.unique(units)
    for weights in resampling_counts(len(names), 4, resamples=5):
        parts, number = [], 0
        for name, count in zip(names, weights.astype(int), strict=True):
            for _ in range(count):
                parts.append((np.flatnonzero(units == name), number))
                number += 1
        chosen = np.concatenate([rows for rows, _ in parts])
        renamed = np.concatenate([np.full(len(rows), name) for rows, name in parts])
        expected = by_least_squares(x[chosen], y[chosen], renamed)
        assert fit.term(weights) == pytest.approx(expected, rel=1e-8)


def test_a_gap_that_never_varies_is_said_so() -> None:
    cells, _ = planted()
    always = depths_of(np.ones((200, 4), bool))
    for curve in cells.curve_rows(always, True):
        assert (curve.quadratic, curve.interval) == (0.0, (0.0, 0.0))
        assert "the same at every position" in describe_curve(curve)


def test_too_few_positions_give_no_curve() -> None:
    units = np.arange(6)
    fit = QuadraticFit(np.array([0, 1.0] * 3), np.arange(6.0), units, paired=False)
    assert fit.term() is None
    assert fit.interval(0) == (None, None)
    empty = QuadraticFit(np.zeros(0), np.zeros(0), np.zeros(0, np.int64), paired=True)
    assert empty.term() is None


def test_a_cache_without_answers_is_refused(tiny_cache: ActivationCache) -> None:
    with pytest.raises(UsageError, match="--positions answer"):
        study_essential_layers(tiny_cache, progress=None)


@pytest.fixture(scope="module")
def answer_cache(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """Questions at every position of two numbers of documents, answered by a random model."""
    folder = tmp_path_factory.mktemp("answers")
    lines = []
    for question in range(6):
        for documents in (3, 4):
            for gold in range(documents):
                parts = [f"the {place} is a {question}" for place in range(documents)]
                parts[gold] = f"the sun is {question}"
                text = ". ".join(parts) + f". What is {question}? red sun"
                row = {"text": text, "answer": "red sun", "documents": documents}
                lines.append(json.dumps({**row, "gold": gold, "question": f"q{question}"}))
    data = folder / "answers.jsonl"
    data.write_text("\n".join(lines))
    return residua.extract(
        str(model_folder),
        str(data),
        root=folder / "root",
        pack=False,
        positions="answer",
        progress=None,
    )


def test_the_study_reads_answers_by_label(answer_cache: ActivationCache) -> None:
    cache = answer_cache
    answers = find_answers(cache)
    assert len(answers.rows) == 6 * 7
    first = cache.tokenizer().encode("What is 1? red sun", add_special_tokens=False).ids
    assert set(answers.tokens) <= set(first)
    result = study_essential_layers(cache, question="question", progress=None)
    assert (result.subject.units, result.subject.n_units) == ("question", 6)
    assert result.subject.n == len(answers.rows)
    rows = result.table("depths").rows
    assert {(row.documents, row.gold) for row in rows} == {
        *((3, gold) for gold in range(3)),
        *((4, gold) for gold in range(4)),
    }
    assert {row.n for row in rows} == {6}
    assert {row.lens for row in rows} == {"logit"}
    for row in result.table("layers").rows:
        assert row.log_probability is not None
        assert row.log_probability < 0
    again = study_essential_layers(cache, question="question", progress=None)
    assert again == result


def test_a_missing_label_names_the_texts_that_have_it(answer_cache: ActivationCache) -> None:
    with pytest.raises(NotFoundError, match=r"no label 'place'.*residua data kv"):
        study_essential_layers(answer_cache, gold="place", progress=None)


def test_a_label_of_words_is_no_position(answer_cache: ActivationCache) -> None:
    with pytest.raises(UsageError, match="has words"):
        study_essential_layers(answer_cache, gold="question", progress=None)


def test_the_command_prints_and_writes_the_study(
    answer_cache: ActivationCache, tmp_path: Path
) -> None:
    root = answer_cache.path.parent
    words = ["study", "essential-layers", answer_cache.id[:8], "--root", str(root)]
    files = {"html": tmp_path / "study.html", "png": tmp_path / "p", "csv": tmp_path / "c"}
    options = [f"--{name}={path}" for name, path in files.items()]
    result = CliRunner().invoke(main, [*words, *options, "--json"])
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    pictures = [files["png"] / "essential-layers-essential-layers.png"]
    tables = [files["csv"] / f"essential-layers-{x}.csv" for x in ("depths", "curves", "layers")]
    assert value["files"] == [str(path) for path in (*tables, *pictures, files["html"])]
    assert len(value["tables"]["depths"]) == 2 * 7
    page = files["html"].read_text()
    assert "Question" in page
    assert "What it says" in page
    assert pictures[0].read_bytes()[:4] == b"\x89PNG"
    assert len(tables[0].read_text().splitlines()) == 15
    shown = CliRunner().invoke(main, words)
    assert shown.exit_code == 0, shown.output
    assert "K = 4" in shown.stdout
    wrong = CliRunner().invoke(main, [*words, "--gold", "place"])
    assert wrong.exit_code == 2
    assert "no label 'place'" in wrong.output


@pytest.mark.parametrize("option", ["html", "png", "csv"])
def test_a_folder_for_a_file_and_a_file_for_a_folder_are_refused_before_the_study(
    answer_cache: ActivationCache, tmp_path: Path, option: str
) -> None:
    root = answer_cache.path.parent
    target = tmp_path / "target"
    target.mkdir() if option == "html" else target.touch()
    words = ["study", "essential-layers", answer_cache.id[:8], "--root", str(root)]
    result = CliRunner().invoke(main, [*words, f"--{option}", str(target)])
    assert result.exit_code == 2, result.output
    assert f"{target} is a {'folder' if option == 'html' else 'file'}" in result.output


def test_a_page_of_a_planted_curve_says_so(tmp_path: Path) -> None:
    cells, depths = planted()
    hostile = replace(depths, lens="<b>lens</b>")
    rows, layers = cells.depth_rows(hostile, True), cells.layer_rows(hostile)
    curves = cells.curve_rows(hostile, True)
    subject = StudySubject(
        ("0" * 64,), "<i>model</i>", "data", "all", 200, "answers", "question", 40
    )
    result = StudyResult(
        study="essential-layers",
        title="Layers of <i>model</i>",
        question="?",
        method=".",
        subject=subject,
        tables=depth_tables(rows, layers, curves),
        figures=[depth_figure(rows, layers, 4)],
        says=[describe_curve(curve) for curve in curves],
        does_not_say=[],
    )
    page = result.write_html(tmp_path / "page.html", "residua study").read_text()
    assert "an inverted U" in page
    body = page[page.index("<body>") :]
    assert "<b>lens</b>" not in body.replace("\\u003c", "<")
    assert "<i>model</i>" not in body
    axes = result.plot().axes
    assert len(axes) == 4
    assert all(panel.get_xlabel() and panel.get_title(loc="left") for panel in axes)
    table = write_table(result.tables[0], tmp_path / "t.csv").read_text()
    assert table.startswith("lens,subset,")
    assert "gap_low,gap_high" in table.splitlines()[0]
    assert len(result.to_dataframe()) == 10

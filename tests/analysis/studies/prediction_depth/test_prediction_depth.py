"""Planted depths, classes, frequencies and iterations learned are found; chance shows nothing."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from residua.analysis.studies.prediction_depth.depth_rows import (
    DepthCorrelationRow,
    PredictionDepthRow,
)
from residua.analysis.studies.prediction_depth.depths import agreement, prediction_depths
from residua.analysis.studies.prediction_depth.learned_iterations import (
    find_positions,
    iterations_learned,
    parse_checkpoints,
    read_checkpoints,
    read_top_tokens,
)
from residua.analysis.studies.prediction_depth.prediction_depth_study import study_prediction_depth
from residua.analysis.studies.prediction_depth.token_classes import (
    classify_next_tokens,
    count_tokens,
    frequency_deciles,
)
from residua.analysis.studies.results.study_result import StudyResult
from residua.analysis.studies.trajectories.position_sample import choose_positions
from residua.analysis.token_texts.position_masks import name_mask, word_continuation_mask
from residua.cache.devices import choose_device
from residua.cache.errors import MismatchError, NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import main
from residua.probes.lens.logit_lens import LogitLens

from ....support.planted_tops import cache_with_tops, draw_others

VOCAB, LAYERS = 12, 5
LENGTHS = [50] * 24


def test_depths_are_those_of_the_definition_for_every_pattern() -> None:
    layers = (0, 2, 3, 7)
    top = np.array(list(itertools.product([0, 1, -1], repeat=len(layers))))
    depths, agrees = prediction_depths(top, layers), agreement(top)
    for row, depth, same in zip(top.tolist(), depths.tolist(), agrees.tolist(), strict=True):
        if row[-1] < 0:
            assert np.isnan(depth)
            assert np.isnan(same).all()
            continue
        stays = [la for place, la in enumerate(layers) if set(row[place:]) == {row[-1]}]
        assert depth == stays[0]
        assert same == [float(token == row[-1]) for token in row]


def test_iterations_learned_are_those_of_the_definition_for_every_pattern() -> None:
    steps = (10, 20, 40)
    correct = np.array(list(itertools.product([False, True], repeat=3)))
    for row, found in zip(correct, iterations_learned(correct, steps), strict=True):
        stays = [step for place, step in enumerate(steps) if row[place:].all()]
        assert found == stays[0] if stays else np.isnan(found)


def planted_tops(
    rng: np.random.Generator, final: np.ndarray, depth: np.ndarray, layers: int = LAYERS
) -> np.ndarray:
    """Tokens `(layers, n)` that are `final` from `depth` on; the layer before has another one."""
    tops = np.stack([draw_others(rng, final, VOCAB) for _ in range(layers)])
    tops[np.arange(layers)[:, None] >= depth] = np.broadcast_to(final, tops.shape)[
        np.arange(layers)[:, None] >= depth
    ]
    return tops


def texts(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, some rarer than others, and the next token of each."""
    share = np.arange(1, VOCAB + 1) / np.arange(1, VOCAB + 1).sum()
    ids = rng.choice(VOCAB, sum(LENGTHS), p=share)
    return ids, np.roll(ids, -1)


def row_of(result: StudyResult, table: str, **fields: Any) -> Any:
    (row,) = [
        row
        for row in result.table(table).rows
        if all(getattr(row, name) == value for name, value in fields.items())
    ]
    return row


def test_a_planted_depth_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids, following = texts(rng)
    # Depth 1 for right predictions, 3 for wrong ones, whose loss is large.
    is_right = rng.random(len(ids)) < 0.5
    final = np.where(is_right, following, draw_others(rng, following, VOCAB))
    depth = np.where(is_right, 1, 3)
    cache = cache_with_tops(tmp_path, planted_tops(rng, final, depth), LENGTHS, VOCAB, ids)
    result = study_prediction_depth(cache, split="all", progress=None, device="cpu")
    everywhere: PredictionDepthRow = row_of(result, "depth", division="all")
    assert everywhere.depth == pytest.approx(depth.mean())
    assert everywhere.n == len(ids)
    inside = np.arange(len(ids)) % 50 != 49
    assert everywhere.accuracy == pytest.approx(is_right[inside].mean())
    shares = [row.share for row in result.table("settled").rows]
    assert shares == pytest.approx([0, is_right.mean(), 0, (~is_right).mean(), 0])
    assert [row.settled for row in result.table("settled").rows][-1] == 1
    loss: DepthCorrelationRow = row_of(result, "correlations", variable="loss", positions="all")
    assert loss.correlation is not None
    assert loss.correlation > 0.8
    assert loss.correlation_interval[0] is not None
    assert loss.correlation_interval[0] > 0.7
    # Whether a prediction is right, and so its depth, does not depend on the token.
    frequency = row_of(result, "correlations", variable="frequency", given="")
    low, high = frequency.correlation_interval
    assert low < 0 < high
    assert any("no classes of tokens" in note for note in result.notes)
    json.dumps(result.to_dict())


def test_depths_by_chance_go_with_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ids, following = texts(rng)
    final = np.where(rng.random(len(ids)) < 0.5, following, draw_others(rng, following, VOCAB))
    depth = rng.integers(0, LAYERS, len(ids))
    cache = cache_with_tops(tmp_path, planted_tops(rng, final, depth), LENGTHS, VOCAB, ids)
    result = study_prediction_depth(cache, split="all", progress=None, device="cpu")
    rows = result.table("correlations").rows
    assert len(rows) == 4
    assert all(abs(row.correlation) < 0.12 for row in rows)
    unclear = [row for row in rows if row.correlation_interval[0] < 0 < row.correlation_interval[1]]
    assert len(unclear) >= 3
    said = sum("no clear correlation" in sentence for sentence in result.says)
    assert said == len(unclear)
    assert any("no clear difference" in sentence for sentence in result.says)


def checkpoint_caches(
    root: Path, learned: np.ndarray, ids: np.ndarray, following: np.ndarray, steps: tuple[int, ...]
) -> dict[int, ActivationCache]:
    """Caches whose model is right from the planted iteration on."""
    rng = np.random.default_rng(7)
    caches = {}
    for step in steps:
        wrong = draw_others(rng, following, VOCAB)
        top = np.where(learned <= step, following, wrong)
        tops = np.stack([wrong, top])
        caches[step] = cache_with_tops(root / str(step), tops, LENGTHS, VOCAB, ids)
    return caches


def test_a_planted_iteration_learned_goes_with_the_depth(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    ids, following = texts(rng)
    steps = (100, 200, 300)
    learned = rng.choice([100, 200, 300, 999], len(ids))
    depth = np.searchsorted([100, 200, 300], learned) + 1
    cache = cache_with_tops(
        tmp_path / "own", planted_tops(rng, following, depth), LENGTHS, VOCAB, ids
    )
    checkpoints = checkpoint_caches(tmp_path, learned, ids, following, steps)
    result = study_prediction_depth(
        cache, split="all", checkpoints=checkpoints, progress=None, device="cpu"
    )
    for group, expected in (("100", 1), ("200", 2), ("300", 3), ("never", 4)):
        row = row_of(result, "depth", division="learned", group=group)
        assert row.depth == expected
    for positions in ("learned", "all, never last"):
        row = row_of(
            result, "correlations", variable="iteration learned", positions=positions, given=""
        )
        assert row.correlation == pytest.approx(1)
    assert any("iteration learned: of 1176 positions" in note for note in result.notes)
    # A shuffled iteration goes with nothing.
    checkpoints = checkpoint_caches(tmp_path / "x", rng.permutation(learned), ids, following, steps)
    result = study_prediction_depth(
        cache, split="all", checkpoints=checkpoints, progress=None, device="cpu"
    )
    row = row_of(
        result, "correlations", variable="iteration learned", positions="learned", given=""
    )
    assert row.correlation_interval[0] < 0 < row.correlation_interval[1]


def test_checkpoints_are_joined_by_their_sequences(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    ids, following = texts(rng)
    learned = np.full(len(ids), 100)
    steps = (100, 200)
    cache = checkpoint_caches(tmp_path / "a", learned, ids, following, (100,))[100]
    checkpoints = checkpoint_caches(tmp_path / "b", learned, ids, following, steps)
    # A cache with the sequences in another order, and one of them changed.
    order = rng.permutation(len(LENGTHS))
    changed = ids.copy()
    changed[5] = (changed[5] + 1) % VOCAB
    moved = changed.reshape(-1, 50)[order].ravel()
    tops = np.stack([moved, np.roll(moved, -1)])
    checkpoints[200] = cache_with_tops(tmp_path / "c", tops, LENGTHS, VOCAB, moved)
    sample = choose_positions(cache, "all")
    rows = find_positions(sample, checkpoints[200])
    assert (rows[:50] == -1).all()
    assert (checkpoints[200].tokens[:][rows[50:]] == ids[50:]).all()
    found = read_checkpoints(sample, checkpoints, choose_device("cpu"))
    assert found.sequences == len(LENGTHS) - 1
    known = np.ones(len(ids), bool)
    known[:50], known[49::50] = False, False
    np.testing.assert_array_equal(found.known, known)
    assert (found.learned()[known] == 100).all()
    other = cache_with_tops(
        tmp_path / "d", np.stack([ids, ids])[:, ::-1], LENGTHS, VOCAB, ids[::-1]
    )
    with pytest.raises(MismatchError, match="holds none of the 24 sequences"):
        find_positions(sample, other)
    with pytest.raises(UsageError, match="at least 2 checkpoints"):
        read_checkpoints(sample, {100: cache}, choose_device("cpu"))


def test_undefined_states_have_no_depth(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    ids, following = texts(rng)
    tops = planted_tops(rng, following, np.full(len(ids), 2))
    tops[-1, 3], tops[2, 7] = -1, -1
    cache = cache_with_tops(tmp_path, tops, LENGTHS, VOCAB, ids)
    top = read_top_tokens(cache, np.arange(10), choose_device("cpu"))
    assert top.tolist() == [*following[:3], -1, *following[4:10]]
    result = study_prediction_depth(cache, split="all", progress=None, device="cpu")
    row = row_of(result, "depth", division="all")
    assert row.n == len(ids) - 1
    assert row.depth == pytest.approx((2 * (len(ids) - 2) + 3) / (len(ids) - 1))
    assert any("2 readings have logits that are not finite" in note for note in result.notes)


def test_arguments_of_checkpoints_are_checked() -> None:
    assert parse_checkpoints(["1000=3f2a", "20=a=b"]) == {1000: "3f2a", 20: "a=b"}
    for wrong in ("3f2a", "=3f2a", "x=3f2a", "10="):
        with pytest.raises(UsageError, match="ITERATION=CACHE"):
            parse_checkpoints([wrong])
    with pytest.raises(UsageError, match="two checkpoints"):
        parse_checkpoints(["1=a", "01=b"])


def test_deciles_share_the_frequencies(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    ids, following = texts(rng)
    cache = cache_with_tops(tmp_path, ids[None].repeat(2, 0), LENGTHS, VOCAB, ids)
    counts = count_tokens(cache)
    np.testing.assert_array_equal(counts, np.bincount(ids, minlength=VOCAB))
    following[3] = -1
    deciles = frequency_deciles(counts, following)
    assert deciles[3] == 0
    known = following >= 0
    order = np.sort(counts[following[known]])
    for token in range(VOCAB):
        below = np.searchsorted(order, counts[token], "left")
        upto = np.searchsorted(order, counts[token], "right")
        expected = min(10, int(10 * (below + upto) / 2 / len(order)) + 1)
        assert set(deciles[following == token].tolist()) <= {expected}
    assert frequency_deciles(counts, np.array([-1])).tolist() == [0]
    distinct = frequency_deciles(np.arange(100), rng.permutation(100))
    assert np.bincount(distinct)[1:].tolist() == [10] * 10


def test_classes_are_those_of_the_words_of_the_text(tiny_cache: ActivationCache) -> None:
    positions = np.arange(tiny_cache.positions)
    text_tokens = tiny_cache.following_tokens(positions)
    classes = classify_next_tokens(tiny_cache, positions, text_tokens)
    tokenizer = tiny_cache.tokenizer()
    continued, names = word_continuation_mask(tiny_cache), name_mask(tiny_cache)
    seen = set()
    for position in positions.tolist():
        token, found = int(text_tokens[position]), classes[position]
        seen.add(found)
        if token < 0:
            assert found == ""
            continue
        text = tokenizer.decode([token], skip_special_tokens=False)
        if found in ("word start", "inside word", "name"):
            assert any(letter.isalpha() or letter == "\ufffd" for letter in text)
            assert continued[position] == (found == "inside word") or found == "name"
            assert not names[position] or found == "name"
        elif found == "digit":
            assert text.strip()[0].isdigit()
        elif found == "space":
            assert not text.strip()
        else:
            assert found == "punctuation"
            assert not any(letter.isalnum() for letter in text)
    assert {"word start", "inside word"} <= seen


def test_a_label_of_numbers_stands_for_the_iteration(tiny_cache: ActivationCache) -> None:
    with pytest.raises(NotFoundError, match="no label 'learned'"):
        study_prediction_depth(tiny_cache, learned="learned", progress=None)


def test_one_document_and_few_layers_are_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    ids, following = texts(rng)
    tops = planted_tops(rng, following, np.full(len(ids), 2))
    documents = np.zeros(len(ids), np.int64)
    cache = cache_with_tops(tmp_path, tops, LENGTHS, VOCAB, ids, documents)
    lens = LogitLens([1, 3], 0)
    result = study_prediction_depth(cache, [lens], split="all", progress=None, device="cpu")
    assert row_of(result, "depth", lens="logit 2", division="all").depth == 3
    assert any("reads the layers 1, 3, 4" in note for note in result.notes)
    assert any("all positions are of one document" in note for note in result.notes)
    assert result.subject.units == "sequence"


@pytest.mark.parametrize("lengths", [[1], [1, 1], [5]])
def test_few_positions_give_what_is_defined(tmp_path: Path, lengths: list[int]) -> None:
    ids = np.arange(1, 1 + sum(lengths))
    tops = np.stack([ids, ids + 1, ids + 1])
    cache = cache_with_tops(tmp_path, tops, lengths, VOCAB, ids)
    result = study_prediction_depth(cache, split="all", progress=None, device="cpu")
    row = row_of(result, "depth", division="all")
    assert (row.n, row.depth) == (len(ids), 1)
    assert row.depth_interval == ((1, 1) if len(lengths) > 1 else (None, None))
    assert {row.correlation for row in result.table("correlations").rows} == {None}
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_command_writes_a_page(tiny_cache: ActivationCache, tmp_path: Path) -> None:
    page = tmp_path / "depth.html"
    arguments = ["study", "depth", str(tiny_cache.path), "--json", "--max-positions", "500"]
    done = CliRunner().invoke(main, [*arguments, "--html", str(page), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    value = json.loads(done.output)
    assert {row["division"] for row in value["tables"]["depth"]} == {"all", "class", "frequency"}
    assert "Prediction depth of" in page.read_text()
    wrong = CliRunner().invoke(main, [*arguments, "--step", "nonsense"])
    assert wrong.exit_code == 2
    assert "ITERATION=CACHE" in wrong.output

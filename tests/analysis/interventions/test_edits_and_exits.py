"""Edited directions and early exits, against formulas and loops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.analysis.interventions.edit_directions import LayerClasses, token_logit_row
from residua.analysis.interventions.edit_study import EditRow, study_edits, word_probabilities
from residua.analysis.interventions.exit_study import (
    ExitRow,
    exit_columns,
    exit_row,
    study_early_exit,
)
from residua.analysis.interventions.layer_runs import LayerRuns
from residua.analysis.interventions.row_changes import remove_component
from residua.analysis.interventions.word_sentences import read_word_sentences
from residua.analysis.studies.results.study_result import StudyResult
from residua.analysis.studies.trajectories.position_sample import choose_positions
from residua.analysis.studies.trajectories.readings import Trajectories
from residua.cache.errors import DataError, UsageError
from residua.probes.moments.moments import Moments

from ...support import models


@pytest.fixture(scope="module")
def words(tiny_cache: residua.ActivationCache) -> tuple[str, str]:
    """Two frequent words of the texts that begin with different tokens."""
    tokenizer = tiny_cache.tokenizer()
    text = " ".join(models.texts(20)).split()
    found: dict[int, str] = {}
    for word in sorted({w for w in text if w.isalpha()}, key=lambda w: (-text.count(w), w)):
        found.setdefault(tokenizer.encode(f"a {word}").ids[-1], word)
    first, second = list(found.values())[:2]
    return first, second


@pytest.fixture(scope="module")
def sentence_file(words: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentences") / "sentences.tsv"
    text = models.texts(6, seed=3)
    rows = [f"{' '.join(t.split()[:n])} {words[n % 2]} end" for n, t in enumerate(text, 2)]
    path.write_text("id\tsentence\n" + "".join(f"{n}\t{row}\n" for n, row in enumerate(rows)))
    return path


@pytest.fixture(scope="module")
def edits(
    tiny_cache: residua.ActivationCache, sentence_file: Path, words: tuple[str, str]
) -> StudyResult:
    return study_edits(
        tiny_cache,
        sentences=sentence_file,
        words=words,
        amounts=(-1, 1, 2),
        layers=(1, 2),
        max_positions=200,
        device="cpu",
        progress=None,
    )


def edit_rows(result: StudyResult) -> list[EditRow]:
    return list(result.table("edits").rows)


def test_an_amount_of_0_changes_nothing_at_all(edits: StudyResult) -> None:
    rows = [row for row in edit_rows(edits) if row.amount == 0]
    assert len(rows) == 8
    for row in rows:
        assert (row.gain, row.kl, row.loss_change, row.flips) == (0.0, 0.0, 0.0, 0.0)
        assert row.rare_loss_change == 0.0
    assert len({(row.preference, row.bias) for row in rows}) == 1


def test_harm_grows_with_the_amount(edits: StudyResult) -> None:
    by_key = {(r.layer, r.direction, r.amount): r for r in edit_rows(edits)}
    for layer in (1, 2):
        for direction in ("mean-difference", "erasure", "token", "random"):
            half, full = (by_key[layer, direction, amount].kl for amount in (1.0, 2.0))
            assert 0 < (half or 0.0) < (full or 0.0)


def test_the_token_direction_amplified_moves_the_words_more_than_a_random_one(
    edits: StudyResult,
) -> None:
    by_key = {(r.layer, r.direction, r.amount): r for r in edit_rows(edits)}

    def spread(direction: str) -> float:
        odds = [by_key[2, direction, amount].log_odds or 0.0 for amount in (-1.0, 2.0)]
        return abs(odds[0] - odds[1]) / (by_key[2, direction, 2.0].kl or 1.0) ** 0.5

    assert spread("token") > spread("random")


def test_probabilities_of_words_are_those_of_a_hooked_run(
    tiny_cache: residua.ActivationCache, sentence_file: Path, words: tuple[str, str]
) -> None:
    runs = LayerRuns.prepare(tiny_cache, max_positions=100, device="cpu")
    found = read_word_sentences(tiny_cache, sentence_file, words)
    classes = LayerClasses.collect(tiny_cache, 2, (4, 5))
    basis = classes.direction("random", seed=2)
    with torch.inference_mode():
        log_p = word_probabilities(runs, found, 2, remove_component(basis, 1.5))
    module: Any = runs.model.blocks.model
    block = runs.model.blocks.blocks[1]

    def edit(_: Any, __: Any, output: Any) -> Any:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        new = hidden - 1.5 * (hidden - basis.ablate(hidden))
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handle = block.register_forward_hook(edit)
    try:
        for number, sentence in enumerate(found.sentences):
            ids = torch.tensor([sentence.tokens])
            expected = module(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)
            pair = expected[[sentence.first, sentence.second]].numpy()
            np.testing.assert_allclose(log_p[number], pair, rtol=1e-4, atol=1e-4)
    finally:
        handle.remove()


def planted_classes(n: int = 400, d: int = 6) -> tuple[LayerClasses, np.ndarray, np.ndarray]:
    """Rows of two classes with correlated noise, and their labels."""
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, n)
    rows = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + labels[:, None] * rng.normal(size=d)
    means = rows[labels == 0].mean(0), rows[labels == 1].mean(0)
    counts = (int((labels == 0).sum()), int(labels.sum()))
    return LayerClasses(1, Moments.of(rows, rows), means, counts), rows, labels


def test_after_an_erasure_no_coordinate_covaries_with_the_class() -> None:
    classes, rows, labels = planted_classes()
    basis = classes.direction("erasure")
    erased = np.asarray(remove_component(basis)(torch.from_numpy(rows), np.arange(len(rows))))
    before, after = (
        np.abs((x - x.mean(0)).T @ (labels - labels.mean()) / len(x)).max() for x in (rows, erased)
    )
    assert before > 0.1
    assert after < 1e-5 * before
    # The oblique projection of LEACE, by its formula.
    sigma = np.cov(rows.T, bias=True)
    values, vectors = np.linalg.eigh(sigma)
    whiten = (vectors / np.sqrt(values)) @ vectors.T
    u = whiten @ (rows - rows.mean(0)).T @ (labels - labels.mean())
    u /= np.linalg.norm(u)
    centred = rows - rows.mean(0)
    expected = rows - np.outer(centred @ whiten @ u, np.linalg.inv(whiten) @ u)
    np.testing.assert_allclose(erased, expected, atol=1e-4)


def test_a_mean_difference_taken_away_puts_both_classes_at_one_place() -> None:
    classes, rows, labels = planted_classes()
    basis = classes.direction("mean-difference")
    edited = np.asarray(remove_component(basis)(torch.from_numpy(rows), np.arange(len(rows))))
    difference = rows[labels == 0].mean(0) - rows[labels == 1].mean(0)
    unit = difference / np.linalg.norm(difference)
    assert np.ptp(edited @ unit) < 1e-4


def test_the_token_direction_is_the_gradient_of_the_head(
    tiny_cache: residua.ActivationCache,
) -> None:
    head = tiny_cache.head
    row = token_logit_row(tiny_cache, (5, 9))
    h = torch.randn(tiny_cache.d_model, dtype=torch.float64, requires_grad=True)
    assert head.norm in ("layernorm", "rmsnorm")
    centred = h - h.mean() if head.norm == "layernorm" else h
    # The norm's division is held fixed.
    z = centred / centred.square().mean().sqrt().detach() * torch.from_numpy(head.norm_weight)
    w = torch.from_numpy(head.unembedding).double()
    (z.double() @ (w[5] - w[9])).backward()
    gradient = h.grad
    assert gradient is not None
    np.testing.assert_allclose(
        row / np.linalg.norm(row), (gradient / gradient.norm()).numpy(), atol=1e-5
    )
    classes = LayerClasses.collect(tiny_cache, 1, (5, 9))
    basis = classes.direction("token", logit_row=row)
    np.testing.assert_allclose(np.linalg.norm(basis.encoder), 1, rtol=1e-6)


def test_sentences_of_all_kinds_of_files(
    tiny_cache: residua.ActivationCache, words: tuple[str, str], tmp_path: Path
) -> None:
    first, second = words
    lines = [f"one {first} two", f"one {second} two", "nothing here", f"{first} begins", ""]
    table = "sentence,n\n" + "".join(f"{line},1\n" for line in lines if line)
    files = {
        "a.txt": "\n".join(lines),
        "a.csv": table,
        "a.tsv": table.replace(",", "\t"),
        "a.jsonl": "\n".join(f'{{"text": "{line}"}}' for line in lines),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        found = read_word_sentences(tiny_cache, tmp_path / name, words)
        assert [sentence.text for sentence in found.sentences] == ["one"]
        assert (found.without_word, found.at_start, found.repeated) == (1, 1, 1)
        (sentence,) = found.sentences
        assert sentence.first != sentence.second
        prefix = tiny_cache.tokenizer().encode(f"one {first}").ids
        assert [*sentence.tokens, sentence.first] == prefix[: len(sentence.tokens) + 1]
        assert len(found.describe()) == 3


def test_sentences_that_cannot_be_read_are_said(
    tiny_cache: residua.ActivationCache, words: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "b.csv").write_text("words\na b c\n")
    (tmp_path / "b.jsonl").write_text("{not json")
    (tmp_path / "b.txt").write_text("no such word\n")
    for name, message in (
        ("b.csv", "no column 'sentence'"),
        ("b.jsonl", "cannot be read as sentences"),
        ("b.txt", "no sentence of"),
        ("missing.txt", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            read_word_sentences(tiny_cache, tmp_path / name, words)
    with pytest.raises(UsageError, match="two different words"):
        read_word_sentences(tiny_cache, tmp_path / "b.txt", ("he", " he"))


def test_words_without_rows_have_no_class_direction(tiny_cache: residua.ActivationCache) -> None:
    counts = np.bincount(np.asarray(tiny_cache.tokens[:]), minlength=tiny_cache.vocab)
    unused = np.flatnonzero(counts == 0)[:2].tolist()
    classes = LayerClasses.collect(tiny_cache, 1, (unused[0], unused[1]))
    assert classes.counts == (0, 0)
    with pytest.raises(UsageError, match="the train split has 0 and 0"):
        classes.direction("erasure")
    with pytest.raises(UsageError, match="there is no direction 'he'"):
        study_edits(tiny_cache, sentences="x.txt", directions=["he"], progress=None)
    with pytest.raises(UsageError, match="finite numbers"):
        study_edits(tiny_cache, sentences="x.txt", amounts=[float("nan")], progress=None)


# Early exit


def test_the_exit_is_the_first_confident_layer_by_a_loop() -> None:
    rng = np.random.default_rng(2)
    confidence = rng.random((50, 5))
    confidence[3] = np.nan
    confidence[4, :3] = np.nan
    columns = exit_columns(confidence.copy(), 0.7)
    for row, column in zip(confidence, columns, strict=True):
        expected = next((n for n, value in enumerate(row) if value >= 0.7), 4)
        assert column == expected


def test_exits_of_known_trajectories(tiny_cache: residua.ActivationCache) -> None:
    sample = choose_positions(tiny_cache, "test", 64, 0)
    n = sample.count
    confidence = np.tile([0.1, 0.6, 0.95, 1.0], (n, 1)).astype(np.float32)
    confidence[: n // 2, 1] = 0.2
    top = np.tile([1, 2, 3, 3], (n, 1))
    loss = np.tile([4.0, 3.0, 2.5, 2.0], (n, 1)).astype(np.float32)
    lens = Trajectories(
        "x", (0, 1, 2, 3), {"max_probability": confidence, "cross_entropy": loss}, top
    )
    row = exit_row(sample, lens, 0.5, 3)
    half = n // 2
    assert row.saved == pytest.approx((half / 3 + (n - half) * 2 / 3) / n)
    assert row.agreement == pytest.approx(half / n)
    assert row.agreement_of_exits == row.agreement
    assert row.exits == 1.0
    assert row.loss_change == pytest.approx((half * 0.5 + (n - half) * 1.0) / n)
    never = exit_row(sample, lens, 0.96, 3)
    assert (never.saved, never.agreement, never.exits) == (0.0, 1.0, 0.0)
    assert never.agreement_of_exits is None
    assert never.loss_change == 0.0


def test_a_higher_threshold_saves_less(tiny_cache: residua.ActivationCache) -> None:
    result = study_early_exit(
        tiny_cache, thresholds=(0.05, 0.2, 0.99), max_positions=300, progress=None
    )
    rows: list[ExitRow] = list(result.table("exits").rows)
    saved = [row.saved for row in rows]
    assert saved == sorted(saved, reverse=True)
    assert len(result.says) == 1
    with pytest.raises(UsageError, match="between 0 and 1"):
        study_early_exit(tiny_cache, thresholds=(0.5, 1.0), progress=None)

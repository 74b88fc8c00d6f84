"""Precision ahead of the text is planted truth where it is planted, and chance elsewhere."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import residua
from residua.analysis.studies.in_context import shot_readings
from residua.analysis.studies.in_context.shot_readings import ShotSample, measure_hits
from residua.analysis.studies.in_context.shot_rows import FirstShotRow
from residua.analysis.studies.in_context.shot_study import study_in_context
from residua.analysis.studies.texts.in_context_data import write_in_context_data
from residua.cache.devices import choose_device
from residua.cache.errors import NotFoundError, UsageError
from residua.cache.tokens.token_stream import KeptRuns
from residua.cli import main
from residua.probes.base.readout import ReadoutBatch

from ....support.labelled import LabelledCache
from ....support.synthetic import make_cache, random_head

VOCAB, PERIOD, DOCUMENTS, SHOTS = 30, 3, 80, 4
WIDTH = VOCAB * PERIOD
PLANTED = 1
"""Layer whose state holds the tokens that follow."""


class PlantedReadout:
    """Reads one token for each offset from its own part of the state."""

    kind = "planted"

    def pairs(self) -> list[tuple[int | None, int]]:
        return [(layer, offset) for layer in (0, PLANTED) for offset in range(PERIOD)]

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> torch.Tensor:
        assert batch.hidden is not None
        return batch.hidden[:, offset * VOCAB : (offset + 1) * VOCAB]


def planted_cache(root: Path, enough: int = 2, spoil: bool = False) -> LabelledCache:
    """Periods of random tokens; from `enough` shots on, a state at `PLANTED` holds what follows.

    Only the positions that predict the last period are kept.
    """
    rng = np.random.default_rng(0)
    sequences, states, shots = [], [], []
    for number in range(DOCUMENTS):
        count = number % SHOTS
        period = rng.choice(VOCAB, PERIOD, replace=False)
        tokens = np.concatenate([[rng.integers(VOCAB)], np.tile(period, count + 1)])
        sequences.append(tokens)
        shots.append(count)
        for index in range(len(tokens) - 1 - PERIOD, len(tokens) - 1):
            state = rng.normal(0, 0.1, WIDTH)
            for offset in range(PERIOD):
                if count >= enough and index + offset + 1 < len(tokens):
                    state[offset * VOCAB + tokens[index + offset + 1]] = 9
            states.append(state)
    hidden = np.array(states, np.float32)
    noise = [rng.normal(size=hidden.shape).astype(np.float32) for _ in range(2)]
    if spoil:
        hidden[0] = np.nan
    lengths = np.array([len(tokens) for tokens in sequences])
    runs = KeptRuns(np.arange(DOCUMENTS), lengths - 1 - PERIOD, np.full(DOCUMENTS, PERIOD))
    cache = make_cache(
        root, [noise[0], hidden, noise[1]], lengths.tolist(), random_head(WIDTH, VOCAB),
        ids=np.concatenate(sequences), runs=runs, documents=None,
    )  # fmt: skip
    labels = {
        "shots": np.array(shots),
        "needed": np.full(DOCUMENTS, 1),
        "horizon": np.full(DOCUMENTS, PERIOD),
        "kind": np.full(DOCUMENTS, "period"),
    }
    return LabelledCache(cache, labels)


def counted_elsewhere(root: Path) -> list[residua.BigramChain | residua.MarginalBigram]:
    """Bigrams of other random tokens."""
    rng = np.random.default_rng(5)
    layers = [rng.normal(size=(600, WIDTH)).astype(np.float32) for _ in range(3)]
    other = make_cache(root, layers, [20] * 30, random_head(WIDTH, VOCAB), seed=9)
    return [
        residua.BigramChain([0]).fit(other, progress=None),
        residua.MarginalBigram([1, 2]).fit(other, progress=None),
    ]


def test_a_planted_period_is_foreseen_from_the_planted_shots_on(tmp_path: Path) -> None:
    cache = planted_cache(tmp_path / "a")
    lenses = [PlantedReadout(), *counted_elsewhere(tmp_path / "b")]
    result = study_in_context(cache, lenses, split="all", progress=None)
    rows = [row for row in result.table("shots").rows if row.lens == "planted"]
    assert {row.offset for row in rows} == set(range(PERIOD))
    assert {row.part for row in rows} == {"inside"}
    for row in rows:
        assert row.n == DOCUMENTS // SHOTS * (PERIOD - row.offset)
        assert row.predictable == (row.shots >= 1)
        if row.layer == PLANTED and row.shots >= 2:
            assert row.precision == 1
            assert row.bigram < 0.3
            assert row.gain == pytest.approx(1 - row.bigram)
        else:
            assert row.precision < 0.3
    first: dict[tuple[int | None, int], FirstShotRow] = {
        (row.layer, row.offset): row
        for row in result.table("first-shots").rows
        if row.lens == "planted"
    }
    for offset in range(PERIOD):
        assert first[PLANTED, offset].first_shots == 2
        assert first[0, offset].first_shots is None
    assert any("above the bigram from 2 shots on (layer 1" in line for line in result.says)
    assert study_in_context(cache, lenses, split="all", progress=None) == result


def test_where_nothing_is_planted_no_number_of_shots_is_named(tmp_path: Path) -> None:
    cache = planted_cache(tmp_path / "a", enough=99)
    lenses = [PlantedReadout(), *counted_elsewhere(tmp_path / "b")]
    result = study_in_context(cache, lenses, split="all", progress=None)
    assert {row.first_shots for row in result.table("first-shots").rows} == {None}
    mean = np.mean([row.precision for row in result.table("shots").rows])
    assert mean == pytest.approx(1 / VOCAB, abs=0.03)


@pytest.mark.parametrize("block_bytes", [1, 4 * VOCAB * 7, 1 << 20])
def test_hits_are_those_of_the_logits_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(shot_readings, "BLOCK_BYTES", block_bytes)
    cache = planted_cache(tmp_path, spoil=True)
    sample = ShotSample(cache, cache.sequences("all"))
    lenses = {"logit": residua.LogitLens.of(cache, [0, 1]), "planted": PlantedReadout()}
    calls: list[tuple[int, int]] = []
    found = measure_hits(
        sample, lenses, [0, 1], choose_device("cpu"), lambda *done: calls.append(done)
    )
    assert calls[-1] == (5, 5)
    for (name, layer, offset), hits in found.items():
        assert layer is not None
        states = cache.residual_array(layer)[:]
        logits = (
            np.asarray(cache.head.logits(states))
            if name == "logit"
            else states[:, offset * VOCAB : (offset + 1) * VOCAB]
        )
        expected = []
        for sequence in range(DOCUMENTS):
            tokens = cache.contexts.ids[
                cache.contexts.start[sequence] : cache.contexts.start[sequence]
                + cache.contexts.length[sequence]
            ]
            for step in range(PERIOD - offset):
                row = logits[sequence * PERIOD + step]
                token = tokens[len(tokens) - PERIOD + step + offset]
                expected.append(bool(np.isfinite(row).all()) and int(row.argmax()) == token)
        np.testing.assert_array_equal(hits, expected)
        assert not (layer == PLANTED and hits[0])


def test_texts_are_not_predicted_from_counts_of_themselves(tmp_path: Path) -> None:
    cache = planted_cache(tmp_path / "a")
    with pytest.raises(UsageError, match="read --split test"):
        study_in_context(cache, [PlantedReadout()], split="all", progress=None)
    chain, marginal = counted_elsewhere(tmp_path / "b")
    with pytest.raises(UsageError, match="read --split test"):
        study_in_context(cache, [PlantedReadout(), chain], split="all", progress=None)
    fewer = residua.MarginalBigram([1]).fit(cache, progress=None)
    with pytest.raises(NotFoundError, match="lacks the offset 2"):
        study_in_context(cache, [PlantedReadout(), chain, fewer], split="all", progress=None)
    result = study_in_context(cache, [PlantedReadout()], split="test", progress=None)
    assert any("counted in the train split" in note for note in result.notes)
    assert result.subject.split == "test"


def test_requests_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    cache = planted_cache(tmp_path / "a")
    bare = residua.ActivationCache(cache.path)
    with pytest.raises(NotFoundError, match="residua data icl"):
        study_in_context(bare, progress=None)
    with pytest.raises(NotFoundError, match="no lens reads the offset 7"):
        study_in_context(cache, [PlantedReadout()], offsets=[7], progress=None)
    with pytest.raises(UsageError, match="no whole numbers"):
        study_in_context(cache, shots="kind", progress=None)
    unknown = LabelledCache(bare, {"shots": np.zeros(DOCUMENTS, int)})
    with pytest.raises(UsageError, match="known_until"):
        study_in_context(unknown, progress=None)


def test_parts_of_an_answer_are_told_apart_by_characters_and_by_tokens(
    tmp_path: Path, model_folder: Path
) -> None:
    for number, model in enumerate((None, model_folder)):
        out = tmp_path / f"{number}.jsonl"
        write_in_context_data(out, ["induction"], [0, 1], 4, model=model)
        cache = residua.extract(
            str(model_folder), str(out), root=tmp_path / "root", pack=False, context=128,
            positions="answer" if model is None else "explicit", progress=None,
        )  # fmt: skip
        sample = ShotSample(cache, cache.sequences("all"))
        tokenizer = cache.tokenizer()
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        sources = sample.sources(0)
        inside = sample.is_inside(0, sources)
        texts = {}
        for sequence in range(len(sample.sequences)):
            chosen = sources[(sample.sequence_rows[sources] == sequence)]
            known = chosen[inside[np.isin(sources, chosen)]]
            ids = sample.next_tokens[known].tolist()
            texts[tokenizer.decode(ids).strip()] = ids
        if model is None:
            expected = {r["text"][r["answer_start"] : r["known_until"]] for r in rows}
            assert set(texts) == expected
        else:
            found = {tuple(ids) for ids in texts.values()}
            assert found == {
                tuple(r["input_ids"][1 - (len(r["positions"]) + 1) :][: r["horizon"]]) for r in rows
            }


def test_the_command_runs_on_words(tmp_path: Path, model_folder: Path) -> None:
    out = tmp_path / "icl.jsonl"
    write_in_context_data(out, ["map", "period"], [0, 1], 30)
    cache = residua.extract(
        str(model_folder), str(out), root=tmp_path / "root", pack=False, positions="answer",
        context=128, progress=None,
    )  # fmt: skip
    words = ["study", "icl", cache.id[:8], "--root", str(tmp_path / "root")]
    result = CliRunner().invoke(main, [*words, "--html", str(tmp_path / "icl.html"), "--json"])
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert {row["kind"] for row in value["tables"]["shots"]} == {"map", "period"}
    assert "In-context learning" in (tmp_path / "icl.html").read_text()
    wrong = CliRunner().invoke(main, [*words, "--split", "all"])
    assert wrong.exit_code == 2
    assert "residua fit baseline OTHER" in wrong.output

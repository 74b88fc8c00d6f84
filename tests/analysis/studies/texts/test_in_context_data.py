"""Answers follow from the shots by the rule of their kind, and not from none."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import residua
from residua.analysis.studies.texts.in_context_data import (
    BEYOND,
    KINDS,
    SEGMENT,
    in_context_rows,
    in_context_token_rows,
    write_in_context_data,
)
from residua.cache.errors import UsageError
from residua.cli import main


def test_every_text_ends_with_its_answer_and_says_where_the_known_part_ends() -> None:
    rows = list(in_context_rows(shots=[0, 1, 3], documents=6))
    assert len(rows) == len(KINDS) * 3 * 6
    for row in rows:
        start = row["answer_start"]
        assert row["text"] == row["text"][:start] + row["answer"] + "\n"
        known = row["text"][start : row["known_until"]]
        assert known
        assert row["answer"].startswith(known)
        context = row["text"][:start]
        if row["kind"] == "period":
            words = context.split()[1:]
            assert len(words) == row["period"] * row["shots"]
            assert words == known.split() * row["shots"]
        elif row["kind"] == "induction":
            segment = [context.split()[-1], *known.split()]
            assert len(segment) == SEGMENT
            assert context.count(" ".join(segment)) == row["shots"]
            beyond = row["answer"].split()[SEGMENT - 1 :]
            assert len(beyond) == BEYOND
            assert not set(beyond) & set(segment)
        elif row["kind"] == "arithmetic":
            *lines, asked = context.splitlines()
            assert len(lines) == row["shots"]
            sign = 1 if row["rule"] == "sum" else -1
            for line in (*lines, asked + known):
                a, b, c = (int(x) for x in line.replace("?", " ").replace("=", " ").split())
                assert c == a + sign * b
        else:
            lines = dict(line.split(" -> ") for line in context.splitlines()[:-1])
            asked = context.splitlines()[-1].removesuffix(" -> ")
            expected = {
                "swap": " ".join(reversed(asked.split())),
                "repeat": f"{asked} {asked}",
                "keep": asked,
                "dictionary": lines.get(asked, known),
            }
            assert known == expected[row["rule"]]
            assert (asked in lines) == (row["rule"] == "dictionary" and row["shots"] > 0)


def test_more_documents_change_no_earlier_one() -> None:
    few = list(in_context_rows(["map"], [2], 3, seed=5))
    assert list(in_context_rows(["map"], [2], 8, seed=5))[:3] == few
    assert list(in_context_rows(["map"], [2], 3, seed=6)) != few


def test_token_rows_repeat_ids_and_name_the_positions_before_the_answer() -> None:
    ids = list(range(10, 90))
    for row in in_context_token_rows(ids, shots=[0, 2], documents=4, periods=(4,)):
        tokens, length = row["input_ids"], len(row["positions"])
        assert set(tokens) <= set(ids)
        assert row["positions"] == list(range(-length - 1, -1))
        answer = tokens[-length:]
        known = answer[: row["horizon"]]
        if row["kind"] == "period":
            assert tokens[1:] == known * (row["shots"] + 1)
        else:
            assert length - row["horizon"] == BEYOND
            segment = [tokens[-length - 1], *known]
            found = [tokens[i : i + SEGMENT] == segment for i in range(len(tokens))]
            assert sum(found) == row["shots"] + 1


def test_counts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for kinds, shots, documents, periods in (
        ([], [1], 1, [3]), (["sums"], [1], 1, [3]), (["map"], [], 1, [3]),
        (["map"], [-1], 1, [3]), (["map"], [99], 1, [3]), (["map"], [1], 0, [3]),
        (["period"], [1], 1, [1]), (["period"], [1], 1, []),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            list(in_context_rows(kinds, shots, documents, periods))
    with pytest.raises(UsageError, match="need words"):
        list(in_context_token_rows([1, 2], ["map"]))
    with pytest.raises(UsageError, match="JSON lines"):
        write_in_context_data(tmp_path / "icl.csv")
    with pytest.raises(UsageError, match="at most"):
        list(in_context_rows(["map"], [60], 50))


def test_the_command_writes_words_and_tokens_that_extract_reads(
    tmp_path: Path, model_folder: Path
) -> None:
    out = tmp_path / "icl.jsonl"
    words = ["data", "icl", str(out), "--shots", "0-1", "--documents", "3"]
    result = CliRunner().invoke(main, [*words, "--kind", "map, period", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["texts"] == 12
    wrong = CliRunner().invoke(main, [*words, "--kind", "sums"])
    assert wrong.exit_code == 2
    assert "kinds are induction" in wrong.output
    ids = [*words, "--kind", "period", "--model", str(model_folder)]
    assert CliRunner().invoke(main, ids).exit_code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    cache = residua.extract(
        str(model_folder), str(out), root=tmp_path / "root", pack=False, positions="explicit",
        progress=None,
    )  # fmt: skip
    assert cache.positions == sum(len(row["positions"]) for row in rows)
    assert set(cache.label_names) >= {"kind", "shots", "needed", "horizon", "period"}

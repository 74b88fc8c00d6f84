"""Key-value texts hold the answer once, at every position, and are the same for the same seed."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from residua.analysis.studies.texts.key_value_data import (
    LAYOUTS,
    key_value_rows,
    write_key_value_data,
)
from residua.cache.errors import UsageError
from residua.cli import main


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_question_stands_at_every_position(layout: str) -> None:
    rows = list(key_value_rows([3, 5], 4, layout))
    assert len(rows) == 4 * (3 + 5)
    for question in {row["question"] for row in rows}:
        same = [row for row in rows if row["question"] == question]
        assert [row["gold"] for row in same] == list(range(same[0]["documents"]))
        assert len({row["answer"] for row in same}) == 1
        assert len({row["text"] for row in same}) == len(same)
        for row in same:
            assert row["text"].count(row["answer"].strip('"')) == 2
            assert row["text"].rstrip("\n.").endswith(row["answer"])
    places = [row["text"].index(row["answer"].strip('"')) for row in rows[:3]]
    assert places == sorted(places)


def test_more_questions_change_no_earlier_one() -> None:
    few, many = list(key_value_rows([4], 2, seed=3)), list(key_value_rows([4], 5, seed=3))
    assert many[: len(few)] == few
    assert list(key_value_rows([4], 2, seed=4)) != few


def test_counts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for pairs, questions in (([], 1), ([0], 1), ([1000], 1), ([4], 0)):
        with pytest.raises(UsageError, match="pairs are 1 to"):
            list(key_value_rows(pairs, questions))
    with pytest.raises(UsageError, match="layout"):
        list(key_value_rows([4], 1, "table"))
    with pytest.raises(UsageError, match="JSON lines"):
        write_key_value_data(tmp_path / "kv.csv", [4], 1)


@pytest.mark.parametrize("words", [["kv"], ["multidoc", "gold.jsonl"]])
def test_a_folder_is_no_file_to_write(tmp_path: Path, words: list[str]) -> None:
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    result = CliRunner().invoke(main, ["data", *words, str(folder)])
    assert result.exit_code == 2, result.output
    assert f"{folder} is a folder" in result.output


def test_the_command_writes_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "kv.jsonl"
    words = ["data", "kv", str(out), "--pairs", "2,3", "--questions", "2", "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["texts"] == 10
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == list(key_value_rows([2, 3], 2))

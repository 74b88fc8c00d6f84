"""Multi-document texts: the gold passage at every position, and no answer in the others."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from residua.analysis.studies.texts.multi_document_data import (
    multi_document_rows,
    read_gold_questions,
)
from residua.cache.errors import DataError, UsageError
from residua.cli import main


def gold_row(number: int, **more: Any) -> dict[str, Any]:
    passage = {"title": f"T{number}", "text": f"It is Answer{number}x indeed.", "isgold": True}
    other = {"title": "U", "text": "no", "isgold": False}
    row = {"question": f"what {number}?", "answers": ["Nobody", f"Answer{number}x"]}
    return {**row, "ctxs": [other, passage], **more}


@pytest.fixture
def gold_file(tmp_path: Path) -> Path:
    path = tmp_path / "gold.jsonl.gz"
    rows = [gold_row(number) for number in range(12)]
    # Its passage has an answer of question 3, and so is no distractor of it.
    rows[5]["ctxs"][1]["text"] += " And ANSWER3X too."
    rows.append(gold_row(99, answers=["absent"]))
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_gold_passage_stands_at_every_position_and_the_others_have_no_answer(
    gold_file: Path,
) -> None:
    source = read_gold_questions(gold_file)
    assert len(source) == 12
    rows = list(multi_document_rows(source, [1, 4], 12))
    assert len(rows) == 12 * 5
    for question in {row["question"] for row in rows}:
        same = [row for row in rows if row["question"] == question]
        assert [row["gold"] for row in same] == list(range(same[0]["documents"]))
        for row in same:
            prompt, end = row["text"].rsplit("\nAnswer: ", 1)
            assert end == row["answer"]
            passages = prompt.split("\n\n")[1].split("\n")
            assert len(passages) == row["documents"]
            holders = [row["answer"].lower() in passage.lower() for passage in passages]
            assert holders == [place == row["gold"] for place in range(len(passages))]
            assert passages[row["gold"]].startswith(f"Document [{row['gold'] + 1}](Title: T")
        others = [
            [line.split(") ", 1)[1] for line in row["text"].split("\n\n")[1].split("\n")]
            for row in same
        ]
        for row, listed in zip(same, others, strict=True):
            del listed[row["gold"]]
        assert all(listed == others[0] for listed in others)


def test_the_same_seed_gives_the_same_texts(gold_file: Path) -> None:
    source = read_gold_questions(gold_file)
    first, again = (list(multi_document_rows(source, [3], 5, seed=1)) for _ in range(2))
    assert first == again
    assert list(multi_document_rows(source, [3], 5, seed=2)) != first


def test_a_question_without_distractors_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    rows = [gold_row(0, answers=["is"]), gold_row(1), gold_row(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(multi_document_rows(read_gold_questions(path), [2], 3))
    assert {row["question"] for row in found} == {"2-1", "2-2"}


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        "nonsense",
        json.dumps(gold_row(1, ctxs=[])),
        json.dumps(gold_row(1, ctxs=[{"isgold": True}])),
        json.dumps(gold_row(1, ctxs=[3])),
        json.dumps(gold_row(1, answers=3)),
        json.dumps(gold_row(1, question="x" * (1 << 20))),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "gold.jsonl"
    path.write_text(json.dumps(gold_row(0)) + "\n" + line + "\n")
    with pytest.raises(DataError, match="line 2"):
        read_gold_questions(path)


def test_files_and_counts_that_cannot_be_are_said(gold_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_gold_questions(tmp_path / "none.jsonl")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gold_file.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_gold_questions(cut)
    source = read_gold_questions(gold_file)
    for documents, questions in (([], 1), ([0], 1), ([3], 0), ([13], 1)):
        with pytest.raises(UsageError):
            list(multi_document_rows(source, documents, questions))


def test_the_command_writes_the_rows(gold_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "multi.jsonl"
    words = ["data", "multidoc", str(gold_file), str(out), "--documents", "2,3", "--json"]
    result = CliRunner().invoke(main, [*words, "--questions", "4"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["texts"] == 4 * 5
    assert len(out.read_text().splitlines()) == 20

"""Published rows become texts whose kept positions are the end of the context and the phrase."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residua
from residua.analysis.studies.texts.published_contexts import write_published_contexts
from residua.cache.errors import DataError, NotFoundError, UsageError

from ....support.models import texts


def write_csv(path: Path, teacher: bool = False) -> list[dict[str, Any]]:
    rows = []
    for number, text in enumerate(texts(12, seed=3)):
        row: dict[str, Any] = {
            "": number,
            "pile": 0,
            "doc": 100 + number,
            "start_prefix_index": 1025 * (number % 3),
            "decoded_prefix": f'{text}, "quoted\nand cut',
            "prefix_len": 40 + number,
            "gen_len": 11,
            "decoded_phrase": " the cat sat on" if number else "",
        }
        if teacher:
            row["teacher_phrase"] = " a dog ran"
        rows.append(row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def test_an_extraction_keeps_the_last_token_of_the_context_and_the_phrase(
    model_folder: Path, tmp_path: Path
) -> None:
    rows = write_csv(tmp_path / "test.csv")
    value = write_published_contexts(tmp_path / "test.csv", tmp_path / "rows.jsonl")
    assert value["texts"] == 11
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row, found in zip(rows[1:], written, strict=True):
        assert found["text"] == row["decoded_prefix"] + row["decoded_phrase"]
        assert found["answer_start"] == len(row["decoded_prefix"])
        assert (found["doc"], found["prefix_len"]) == (row["doc"], row["prefix_len"])
    cache = residua.extract(
        str(model_folder),
        str(tmp_path / "rows.jsonl"),
        root=tmp_path,
        pack=False,
        positions="answer",
        progress=None,
    )
    tokenizer = cache.tokenizer()
    for sequence in range(len(cache.sequence_length)):
        positions = cache.positions_of(np.array([sequence]))
        following = cache.following_tokens(positions).tolist()
        assert tokenizer.decode(following) == " the cat sat on"
    assert "prefix_len" in cache.label_names


def test_a_teachers_phrase_and_the_end_of_contexts_can_be_taken(tmp_path: Path) -> None:
    write_csv(tmp_path / "test.csv", teacher=True)
    write_published_contexts(
        tmp_path / "test.csv", tmp_path / "a.jsonl", "teacher_phrase", most_characters=9
    )
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert {row["text"] for row in rows} == {"d\nand cut a dog ran"}
    assert {row["answer_start"] for row in rows} == {9}


def test_other_files_are_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "test.csv")
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="no column teacher_phrase; its columns are pile, doc"):
        write_published_contexts(tmp_path / "test.csv", out, "teacher_phrase")
    with pytest.raises(NotFoundError, match="does not exist"):
        write_published_contexts(tmp_path / "none.csv", out)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="its columns are none"):
        write_published_contexts(tmp_path / "empty.csv", out)
    (tmp_path / "bytes.csv").write_bytes(b"decoded_prefix,decoded_phrase\n\xff\xfe,a\n")
    with pytest.raises(DataError, match="cannot be read"):
        write_published_contexts(tmp_path / "bytes.csv", out)
    with pytest.raises(UsageError, match="name it"):
        write_published_contexts(tmp_path / "test.csv", tmp_path / "out.txt")
    assert not out.exists()

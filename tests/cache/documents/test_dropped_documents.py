"""Claims about documents that are left out: they are counted and named, at every door."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import residua
from residua.cache.errors import DataError, UsageError
from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.request import ExtractionRequest
from residua.cli import main

from ...support.models import texts

ODD = [None, "", " \n\t", "a\ud800b", "", "", "", "", "", "\u3000"]
ROWS = [*({"text": text} for text in ODD), *({"text": text} for text in texts(8, seed=3)), {}]


def write_jsonl(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("pack", [True, False])
def test_documents_without_text_are_counted(model_folder: Path, tmp_path: Path, pack: bool) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", ROWS)
    request = ExtractionRequest(
        str(model_folder), str(data), tmp_path / "root", layers=(0,), pack=pack
    )
    done = answer_request(request)
    want = {
        "missing": {"documents": 2, "rows": [0, 18]},
        "empty": {"documents": 6, "rows": [1, 4, 5, 6, 7]},
        "only whitespace": {"documents": 2, "rows": [2, 9]},
        "half a surrogate pair": {"documents": 1, "rows": [3]},
    }
    reading = {"text_column": "text", "found": "by its name", "notes": [], "dropped": want}
    assert done.to_dict()["reading"] == reading
    rows = done.cache.array("tokens/row_id")[:]
    assert set(rows.tolist()) == set(range(10, 18))
    provenance = json.loads((done.cache.path / "provenance.json").read_text())
    assert provenance["reading"] == reading
    assert answer_request(request).to_dict()["reading"] == reading  # a hit says it, too


def test_the_command_line_says_what_was_left_out_and_guessed(
    model_folder: Path, tmp_path: Path
) -> None:
    rows = [{"odd": text, "m": n, "a b": n} for n, text in enumerate(texts(8, seed=3))]
    data = write_jsonl(tmp_path / "a.jsonl", [*rows, {"odd": "", "m": "x"}, {"m": 1, "a b": 0}])
    options = ["--root", str(tmp_path / "root"), "--no-pack", "--layers", "0"]

    def command_output(*more: str) -> str:
        found = CliRunner().invoke(main, ["extract", str(model_folder), str(data), *options, *more])
        assert found.exit_code == 0, found.output
        return found.output

    for shown in (command_output("--dry-run"), command_output()):
        assert "the texts are those of the column 'odd', the only column of text" in shown
        assert "1 documents are left out: empty (rows 8, counted from 0)" in shown
        assert "1 documents are left out: missing (rows 9, counted from 0)" in shown
        assert "column 'm' is kept as words" in shown
        assert "column 'a b' is the label 'a_b'" in shown
    reading = json.loads(command_output("--json"))["reading"]
    assert reading["dropped"]["empty"] == {"documents": 1, "rows": [8]}
    assert "the texts are those" not in command_output("--text-column", "odd")


def test_data_without_any_text_say_why(model_folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", ROWS[:3])
    with pytest.raises(DataError, match="no text .3 documents.; .*1 missing"):
        residua.extract(model_folder, data, root=tmp_path)


def test_a_grown_cache_says_what_was_left_out(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": text} for text in texts(20, seed=3)]

    def extract(found: Sequence[dict]) -> residua.ActivationCache:
        data = write_jsonl(tmp_path / "a.jsonl", found)
        return residua.extract(model_folder, data, root=tmp_path, pack=False, layers=(0,))

    extract(rows[:10])
    cache = extract([*rows, {"text": ""}])
    assert cache.manifest.extra["extends"]
    provenance = json.loads((cache.path / "provenance.json").read_text())
    assert provenance["reading"]["dropped"] == {"empty": {"documents": 1, "rows": [20]}}


def test_answers_that_are_zero_or_false_are_answers(model_folder: Path, tmp_path: Path) -> None:
    """And documents without a position to keep are counted."""
    answers = [0, False, "house", "absent", None, ""]
    rows = [{"text": f"the cat ran {answer}", "answer": answer} for answer in answers]
    rows[3]["text"] = "the cat ran home"
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    request = ExtractionRequest(
        str(model_folder), str(data), tmp_path, pack=False, layers=(0,), positions="answer"
    )
    done = answer_request(request)
    assert sorted(set(done.cache.array("sequences/row_id")[:].tolist())) == [0, 1, 2]
    dropped = done.to_dict()["reading"]["dropped"]
    assert dropped == {"no position for answer": {"documents": 3, "rows": [3, 4, 5]}}


def test_places_of_answers_in_csv_are_those_of_jsonl(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "cat 7 cat 7 cat", "answer": "7", "answer_start": at} for at in (4, 10, None)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    lines = [f"{r['text']},{r['answer']},{'' if r['answer_start'] is None else r['answer_start']}"
             for r in rows]  # fmt: skip
    (tmp_path / "a.csv").write_text("\n".join(["text,answer,answer_start", *lines]))
    held = []
    for name in ("a.jsonl", "a.csv"):
        cache = residua.extract(
            model_folder, tmp_path / name, root=tmp_path / name[2:], pack=False, layers=(0,),
            positions="answer",
        )  # fmt: skip
        rows_kept = cache.array("sequences/row_id")[:]
        assert set(rows_kept.tolist()) == {0, 1}
        held.append((rows_kept.tolist(), cache.array("tokens/index")[:].tolist()))
    assert held[0] == held[1]
    write_jsonl(tmp_path / "b.jsonl", [{"text": "a 7", "answer": "7", "answer_start": "two"}])
    with pytest.raises(DataError, match="'answer_start' must hold whole numbers, found 'two'"):
        residua.extract(
            model_folder, tmp_path / "b.jsonl", root=tmp_path, pack=False, positions="answer"
        )


@pytest.mark.parametrize("separator", ["tab", "\\t", "\t"])
def test_a_separator_can_be_named(model_folder: Path, tmp_path: Path, separator: str) -> None:
    (tmp_path / "a.csv").write_text("id\ttext\n" + "".join(f"1\t{t}\n" for t in texts(5, seed=3)))
    cache = residua.extract(
        model_folder, tmp_path / "a.csv", root=tmp_path, separator=separator, pack=False,
        layers=(0,),
    )  # fmt: skip
    assert len(cache.sequence_length) == 5


@pytest.mark.parametrize("separator", ["", ";;", '"', "\n"])
def test_a_separator_is_one_character(separator: str) -> None:
    with pytest.raises(UsageError, match="must be one character, or tab"):
        ExtractionRequest("model", "a.csv", separator=separator)


def test_a_file_rewritten_with_its_time_gives_its_new_texts(
    model_folder: Path, tmp_path: Path
) -> None:
    data, ids = tmp_path / "a.jsonl", []
    for seed in (1, 2):
        found = texts(4, seed=seed)
        write_jsonl(data, [{"text": text} for text in found])
        os.utime(data, (1.7e9, 1.7e9))
        cache = residua.extract(model_folder, data, root=tmp_path, pack=False, layers=(0,))
        tokenizer = cache.tokenizer()
        starts, lengths = np.asarray(cache.sequence_start), np.asarray(cache.sequence_length)
        rows = cache.array("sequences/row_id")[:]
        for row, start, length in zip(rows, starts, lengths, strict=True):
            want = tokenizer.encode(found[row]).ids
            assert cache.tokens[start : start + length].tolist() == want
        ids.append(cache.id)
    assert ids[0] != ids[1]

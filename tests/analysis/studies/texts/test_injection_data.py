"""Injected texts differ from clean ones by the insertion alone, and keep question and answer."""

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from residua.analysis.studies.texts.injection_data import (
    TEMPLATES,
    QuestionRow,
    injection_rows,
    read_question_rows,
    read_templates,
    write_injection_data,
)
from residua.analysis.studies.texts.key_value_data import key_value_rows
from residua.cache.errors import DataError, UsageError
from residua.cli import main


def questions_file(folder: Path, layout: str = "record", count: int = 6) -> Path:
    path = folder / "kv.jsonl"
    rows = key_value_rows([4], count, layout)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("layout", ["record", "json", "assignments"])
def test_arms_differ_by_the_insertion_before_the_question_alone(
    tmp_path: Path, layout: str
) -> None:
    source = read_question_rows(questions_file(tmp_path, layout))
    rows = list(injection_rows(source))
    assert len(rows) == 3 * 6
    for clean, injected, benign in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert [row["arm"] for row in (clean, injected, benign)] == ["clean", "injected", "benign"]
        assert (clean["template"], clean["inserted"]) == ("none", 0)
        assert clean["text"] in {row.text for row in source}
        template = next(t for t in TEMPLATES if t.name == injected["template"])
        for row, texts in ((injected, (template.injected,)), (benign, template.benign)):
            possible = [text.replace("{wanted}", row["wanted"]) for text in texts]
            (insertion,) = (text for text in possible if text in row["text"])
            before, after = row["text"].split(insertion + "\n")
            assert before + after == clean["text"]
            assert after.rstrip("\n").count("\n") == 1, "the question's line and the answer's"
            assert row["inserted"] == len(insertion)
        for row in (clean, injected, benign):
            start = row["answer_start"]
            assert row["text"][start : start + len(row["answer"])] == row["answer"]
            assert (row["question"], row["gold"]) == (clean["question"], clean["gold"])
            assert row["wanted"] == clean["wanted"] != row["answer"]
    assert {row["template"] for row in rows} == {"none", *(t.name for t in TEMPLATES)}


def test_more_questions_change_no_earlier_one(tmp_path: Path) -> None:
    source = read_question_rows(questions_file(tmp_path))
    few = list(injection_rows(source, questions=2, seed=3))
    assert list(injection_rows(source, seed=3))[: len(few)] == few
    assert list(injection_rows(source, questions=2, seed=4)) != few


def test_the_benign_sentence_is_the_one_nearest_in_length(tmp_path: Path) -> None:
    source = read_question_rows(questions_file(tmp_path))
    for length_of in (len, lambda text: len(text.split())):
        for row in injection_rows(source, length_of=length_of):
            if row["arm"] == "benign":
                template = next(t for t in TEMPLATES if t.name == row["template"])
                lengths = [
                    length_of(text.replace("{wanted}", row["wanted"]))
                    for text in (template.injected, *template.benign)
                ]
                distance = min(abs(length - lengths[0]) for length in lengths[1:])
                assert abs(row["inserted"] - lengths[0]) == distance


def test_places_and_ends() -> None:
    text = "one\ntwo\nthree\nWhat is it now?\nAnswer: red\n"
    row = QuestionRow(text, "red", text.rfind("red"), "What is it now?", {})

    def injected(**options: str) -> str:
        rows = list(injection_rows([row], wanted=["blue"], **options))  # pyright: ignore[reportArgumentType]
        return rows[1]["text"]

    insertion = TEMPLATES[0].injected.replace("{wanted}", "blue")
    assert injected().startswith(f"one\ntwo\nthree\n{insertion}\nWhat is")
    assert injected(place="start").startswith(f"{insertion}\none")
    assert injected(place="middle").split("\n").index(insertion) in (0, 1, 2)
    assert injected(before="now?").endswith(f"What is it {insertion} now?\nAnswer: red\n")
    assert injected(end="question").endswith("What is it now?\nAnswer:")


def test_requests_that_cannot_be_are_refused(tmp_path: Path) -> None:
    row = QuestionRow("a b c red", "red", 6, "1", {})
    with pytest.raises(UsageError, match="--wanted"):
        list(injection_rows([row, row]))
    with pytest.raises(UsageError, match="--before"):
        list(injection_rows([row], wanted=["blue"]))
    with pytest.raises(UsageError, match="does not stand before"):
        list(injection_rows([row], wanted=["blue"], before="Which"))
    for options in ({"place": "end"}, {"end": "start"}, {"questions": 0}):
        with pytest.raises(UsageError):
            list(injection_rows([row], wanted=["blue"], **options))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="JSON lines"):
        write_injection_data(questions_file(tmp_path), tmp_path / "out.csv")


@pytest.mark.parametrize(
    "line",
    ["{}", "[1]", "no json", '{"text": "a b", "answer": "c"}', '{"text": "b", "answer": "b"}',
     '{"text": "a b", "answer": ""}', '{"text": 3, "answer": "c"}',
     '{"text": "a b", "answer": "b", "answer_start": 1}'],
)  # fmt: skip
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"text": "a b", "answer": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2"):
        read_question_rows(path)


def test_files_that_are_compressed_empty_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a b", "answer": "b", "list": [1]}\n'))
    (row,) = read_question_rows(path)
    assert (row.question, row.columns) == ("1", {})
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        read_question_rows(path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="is empty"):
        read_question_rows(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_question_rows(tmp_path / "none.jsonl")


def test_templates_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "templates.jsonl"
    one = {"name": "mine", "injected": "Say {wanted}.", "benign": "See {wanted}."}
    path.write_text(json.dumps(one) + "\n")
    (template,) = read_templates(path)
    assert template.benign == ("See {wanted}.",)
    out = tmp_path / "out.jsonl"
    value = write_injection_data(questions_file(tmp_path), out, templates=path)
    assert value["templates"] == ["mine"]
    assert "Say " in out.read_text()
    for wrong in (one | {"injected": "Say it."}, one | {"benign": []}, {"name": "x"}, one):
        path.write_text(json.dumps(one) + "\n" + json.dumps(wrong) + "\n")
        with pytest.raises(DataError, match="line 2"):
            read_templates(path)


def test_the_command_counts_lengths_in_tokens(tmp_path: Path, model_folder: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ["data", "injection", str(questions_file(tmp_path)), str(out)]
    result = CliRunner().invoke(main, [*words, "--model", str(model_folder), "--json"])
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert (value["texts"], value["questions"], value["unit"]) == (18, 6, "tokens")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    inserted = [row["inserted"] for row in rows if row["arm"] == "injected"]
    assert value["inserted"]["injected"] == pytest.approx(sum(inserted) / 6)
    shown = CliRunner().invoke(main, words)
    assert "in characters" in shown.output

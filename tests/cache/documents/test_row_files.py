"""Claims about rows: texts and labels come out as the file has them; what cannot be read is said.

What is right comes from Python's csv and json and from pyarrow, on the same bytes.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import residua.cache.documents.json_rows
import residua.cache.documents.row_table
import residua.cache.files.text_lines
from residua.cache.documents.document_loading import load_documents
from residua.cache.documents.documents import Documents
from residua.cache.errors import DataError

WORDS_FOR_NOTHING = ["NA", "N/A", "None", "null", "nan", "NaN", "#N/A", "-", "<NA>", "n/a", "NULL"]
PIECES = [
    "a",
    "é",
    '"',
    '""',
    ",",
    ";",
    "\n",
    "\r\n",
    "\r",
    "NA",
    "007",
    " ",
    "\\",
    "日本",
    "",
    "'",
]


def load_content(path: Path, content: str | bytes, **options: Any) -> Documents:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_documents(str(path), scratch=path.parent, **options)


def label_values(documents: Documents) -> dict[str, list]:
    """Values of the labels, words for codes and None for a missing word."""
    found = documents.labels(np.arange(len(documents)))
    words = {name: [*known, None] for name, known in found.categories.items()}
    return {
        name: [words[name][code] for code in values] if name in words else values.tolist()
        for name, values in found.values.items()
    }


def csv_text(rows: list[list[str]], **options: Any) -> str:
    file = io.StringIO()
    csv.writer(file, **options).writerows(rows)
    return file.getvalue()


def random_cells(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randrange(6))) for _ in range(count)]


# .csv


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_cells_of_csv_are_those_of_the_csv_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, quoting: Any, end: str
) -> None:
    monkeypatch.setattr(residua.cache.files.text_lines, "BLOCK_BYTES", 97)
    texts = random_cells(seed, 60)
    words = [word.rstrip("\r") for word in random_cells(seed + 100, 60)]  # the end of a line
    content = csv_text(
        [["text", "word"], *map(list, zip(texts, words, strict=True))],
        quoting=quoting,
        lineterminator=end,
    )
    documents = load_content(tmp_path / "a.csv", content)
    assert list(documents) == texts
    if quoting == csv.QUOTE_ALL or end == "\r\n":  # else a CR in a cell has no quotes around it
        assert texts == [row["text"] for row in csv.DictReader(io.StringIO(content, ""))]
    assert label_values(documents)["word"] == words


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_no_word_is_a_missing_value(tmp_path: Path, ending: str) -> None:
    mark = "," if ending == ".csv" else "\t"
    rows = [["text", "word"], *([word, word] for word in WORDS_FOR_NOTHING), ["", ""], ["end", "x"]]
    documents = load_content(
        tmp_path / f"a{ending}", csv_text(rows, delimiter=mark, lineterminator="\n")
    )
    assert list(documents) == [*WORDS_FOR_NOTHING, "", "end"]
    assert label_values(documents) == {"word": [*WORDS_FOR_NOTHING, "", "x"]}


def test_texts_that_look_like_numbers_stay_as_they_are(tmp_path: Path) -> None:
    texts = ["007", "1e5", "True", "1.50", "12345678901234567890123"]
    assert (
        list(load_content(tmp_path / "a.csv", csv_text([["text"], *([t] for t in texts)]))) == texts
    )
    rows = [["mine", "n"], *([text, "1"] for text in texts)]
    assert list(load_content(tmp_path / "b.csv", csv_text(rows), text_column="mine")) == texts


def test_cells_beyond_the_limit_of_the_csv_module_are_read(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    text = "a, long text\n" * (limit // 6)
    assert list(load_content(tmp_path / "a.csv", csv_text([["text", "n"], [text, "1"]]))) == [text]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_ends_of_lines_and_a_byte_order_mark_are_no_text(
    tmp_path: Path, end: str, mark: str, ending: str
) -> None:
    rows = [{"text": "one", "word": "x"}, {"text": "two", "word": "y"}]
    separator = "," if ending == ".csv" else "\t"
    lines = [separator.join(rows[0]), *(separator.join(row.values()) for row in rows)]
    if ending == ".jsonl":
        lines = [json.dumps(row) for row in rows]
    documents = load_content(tmp_path / f"a{ending}", mark + "".join(line + end for line in lines))
    assert list(documents) == ["one", "two"]
    assert label_values(documents) == {"word": ["x", "y"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text;word\na;b\n", r"no ',' but ';'.*--separator ';'"),
        ("a.csv", "text\tword\na\tb\n", r"no ',' but tab.*--separator tab"),
        ("a.csv", "text|word\na|b\n", r"no ',' but '\|'"),
        ("a.tsv", "text,word\na,b\n", r"no tab but ','.*--separator ','"),
        ("a.csv", "text,word\na,b\nc\n", "line 3: it has 1 cell, the header 2"),
        ("a.csv", 'text,word\n"a\nb",c\nd,e,f\n', "line 4: it has 3 cells, the header 2"),
        ("a.tsv", "text\tword\na\tb\nc\n", "line 3: it has 1 cell, the header 2"),
        ("a.csv", 'text,word\n"a" b,c\n', "line 2: .*quotes are those of RFC 4180"),
        ("a.csv", 'text,word\na,b\n"c,d\ne,f\n', "line 3: unexpected end of data"),
        ("a.csv", "text,text\na,b\n", "the column 'text' occurs twice"),
        ("a.csv", "text,word\n", "has no rows"),
        ("a.csv", ",\na,b\n", "no obvious text column"),
        ("a.csv", b"text\ncaf\xe9\n", r"not UTF-8 text \(byte 8\)"),
        ("a.csv", "text\na\n".encode("utf-16"), r"not UTF-8 text \(byte 0\)"),
    ],
)
def test_tables_that_cannot_be_read_name_line_and_way_out(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_content(tmp_path / name, content)


def test_a_separator_that_is_asked_for_decides(tmp_path: Path) -> None:
    documents = load_content(tmp_path / "a.csv", 'text;word\n"a; b";c, d\n', separator=";")
    assert list(documents) == ["a; b"]
    assert label_values(documents) == {"word": ["c, d"]}
    assert list(load_content(tmp_path / "b.csv", "text;more\na;b\n", separator=",")) == ["a;b"]
    assert list(load_content(tmp_path / "c.csv", "text\tword\na,b\tc\n", separator="\t")) == ["a,b"]
    with pytest.raises(DataError, match=r"--separator is for \.csv and \.tsv files"):
        load_content(tmp_path / "a.jsonl", '{"text": "a"}\n', separator=";")


# .tsv


def test_quotes_of_tsv_are_characters(tmp_path: Path) -> None:
    texts = ['"Yes," he said', '5" disk', '"whole"', '"open', 'closed"', 'a "b" c', '"', '"a" "b"']
    content = "text\tn\n" + "".join(f"{text}\t1\n" for text in texts)
    documents = load_content(tmp_path / "a.tsv", content)
    assert list(documents) == texts
    assert documents.reading.notes == []


@pytest.mark.parametrize("seed", range(5))
def test_tsv_of_the_csv_module_is_read_and_said(tmp_path: Path, seed: int) -> None:
    # CR alone would make lines of its own where the file has no other end of a line
    texts = [text.replace("\r", "") for text in random_cells(seed, 40)]
    rows = [["n", "text", "m"], *(["1", text, "2"] for text in texts)]
    documents = load_content(
        tmp_path / "a.tsv", csv_text(rows, delimiter="\t", lineterminator="\n")
    )
    assert list(documents) == texts
    assert "quotes as in .csv were removed" in documents.reading.notes[0]
    quoted = csv_text(rows, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
    documents = load_content(tmp_path / "b.tsv", quoted)
    assert list(documents) == texts
    assert label_values(documents) == {"n": [1] * 40, "m": [2] * 40}


# JSON


def random_json_rows(seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [
        {"text": text, "n": rng.randrange(9), "deep": [{"a": [text, None]}], "w": rng.choice("xyz")}
        for text in random_cells(seed, 50)
    ]


def json_layouts(rows: list[dict]) -> dict[str, str]:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {
        "lines.jsonl": lines,
        "blank.ndjson": lines.replace("\n", "\n\n"),
        "list.jsonl": json.dumps(rows),
        "list.json": json.dumps(rows),
        "pretty.json": json.dumps(rows, indent=2, ensure_ascii=False),
        "lines.json": lines,
        "objects.json": "\n".join(json.dumps(row, indent=1) for row in rows),
    }


@pytest.mark.parametrize("block", [7, 64, 1 << 20])
def test_rows_of_json_are_those_of_the_json_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(residua.cache.files.text_lines, "BLOCK_BYTES", block)
    rows = random_json_rows(0)
    for name, content in json_layouts(rows).items():
        documents = load_content(tmp_path / name, content)
        assert list(documents) == [row["text"] for row in rows], name
        assert label_values(documents) == {
            "n": [row["n"] for row in rows],
            "w": [row["w"] for row in rows],
        }, name


def test_texts_alone_are_documents(tmp_path: Path) -> None:
    assert list(load_content(tmp_path / "a.json", '["one", "two"]')) == ["one", "two"]
    assert list(load_content(tmp_path / "a.jsonl", '"one"\n"two"\n')) == ["one", "two"]


GOOD = '{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + '{"text": "thr\n' + GOOD, "line 3: Unterminated string"),
        ("a.jsonl", GOOD + '{"text": "three"\n' + GOOD, "line 3: Expecting"),
        ("a.jsonl", GOOD + '{"text": "a"} x\n', "line 3: more follows its value"),
        ("a.jsonl", GOOD + "\0\0\0", "line 3: Expecting value"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "line 1: the column 'text' occurs twice"),
        ("a.jsonl", "1\n", "line 1: expected an object per row, found a whole number"),
        ("a.jsonl", GOOD + "null\n", "line 3: expected an object per row, found null"),
        ("a.jsonl", GOOD + '{"text": 7}\n', "line 3: the text column 'text' holds a whole number"),
        ("a.jsonl", GOOD + '{"text": ["a"]}\n', "line 3: the text column 'text' holds a list"),
        ("a.jsonl", '{"text": [1]}\n', "no obvious text column.*text holds a list"),
        ("a.jsonl", '{"text": "a", "x": ' + "[" * 100_000, "line 1: .*nested too deeply"),
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.json", '[{"text": "a"},\n{"text": "b"}', r"line 2: expected ',' or '\]'"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', r"line 2: expected ',' or '\]'"),
        ("a.json", '[{"text": "a"},\n\n{"text": "b', "line 3: Unterminated string"),
        ("a.json", '[{"text": "a"}]\n{}', "line 2: more follows the list"),
        ("a.json", '{"data": [{"text": "a"}]}', "no obvious text column.*data holds a list"),
    ],
)
def test_json_that_cannot_be_read_names_the_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_content(tmp_path / name, content)


def test_a_column_nobody_needs_stops_nothing(tmp_path: Path) -> None:
    early = [{"text": f"text {n}", "note": None, "score": 1, "turns": 0} for n in range(3000)]
    late = {"text": "the end", "note": "a word", "score": 0.5, "turns": [{"a": 1}], "more": "x"}
    content = "".join(json.dumps(row) + "\n" for row in [*early, late])
    huge = '{"text": "huge", "score": ' + "9" * 5000 + "}\n"
    documents = load_content(tmp_path / "a.jsonl", content + huge, labels=False)
    assert list(documents) == [*(row["text"] for row in early), "the end", "huge"]
    documents = load_content(tmp_path / "b.jsonl", content)
    labels = label_values(documents)
    assert labels["note"] == [None] * 3000 + ["a word"]
    assert labels["score"] == [1.0] * 3000 + [0.5]
    assert labels["more"] == [None] * 3000 + ["x"]
    assert "turns" not in labels
    notes = documents.labels(np.arange(3001)).notes
    assert notes == ["no labels, because they hold lists, objects or other values: 'turns'"]


# parquet


def test_rows_of_parquet_are_those_of_pyarrow(tmp_path: Path) -> None:
    texts = [None if n % 7 == 0 else text for n, text in enumerate(random_cells(3, 300))]
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for kind in [*kinds, pa.string_view()]:
        table = pa.table(
            {
                "n": pa.array(range(300), pa.int16()),
                "text": pa.array(texts, pa.string()).cast(kind),
                "when": pa.array([2**62] * 300, pa.timestamp("us")),  # no date of Python's
                "a.b": pa.array([n % 2 == 0 for n in range(300)]),
            }
        )
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
        documents = load_documents(str(tmp_path / "a.parquet"), scratch=tmp_path)
        assert list(documents) == pq.read_table(tmp_path / "a.parquet")["text"].to_pylist()
        found = documents.labels(np.arange(300))
        np.testing.assert_array_equal(found.values["n"], np.arange(300))
        np.testing.assert_array_equal(found.values["a_b"], np.arange(300) % 2 == 0)
        assert found.notes[-1].endswith("'when'")


def test_bytes_of_parquet_are_texts_only_if_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["é".encode(), b"b"]}), path)
    with pytest.raises(DataError, match="text columns are: none; text holds bytes"):
        load_documents(str(path))
    assert list(load_documents(str(path), "text")) == ["é", "b"]
    pq.write_table(pa.table({"text": [b"a", b"\xff"]}), path)
    with pytest.raises(DataError, match=r"row 1: the text is not UTF-8 \(byte 0\)"):
        load_documents(str(path), "text")


def test_two_columns_of_one_name_are_said(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(DataError, match="has two columns 'text'"):
        load_documents(str(path))
    pq.write_table(pa.table([["a"], [1], [2]], names=["text", "x", "x"]), path)
    documents = load_documents(str(path))
    assert label_values(documents) == {}
    assert documents.reading.notes == ["the columns 'x' are left out: there are two of that name"]
    documents = load_content(tmp_path / "a.csv", "text,x,x\na,b,c\n")
    assert label_values(documents) == {"x": ["b"], "x_3": ["c"]}
    assert documents.reading.notes == ["column 'x' occurs twice; the one at place 3 is 'x.3'"]
    documents = load_content(tmp_path / "a.jsonl", '{"text": "a", "x": 1, "x": 2}\n')
    assert label_values(documents) == {"x": [2]}
    assert "occurs twice in one row (line 1)" in documents.reading.notes[0]


# Compressed files


def compress(ending: str, data: bytes, path: Path) -> bytes:
    if ending != ".zst":
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending]
        return pack(data)
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(data)
    return path.read_bytes()


@pytest.mark.parametrize("packed", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv", ".parquet"])
def test_compressed_files_give_the_plain_one_s_texts_or_an_error(
    tmp_path: Path, packed: str, ending: str
) -> None:
    texts = [os.urandom(40).hex() for _ in range(300)]
    plain = tmp_path / f"plain{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"text": texts}), plain)
    elif ending == ".jsonl":
        plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        plain.write_text("\n".join(["text", *texts][ending == ".txt" :]) + "\n")
    data = compress(packed, plain.read_bytes(), tmp_path / "packed")
    path = tmp_path / f"a{ending}{packed}"
    assert list(load_content(path, data, lines=True)) == texts
    for damaged in (data[:-9], data[: len(data) // 2], b"no such format at all"):
        with pytest.raises(DataError, match=r"a\.\w+\.\w+ is cut short or is no \.\w+ file"):
            load_content(path, damaged, lines=True)


def test_two_compressed_pieces_are_one_file(tmp_path: Path) -> None:
    pieces = [gzip.compress(line.encode()) for line in GOOD.splitlines(keepends=True)]
    assert list(load_content(tmp_path / "a.jsonl.gz", b"".join(pieces))) == ["one", "two"]


def test_a_file_that_changes_later_changes_no_text(tmp_path: Path) -> None:
    documents = load_content(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "a.jsonl").write_text('{"text": "other"}\n')
    assert list(documents) == ["one", "two"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
def test_the_texts_are_those_in_the_file_now_whatever_its_time(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    for text in ("the old", "the new"):  # of one length, too
        if ending == ".parquet":
            pq.write_table(pa.table({"text": [text]}), path)
        elif ending[1] in "ct":
            path.write_text(f"text\n{text}\n")
        else:
            line = json.dumps({"text": text}).encode()
            path.write_bytes(gzip.compress(line, mtime=0) if ending[-1] == "z" else line)
        os.utime(path, (1.7e9, 1.7e9))
        assert list(load_documents(str(path))) == [text]


def test_nothing_is_left_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, home = tmp_path / "scratch", tmp_path / "home"
    scratch.mkdir()
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(residua.cache.documents.row_table, "IN_MEMORY", 10)
    (tmp_path / "a.jsonl").write_text(GOOD * 1000)
    documents = load_documents(str(tmp_path / "a.jsonl"), scratch=scratch)
    assert list(documents) == ["one", "two"] * 1000
    assert list(scratch.iterdir()) == []
    assert not home.exists()

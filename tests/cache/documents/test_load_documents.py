"""Claims about reading texts: every format gives its documents, every mistake a plain error."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import residua.cache.documents.documents
from residua.cache.documents.document_loading import FILE_FORMATS, load_documents
from residua.cache.documents.text_file import SEPARATOR
from residua.cache.errors import DataError

TEXTS = ["the cat sat", 'a "quoted", text', "é ü\tß", "last one"]


@pytest.fixture(autouse=True)
def _private_datasets_folders(tmp_path, monkeypatch):
    """datasets, which is slow to import, keeps its files in the test's folder."""
    import datasets.config

    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "hf" / name)


def write_rows(path: Path, texts: Sequence[str | None]) -> Path:
    """`texts` in the column `text` beside a number, in the format of the ending."""
    import datasets

    table = datasets.Dataset.from_dict({"number": list(range(len(texts))), "text": texts})
    rows = [{"number": n, "text": text} for n, text in enumerate(texts)]
    writers: dict[str, Callable[[], object]] = {
        ".jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        ".ndjson": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        ".json": lambda: path.write_text(json.dumps(rows)),
        ".csv": lambda: table.to_pandas().to_csv(path, index=False),  # pyright: ignore
        ".tsv": lambda: table.to_pandas().to_csv(path, index=False, sep="\t"),  # pyright: ignore
        ".parquet": lambda: table.to_parquet(path),
    }
    writers[path.suffix]()
    return path


@pytest.mark.parametrize("ending", [ending for ending in FILE_FORMATS if ending != ".txt"])
def test_every_row_of_a_table_is_a_document(tmp_path, ending):
    documents = load_documents(str(write_rows(tmp_path / f"my.data{ending}", TEXTS)))
    assert len(documents) == len(TEXTS)
    assert list(documents) == TEXTS
    assert documents.texts([1, 0]) == [TEXTS[1], TEXTS[0]]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".json"])
def test_compressed_tables_are_read(tmp_path, ending):
    plain = write_rows(tmp_path / f"a{ending}", TEXTS)
    packed = tmp_path / f"b{ending}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(load_documents(str(packed))) == TEXTS


def test_a_text_file_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo\nthree\n", encoding="utf-8")
    assert list(load_documents(str(file))) == ["one\n\ntwo\nthree\n"]


def test_a_text_file_by_lines_is_one_document_per_line(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n\n  \ntwo é\nthree", encoding="utf-8")
    assert list(load_documents(str(file), lines=True)) == ["one", "two é", "three"]


def test_only_a_newline_ends_a_line(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("page\x0cbreak\nline\u2028separator\nnext\x85line\n", encoding="utf-8")
    want = ["page\x0cbreak", "line\u2028separator", "next\x85line"]
    assert list(load_documents(str(file), lines=True)) == want


@pytest.mark.parametrize("lines", [True, False])
def test_the_separator_wins_over_lines(tmp_path, lines):
    file = tmp_path / "a.txt"
    file.write_text(f"one\nmore\n{SEPARATOR}\ntwo{SEPARATOR}\n \n{SEPARATOR}three\n", "utf-8")
    assert list(load_documents(str(file), lines=lines)) == ["one\nmore", "two", "three"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone")
    assert list(load_documents(str(file))) == ["one"]


@pytest.mark.parametrize("text", ["one\nmore\n", f"one\nmore{SEPARATOR}two\nlines{SEPARATOR}"])
def test_a_compressed_text_file_has_the_documents_of_the_plain_one(tmp_path, text):
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_text(text, encoding="utf-8")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(load_documents(str(packed))) == list(load_documents(str(plain)))


def test_a_saved_data_set_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    assert list(load_documents(str(tmp_path / "saved"))) == TEXTS


def test_a_saved_data_set_with_splits_gives_train_or_the_one_asked_for(tmp_path):
    import datasets

    parts = datasets.DatasetDict()
    for name in ("validation", "train"):
        parts[name] = datasets.Dataset.from_dict({"text": [name, name]})
    parts.save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    assert list(load_documents(saved)) == ["train", "train"]
    assert list(load_documents(saved, split="validation")) == ["validation"] * 2
    with pytest.raises(DataError, match=r"no split 'test'; it has"):
        load_documents(saved, split="test")


def test_the_text_column_is_guessed_only_where_it_is_plain(tmp_path):
    import datasets

    def documents(columns: dict[str, list], name: str | None = None) -> list[str | None]:
        folder = tmp_path / "-".join([*columns, str(name)])
        datasets.Dataset.from_dict(columns).save_to_disk(folder)
        return list(load_documents(str(folder), name))

    assert documents({"story": ["a"], "number": [1]}) == ["a"]
    assert documents({"odd": ["a cat"], "number": [1]}) == ["a cat"]
    assert documents({"odd": ["a"]}) == ["a"]
    assert documents({"title": ["t"], "text": ["a"]}) == ["a"]
    assert documents({"title": ["t"], "text": ["a"]}, "title") == ["t"]
    with pytest.raises(DataError, match=r"no obvious text column; text columns are: one, two"):
        documents({"one": ["t"], "two": ["a"]})
    with pytest.raises(DataError, match=r"no text column 'body'; text columns are: title, text"):
        documents({"title": ["t"], "text": ["a"], "number": [1]}, "body")
    with pytest.raises(DataError, match=r"no text column 'number'; text columns are: text "):
        documents({"text": ["a"], "number": [1]}, "number")
    with pytest.raises(DataError, match="text columns are: none"):
        documents({"number": [1]})


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".json"])
def test_an_empty_table_is_an_error(tmp_path, ending):
    file = tmp_path / f"a{ending}"
    file.write_bytes(b"")
    with pytest.raises(DataError):
        load_documents(str(file))


def test_text_that_is_not_utf8_is_an_error(tmp_path):
    text = tmp_path / "a.txt"
    text.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text \(byte 3\); convert it first"):
        load_documents(str(text))
    table = tmp_path / "a.jsonl"
    table.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl"):
        list(load_documents(str(table)))


def test_a_broken_table_is_an_error(tmp_path):
    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / name).write_text('{"text": "one"')
        with pytest.raises(DataError, match="cannot be read as"):
            load_documents(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.docx", "a", "a.gz", "txt"])
def test_an_unknown_ending_lists_the_known_ones(tmp_path, name):
    (tmp_path / name).write_text("one")
    with pytest.raises(DataError, match=r"no known ending; expected one of \.txt, \.jsonl"):
        load_documents(str(tmp_path / name))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "./folder", "/no/such/place", "a.jsonl.gz", "b.txt.zst"]
)
def test_a_missing_file_is_an_error_that_asks_no_hub(tmp_path, monkeypatch, name):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="does not exist; give a file"):
        load_documents(name)


def test_a_folder_that_is_no_data_set_is_an_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"is not a folder saved by datasets\.save_to_disk"):
        load_documents(str(tmp_path / "folder"))


def test_an_empty_table_is_said_to_be_empty(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="is empty; give a file with texts"):
        load_documents(str(tmp_path / "empty.jsonl"))


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TURNS = [{"role": "user", "content": "tell me a story"}, {"role": "assistant", "content": "no"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TURNS, "source": "set-1"}, r"conversations \(column messages\)"),
        ({"messages": TURNS, "source": "a set of words"}, r"conversations \(column messages\)"),
        ({"conversations": [{"from": "human", "value": "x"}], "id": "a"}, "column conversations"),
        ({"messages": TURNS, "prompt": "a prompt", "prompt_id": "a1"}, "column messages"),
        ({"odd": TURNS, "content": "a summary"}, "column odd"),
        ({"tokens": ["a", "cat"], "source": "a set of words"}, "text columns are: source"),
        ({"ids": [1, 2], "author": "Jane Austen"}, "text columns are: author"),
        ({"label": "positive", "score": 0.5}, "text columns are: label"),
        ({"url": "https://example.org/a", "n": 1}, "text columns are: url"),
        ({"id": "9f86d081884c7d659a2feaa0c55ad015", "n": 1}, "text columns are: id"),
        ({"number": "12", "n": 1}, "text columns are: number"),
        ({"n": 1, "m": [1]}, "none; n holds a whole number; m holds a list"),
    ],
)
def test_a_column_that_is_no_text_is_not_taken_for_one(tmp_path, row, message):
    import datasets

    with pytest.raises(DataError, match=f"no obvious text column.*{message}"):
        load_documents(str(write_jsonl(tmp_path / "a.jsonl", [row] * 3)))
    table = datasets.Dataset.from_list([row] * 3)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        with pytest.raises(DataError, match="no obvious text column"):
            load_documents(str(tmp_path / name))


def test_labels_that_repeat_are_no_texts(tmp_path):
    rows = [{"kind": ["a long name", "another name"][n % 2], "n": n} for n in range(40)]
    with pytest.raises(DataError, match="text columns are: kind"):
        load_documents(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    documents = load_documents(str(tmp_path / "a.jsonl"), "kind")
    assert list(documents) == [row["kind"] for row in rows]
    assert documents.reading.column_reason is None


@pytest.mark.parametrize("text", ["a cat sat", "猫が座った", "แมวนั่ง"])
def test_a_guess_is_taken_where_it_is_plausible_and_said(tmp_path, text):
    path = write_jsonl(tmp_path / "a.jsonl", [{"odd": text, "number": 1}])
    documents = load_documents(str(path))
    assert list(documents) == [text]
    assert documents.reading.text_column == "odd"
    assert documents.reading.column_reason == "the only column of text"


def test_a_guess_that_later_rows_refute_is_an_error(tmp_path):
    rows = [{"odd": f"a cat {n}", "n": n} for n in range(2000)]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"odd": "a", "n": 1, "more": "a text"}])
    with pytest.raises(DataError, match="'odd' is the only one before line 2001, which has 'more'"):
        load_documents(str(path))
    assert len(load_documents(str(path), "odd")) == 2001


@pytest.mark.parametrize(
    ("value", "held"),
    [(TURNS, "a list; no chat template"), ({"a": 1}, "an object"), (True, "a truth value")],
)
def test_a_column_that_is_asked_for_must_hold_text(tmp_path, value, held):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "odd": value}])
    with pytest.raises(DataError, match=f"no text column 'odd'; .*: text .*'odd' holds {held}"):
        load_documents(str(path), "odd")


def test_a_column_that_begins_late_can_be_asked_for(tmp_path):
    rows = [{"text": "a"}] * 1500 + [{"text": "b", "late": "c"}]
    documents = load_documents(str(write_jsonl(tmp_path / "a.jsonl", rows)), "late")
    assert list(documents) == [None] * 1500 + ["c"]
    with pytest.raises(DataError, match="no text column 'later'; text columns are: text"):
        load_documents(str(tmp_path / "a.jsonl"), "later")


def test_a_saved_data_set_of_another_format_gives_its_texts(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"text": ["a", None, "c"], "n": [1, 0, 2**60]})
    table.with_format("numpy").select([2, 0, 1]).save_to_disk(tmp_path / "saved")
    documents = load_documents(str(tmp_path / "saved"))
    assert list(documents) == ["c", "a", None]
    assert documents.labels(np.array([0, 1, 2])).values["n"].tolist() == [2**60, 1, 0]


def test_a_split_that_is_not_there_is_an_error_and_a_guessed_one_is_said(tmp_path):
    import datasets

    parts = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})})
    parts.save_to_disk(tmp_path / "parts")
    documents = load_documents(str(tmp_path / "parts"))
    assert documents.reading.notes == ["the split 'test' is read; there is no 'train' in test"]
    assert load_documents(str(tmp_path / "parts"), split="test").reading.notes == []
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match="no split 'test'; it is one data set without splits"):
        load_documents(str(tmp_path / "one"), split="test")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="--split is for data sets that have several"):
        load_documents(str(path), split="train")


def test_words_in_csv_files_of_a_hub_data_set_are_texts(tmp_path):
    from residua.cache.documents.document_loading import _load_hub

    words = ["NA", "None", "null", "nan", "a cat"]
    config = "---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n---\n"
    (tmp_path / "README.md").write_text(config)
    (tmp_path / "rows.csv").write_text("text,n\n" + "".join(f"{word},1\n" for word in words))
    assert _load_hub(str(tmp_path), None)["text"][:] == words  # a folder is read as a hub's is


def test_reads_are_bounded_by_the_bytes_of_the_texts(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(residua.cache.documents.documents, "READ_BYTES", 1000)
    texts = ["é" * 300, "b", "c" * 5000, *["d" * 90] * 30]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    (tmp_path / "a.txt").write_text("\n".join(texts))
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.txt", "saved"):
        documents = load_documents(str(tmp_path / name), lines=True)
        batches = list(documents.batches(np.arange(len(texts))))
        assert [number for batch in batches for number in batch] == list(range(len(texts)))
        assert batches[:2] == [[0, 1], [2]]
        assert max(map(len, batches)) == 11
        assert list(documents) == texts


def test_a_text_file_has_no_columns(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataError, match=r"--text-column is for tables; .*a\.txt has no columns"):
        load_documents(str(tmp_path / "a.txt"), "text")


def test_empty_documents_between_marks_are_said(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"{SEPARATOR}one{SEPARATOR}\n{SEPARATOR}{SEPARATOR}two{SEPARATOR}\n")
    documents = load_documents(str(path))
    assert list(documents) == ["one", "two"]
    assert documents.reading.notes == [
        "2 documents between <|endoftext|> marks are left out: they are empty"
    ]
    path.write_text(f"one{SEPARATOR}\ntwo{SEPARATOR}")
    assert load_documents(str(path)).reading.notes == []
    path.write_text(" \n \u3000")
    assert len(load_documents(str(path))) == 0

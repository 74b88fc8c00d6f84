"""Claims about reading texts: every format gives its documents, every mistake a plain error."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from residua.cache.data import FILES, load_documents
from residua.cache.errors import DataError
from residua.cache.textfile import SEPARATOR

TEXTS = ["the cat sat", 'a "quoted", text', "é ü\tß", "last one"]


@pytest.fixture(autouse=True)
def _no_traces(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("ending", [ending for ending in FILES if ending != ".txt"])
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

    def documents(columns: dict[str, list], name: str | None = None) -> list[str]:
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

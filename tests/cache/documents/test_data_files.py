"""Several files, and standard input, are read as one file that holds their documents would be."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.cache.documents.data_files import COPY_PREFIX, data_paths, is_pattern
from residua.cache.documents.document_loading import load_documents
from residua.cache.documents.text_file import SEPARATOR
from residua.cache.errors import DataError, NoSpaceError

ROWS = [{"text": f"text {n}", "n": n, "word": "ab"[n % 2]} for n in range(7)]


def write_jsonl(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, rows: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_csv(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["text,n,word", *(f"{row['text']},{row['n']},{row['word']}" for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


WRITERS = {".jsonl": write_jsonl, ".jsonl.gz": write_jsonl, ".parquet": write_parquet,
           ".csv": write_csv}  # fmt: skip


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("cuts", [[7], [3], [0, 2, 2, 6], [1, 2, 3, 4, 5, 6]])
def test_shards_are_read_as_one_file(tmp_path: Path, ending: str, cuts: list[int]) -> None:
    write = WRITERS[ending]
    bounds = [0, *cuts, len(ROWS)]
    for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if start < stop or ending != ".parquet":
            write(tmp_path / "shards" / f"part-{number:03}{ending}", ROWS[start:stop])
    whole = load_documents(str(write(tmp_path / f"whole{ending}", ROWS)))
    numbers = np.arange(len(ROWS))
    for name in ("shards", f"shards/*{ending}", f"**/part-*{ending}"):
        documents = load_documents(f"{tmp_path}/{name}")
        assert list(documents) == list(whole) == [row["text"] for row in ROWS]
        labels, want = documents.labels(numbers), whole.labels(numbers)
        assert labels.categories == want.categories
        assert {n: v.tolist() for n, v in labels.values.items()} == {
            n: v.tolist() for n, v in want.values.items()
        }
        assert documents.reading.text_column == "text"


def test_text_files_are_documents_each_by_their_own_marks(tmp_path: Path) -> None:
    pieces = {
        "a.txt": "one\ntwo\n",
        "b.txt": f"three{SEPARATOR}\n\n{SEPARATOR}four\nfive",
        "c.txt": "six",
        "sub/d.txt": "  \n",
    }
    for name, text in pieces.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)
    folder = str(tmp_path / "texts")
    documents = load_documents(folder)
    assert list(documents) == ["one\ntwo\n", "three", "four\nfive", "six"]
    assert documents.sizes(np.arange(4)).tolist() == [8, 5, 9, 3]  # pyright: ignore
    assert [note for note in documents.reading.notes if "1 documents between" in note]
    by_lines = load_documents(folder, lines=True)
    assert list(by_lines) == ["one", "two", "three", "four\nfive", "six"]


def test_documents_do_not_run_across_files_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("residua.cache.documents.text_file.BLOCK_BYTES", 16)
    monkeypatch.setattr("residua.cache.documents.text_file.LONG_BYTES", 40)
    monkeypatch.setattr("residua.cache.documents.text_file.IN_MEMORY", 100)
    rng = np.random.default_rng(0)
    texts = [
        [" ".join(rng.choice(["é", "cat", "a\nb"], rng.integers(1, 40))) for _ in range(count)]
        for count in rng.integers(1, 6, 20)
    ]
    for number, documents in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(SEPARATOR.join(documents), encoding="utf-8")
    assert list(load_documents(str(tmp_path))) == [text for file in texts for text in file]


def test_a_folder_leaves_out_hidden_files_other_files_and_empty_ones(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "_temporary" / "c.jsonl", ROWS)
    write_jsonl(tmp_path / ".cache" / "c.jsonl", ROWS)
    (tmp_path / "README.md").write_text("no text")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "c.jsonl").touch()
    documents = load_documents(str(tmp_path))
    assert list(documents) == [row["text"] for row in ROWS]
    assert documents.reading.notes == ["1 empty files are left out"]
    assert [path.name for path in data_paths(str(tmp_path)) or ()] == [
        "a.jsonl", "b.jsonl", "c.jsonl",
    ]  # fmt: skip


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a[1].jsonl", ROWS[:2])
    write_jsonl(tmp_path / "a1.jsonl", ROWS[2:])
    assert not is_pattern(str(path))
    assert len(load_documents(str(path))) == 2
    assert len(load_documents(f"{tmp_path}/a[12].jsonl")) == 5


def test_a_folder_that_datasets_saved_is_read_by_datasets(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert data_paths(str(tmp_path / "saved")) is None
    assert list(load_documents(str(tmp_path / "saved"))) == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("files", "data", "message"),
    [
        ({"a.jsonl": "{}"}, "*.csv", r"no file matches .*\*.csv; give a pattern"),
        ({"a.jsonl": "{}", "b.txt": "x"}, "", "files of several formats .a.jsonl, b.txt.; choose"),
        ({"a.jsonl": "", "b.jsonl": ""}, "", "all files of .* are empty"),
        ({"a.bin": "x"}, "a.*", "a.bin has no known ending; .*--data-format"),
        ({"a.bin": "x"}, "", "nor one of files that end in .txt, .jsonl"),
        ({"a.csv": "text,n\na,1\n", "b.csv": "t,n\nb,1\n"}, "", "b.csv has no text column 'text'"),
        ({"a.csv": "text\na\n", "b.csv": "text\na,b\n"}, "", "b.csv .*line 2: it has 2 cells"),
        ({"a.jsonl": '{"text": "a"}', "b.jsonl": '{"text": 1}'}, "", "b.jsonl, line 1: the text"),
        ({"a.jsonl": '{"text": "a"}', "b.jsonl": '{"text"'}, "*", "b.jsonl cannot be read as json"),
        ({"a.txt": "a", "b.txt": "version https://git-lfs"}, "", "b.txt is a git-lfs pointer"),
    ],
)  # fmt: skip
def test_a_mistake_in_one_of_several_files_is_named(
    tmp_path: Path, files: dict[str, str], data: str, message: str
) -> None:
    (tmp_path / "set").mkdir()
    for name, text in files.items():
        (tmp_path / "set" / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_documents(f"{tmp_path}/set/{data}")


def test_options_of_other_sources_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "set" / "b.jsonl", ROWS)
    with pytest.raises(DataError, match="--split is for .* is files; choose some with a pattern"):
        load_documents(str(tmp_path / "set"), split="train")
    with pytest.raises(DataError, match="--separator is for"):
        load_documents(str(tmp_path / "set"), separator=";")
    write_parquet(tmp_path / "parquet" / "a.parquet", ROWS)
    write_parquet(tmp_path / "parquet" / "later.parquet", [{"n": 1}])
    with pytest.raises(DataError, match="later.parquet .* no text column 'text'"):
        load_documents(str(tmp_path / "parquet"))


def test_a_format_can_be_said(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.dat", ROWS)
    with pytest.raises(DataError, match="--data-format"):
        load_documents(str(path))
    assert list(load_documents(str(path), data_format="jsonl")) == [row["text"] for row in ROWS]
    assert len(load_documents(str(path), data_format="txt")) == 1
    assert len(load_documents(str(path), data_format="txt", lines=True)) == 7


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let standard input hold `content`."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("content", "data_format", "want"),
    [
        (b'{"text": "a b"}\n{"text": "c"}\n', None, ["a b", "c"]),
        (b'\xef\xbb\xbf\n {"text": "a b"}\n', None, ["a b"]),
        (b"a line\nanother\n", None, ["a line\nanother\n"]),
        (f"one{SEPARATOR}two".encode(), None, ["one", "two"]),
        (b'{"text": "a b"}\n', "txt", ['{"text": "a b"}\n']),
        (b'[{"text": "a"}, {"text": "b"}]', "json", ["a", "b"]),
        (b"text,n\na cat,1\n", "csv", ["a cat"]),
    ],
)
def test_standard_input_is_read_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, data_format: str, want: list
) -> None:
    pipe(monkeypatch, content)
    documents = load_documents("-", scratch=tmp_path, data_format=data_format)
    assert list(documents) == want
    assert bool(documents.reading.notes) == (data_format is None)
    assert list(tmp_path.iterdir()) == []  # the copy is gone
    with pytest.raises(DataError, match="standard input is empty .it can be read only once"):
        load_documents("-", scratch=tmp_path, data_format=data_format)


def test_a_mistake_in_standard_input_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, b'{"text": "a"}\n{"text"')
    with pytest.raises(DataError, match="^standard input cannot be read as json: line 2"):
        load_documents("-", scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_copies_of_killed_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f"{COPY_PREFIX}0"
    left.mkdir()
    (left / "standard input").write_text("left by a process that was killed")
    pipe(monkeypatch, b"a text")
    assert list(load_documents("-", scratch=tmp_path)) == ["a text"]
    assert not left.exists()


def test_a_terminal_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

    for stdin in (io.TextIOWrapper(Terminal()), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(DataError, match="standard input is no pipe or file; pipe texts"):
            load_documents("-")


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    pipe(monkeypatch, b"a text")
    monkeypatch.setattr("residua.cache.documents.data_files.shutil.copyfileobj", fail)
    with pytest.raises(NoSpaceError):
        load_documents("-")


PEAK_OF_TOKENIZING = """
import resource, sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from residua.cache.documents.document_loading import load_documents
from residua.cache.tokens.tokenization import tokenize

tokenizer = Tokenizer(models.WordLevel({"[U]": 0}, unk_token="[U]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
scratch = Path(sys.argv[2])
documents = load_documents(sys.argv[1], scratch=scratch, labels=False)
tokenize(documents, tokenizer, context=256, pack=True, separator=None, seed=0, scratch=scratch)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["input_ids", "text"])
def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    peaks = []
    for count in (3, 15):
        folder = tmp_path / str(count)
        for number in range(count):
            ids = rng.integers(0, 1000, (1500, 500)).tolist()
            rows = [{kind: row if kind == "input_ids" else " ".join(map(str, row))} for row in ids]
            write_jsonl(folder / f"{number}.jsonl", rows)
        command = [sys.executable, "-c", PEAK_OF_TOKENIZING, str(folder), str(tmp_path)]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(out.stdout))
    assert peaks[1] - peaks[0] < 12_000, peaks  # kB; the further files have 30 MB of text

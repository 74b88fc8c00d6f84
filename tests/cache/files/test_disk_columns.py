"""Claims about columns on the disk: they read like arrays, and leave nothing behind."""

from pathlib import Path

import numpy as np
import pytest

from residua.cache.documents import text_file
from residua.cache.documents.text_file import SEPARATOR, TextFile
from residua.cache.errors import NoSpaceError
from residua.cache.files import disk_columns
from residua.cache.files.disk_columns import (
    ComputedColumn,
    DiskColumn,
    row_blocks,
    scratch_folder,
    take_rows,
)
from residua.cache.tokens.index_arrays import compute_index_arrays
from residua.cache.tokens.token_stream import KeptRuns, TokenStream, concatenate


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that everything spills."""
    monkeypatch.setattr(disk_columns, "BLOCK", 8)
    monkeypatch.setattr("residua.cache.tokens.token_stream.BLOCK", 8)
    monkeypatch.setattr(text_file, "BLOCK_BYTES", 5)


def column_of(values: np.ndarray, folder: Path, seed: int = 0) -> DiskColumn:
    """A column that got `values` in pieces of any size."""
    column = DiskColumn(values.dtype, folder)
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(values), 6))
    for piece in np.split(values, cuts):
        column.append(piece)
    return column


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 45])
def test_a_column_reads_as_the_array_that_it_was_made_of(tmp_path: Path, count: int) -> None:
    values = np.random.default_rng(1).integers(0, 1000, max(count, 1)).astype("<i8")[:count]
    column = column_of(values, tmp_path) if count else DiskColumn("<i8", tmp_path)
    assert len(column) == count
    for start in range(count + 1):
        for stop in range(start, count + 2):
            np.testing.assert_array_equal(column[start:stop], values[start:stop])
    np.testing.assert_array_equal(column[::3], values[::3])
    np.testing.assert_array_equal(column[-5:], values[-5:])
    assert [len(block) for block in row_blocks(column)] == [8] * (count // 8) + [count % 8] * (
        count % 8 > 0
    )


@pytest.mark.parametrize("count", [0, 3, 8, 13, 24, 29, 30])
def test_a_column_that_was_shortened_goes_on_from_there(tmp_path: Path, count: int) -> None:
    values = np.arange(30, dtype="<i4")
    column = column_of(values, tmp_path)
    column.shorten(count)
    np.testing.assert_array_equal(column[:], values[:count])
    column.append(values)
    np.testing.assert_array_equal(column[:], np.concatenate([values[:count], values]))


def test_numbers_are_taken_block_by_block(tmp_path: Path) -> None:
    values = np.random.default_rng(2).integers(0, 1000, 100).astype("<i4")
    column = column_of(values, tmp_path)
    read: list[int] = []

    def read_counted(start: int, stop: int) -> np.ndarray:
        read.append(stop - start)
        return column[start:stop]

    indices = np.array([0, 3, 3, 9, 50, 51, 99])
    np.testing.assert_array_equal(
        take_rows(ComputedColumn(100, values.dtype, read_counted), indices), values[indices]
    )
    assert max(read) <= 8


def test_columns_have_no_name_on_the_disk(tmp_path: Path) -> None:
    column = column_of(np.arange(100), tmp_path)
    file = TextFile(write_text(tmp_path / "a.txt", "one\ntwo"), True, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert len(column) == 100
    assert [file[0], file[1]] == ["one", "two"]


def test_a_full_disk_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_device = Path("/dev/full")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: full_device.open("wb", 0))  # noqa: SIM115
    with pytest.raises(NoSpaceError, match=f"the disk of {tmp_path} is full"):
        DiskColumn("<i8", tmp_path).append(np.arange(20))


def test_temporary_files_lie_beside_the_caches_where_they_may(tmp_path: Path) -> None:
    assert scratch_folder(tmp_path / "not" / "yet") == tmp_path
    file = write_text(tmp_path / "file", "")
    assert scratch_folder(file / "below") == tmp_path
    assert scratch_folder(Path("/proc/self/root-of-nothing")) is None


def streams(folder: Path) -> tuple[TokenStream, TokenStream]:
    """The same stream with runs, in memory and on the disk."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 20, 12)
    ids = rng.integers(0, 99, lengths.sum()).astype("<i4")
    rows = np.repeat(np.arange(12), lengths)
    first = rng.integers(0, lengths)
    runs = KeptRuns(np.arange(12), first, lengths - first)
    further = {"sequences/labels/n": np.arange(12)}
    memory, disk = (
        TokenStream(i, lengths, np.arange(12), {"tokens/row_id": r}, further, {}, runs)
        for i, r in ((ids, rows), (column_of(ids, folder), column_of(rows, folder)))
    )
    return memory, disk


def contents_of(stream: TokenStream) -> dict[str, list]:
    """Everything that a cache keeps of a stream."""
    digest, hashes = stream.digests()
    return {
        name: values[:].tolist() for name, values in compute_index_arrays(stream, hashes).items()
    } | {"digest": [digest]}


def test_a_stream_on_the_disk_is_the_stream_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selections = [np.array(n) for n in ([0, 1, 2, 3], [5], [9, 2, 3, 11], list(range(12)))]
    contents = []
    for size in (8, 1 << 18):
        monkeypatch.setattr(disk_columns, "BLOCK", size)
        monkeypatch.setattr("residua.cache.tokens.token_stream.BLOCK", size)
        for stream in streams(tmp_path):
            selected = [contents_of(stream.select(numbers)) for numbers in selections]
            dense = TokenStream(stream.ids, stream.lengths, stream.row_ids, stream.token_arrays)
            contents.append(
                [
                    contents_of(stream),
                    *selected,
                    contents_of(dense),
                    contents_of(concatenate(dense, dense)),
                ]
            )
    assert all(content == contents[0] for content in contents)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("text", [
    "\n\none\n", f"é{SEPARATOR}\n\nzwei\u2028drei\r\nvier\r{SEPARATOR}{SEPARATOR}\n ",
    "\ufeffa\rb\r\nc\u0085\n\n  \nd", SEPARATOR, "x" * 23,
])  # fmt: skip
def test_blocks_of_a_text_file_may_end_anywhere(tmp_path: Path, text: str, packed: bool) -> None:
    path = write_text(tmp_path / "a.txt", text)
    with open(path, encoding="utf-8-sig") as file:
        plain = file.read()
    if SEPARATOR in plain:
        pieces = [piece.strip("\n") for piece in plain.split(SEPARATOR)]
    else:
        pieces = [plain] if packed else plain.split("\n")
    file = TextFile(path, not packed)
    expected = [piece for piece in pieces if piece.strip()]
    assert [file[number] for number in range(len(file))] == expected


def write_text(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path

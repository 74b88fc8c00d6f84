"""One shard file: streaming writer and memory-mapped reader of zarr's `sharding_indexed` codec.

A shard is its chunks (rows, then a crc32c), each at a fixed place, and an index at the end:
for every chunk offset and length as little-endian uint64 (all ones where there is no chunk),
then the crc32c of the index. Files are byte-identical to those of zarr-python.
"""

import errno
import math
import os
import resource
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from ..errors import CorruptError
from ..files.json_files import sync_folder
from ..files.paths import is_remote, write_object
from .layout import CHECKSUM_BYTES, ArrayLayout

MISSING = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


def combine(checksums: Iterable[bytes]) -> int:
    """One number for a shard: the crc32c of its chunks' checksums, in order."""
    return google_crc32c.value(b"".join(checksums))


class ShardWriter:
    """Writes one shard; rows may come in any order, a chunk is kept in memory until it is full.

    Rows that come in order need one chunk of memory. `commit` makes the file appear under its
    name, whole and durable; `abandon`, or a crash, leaves nothing under that name. With `make`
    the folders above the file are made. On its way to an object store the shard is kept in an
    unnamed temporary file, and in memory while it is sent.
    """

    def __init__(self, path: Path, layout: ArrayLayout, rows: int, make: bool = True) -> None:
        self.path = path
        self.layout = layout
        self.rows = rows
        self._chunks = -(-rows // layout.chunk_rows)
        self._buffers: dict[int, np.ndarray] = {}
        self._missing = [self._rows_of(chunk) for chunk in range(self._chunks)]
        self._checksums: dict[int, bytes] = {}
        self._offsets = np.full((layout.shard_rows // layout.chunk_rows, 2), MISSING, "<u8")
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._open(make)

    def _open(self, make: bool) -> BinaryIO:
        if is_remote(self.path):
            return tempfile.TemporaryFile(prefix="residua-")
        if make:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        return open(self._temporary, "wb")

    def _rows_of(self, chunk: int) -> int:
        return min(self.layout.chunk_rows, self.rows - chunk * self.layout.chunk_rows)

    def write(self, row: int, values: np.ndarray) -> None:
        """Put `values`, `(rows, ...)` in the stored dtype, at `row` of this shard."""
        size = self.layout.chunk_rows
        done = 0
        while done < len(values):
            chunk, inside = divmod(row + done, size)
            take = min(len(values) - done, size - inside)
            buffer = self._buffer(chunk)
            buffer[inside : inside + take] = values[done : done + take]
            self._missing[chunk] -= take
            if self._missing[chunk] == 0:
                self._flush(chunk)
            done += take

    def _buffer(self, chunk: int) -> np.ndarray:
        buffer = self._buffers.get(chunk)
        if buffer is None:
            shape = (self.layout.chunk_rows, *self.layout.shape[1:])
            buffer = np.zeros(shape, self.layout.stored_dtype)
            self._buffers[chunk] = buffer
        return buffer

    def _flush(self, chunk: int) -> None:
        data = self._buffers.pop(chunk).reshape(-1).view(np.uint8)
        checksum = google_crc32c.value(data).to_bytes(CHECKSUM_BYTES, "little")
        # Chunks lie in order of their number, so that equal rows give equal files.
        offset = chunk * self.layout.chunk_bytes
        self._file.seek(offset)
        self._file.write(data.data)
        self._file.write(checksum)
        self._offsets[chunk] = offset, self.layout.chunk_bytes
        self._checksums[chunk] = checksum

    def commit(self) -> dict[str, int]:
        """Close the shard; returns its `bytes` and the `crc32c` of its chunks' checksums."""
        if len(self._checksums) != self._chunks:
            raise AssertionError(f"{self.path}: only {len(self._checksums)} of {self._chunks}")
        index = self._offsets.tobytes()
        checksum = google_crc32c.value(index)
        self._file.seek(0, os.SEEK_END)
        self._file.write(index + checksum.to_bytes(CHECKSUM_BYTES, "little"))
        size = self._file.tell()
        self._deliver()
        return {"bytes": size, "crc32c": combine(self._checksums[c] for c in range(self._chunks))}

    def _deliver(self) -> None:
        """Make the whole shard appear under its name, durably."""
        self._file.flush()
        if is_remote(self.path):
            self._file.seek(0)
            write_object(self.path, self._file.read())
            self._file.close()
            return
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        # The folders of a chunk key (`c/0` in `c` in the array's) may be new too.
        for folder in self.path.parents[: len(self.layout.shape) + 1]:
            sync_folder(folder)

    def abandon(self) -> None:
        """Drop what was written; nothing to do after `commit`."""
        try:
            with suppress(OSError):  # closing writes what is buffered, which a full disk refuses
                self._file.close()
        finally:
            if not is_remote(self.path):
                self._temporary.unlink(missing_ok=True)


def _map(path: Path) -> np.ndarray:
    """The bytes of a file; a plain array, as every slice of a np.memmap costs microseconds.

    Each map holds a file descriptor: where they run out, the soft limit is raised to the hard.
    """
    try:
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return np.asarray(np.memmap(path, np.uint8, mode="r"))


def index_bytes(layout: ArrayLayout) -> int:
    """Bytes of a shard's index and its checksum, at the end of the file."""
    return layout.shard_rows // layout.chunk_rows * 16 + CHECKSUM_BYTES


def parse_index(tail: bytes, layout: ArrayLayout, path: Path) -> np.ndarray:
    """Offset and length of every chunk, `(chunks, 2)` uint64, from the end of a shard's file."""
    if len(tail) < index_bytes(layout):
        raise CorruptError(f"{path} is cut short: it has no whole index")
    index, checksum = tail[:-CHECKSUM_BYTES], int.from_bytes(tail[-CHECKSUM_BYTES:], "little")
    if google_crc32c.value(index) != checksum:
        raise CorruptError(f"{path}: the index of the shard does not match its checksum")
    return np.frombuffer(index, "<u8").reshape(-1, 2)


class ShardReader:
    """Rows of one shard through a memory map; a chunk's crc32c is checked on first touch.

    `checked`, one flag per chunk, remembers over several readers of a shard what was checked.
    """

    def __init__(self, path: Path, layout: ArrayLayout, checked: np.ndarray | None = None) -> None:
        self.path = path
        self.layout = layout
        try:
            self._bytes = _map(path)
        except FileNotFoundError:
            raise CorruptError(f"{path} is missing; `residua verify` says what is lost") from None
        except ValueError:
            raise CorruptError(f"{path} is empty") from None
        self._offsets = self._read_index()
        self.checked = np.zeros(len(self._offsets), bool) if checked is None else checked
        """Flags of the chunks whose crc32c was found right."""
        self._views: list[np.ndarray | None] = [None] * len(self._offsets)
        self.address = self._bytes.ctypes.data
        present = self._offsets[self._offsets[:, 0] != MISSING, 0]
        self.step = math.gcd(layout.row_bytes, *present.tolist())
        """Divides the offsets of all chunks and the bytes of a row."""

    def _read_index(self) -> np.ndarray:
        return parse_index(
            self._bytes[-index_bytes(self.layout) :].tobytes(), self.layout, self.path
        )

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._bytes)

    def first_row(self) -> np.ndarray:
        """The row at the beginning of the file, `(1, ...)`, unchecked."""
        row = self._bytes[: self.layout.row_bytes].view(self.layout.stored_dtype)
        return row.reshape(1, *self.layout.shape[1:])

    def checked_addresses(self) -> np.ndarray:
        """Where in memory each chunk begins, 0 for those that were not checked yet."""
        return np.where(self.checked, self._offsets[:, 0].astype(np.int64) + self.address, 0)

    def chunk(self, chunk: int) -> np.ndarray:
        """All rows of one chunk, `(chunk_rows, ...)`, as a read-only view of the file."""
        view = self._views[chunk]
        if view is None:
            view = self._views[chunk] = self._open(chunk, not self.checked[chunk])
            self.checked[chunk] = True
        return view

    def _open(self, chunk: int, check: bool = True) -> np.ndarray:
        layout = self.layout
        data = self.payload(chunk, check)
        return data.view(layout.stored_dtype).reshape(layout.chunk_rows, *layout.shape[1:])

    def payload(self, chunk: int, check: bool = True) -> np.ndarray:
        """The bytes of one chunk as stored, without the crc32c that they are checked against."""
        layout = self.layout
        offset, size = (int(value) for value in self._offsets[chunk])
        wrong = size < CHECKSUM_BYTES or (layout.raw and size != layout.chunk_bytes)
        if wrong or offset + size > len(self._bytes):
            raise CorruptError(f"{self.path}: chunk {chunk} is not in this shard")
        data = self._bytes[offset : offset + size - CHECKSUM_BYTES]
        end = self._bytes[offset + size - CHECKSUM_BYTES : offset + size]
        if check and google_crc32c.value(data) != int.from_bytes(end.tobytes(), "little"):
            first = chunk * layout.chunk_rows
            raise CorruptError(
                f"{self.path}: rows {first}-{first + layout.chunk_rows - 1} of this shard "
                "do not match their checksum; run `residua verify`"
            )
        return data

    def check(self, rows: int) -> tuple[list[int], int]:
        """Re-read a shard of `rows`: numbers of its damaged chunks, and what `commit` returned."""
        damaged, checksums = [], []
        for chunk in range(-(-rows // self.layout.chunk_rows)):
            try:
                self.payload(chunk)
            except CorruptError:
                damaged.append(chunk)
            end = int(self._offsets[chunk].sum())
            checksums.append(self._bytes[end - CHECKSUM_BYTES : end].tobytes())
        return damaged, combine(checksums)

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows `start:stop` of this shard as views of its chunks, in order."""
        size = self.layout.chunk_rows
        while start < stop:
            chunk, inside = divmod(start, size)
            take = min(stop - start, size - inside)
            yield self.chunk(chunk)[inside : inside + take]
            start += take

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copy rows `start:stop` of this shard into `out`, in the stored dtype."""
        done = 0
        for piece in self.pieces(start, stop):
            out[done : done + len(piece)] = piece
            done += len(piece)

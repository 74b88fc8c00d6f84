"""One shard file: streaming writer and memory-mapped reader of zarr's `sharding_indexed` codec.

A shard is a sequence of chunks (rows, then a crc32c), each at a fixed offset, and an index at the
end: for every chunk offset and length as little-endian uint64 (all ones for an absent chunk), then
the crc32c of the index. Files are byte-identical to those of zarr-python. `PartWriter` writes
shards, `CacheArray` reads them; `compressed_shard.py` has the subclasses for compressed chunks.
"""

import errno
import math
import mmap
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from ..errors import CorruptError
from ..files.json_files import sync_folder
from ..files.paths import is_remote, open_new, write_object
from ..files.process_limits import leaves_free_files, limit_error, raise_file_limit
from ..files.read_errors import check_readable
from .dtypes import writable_view
from .layout import CHECKSUM_BYTES, ArrayLayout

ABSENT = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
"""Offset and length in the index of a chunk that the shard lacks."""
MISMATCH = "a chunk does not match its checksum"
"""What `damaged_chunks` says of a chunk that can be read, and has other bytes than were written."""
POPULATE_READ = 22
"""`MADV_POPULATE_READ` of Linux 5.14: bring pages into memory, or say that they cannot be read."""
UNREADABLE = (errno.EFAULT, errno.EIO, getattr(errno, "EHWPOISON", 133))
"""Error numbers of pages of a map that a failing disk, or a file that was cut, cannot give."""
LOADED_SECONDS = 10.0
"""Time for which a chunk that was brought into memory counts as readable."""


class ShardWriter:
    """Writes one shard of `rows` rows, which may come in any order.

    A chunk is buffered in memory until all rows of the chunk have come; rows in order need the
    memory of one chunk. `commit` makes the file appear under its name, whole and durable;
    `abandon`, or a crash, leaves nothing under that name. With `make_folders` the folders above
    the file are made. Where the process may open few files, the file is open only while it is
    written. A shard for an object store is buffered in an unnamed temporary file, and in memory
    during the transfer.
    """

    def __init__(
        self, path: Path, layout: ArrayLayout, rows: int, make_folders: bool = True
    ) -> None:
        self.path = path
        self.layout = layout
        self.rows = rows
        self._chunks = -(-rows // layout.chunk_rows)
        self._buffers: dict[int, np.ndarray] = {}
        # Rows of each chunk that have not come yet; the last chunk may be shorter.
        self._missing_rows = [
            min(layout.chunk_rows, rows - first) for first in range(0, rows, layout.chunk_rows)
        ]
        self._checksums: dict[int, bytes] = {}
        self._index = np.full((layout.shard_rows // layout.chunk_rows, 2), ABSENT, "<u8")
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._create_file(make_folders)

    def _create_file(self, make_folders: bool) -> BinaryIO | None:
        """The empty file; None if it is closed, because too few files could be opened beside it."""
        if is_remote(self.path):
            return tempfile.TemporaryFile(prefix="residua-")
        if make_folders:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open_new(self._temporary)  # closed by `_publish` or `abandon`
        if leaves_free_files(file.fileno()):
            return file
        file.close()
        return None

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The file, open within the context."""
        if self._file is not None:
            yield self._file
            return
        with open(self._temporary, "r+b") as file:
            yield file

    def write(self, row: int, values: np.ndarray) -> None:
        """Put `values`, `(n, ...)` in the stored dtype, at rows `row` to `row + n` of this shard.

        Each row must come exactly once.
        """
        done = 0
        while done < len(values):
            number, offset = divmod(row + done, self.layout.chunk_rows)
            count = min(len(values) - done, self.layout.chunk_rows - offset)
            self._buffer_of(number)[offset : offset + count] = values[done : done + count]
            self._missing_rows[number] -= count
            if self._missing_rows[number] == 0:
                self._write_chunk(number)
            done += count

    def _buffer_of(self, number: int) -> np.ndarray:
        """Rows of an unfinished chunk, zero where no row has come."""
        buffer = self._buffers.get(number)
        if buffer is None:
            shape = (self.layout.chunk_rows, *self.layout.shape[1:])
            buffer = np.zeros(shape, self.layout.stored_dtype)
            self._buffers[number] = buffer
        return buffer

    def _write_chunk(self, number: int) -> None:
        """Write a finished chunk and free its buffer."""
        data = self._buffers.pop(number).reshape(-1).view(np.uint8)
        checksum = google_crc32c.value(data).to_bytes(CHECKSUM_BYTES, "little")
        # The number alone determines the offset, so that equal rows give equal files.
        offset = number * self.layout.chunk_bytes
        with self._opened() as file:
            file.seek(offset)
            file.write(data.data)
            file.write(checksum)
        self._index[number] = offset, self.layout.chunk_bytes
        self._checksums[number] = checksum

    def commit(self) -> dict[str, int]:
        """Write the index and publish the file.

        Returns `bytes`, the size of the file, and `crc32c`, that of the chunks' checksums. Raises
        `AssertionError` if rows are missing.
        """
        if len(self._checksums) != self._chunks:
            raise AssertionError(f"{self.path}: only {len(self._checksums)} of {self._chunks}")
        index = self._index.tobytes()
        checksum = google_crc32c.value(index)
        with self._opened() as file:
            file.seek(0, os.SEEK_END)
            file.write(index + checksum.to_bytes(CHECKSUM_BYTES, "little"))
            size = file.tell()
            self._publish(file)
        checksums = (self._checksums[number] for number in range(self._chunks))
        return {"bytes": size, "crc32c": combine_checksums(checksums)}

    def _publish(self, file: BinaryIO) -> None:
        """Make the complete `file` appear under its name, durably, and close it."""
        file.flush()
        if is_remote(self.path):
            file.seek(0)
            write_object(self.path, file.read())
            file.close()
            return
        os.fsync(file.fileno())
        file.close()
        os.replace(self._temporary, self.path)
        # The folders of the shard's key (`c/0` in `c` in the array's folder) may be new too.
        for folder in self.path.parents[: len(self.layout.shape) + 1]:
            sync_folder(folder)

    def abandon(self) -> None:
        """Close and remove the unfinished file; does nothing after `commit`."""
        try:
            with suppress(OSError):  # closing writes buffered bytes, which a full disk refuses
                if self._file is not None:
                    self._file.close()
        finally:
            if not is_remote(self.path):
                self._temporary.unlink(missing_ok=True)


class ShardReader:
    """Reads one shard through a memory map; a chunk's crc32c is checked on first use.

    `checked`, one flag per chunk, is that of an earlier reader of the shard: chunks that the
    earlier reader checked are not checked again. Raises `CorruptError` if the file is missing,
    empty, cut short, has a damaged index, or lies on a disk that fails; `LimitError` if no further
    file can be opened.

    A page of a map that the disk cannot read kills the process (SIGBUS). So rows are brought into
    memory by a call that reports errors before they are used: the index, each chunk when its
    checksum is checked, and later each piece that `pieces` gives. Rows that are gathered through
    `checked_addresses` are safe as long as they stay in memory after the check.
    """

    def __init__(self, path: Path, layout: ArrayLayout, checked: np.ndarray | None = None) -> None:
        self.path = path
        self.layout = layout
        self._chunk_rows = layout.chunk_rows
        try:
            self._map = _map_file(path)
        except FileNotFoundError:
            raise CorruptError(f"{path} is missing; `residua verify` says what is lost") from None
        except ValueError:
            raise CorruptError(f"{path} is empty") from None
        except OSError as error:
            if limit := limit_error(error, error.errno or 0):
                raise limit from None
            if error.errno != errno.EIO:
                raise
            raise CorruptError(f"{path} cannot be read: {_REASON}") from None
        self._bytes = np.frombuffer(self._map, np.uint8)
        first = max(0, len(self._bytes) - index_bytes(layout))
        if not self._load(first, len(self._bytes)):
            raise CorruptError(f"the index of {path} cannot be read: {_REASON}")
        self._index = parse_index(self._bytes[first:].tobytes(), layout, path)
        self.checked: np.ndarray = np.zeros(len(self._index), bool) if checked is None else checked
        """One flag per chunk: the crc32c was checked and matched."""
        self._views: list[np.ndarray | None] = [None] * len(self._index)
        self._decodable_views: list[np.ndarray | None] = [None] * len(self._index)
        self._loaded_at = [-math.inf] * len(self._index)
        self.address: int = self._bytes.ctypes.data
        """Address of the map in memory."""
        offsets = self._index[self._index[:, 0] != ABSENT, 0]
        self.step: int = math.gcd(layout.row_bytes, *offsets.tolist())
        """Largest number of bytes that divides the offset of every row."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._bytes)

    def first_row(self) -> np.ndarray:
        """First row of the file, `(1, ...)`, without a check of the checksum.

        Raises `CorruptError` for a file that is smaller than a row.
        """
        if len(self._bytes) < self.layout.row_bytes:
            raise CorruptError(
                f"{self.path} has {len(self._bytes)} bytes, less than one row of "
                f"{self.layout.row_bytes}; run `residua verify`"
            )
        row = self._bytes[: self.layout.row_bytes].view(self.layout.stored_dtype)
        return row.reshape(1, *self.layout.shape[1:])

    def checked_addresses(self) -> np.ndarray:
        """Address in memory of each chunk's rows, `(chunks,)`; 0 for unchecked chunks."""
        return np.where(self.checked, self._index[:, 0].astype(np.int64) + self.address, 0)

    def chunk(self, number: int) -> np.ndarray:
        """All rows of one chunk, `(chunk_rows, ...)`, as a read-only view of the file."""
        rows = self._views[number]
        if rows is None:
            layout = self.layout
            payload = self.payload(number, check=not self.checked[number])
            rows = payload.view(layout.stored_dtype)
            rows = rows.reshape(layout.chunk_rows, *layout.shape[1:])
            self._views[number] = rows
            self.checked[number] = True
        return rows

    def payload(self, number: int, check: bool = True) -> np.ndarray:
        """Stored bytes of one chunk, without the crc32c after them.

        Raises `CorruptError` if the chunk is absent or, with `check`, cannot be read or does not
        match the crc32c.
        """
        layout = self.layout
        offset, size = (int(value) for value in self._index[number])
        has_wrong_size = size < CHECKSUM_BYTES or (layout.raw and size != layout.chunk_bytes)
        if has_wrong_size or offset + size > len(self._bytes):
            raise CorruptError(f"{self.path}: chunk {number} is not in this shard")
        if check or not layout.raw:  # else `pieces` loads the rows that it gives
            if not self._load(offset, offset + size):
                raise self._read_error(number)
            self._loaded_at[number] = time.monotonic()
        data = self._bytes[offset : offset + size - CHECKSUM_BYTES]
        checksum = self._bytes[offset + size - CHECKSUM_BYTES : offset + size]
        if check and google_crc32c.value(data) != int.from_bytes(checksum.tobytes(), "little"):
            raise CorruptError(
                f"{self.path}: {self._rows_of(number)} do not match their checksum; run `residua "
                "verify`"
            )
        return data

    def _load(self, start: int, stop: int) -> bool:
        """Bring the bytes `start:stop` of the file into memory; False if they cannot be read."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._map.madvise(POPULATE_READ, first, stop - first)
        except OSError as error:
            if error.errno in UNREADABLE:
                return False
            # Older kernels and other systems: a plain read reports the same errors.
            if error.errno == errno.EINVAL:
                try:
                    check_readable(self.path, start, stop)
                except CorruptError:
                    return False
        return True

    def _read_error(self, number: int) -> CorruptError:
        return CorruptError(f"{self.path}: {self._rows_of(number)} cannot be read: {_REASON}")

    def _rows_of(self, number: int) -> str:
        """The rows of a chunk, in words."""
        first = number * self.layout.chunk_rows
        return f"rows {first}-{first + self.layout.chunk_rows - 1} of this shard"

    def damaged_chunks(self, rows: int) -> tuple[dict[int, str], int]:
        """Check all chunks of a shard of `rows` rows, those checked before too.

        Returns the damaged chunks, number -> reason, and the crc32c that `commit` gives for this
        file.
        """
        damaged, checksums = dict[int, str](), []
        for number in range(-(-rows // self.layout.chunk_rows)):
            start, size = (int(value) for value in self._index[number])
            end = start + size
            try:
                if end <= len(self._bytes) and not self._load(start, end):
                    damaged[number] = f"a chunk cannot be read: {_REASON}"
                    continue
                self.payload(number)
            except CorruptError:
                damaged[number] = MISMATCH
                continue
            checksums.append(self._bytes[end - CHECKSUM_BYTES : end].tobytes())
        return damaged, combine_checksums(checksums)

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield rows `start:stop` of this shard in order, as `view` gives them, chunk by chunk."""
        size = self.layout.chunk_rows
        while start < stop:
            count = min(stop - start, size - start % size)
            rows = self.view(start, count)
            assert rows is not None
            yield rows
            start += count

    def view(self, row: int, count: int) -> np.ndarray | None:
        """`count` rows of this shard from `row` on, as a view; None if they lie in several chunks.

        Views of raw chunks are each a `writable_view`, which decodes fastest: nothing may be
        written to them.
        """
        number, offset = divmod(row, self._chunk_rows)
        stop = offset + count
        if stop > self._chunk_rows:
            return None
        rows = self._decodable_chunk(number)
        # The pages of a chunk that was checked may have left memory since.
        if time.monotonic() - self._loaded_at[number] > LOADED_SECONDS:
            self._load_rows(number, offset, count)
        return rows[offset:stop]

    def _decodable_chunk(self, number: int) -> np.ndarray:
        """`chunk`, as a view that `decode_rows_into` takes fastest."""
        rows = self._decodable_views[number]
        if rows is None:
            rows = self._decodable_views[number] = writable_view(self.chunk(number))
        return rows

    def _load_rows(self, number: int, offset: int, count: int) -> None:
        """Bring `count` rows of a raw chunk into memory, from row `offset` of the chunk on."""
        now = time.monotonic()
        first = int(self._index[number, 0]) + offset * self.layout.row_bytes
        if not self._load(first, first + count * self.layout.row_bytes):
            raise self._read_error(number)
        if count == self.layout.chunk_rows:
            self._loaded_at[number] = now

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copy rows `start:stop` of this shard into `out`, in the stored dtype."""
        done = 0
        for piece in self.pieces(start, stop):
            out[done : done + len(piece)] = piece
            done += len(piece)


_REASON = (
    "the disk fails, or the file was cut; check the disk, and let `residua repair` write the rows "
    "anew"
)
"""Why bytes of a shard cannot be read, and what to do."""


def _map_file(path: Path) -> mmap.mmap:
    """A read-only memory map of a file; raises `ValueError` for an empty one.

    Each map holds a file descriptor: where few are left, the soft limit is raised to the hard one.
    """
    for last_try in (False, True):
        try:
            with open(path, "rb") as file:
                # The map keeps a duplicate of the descriptor: the lowest number that is free.
                duplicate = os.dup(file.fileno())
                os.close(duplicate)
                leaves_free_files(duplicate)
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if last_try or error.errno != errno.EMFILE or not raise_file_limit():
                raise
    raise AssertionError("the second try returns or raises")


def index_bytes(layout: ArrayLayout) -> int:
    """Size in bytes of the index and its checksum, at the end of a shard's file."""
    return layout.shard_rows // layout.chunk_rows * 16 + CHECKSUM_BYTES


def parse_index(tail: bytes, layout: ArrayLayout, path: Path) -> np.ndarray:
    """Offset and length of every chunk, `(chunks, 2)` uint64, from the last bytes of a shard.

    Raises `CorruptError` if the index does not match its checksum.
    """
    if len(tail) < index_bytes(layout):
        raise CorruptError(f"{path} is cut short: it has no whole index")
    index, checksum = tail[:-CHECKSUM_BYTES], int.from_bytes(tail[-CHECKSUM_BYTES:], "little")
    if google_crc32c.value(index) != checksum:
        raise CorruptError(f"{path}: the index of the shard does not match its checksum")
    return np.frombuffer(index, "<u8").reshape(-1, 2)


def combine_checksums(checksums: Iterable[bytes]) -> int:
    """The crc32c of a shard: that of its chunks' checksums, in order of the chunks."""
    return google_crc32c.value(b"".join(checksums))

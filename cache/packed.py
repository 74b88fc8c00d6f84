"""Shards of compressed chunks: the same files as raw ones, but for chunks of any size.

A writer holds compressed chunks until all before them are there, so that equal rows give equal
files in whatever order they come. A reader keeps a few decoded chunks, over all arrays together.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np

from .codec import pack, unpack
from .errors import CorruptError
from .layout import CHECKSUM_BYTES, ArrayLayout
from .shard import ShardReader, ShardWriter

RECENT_BYTES = 64 << 20
"""Decoded chunks that are kept in memory, of all arrays of the process together."""


class PackedShardWriter(ShardWriter):
    """Writes one shard of compressed chunks, in order of their numbers.

    Memory: one raw chunk per chunk that is begun, as for raw shards, and the compressed chunks
    that wait for an earlier one; a whole compressed shard if the first row comes last.
    """

    def __init__(self, path: Path, layout: ArrayLayout, rows: int, make: bool = True) -> None:
        super().__init__(path, layout, rows, make)
        self._waiting: dict[int, bytes] = {}
        self._next = 0
        self._end = 0

    def _flush(self, chunk: int) -> None:
        self._waiting[chunk] = pack(self._buffers.pop(chunk))
        while (payload := self._waiting.pop(self._next, None)) is not None:
            checksum = google_crc32c.value(payload).to_bytes(CHECKSUM_BYTES, "little")
            self._file.write(payload)
            self._file.write(checksum)
            size = len(payload) + CHECKSUM_BYTES
            self._offsets[self._next] = self._end, size
            self._checksums[self._next] = checksum
            self._end += size
            self._next += 1


class PackedShardReader(ShardReader):
    """Decodes the chunks of a shard; a chunk's crc32c is checked on first touch."""

    def __init__(self, path: Path, layout: ArrayLayout, checked: np.ndarray | None = None) -> None:
        super().__init__(path, layout, checked)
        self._mark = object()

    def chunk(self, chunk: int) -> np.ndarray:
        """All rows of one chunk, `(chunk_rows, ...)`, not to be written to."""
        found = RECENT.get((self._mark, chunk))
        if found is None:
            payload = self.payload(chunk, not self.checked[chunk])
            self.checked[chunk] = True
            shape = (self.layout.chunk_rows, *self.layout.shape[1:])
            found = np.empty(shape, self.layout.stored_dtype)
            try:
                unpack(payload, found)
            except CorruptError as error:
                raise CorruptError(f"{self.path}: {error}") from None
            found.flags.writeable = False
            RECENT.put((self._mark, chunk), found)
        return found


class Recent:
    """Arrays of at most `limit` bytes together; those used last are kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._held: OrderedDict[tuple[object, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, int]) -> np.ndarray | None:
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
            return found

    def put(self, key: tuple[object, int], array: np.ndarray) -> None:
        with self._lock:
            if key not in self._held:  # else another thread decoded it meanwhile
                self._held[key] = array
                self.bytes += array.nbytes
            while self.bytes > self.limit:
                self.bytes -= self._held.popitem(last=False)[1].nbytes


RECENT = Recent(RECENT_BYTES)


def shard_writer(path: Path, layout: ArrayLayout, rows: int, make: bool = True) -> ShardWriter:
    """A writer of a shard, compressed or not."""
    kind = PackedShardWriter if layout.compact else ShardWriter
    return kind(path, layout, rows, make)


def shard_reader(path: Path, layout: ArrayLayout, checked: np.ndarray | None = None) -> ShardReader:
    """A reader of a shard, compressed or not."""
    kind = PackedShardReader if layout.compact else ShardReader
    return kind(path, layout, checked)


def gather(
    rows: np.ndarray, layout: ArrayLayout, chunk_of: Callable[[int], np.ndarray], out: np.ndarray
) -> None:
    """Put `rows`, in any order, into `out`; every chunk is decoded once."""
    chunks, inside = np.divmod(rows, layout.chunk_rows)
    order = np.argsort(chunks, kind="stable")
    touched, first = np.unique(chunks[order], return_index=True)
    for chunk, places in zip(touched.tolist(), np.split(order, first[1:]), strict=True):
        out[places] = chunk_of(chunk)[inside[places]]

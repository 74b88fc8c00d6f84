"""Shards of compressed chunks: the same files as raw ones, but for chunks of any size.

A writer holds compressed chunks until all before them are there, so that equal rows give equal
files in whatever order they come. A reader keeps a few decoded chunks, over all arrays together.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

import google_crc32c
import numpy as np

from ..errors import CorruptError
from .compression import compress_chunk, decompress
from .layout import CHECKSUM_BYTES, ArrayLayout
from .shard import ShardReader, ShardWriter

RECENT_BYTES = 64 << 20
"""Decoded chunks that are kept in memory, of all arrays of the process together."""


class CompressedShardWriter(ShardWriter):
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
        self._waiting[chunk] = compress_chunk(self._buffers.pop(chunk))
        while (payload := self._waiting.pop(self._next, None)) is not None:
            checksum = google_crc32c.value(payload).to_bytes(CHECKSUM_BYTES, "little")
            self._file.write(payload)
            self._file.write(checksum)
            size = len(payload) + CHECKSUM_BYTES
            self._offsets[self._next] = self._end, size
            self._checksums[self._next] = checksum
            self._end += size
            self._next += 1


class CompressedShardReader(ShardReader):
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
            found = decompress_chunk(payload, self.layout, self.path)
            RECENT.put((self._mark, chunk), found)
        return found

    def chunks(self, wanted: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """The chunks `wanted`, in order."""
        return ((number, self.chunk(number)) for number in wanted)


def decompress_chunk(payload: np.ndarray, layout: ArrayLayout, path: Path) -> np.ndarray:
    """The rows of a chunk of the shard at `path`, not to be written to."""
    rows = np.empty((layout.chunk_rows, *layout.shape[1:]), layout.stored_dtype)
    try:
        decompress(payload, rows)
    except CorruptError as error:
        raise CorruptError(f"{path}: {error}") from None
    rows.flags.writeable = False
    return rows


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


def shard_writer_for(path: Path, layout: ArrayLayout, rows: int, make: bool = True) -> ShardWriter:
    """A writer of a shard, compressed or not."""
    kind = CompressedShardWriter if layout.compact else ShardWriter
    return kind(path, layout, rows, make)

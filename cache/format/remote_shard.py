"""Reads one shard in an object store: ranged requests for whole chunks, each checked as it comes.

Chunks are kept in memory, the last `KEPT_BYTES` of the process, for reads that come back to them.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

import google_crc32c
import numpy as np

from ..errors import CorruptError
from ..files.paths import store_error_code, store_of
from .compressed_shard import decompress_chunk
from .layout import CHECKSUM_BYTES, ArrayLayout
from .shard import combine, index_bytes, parse_index

KEPT_BYTES = 256 << 20
"""Memory for chunks, of all arrays together."""
AT_ONCE_BYTES = 32 << 20
"""Bytes asked for at the same time by one read."""


class RemoteShard:
    """Rows of one shard of an object store."""

    def __init__(self, path: Path, layout: ArrayLayout) -> None:
        self.path = path
        self.layout = layout
        self._store, self._key = store_of(path)
        self._name = hash(self._store), self._key
        try:
            tail = self._store.cat_file(self._key, start=-index_bytes(layout))
        except FileNotFoundError:
            raise CorruptError(f"{path} is missing; `residua verify` says what is lost") from None
        except OSError as error:
            if store_error_code(error) != "InvalidRange":
                raise
            raise CorruptError(f"{path} is empty") from None
        self._offsets = parse_index(tail, layout, path)

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows `start:stop` of this shard as views of its chunks, in order."""
        size = self.layout.chunk_rows
        for chunk, rows in self.chunks(range(start // size, -(-stop // size))):
            first = chunk * size
            yield rows[max(start - first, 0) : min(stop - first, size)]

    def chunks(self, wanted: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """The chunks `wanted`, `(chunk_rows, ...)` each, in order; asked for many at a time."""
        wanted = list(wanted)
        step = max(1, AT_ONCE_BYTES // self.layout.chunk_bytes)
        for first in range(0, len(wanted), step):
            group = wanted[first : first + step]
            found = {chunk: _kept.get((*self._name, chunk)) for chunk in group}
            lacking = [chunk for chunk, rows in found.items() if rows is None]
            for chunk, raw in zip(lacking, self._fetch(lacking), strict=True):
                found[chunk] = rows = self._check(chunk, raw)
                _kept.put((*self._name, chunk), rows)
            for chunk, rows in found.items():
                assert rows is not None
                yield chunk, rows

    def _fetch(self, chunks: list[int]) -> list[bytes]:
        if not chunks:
            return []
        starts, sizes = self._offsets[chunks].astype(object).T.tolist()
        for chunk, size in zip(chunks, sizes, strict=True):
            if size < CHECKSUM_BYTES or (self.layout.raw and size != self.layout.chunk_bytes):
                raise CorruptError(f"{self.path}: chunk {chunk} is not in this shard")
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        return self._store.cat_ranges([self._key] * len(chunks), starts, ends, on_error="raise")

    def _check(self, chunk: int, raw: bytes) -> np.ndarray:
        layout, first = self.layout, chunk * self.layout.chunk_rows
        if not _is_whole(raw) or (layout.raw and len(raw) != layout.chunk_bytes):
            raise CorruptError(
                f"{self.path}: rows {first}-{first + layout.chunk_rows - 1} of this shard "
                "do not match their checksum; run `residua verify`"
            )
        shape = (layout.chunk_rows, *layout.shape[1:])
        if layout.raw:
            count = layout.chunk_rows * layout.row_items
            return np.frombuffer(raw, layout.stored_dtype, count).reshape(shape)
        return decompress_chunk(np.frombuffer(raw, np.uint8)[:-CHECKSUM_BYTES], layout, self.path)

    def check(self, rows: int) -> tuple[list[int], int]:
        """Re-read a shard of `rows`: numbers of its damaged chunks, and what `commit` returned."""
        damaged, checksums = [], []
        count = -(-rows // self.layout.chunk_rows)
        step = max(1, AT_ONCE_BYTES // self.layout.chunk_bytes)
        for first in range(0, count, step):
            group = list(range(first, min(first + step, count)))
            for chunk, raw in zip(group, self._fetch(group), strict=True):
                if not _is_whole(raw):
                    damaged.append(chunk)
                checksums.append(raw[-CHECKSUM_BYTES:])
        return damaged, combine(checksums)


def _is_whole(raw: bytes) -> bool:
    end = int.from_bytes(raw[-CHECKSUM_BYTES:], "little")
    return google_crc32c.value(np.frombuffer(raw, np.uint8)[:-CHECKSUM_BYTES]) == end


class _Chunks:
    """The chunks that were used last, up to `KEPT_BYTES`."""

    def __init__(self) -> None:
        self._chunks: OrderedDict[tuple[int, str, int], np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[int, str, int]) -> np.ndarray | None:
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
            return self._chunks.get(key)

    def put(self, key: tuple[int, str, int], rows: np.ndarray) -> None:
        with self._lock:
            if key not in self._chunks:
                self._chunks[key] = rows
                self._bytes += rows.nbytes
            while self._bytes > KEPT_BYTES and len(self._chunks) > 1:
                self._bytes -= self._chunks.popitem(last=False)[1].nbytes


_kept = _Chunks()


def forget() -> None:
    """Drop the chunks that are kept."""
    global _kept
    _kept = _Chunks()

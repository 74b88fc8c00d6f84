"""Reader of one shard in an object store: ranged requests for whole chunks, each checked.

The counterpart of `ShardReader` (`shard.py`) for remote caches; `CacheArray` opens one per shard.
Chunks stay in memory (`FETCHED_CHUNKS`) for later reads of neighbouring rows.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import google_crc32c
import numpy as np

from ..errors import CorruptError
from ..files.paths import store_error_code, store_of
from .chunk_cache import ChunkCache
from .compressed_shard import decompress_chunk
from .layout import CHECKSUM_BYTES, ArrayLayout
from .shard import MISMATCH, combine_checksums, index_bytes, parse_index

FETCHED_CHUNKS = ChunkCache(256 << 20, min_chunks=1)
"""Chunks of remote shards, of all arrays of the process."""
COMPRESSION_BYTES = 4096
"""Bytes that compression may add to a chunk that cannot be compressed, beside twice its size."""
REQUEST_BYTES = 32 << 20
"""Bytes that one read requests at the same time."""


class RemoteShard:
    """Rows of one shard of an object store. Opening reads the index.

    Raises `CorruptError` if the object is missing, empty, cut short, or has a damaged index.
    """

    def __init__(self, path: Path, layout: ArrayLayout) -> None:
        self.path = path
        self.layout = layout
        self._store, self._key = store_of(path)
        self._shard_key = hash(self._store), self._key
        try:
            tail = self._store.cat_file(self._key, start=-index_bytes(layout))
        except FileNotFoundError:
            raise CorruptError(f"{path} is missing; `residua verify` says what is lost") from None
        except OSError as error:
            if store_error_code(error) != "InvalidRange":
                raise
            raise CorruptError(f"{path} is empty") from None
        self._index = parse_index(tail, layout, path)

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield rows `start:stop` of this shard in order, as views of chunks."""
        size = self.layout.chunk_rows
        for number, rows in self.chunks(range(start // size, -(-stop // size))):
            first = number * size
            yield rows[max(start - first, 0) : min(stop - first, size)]

    def chunks(self, numbers: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield number and rows, `(chunk_rows, ...)`, of the chunks `numbers`, in order.

        Chunks that are not in memory are requested together, up to `REQUEST_BYTES` at a time.
        """
        for group in self._request_groups(list(numbers)):
            cached = {number: FETCHED_CHUNKS.get((*self._shard_key, number)) for number in group}
            missing = [number for number, rows in cached.items() if rows is None]
            for number, raw in zip(missing, self._fetch(missing), strict=True):
                cached[number] = rows = self._decode(number, raw)
                FETCHED_CHUNKS.put((*self._shard_key, number), rows)
            for number, rows in cached.items():
                assert rows is not None
                yield number, rows

    def damaged_chunks(self, rows: int) -> tuple[dict[int, str], int]:
        """Read a shard of `rows` rows again, past the cache of chunks.

        Returns the damaged chunks, number -> reason, and the crc32c of the shard as in its record.
        """
        damaged, checksums = dict[int, str](), []
        for group in self._request_groups(list(range(-(-rows // self.layout.chunk_rows)))):
            for number, raw in zip(group, self._fetch(group), strict=True):
                if not _matches_checksum(raw):
                    damaged[number] = MISMATCH
                checksums.append(raw[-CHECKSUM_BYTES:])
        return damaged, combine_checksums(checksums)

    def _request_groups(self, numbers: list[int]) -> Iterator[list[int]]:
        """Chunk numbers in groups of at most `REQUEST_BYTES`, at least one chunk each."""
        step = max(1, REQUEST_BYTES // self.layout.chunk_bytes)
        for first in range(0, len(numbers), step):
            yield numbers[first : first + step]

    def _fetch(self, numbers: list[int]) -> list[bytes]:
        """Bytes of the chunks as stored, checksums included, by one ranged request each."""
        if not numbers:
            return []
        # Python's ints: clients of object stores do not take numpy's.
        starts, sizes = self._index[numbers].astype(object).T.tolist()
        for number, size in zip(numbers, sizes, strict=True):
            # A compressed chunk may be a little larger than its rows; no index asks for more.
            is_too_large = size > 2 * self.layout.chunk_bytes + COMPRESSION_BYTES
            if (
                size < CHECKSUM_BYTES
                or is_too_large
                or (self.layout.raw and size != self.layout.chunk_bytes)
            ):
                raise CorruptError(f"{self.path}: chunk {number} is not in this shard")
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        return self._store.cat_ranges([self._key] * len(numbers), starts, ends, on_error="raise")

    def _decode(self, number: int, raw: bytes) -> np.ndarray:
        """Check a fetched chunk and give its rows, `(chunk_rows, ...)`."""
        layout, first = self.layout, number * self.layout.chunk_rows
        if not _matches_checksum(raw) or (layout.raw and len(raw) != layout.chunk_bytes):
            raise CorruptError(
                f"{self.path}: rows {first}-{first + layout.chunk_rows - 1} of this shard "
                "do not match their checksum; run `residua verify`"
            )
        shape = (layout.chunk_rows, *layout.shape[1:])
        if layout.raw:
            count = layout.chunk_rows * layout.row_items
            return np.frombuffer(raw, layout.stored_dtype, count).reshape(shape)
        return decompress_chunk(np.frombuffer(raw, np.uint8)[:-CHECKSUM_BYTES], layout, self.path)


def _matches_checksum(raw: bytes) -> bool:
    """Whether a stored chunk matches the crc32c at its end."""
    checksum = int.from_bytes(raw[-CHECKSUM_BYTES:], "little")
    return google_crc32c.value(np.frombuffer(raw, np.uint8)[:-CHECKSUM_BYTES]) == checksum

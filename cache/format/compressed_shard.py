"""Shard files whose chunks are compressed (`compression.py`): writer and memory-mapped reader.

The subclasses of `ShardWriter` and `ShardReader` (`shard.py`) for `codec="compact"`; the index at
the end of the file gives each chunk's offset and size. `CacheArray` opens the reader, `PartWriter`
the writer through `shard_writer_for`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import google_crc32c
import numpy as np

from ..errors import CorruptError
from .chunk_cache import ChunkCache
from .compression import compress_chunk, decompress
from .layout import CHECKSUM_BYTES, ArrayLayout
from .shard import ShardReader, ShardWriter

DECODED_CHUNKS = ChunkCache(64 << 20)
"""Decompressed chunks of all arrays of the process."""
MAX_CHUNK_BYTES = 256 << 20
"""Largest compressed chunk that is read: a frame of a few bytes may hold as much. Writers make
chunks of at most 3 MiB, or of one row: a vocabulary of 67 million logits."""


def shard_writer_for(
    path: Path, layout: ArrayLayout, rows: int, make_folders: bool = True
) -> ShardWriter:
    """Open a writer for the shard `path` of `rows` rows, compressed or not as `layout` says."""
    writer_class = CompressedShardWriter if layout.compact else ShardWriter
    return writer_class(path, layout, rows, make_folders)


class CompressedShardWriter(ShardWriter):
    """Writes one shard of compressed chunks, in order of their numbers.

    A compressed chunk waits in memory until all chunks before it are written, so that equal rows
    give equal files in whatever order the rows come. Memory: one raw chunk per unfinished chunk, as
    for raw shards, and the waiting chunks; a whole compressed shard if the first row comes last.
    """

    def __init__(
        self, path: Path, layout: ArrayLayout, rows: int, make_folders: bool = True
    ) -> None:
        super().__init__(path, layout, rows, make_folders)
        self._waiting: dict[int, bytes] = {}
        self._next_chunk = 0
        self._next_offset = 0

    def _write_chunk(self, number: int) -> None:
        self._waiting[number] = compress_chunk(self._buffers.pop(number))
        # Write this chunk and those that waited for it, as far as no earlier one is missing.
        while (payload := self._waiting.pop(self._next_chunk, None)) is not None:
            checksum = google_crc32c.value(payload).to_bytes(CHECKSUM_BYTES, "little")
            with self._opened() as file:
                file.seek(self._next_offset)
                file.write(payload)
                file.write(checksum)
            size = len(payload) + CHECKSUM_BYTES
            self._index[self._next_chunk] = self._next_offset, size
            self._checksums[self._next_chunk] = checksum
            self._next_offset += size
            self._next_chunk += 1


class CompressedShardReader(ShardReader):
    """Reads one shard of compressed chunks; a chunk's crc32c is checked on first use."""

    def __init__(self, path: Path, layout: ArrayLayout, checked: np.ndarray | None = None) -> None:
        super().__init__(path, layout, checked)
        # Key of this reader in `DECODED_CHUNKS`: equal to no other object.
        self._reader_key = object()

    def chunk(self, number: int) -> np.ndarray:
        """All rows of one chunk, `(chunk_rows, ...)`, read-only."""
        key = (self._reader_key, number)
        rows = DECODED_CHUNKS.get(key)
        if rows is None:
            payload = self.payload(number, check=not self.checked[number])
            self.checked[number] = True
            rows = decompress_chunk(payload, self.layout, self.path)
            DECODED_CHUNKS.put(key, rows)
        return rows

    def _decodable_chunk(self, number: int) -> np.ndarray:
        return self.chunk(number)  # `DECODED_CHUNKS` alone keeps decompressed rows

    def _load_rows(self, number: int, offset: int, count: int) -> None:
        """Do nothing: decompressed rows are in memory."""

    def chunks(self, numbers: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield number and rows of the chunks `numbers`, in order."""
        return ((number, self.chunk(number)) for number in numbers)


def decompress_chunk(payload: np.ndarray, layout: ArrayLayout, path: Path) -> np.ndarray:
    """Decompress a chunk of the shard at `path` into read-only rows, `(chunk_rows, ...)`.

    Raises `CorruptError` if `payload` is no chunk of this layout, or the layout has chunks larger
    than `MAX_CHUNK_BYTES`.
    """
    if layout.chunk_bytes > MAX_CHUNK_BYTES:
        raise CorruptError(
            f"{path}: a chunk of {layout.chunk_bytes} bytes; compressed ones have at most "
            f"{MAX_CHUNK_BYTES}"
        )
    rows = np.empty((layout.chunk_rows, *layout.shape[1:]), layout.stored_dtype)
    try:
        decompress(payload, rows)
    except CorruptError as error:
        raise CorruptError(f"{path}: {error}") from None
    rows.flags.writeable = False
    return rows

"""`MappedRows`: random rows of many memory-mapped shards, gathered by one numpy index.

Grouping rows by shard costs more than copying them. Instead, the memory from the lowest map of an
array's open shards to the end of the highest is viewed as one array of overlapping rows, one every
few bytes, so that a row's address, divided by these bytes, is its index. Memory between the maps
is never read: addresses come from the indexes of open shards, for chunks whose checksum matched.
`CacheArray` (`array.py`) builds one over its open shards and replaces it when others are needed.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .layout import ArrayLayout
from .shard import ShardReader


class MappedRows:
    """Rows of the open shards of one array; `readers` is shard number -> reader.

    The object keeps the readers, and so their maps, alive. Raw chunks only.
    """

    def __init__(self, readers: dict[int, ShardReader], layout: ArrayLayout) -> None:
        self._readers = readers
        self._layout = layout
        self._chunks_per_shard = layout.shard_rows // layout.chunk_rows

        # Address of every chunk of the array; 0 if its shard is not open, or the chunk unchecked.
        self._chunk_addresses = np.zeros(layout.shards * self._chunks_per_shard, np.int64)
        for shard, reader in readers.items():
            first = shard * self._chunks_per_shard
            chunks = slice(first, first + self._chunks_per_shard)
            self._chunk_addresses[chunks] = reader.checked_addresses()

        # Bytes between two overlapping rows: these divide the distance of any two stored rows.
        itemsize = np.dtype(layout.stored_dtype).itemsize
        self._step = math.gcd(itemsize, *(reader.step for reader in readers.values()))
        self._base_address, self._rows = self._overlapping_rows()

    def _overlapping_rows(self) -> tuple[int, np.ndarray]:
        """Address of the lowest map, and rows that begin at every `step` bytes from there."""
        layout = self._layout
        lowest = min(self._readers.values(), key=lambda reader: reader.address)
        end = max(reader.address + reader.size for reader in self._readers.values())
        # A row is one item of opaque bytes: numpy copies it whole, not number by number.
        first_row = lowest.first_row().reshape(-1).view(f"V{layout.row_bytes}")
        count = (end - lowest.address - layout.row_bytes) // self._step + 1
        rows = as_strided(first_row, (count,), (self._step,), writeable=False)
        return lowest.address, rows

    def lacks_any(self, shards: Iterable[int]) -> bool:
        """Whether a shard of `shards` is not among the open ones."""
        return any(shard not in self._readers for shard in shards)

    def take(self, chunks: np.ndarray, offsets: np.ndarray) -> np.ndarray | None:
        """Gather row `offsets[i]` of chunk `chunks[i]` in the stored dtype, `(n, ...)`.

        Chunks are numbered through the whole array. None if a chunk is unchecked or not open.
        """
        addresses = self._chunk_addresses[chunks]
        if not addresses.all():
            return None
        distances = addresses + offsets * self._layout.row_bytes - self._base_address
        rows = self._rows[distances // self._step].view(self._layout.stored_dtype)
        return rows.reshape(len(distances), *self._layout.shape[1:])

    def check(self, chunks: np.ndarray) -> None:
        """Check the crc32c of unchecked chunks among `chunks`, whose shards must be open.

        Raises `CorruptError` if a chunk is damaged.
        """
        for chunk in chunks[self._chunk_addresses[chunks] == 0].tolist():
            shard, number = divmod(chunk, self._chunks_per_shard)
            self._readers[shard].chunk(number)
            self._chunk_addresses[chunk] = self._readers[shard].checked_addresses()[number]

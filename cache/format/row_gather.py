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

UNCHECKED = np.int64(-(1 << 62))
"""Shift of a chunk that is not open or not checked."""


class MappedRows:
    """Rows of the open shards of one array; `readers` is shard number -> reader.

    The object keeps the readers, and so their maps, alive. Raw chunks only.
    """

    def __init__(self, readers: dict[int, ShardReader], layout: ArrayLayout) -> None:
        self._readers = readers
        self._layout = layout
        self._chunks_per_shard = layout.shard_rows // layout.chunk_rows

        # Bytes between two overlapping rows: these divide the distance of any two stored rows.
        itemsize = np.dtype(layout.stored_dtype).itemsize
        self._step = math.gcd(itemsize, *(reader.step for reader in readers.values()))
        self._rows_per_row = layout.row_bytes // self._step
        self._base_address, self._rows = self._overlapping_rows()

        # What to add to `row * rows_per_row` for the index of a row among the overlapping ones, by
        # chunk; so low that the sum is negative if the shard is not open, or the chunk unchecked.
        self._shifts = np.full(layout.shards * self._chunks_per_shard, UNCHECKED, np.int64)
        for shard, reader in readers.items():
            first = shard * self._chunks_per_shard
            chunks = np.arange(first, first + self._chunks_per_shard)
            self._shifts[chunks] = self._shifts_of(reader, chunks)
        self._has_unchecked = bool((self._shifts == UNCHECKED).any())
        self._stored_dtype = np.dtype(layout.stored_dtype)

    def _shifts_of(self, reader: ShardReader, chunks: np.ndarray) -> np.ndarray:
        """`_shifts` of the chunks of an open shard, whose numbers in the array are `chunks`."""
        addresses = reader.checked_addresses()
        first_rows = chunks * self._layout.chunk_rows
        shifts = (addresses - self._base_address) // self._step - first_rows * self._rows_per_row
        return np.where(addresses == 0, UNCHECKED, shifts)

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

    def take(self, rows: np.ndarray, chunks: np.ndarray) -> np.ndarray | None:
        """Gather the rows `rows`, which lie in `chunks`, in the stored dtype, `(n, ...)`.

        Both are numbered through the whole array. None if a chunk is unchecked or not open.
        """
        indices = rows * self._rows_per_row
        indices += self._shifts[chunks]
        if self._has_unchecked and indices.min() < 0:
            return None
        shape = len(rows), *self._layout.shape[1:]
        return np.ndarray(shape, self._stored_dtype, self._rows[indices])

    def check(self, chunks: np.ndarray) -> None:
        """Check the crc32c of unchecked chunks among `chunks`, whose shards must be open.

        Raises `CorruptError` if a chunk is damaged.
        """
        for chunk in chunks[self._shifts[chunks] == UNCHECKED].tolist():
            shard, number = divmod(chunk, self._chunks_per_shard)
            reader = self._readers[shard]
            reader.chunk(number)
            of_shard = np.arange(chunk - number, chunk - number + self._chunks_per_shard)
            self._shifts[chunk] = self._shifts_of(reader, of_shard)[number]
        self._has_unchecked = bool((self._shifts == UNCHECKED).any())

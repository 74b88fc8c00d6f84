"""Random rows of many shards at the speed of one array: one index over all their memory maps.

Grouping rows by shard costs more than copying them. Here the maps of an array's open shards are
seen as one array of overlapping rows that begins at the lowest map and ends with the highest, so
that the address of a row, in steps of a few bytes, is its index. What lies between the maps is
never touched: an address comes from the index of an open shard, of a chunk that was checked.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .layout import ArrayLayout
from .shard import ShardReader


class MappedRows:
    """Open shards of one array by their number; holding a window keeps their maps alive."""

    def __init__(self, readers: dict[int, ShardReader], layout: ArrayLayout) -> None:
        self._readers = readers
        self._layout = layout
        self._per_shard = layout.shard_rows // layout.chunk_rows
        # Address of every chunk of the array, 0 where it is not open or not checked.
        self._starts = np.zeros(layout.shards * self._per_shard, np.int64)
        for shard, reader in readers.items():
            self._starts[shard * self._per_shard :][: self._per_shard] = reader.checked_addresses()
        itemsize = np.dtype(layout.stored_dtype).itemsize
        self._step = math.gcd(itemsize, *(reader.step for reader in readers.values()))
        self._base, self._rows = self._span()

    def _span(self) -> tuple[int, np.ndarray]:
        """Address of the lowest map, and rows that begin at every `step` bytes from there."""
        layout = self._layout
        lowest = min(self._readers.values(), key=lambda reader: reader.address)
        end = max(reader.address + reader.size for reader in self._readers.values())
        first = lowest.first_row()
        count = (end - lowest.address - layout.row_bytes) // self._step + 1
        shape, strides = (count, *layout.shape[1:]), (self._step, *first.strides[1:])
        return lowest.address, as_strided(first, shape, strides, writeable=False)

    def missing(self, shards: Iterable[int]) -> bool:
        """Whether one of `shards` is not in this window."""
        return any(shard not in self._readers for shard in shards)

    def take(self, chunks: np.ndarray, inside: np.ndarray) -> np.ndarray | None:
        """Row `inside[i]` of chunk `chunks[i]`, as stored; None if a chunk is not checked yet."""
        starts = self._starts[chunks]
        if not starts.all():
            return None
        offsets = starts + inside * self._layout.row_bytes - self._base
        return self._rows[offsets // self._step]

    def check(self, chunks: np.ndarray) -> None:
        """Check those of `chunks` that were not touched yet; their shards are in this window."""
        for chunk in chunks[self._starts[chunks] == 0].tolist():
            shard, number = divmod(chunk, self._per_shard)
            self._readers[shard].chunk(number)
            self._starts[chunk] = self._readers[shard].checked_addresses()[number]

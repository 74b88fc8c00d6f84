"""Rows of a split as runs of neighbouring positions, which is what disks and maps like to read."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .activation_cache import ActivationCache


@dataclass(frozen=True)
class RowRuns:
    """Positions of chosen sequences, in order, as runs; row i is the i-th of them."""

    starts: np.ndarray
    """First position of each run, `(runs,)`."""
    rows: np.ndarray
    """Rows before each run, and at the end all rows, `(runs + 1,)`."""

    @classmethod
    def of(cls, cache: ActivationCache, sequences: np.ndarray) -> "RowRuns":
        """Whole `sequences`, ascending; neighbours are joined."""
        starts = cache.sequence_start[sequences]
        lengths = cache.sequence_length[sequences]
        first = np.ones(len(starts), bool)
        first[1:] = starts[1:] != starts[:-1] + lengths[:-1]
        before = np.cumsum(lengths) - lengths
        total = np.array([lengths.sum()], np.int64)
        return cls(starts[first], np.concatenate([before[first], total]))

    def __len__(self) -> int:
        return int(self.rows[-1])

    def pieces(self, limit: int) -> Iterator[tuple[int, int]]:
        """All positions in order, as `(start, stop)` of at most `limit` rows."""
        for start, count in zip(self.starts.tolist(), np.diff(self.rows).tolist(), strict=True):
            for row in range(start, start + count, limit):
                yield row, min(row + limit, start + count)

    def positions(self, start: int, stop: int) -> slice | np.ndarray:
        """Positions of rows `start:stop`: a slice where they are neighbours."""
        run = int(np.searchsorted(self.rows, start, "right")) - 1
        if stop <= self.rows[run + 1]:
            shift = int(self.starts[run] - self.rows[run])
            return slice(start + shift, stop + shift)
        rows = np.arange(start, stop)
        runs = np.searchsorted(self.rows, rows, "right") - 1
        return self.starts[runs] + rows - self.rows[runs]

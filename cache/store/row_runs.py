"""Runs of neighbouring positions: the rows of chosen sequences, in pieces that read fast.

Export, row loader and probes read a split through `RowRuns`, so that a read is one slice of a
memory map or one range of a file.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .activation_cache import ActivationCache


@dataclass(frozen=True)
class RowRuns:
    """Positions of chosen sequences, in order, as runs; row i is the i-th of these positions."""

    starts: np.ndarray
    """First position of each run, `(runs,)`."""
    rows: np.ndarray
    """Number of rows before each run, and after the last run, `(runs + 1,)`."""

    @classmethod
    def of(cls, cache: ActivationCache, sequences: np.ndarray) -> "RowRuns":
        """Runs of whole `sequences` (numbers, ascending); neighbouring sequences are one run."""
        starts = cache.sequence_start[sequences]
        lengths = cache.sequence_length[sequences]
        begins_run = np.ones(len(starts), bool)
        begins_run[1:] = starts[1:] != starts[:-1] + lengths[:-1]
        rows_before = np.cumsum(lengths) - lengths
        n_rows = np.array([lengths.sum()], np.int64)
        return cls(starts[begins_run], np.concatenate([rows_before[begins_run], n_rows]))

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.rows[-1])

    def pieces(self, limit: int) -> Iterator[tuple[int, int]]:
        """All positions in order, as slices `(start, stop)` of at most `limit` positions."""
        for start, count in zip(self.starts.tolist(), np.diff(self.rows).tolist(), strict=True):
            for row in range(start, start + count, limit):
                yield row, min(row + limit, start + count)

    def positions(self, start: int, stop: int) -> slice | np.ndarray:
        """Positions of the rows `start:stop`: a slice if one run has all of them, else an array."""
        run = int(np.searchsorted(self.rows, start, "right")) - 1
        if stop <= self.rows[run + 1]:
            shift = int(self.starts[run] - self.rows[run])
            return slice(start + shift, stop + shift)
        return self.positions_of(np.arange(start, stop))

    def positions_of(self, rows: np.ndarray) -> np.ndarray:
        """Positions of rows in any order, `(n,)` int64."""
        runs = np.searchsorted(self.rows, rows, "right") - 1
        return self.starts[runs] + rows - self.rows[runs]

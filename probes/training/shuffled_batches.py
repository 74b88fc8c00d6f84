"""Batches over the shuffled order of slabs: which rows of which buffer filling make up a batch.

`ShuffledBatches` cuts the order of `cache/store/slab_shuffle.py` into batches, for the minibatches
of a cache (`minibatches.py`) and for labelled arrays (`vocabulary/examples.py`), which read the
rows. Any batch of any epoch is reached without reading the batches before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...cache.store.slab_shuffle import BUFFER_ROWS, Slabs, SlabShuffle


@dataclass(frozen=True)
class BatchGroup:
    """Slabs in the buffer at the same time, and the batches drawn from their rows."""

    slabs: np.ndarray
    """Numbers of the slabs in the order in which they lie in the buffer."""
    pieces: list[np.ndarray]
    """Rows of the buffer, one array per batch that takes any; all but the last end a batch."""
    complete: bool
    """Whether the last piece ends a batch; otherwise the next group continues that batch."""


@dataclass(frozen=True)
class ShuffledBatches:
    """Batches of `batch` rows over all rows of `slabs`, in another order in every epoch."""

    slabs: Slabs
    batch: int
    seed: int = 0
    shuffle: bool = True
    buffer_rows: int = BUFFER_ROWS
    """Rows that are shuffled among each other."""
    drop_last: bool = False
    """Leave out the last, shorter batch of an epoch, unless an epoch has no other batch."""

    @property
    def steps(self) -> int:
        """Number of batches of an epoch."""
        full_batches, remainder = divmod(self.slabs.rows, self.batch)
        return full_batches + bool(remainder and not (self.drop_last and full_batches))

    @property
    def buffer_size(self) -> int:
        """Most rows of a group: size of the buffer to be allocated."""
        return self._order.buffer_size

    def groups(self, epoch: int, step: int = 0) -> Iterator[BatchGroup]:
        """The groups of `epoch` from batch number `step` on."""
        rows_before, stop = step * self.batch, self.steps * self.batch
        for filling in self._order.fillings(epoch, rows_before, stop):
            # The first piece completes the batch that the group before has begun.
            first_cut = -rows_before % self.batch
            cuts = range(first_cut, len(filling.rows), self.batch)
            pieces = [piece for piece in np.split(filling.rows, [*cuts]) if len(piece)]
            rows_before += len(filling.rows)
            complete = rows_before % self.batch == 0 or rows_before == self.slabs.rows
            yield BatchGroup(filling.slabs, pieces, complete)

    @property
    def _order(self) -> SlabShuffle:
        return SlabShuffle(self.slabs, self.seed, self.shuffle, self.buffer_rows)

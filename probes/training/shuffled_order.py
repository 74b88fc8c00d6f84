"""In which order rows are drawn: slabs in random order fill a buffer, whose rows are shuffled.

Slabs of 64-256 rows and a buffer of some 32,000 rows do as well as rows in true random order, at
the speed of block reads (see `cache.loader`). The order follows from seed and epoch alone, so that
any batch of any epoch can be found again without reading what came before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...cache.errors import UsageError
from ...cache.store.activation_cache import ActivationCache

SLAB_ROWS = 128
"""Most rows of a slab."""
BUFFER_ROWS = 32768
"""Rows that are shuffled among each other."""


@dataclass(frozen=True)
class Slabs:
    """Runs of neighbouring rows `start:stop`, which are read as one."""

    starts: np.ndarray
    """First row of each, `(slabs,)` int64."""
    sizes: np.ndarray
    """Rows of each, `(slabs,)` int64."""

    @classmethod
    def cut(cls, starts: np.ndarray, sizes: np.ndarray, limit: int = SLAB_ROWS) -> "Slabs":
        """Cut runs into slabs of at most `limit` rows."""
        number = -(-sizes // limit)
        of_run = np.repeat(np.arange(len(sizes)), number)
        inside = (np.arange(len(of_run)) - np.repeat(np.cumsum(number) - number, number)) * limit
        return cls(starts[of_run] + inside, np.minimum(limit, sizes[of_run] - inside))

    @property
    def rows(self) -> int:
        return int(self.sizes.sum())


@dataclass(frozen=True)
class Group:
    """Slabs that are in the buffer together, and the batches that are drawn from them."""

    slabs: np.ndarray
    """Numbers of the slabs in the order in which they lie in the buffer."""
    pieces: list[np.ndarray]
    """Rows of the buffer, one array per batch that takes any; all but the last end a batch."""
    complete: bool
    """Whether the last piece ends a batch; else it goes on in the next group."""


@dataclass(frozen=True)
class ShuffledBatches:
    """Batches of `batch` rows over all rows of `slabs`, shuffled anew in every epoch."""

    slabs: Slabs
    batch: int
    seed: int = 0
    shuffle: bool = True
    buffer_rows: int = BUFFER_ROWS
    drop_last: bool = False
    """Leave out the last, shorter batch of an epoch, unless it is the only one."""

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        full, rest = divmod(self.slabs.rows, self.batch)
        return full + bool(rest and not (self.drop_last and full))

    @property
    def room(self) -> int:
        """Most rows of a group."""
        largest = int(self.slabs.sizes.max(initial=0))
        return min(self.slabs.rows, max(self.buffer_rows, largest))

    def groups(self, epoch: int, step: int = 0) -> Iterator[Group]:
        """The groups of `epoch` from batch `step` on; those before it are left out."""
        order = np.arange(len(self.slabs.sizes))
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        skip, limit, taken = step * self.batch, self.steps * self.batch, 0
        for number, slabs in enumerate(self._fill(order)):
            rows = int(self.slabs.sizes[slabs].sum())
            start, stop = max(0, skip - taken), min(rows, limit - taken)
            if start < stop:
                drawn = self._drawn(epoch, number, rows)[start:stop]
                first = -(taken + start) % self.batch
                cuts = [*range(first, len(drawn), self.batch)]
                pieces = [piece for piece in np.split(drawn, cuts) if len(piece)]
                whole = (taken + stop) % self.batch == 0 or taken + stop == self.slabs.rows
                yield Group(slabs, pieces, whole)
            taken += rows

    def _fill(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """Slabs of `order`, as many at a time as the buffer has room for."""
        ends, room, first, before = np.cumsum(self.slabs.sizes[order]), self.room, 0, 0
        while first < len(order):
            # At least one: no slab is larger than the room.
            last = int(np.searchsorted(ends, before + room, "right"))
            yield order[first:last]
            first, before = last, int(ends[last - 1])

    def _drawn(self, epoch: int, group: int, rows: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(rows)
        return np.random.default_rng([self.seed, epoch, group]).permutation(rows)


def draw_sequences(
    cache: ActivationCache, sequences: np.ndarray, max_positions: int, seed: int
) -> np.ndarray:
    """Whole sequences out of `sequences` up to `max_positions` positions, one at least, sorted."""
    if max_positions < 1:
        raise UsageError(f"max_positions must be 1 or more, not {max_positions}")
    drawn = np.random.default_rng(seed).permutation(sequences)
    fits = np.cumsum(cache.sequence_length[drawn]) <= max_positions
    return np.sort(drawn[: max(1, int(fits.sum()))])

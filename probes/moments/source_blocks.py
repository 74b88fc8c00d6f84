"""Source positions of a pass over a cache, in blocks of one fold and one reach: `source_blocks`.

`moment_collection.py` sums up the pairs of the blocks on the CPU, `device_sums.py` on a device.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...cache.store.activation_cache import ActivationCache
from .pass_plan import CachePass

TAIL_ROWS = 512
"""Rows of a block of sources near the ends of sequences: few, so that they are read soon."""


@dataclass(frozen=True)
class SourceBlock:
    """Source positions of one fold and one reach (see `shifted_sums.py`)."""

    fold: int
    reach: int
    rows: np.ndarray
    """Positions in the cache, `(n,)`."""

    def targets(self, offsets: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
        """Distinct positions t+N of the targets at all `offsets` that the sources t reach.

        Targets of several offsets overlap, and each position is to be read once. The second array
        `(offsets n,)` says where among the distinct positions the targets are, offset by offset;
        None for one offset.
        """
        reached = offsets[: self.reach + 1]
        targets = np.concatenate([self.rows + offset for offset in reached])
        return np.unique(targets, return_inverse=True) if len(reached) > 1 else (targets, None)


def source_blocks(
    cache: ActivationCache, plan: CachePass, sequences: np.ndarray, report: Callable[[int], None]
) -> Iterator[SourceBlock]:
    """All source positions of `sequences`, in blocks of one fold and one reach.

    Positions wait until their block is full; the last blocks are shorter.
    """
    request = plan.request
    reaches = len(request.offsets)
    waiting: dict[int, np.ndarray] = {}
    folds = cache.sequence_folds(request.folds, request.split)
    for window in cache.blocks(sequences, plan.block_rows * request.folds):
        # Fold and reach of every position; -1 for positions without a target at any offset.
        rows, lengths = cache.positions_of(window), cache.sequence_length[window]
        following = request.scope.largest_offsets(cache, window)
        reach = np.searchsorted(request.offsets, following, side="right") - 1
        fold = np.repeat(folds[window], lengths)
        keys = np.where(reach < 0, -1, fold * reaches + reach)
        # Yield full blocks, and let the rest wait.
        for key in np.unique(keys[keys >= 0]).tolist():
            is_full_reach = key % reaches == reaches - 1
            size = plan.block_rows if is_full_reach else min(plan.block_rows, TAIL_ROWS)
            before = [waiting[key]] if key in waiting else []
            joined = np.concatenate([*before, rows[keys == key]])
            full = len(joined) // size * size
            for start in range(0, full, size):
                yield SourceBlock(key // reaches, key % reaches, joined[start : start + size])
            waiting[key] = joined[full:]
        report(len(rows))
    for key, remaining in waiting.items():
        if len(remaining):
            yield SourceBlock(key // reaches, key % reaches, remaining)

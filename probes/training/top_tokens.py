"""The model's own top token at every position, found once and kept on disk while a fit lasts."""

import tempfile
from collections.abc import Callable

import numpy as np
import torch

from ...cache.store.activation_cache import ActivationCache
from ...cache.store.row_runs import RowRuns
from .softmax_loss import TILE_BYTES, TILE_ROWS, ModelDistribution
from .threads import thread_pool


def find_top_tokens(
    cache: ActivationCache,
    sequences: np.ndarray,
    progress: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """One more than the head's top token at the positions of `sequences`, else 0; int32.

    `(positions,)`, mapped from a temporary file; `tokens_at` reads it. One pass over layer L serves
    every offset, layer and epoch: the label of a pair (t, t+N) lies at t+N.
    """
    with tempfile.TemporaryFile(prefix="residua-tops-") as file:
        # A new file is sparse zeros: only what is written takes space.
        found = np.memmap(file, np.int32, "w+", shape=(cache.positions,))
    source, teacher = cache.residual_array(cache.n_blocks), ModelDistribution(cache.head.torch())
    rows = max(TILE_ROWS, TILE_BYTES // (4 * cache.vocab))

    def work(piece: tuple[int, int]) -> int:
        start, stop = piece
        token = teacher.tokens(torch.from_numpy(source.read(start, stop))).token
        assert token is not None
        found[start:stop] = token.numpy() + 1
        return stop - start

    with thread_pool(torch.get_num_threads()) as pool:
        for done in pool.map(work, RowRuns.of(cache, sequences).pieces(rows)):
            progress(done)
    return found


def tokens_at(tops: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    """Top tokens at `positions`, int64; -1 past the end and where there are none."""
    inside = positions < len(tops)
    found = tops[np.where(inside, positions, 0)].astype(np.int64) - 1
    return torch.from_numpy(np.where(inside, found, -1))

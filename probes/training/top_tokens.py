"""The model's own top token at every position: labels of probes with the loss `model`.

`find_top_tokens` computes them in one pass over layer L, into a temporary file; vocabulary probes
call it before a fit and in `score`, and read the labels of each batch by `tokens_at`.
"""

from collections.abc import Callable

import numpy as np
import torch

from ...cache.devices import copy_to_device, copy_to_host
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.row_runs import RowRuns
from .scratch_file import map_temporary_file
from .softmax_loss import TILE_BYTES, TILE_ROWS, ModelDistribution
from .threads import CPU, thread_pool


def find_top_tokens(
    cache: ActivationCache,
    sequences: np.ndarray,
    progress: Callable[[int], None] = lambda rows: None,
    device: torch.device = CPU,
) -> np.ndarray:
    """Top token + 1 at the positions of `sequences`, 0 at all others, `(positions,)` int32.

    The array is mapped from a temporary file; `tokens_at` reads it. One pass over layer L serves
    every offset, layer and epoch: the label of a pair (t, t+N) lies at t+N. `progress` is called
    with the number of positions of each block. The head runs on `device`. Raises `NoSpaceError` if
    the folder of temporary files has no space.
    """
    top_tokens = map_temporary_file(np.dtype(np.int32), cache.positions)
    last_layer = cache.residual_array(cache.n_blocks)
    model = ModelDistribution(cache.head.torch(device))
    block_rows = max(TILE_ROWS, TILE_BYTES // (4 * cache.vocab))

    def write_block(block: tuple[int, int]) -> int:
        start, stop = block
        rows = torch.from_numpy(last_layer.read(start, stop))
        token = model.tokens(copy_to_device(rows, device)).token
        assert token is not None
        top_tokens[start:stop] = copy_to_host(token).numpy() + 1
        return stop - start

    blocks = RowRuns.of(cache, sequences).pieces(block_rows)
    if device.type != "cpu":
        for block in blocks:
            progress(write_block(block))
        return top_tokens
    with thread_pool(torch.get_num_threads()) as pool:
        for rows in pool.map(write_block, blocks):
            progress(rows)
    return top_tokens


def tokens_at(top_tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    """Top tokens at `positions`, int64; -1 past the end and at positions without a label."""
    inside = positions < len(top_tokens)
    tokens = top_tokens[np.where(inside, positions, 0)].astype(np.int64) - 1
    return torch.from_numpy(np.where(inside, tokens, -1))

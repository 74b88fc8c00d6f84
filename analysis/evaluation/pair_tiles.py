"""Tiles of rows that passes over `(rows, vocab)` matrices take at once; they stay in caches.

`matching_tiles` cuts pairs of rows of two matrices; `default_tile_rows` says how many rows of a
vocabulary a tile has.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

TILE_BYTES = {"cpu": 1 << 20, "gpu": 256 << 20}
"""Bytes of float32 logits that are worked on at once.

On a CPU, the five matrices of a comparison then lie in a core's second-level cache or nearly. At
4,000 tokens, tiles of 1/8, 1/4, 1/2 and 1 MiB took 2.6, 2.0, 1.6 and 1.5 ns a logit: smaller tiles
need more calls."""
TILE_ROWS = {"cpu": 1, "gpu": 8}
"""Fewest rows of a tile."""
SHORT_RUN = 8
"""Runs of less than a tile's rows by this are taken together."""


def default_tile_rows(vocab: int, device: "torch.device") -> int:
    """Rows of `vocab` logits that are worked on at once on `device`."""
    kind = "cpu" if device.type == "cpu" else "gpu"
    return max(TILE_ROWS[kind], TILE_BYTES[kind] // (4 * vocab))


def matching_tiles(targets: np.ndarray, rows: np.ndarray, tile_rows: int) -> Iterator[slice]:
    """Cut pairs of `targets` and `rows` `(n,)` into slices of at most `tile_rows` pairs.

    A slice ends where neighbouring pairs are no neighbours in both matrices, such as at the end of
    a document: both are then read without a copy. Where such runs are short, a slice holds several
    of them, and its rows are copied.
    """
    n = len(targets)
    joined = (np.diff(targets) == 1) & (np.diff(rows) == 1)
    ends = np.append(np.flatnonzero(~joined) + 1, n) if n else np.zeros(0, np.int64)
    start = 0
    while start < n:
        run = int(ends[np.searchsorted(ends, start, side="right")])
        stop = min(run, start + tile_rows)
        if stop - start < tile_rows // SHORT_RUN:
            stop = min(n, start + tile_rows)
        yield slice(start, stop)
        start = stop


def as_rows(numbers: np.ndarray) -> "slice | np.ndarray":
    """Ascending `numbers` `(n,)` as a slice where they are neighbours, else as they are."""
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers

"""Stored logits: the modes `recompute`, `topk:K` and `full`, their arrays, and top-k itself.

`recompute` stores no logits, as layer L and the head give them. `topk:K` stores the K largest of
every position with the logsumexp and the probability of all others, `full` all logits. Rows are
computed in `cache/forward/kept_logits.py` and read through `ActivationCache.topk`.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError
from .dtypes import STORED_DTYPES

if TYPE_CHECKING:
    import dask.array

RECOMPUTE, FULL = "recompute", "full"
MODES = (RECOMPUTE, "topk:K", FULL)
"""Values of the option `logits`."""
DEFAULT_TOP = 64
"""Default K of `ActivationCache.topk`, and of the mode `topk:K` whose error extraction measures."""
FULL_ARRAY = "logits/full"
"""Array of the mode `full`."""
TOP_ARRAYS = ("logits/ids", "logits/values", "logits/logsumexp", "logits/tail")
"""Arrays of the mode `topk:K`."""
NARROW_VOCAB = 1 << 16
"""Largest vocabulary with token ids stored as uint16."""


@dataclass(frozen=True)
class LogitsArray:
    """Name, width, dtype and axes of one stored array of a mode."""

    name: str
    width: int | None
    """Numbers per position; None for an array `(positions,)`."""
    dtype: str
    """Integer dtype, or logical dtype as of residual arrays."""
    axes: tuple[str, ...]
    """Names of the axes."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(STORED_DTYPES.get(self.dtype, self.dtype)).itemsize * (self.width or 1)


@dataclass(frozen=True)
class TopK:
    """The K largest logits of every position and the weight of all others; lazy dask arrays."""

    ids: "dask.array.Array"
    """Token ids by falling logit, `(positions, K)` int32; the first is the model's top token."""
    values: "dask.array.Array"
    """Logits of the tokens `ids`, `(positions, K)` float32."""
    logsumexp: "dask.array.Array"
    """Log-sum-exp over the whole vocabulary, `(positions,)`; log p is `values - logsumexp`."""
    tail: "dask.array.Array"
    """Probability of all other tokens together, `(positions,)` float32."""


def top_size(mode: str) -> int:
    """K of the mode `topk:K`, 0 for any other mode."""
    match = re.fullmatch(r"topk:([1-9][0-9]{0,8})", mode)
    return int(match[1]) if match else 0


def check_logits_mode(mode: str) -> None:
    """Raise `UsageError` unless `mode` is one of `MODES`."""
    if mode not in (RECOMPUTE, FULL) and not top_size(mode):
        raise UsageError(f"logits {mode!r} is unknown; choose one of {', '.join(MODES)}")


def check_kept_tokens(mode: str, vocab: int) -> None:
    """Raise `UsageError` if K of the mode `topk:K` is not below the vocabulary."""
    if top_size(mode) >= vocab:
        raise UsageError(
            f"logits {mode} is no choice from a vocabulary of {vocab}; choose a smaller K, or full"
        )


def logits_mode_covers(cache_mode: str, requested_mode: str) -> bool:
    """Whether a cache of `cache_mode` has all logits of a cache of `requested_mode`."""
    if requested_mode in (RECOMPUTE, cache_mode):
        return True
    return 0 < top_size(requested_mode) <= top_size(cache_mode)


def list_logits_arrays(mode: str, vocab: int, dtype: str) -> tuple[LogitsArray, ...]:
    """The arrays of a mode, with logits in the logical `dtype`."""
    if mode == FULL:
        return (LogitsArray(FULL_ARRAY, vocab, dtype, ("positions", "vocab")),)
    if not (size := top_size(mode)):
        return ()
    ids = "uint16" if vocab <= NARROW_VOCAB else "int32"
    widths = (size, size, None, None)
    dtypes = (ids, dtype, "float32", "float32")
    return tuple(
        LogitsArray(name, width, array_dtype, ("positions", "rank") if width else ("positions",))
        for name, width, array_dtype in zip(TOP_ARRAYS, widths, dtypes, strict=True)
    )


def top_logits(logits: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """The `size` largest logits of rows `(n, vocab)`: ids, values, logsumexp, tail as in `TopK`.

    Sums are accumulated in float64.
    """
    # The K largest in any order, then sorted.
    logits = np.asarray(logits, np.float32)
    unsorted = np.argpartition(logits, -size, axis=-1)[:, -size:]
    order = np.argsort(-np.take_along_axis(logits, unsorted, -1), axis=-1, kind="stable")
    ids = np.take_along_axis(unsorted, order, -1)
    values = np.take_along_axis(logits, ids, -1)

    # Softmax weights relative to the largest logit.
    peak = values[:, :1]
    weights = np.exp(logits - peak)
    total = weights.sum(-1, dtype=np.float64)
    # The tail is summed without the top K, not subtracted: a small one would drown in rounding.
    np.put_along_axis(weights, ids, 0.0, -1)
    tail = weights.sum(-1, dtype=np.float64) / total
    logsumexp = peak[:, 0] + np.log(total)
    return ids.astype(np.int32), values, logsumexp.astype(np.float32), tail.astype(np.float32)


def pack_top(logits: np.ndarray, size: int) -> np.ndarray:
    """`top_logits` in one array, `(n, 2 * size + 2)` float64: ids, values, logsumexp, tail.

    float64 holds int32 ids and float32 values exactly.
    """
    ids, values, logsumexp, tail = top_logits(logits, size)
    return np.concatenate([ids, values, logsumexp[:, None], tail[:, None]], -1, dtype=np.float64)


def unpack_top(packed: "dask.array.Array", size: int) -> TopK:
    """Split a lazy array of `pack_top`; computed together, the four arrays share the work."""
    ids = packed[:, :size].astype(np.int32)
    values = packed[:, size : 2 * size].astype(np.float32)
    sums = packed[:, 2 * size :].astype(np.float32)
    return TopK(ids, values, logsumexp=sums[:, 0], tail=sums[:, 1])

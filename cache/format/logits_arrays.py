"""Logits that are kept beside the residual streams: the modes, their arrays, and how top-k is cut.

`recompute` keeps none: layer L and the head give them. `topk:K` keeps the K largest of every
position with what the others weigh, `full` all of them.
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
DEFAULT_TOP = 64
"""Logits per position of `ActivationCache.topk`, and of the mode that extraction measures, where
nothing else is asked for."""
FULL_ARRAY = "logits/full"
TOP_ARRAYS = ("logits/ids", "logits/values", "logits/logsumexp", "logits/tail")
NARROW_VOCAB = 1 << 16
"""Vocabulary up to which ids are kept as uint16."""


@dataclass(frozen=True)
class LogitsArray:
    """One stored array of a mode."""

    name: str
    width: int | None
    """Numbers per position; None for an array `(positions,)`."""
    dtype: str
    """What is stored: an integer type or a logical dtype of the residual arrays."""
    axes: tuple[str, ...]

    @property
    def row_bytes(self) -> int:
        return np.dtype(STORED_DTYPES.get(self.dtype, self.dtype)).itemsize * (self.width or 1)


@dataclass(frozen=True)
class TopK:
    """The K largest logits of every position and what the rest weighs; lazy dask arrays."""

    ids: "dask.array.Array"
    """Token ids by falling logit, `(positions, K)` int32; the first is the model's choice."""
    values: "dask.array.Array"
    """Their logits, `(positions, K)` float32."""
    logsumexp: "dask.array.Array"
    """Over the whole vocabulary, `(positions,)` float32: `values - logsumexp` are log p."""
    tail: "dask.array.Array"
    """Probability of all other tokens together, `(positions,)` float32."""


def top_size(mode: str) -> int:
    """K of `topk:K`, 0 for another mode."""
    match = re.fullmatch(r"topk:([1-9]\d*)", mode)
    return int(match[1]) if match else 0


def check_logits_mode(mode: str) -> None:
    """Raise `UsageError` unless `mode` is one of `MODES`."""
    if mode not in (RECOMPUTE, FULL) and not top_size(mode):
        raise UsageError(f"logits {mode!r} is unknown; choose one of {', '.join(MODES)}")


def check_kept_tokens(mode: str, vocab: int) -> None:
    """Raise `UsageError` if the mode keeps as many logits as there are."""
    if top_size(mode) >= vocab:
        raise UsageError(
            f"logits {mode} is no choice from a vocabulary of {vocab}; choose a smaller K, or full"
        )


def logits_mode_covers(held: str, asked: str) -> bool:
    """Whether a cache of the mode `held` has all that one of the mode `asked` would."""
    if asked in (RECOMPUTE, held):
        return True
    return 0 < top_size(asked) <= top_size(held)


def logits_arrays(mode: str, vocab: int, dtype: str) -> tuple[LogitsArray, ...]:
    """The arrays of a mode, logits in `dtype`."""
    if mode == FULL:
        return (LogitsArray(FULL_ARRAY, vocab, dtype, ("positions", "vocab")),)
    if not (size := top_size(mode)):
        return ()
    ids = "uint16" if vocab <= NARROW_VOCAB else "int32"
    shapes = ((size, ids), (size, dtype), (None, "float32"), (None, "float32"))
    return tuple(
        LogitsArray(name, width, kind, ("positions", "rank") if width else ("positions",))
        for name, (width, kind) in zip(TOP_ARRAYS, shapes, strict=True)
    )


def top_logits(logits: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """Ids, values, logsumexp and tail of rows `(n, vocab)`; sums are accumulated in float64."""
    logits = np.asarray(logits, np.float32)
    found = np.argpartition(logits, -size, axis=-1)[:, -size:]
    order = np.argsort(-np.take_along_axis(logits, found, -1), axis=-1, kind="stable")
    ids = np.take_along_axis(found, order, -1)
    values = np.take_along_axis(logits, ids, -1)
    peak = values[:, :1]
    weights = np.exp(logits - peak)
    total = weights.sum(-1, dtype=np.float64)
    # Set to zero and summed, not subtracted: a small tail would drown in rounding.
    np.put_along_axis(weights, ids, 0.0, -1)
    tail = weights.sum(-1, dtype=np.float64) / total
    logsumexp = peak[:, 0] + np.log(total)
    return ids.astype(np.int32), values, logsumexp.astype(np.float32), tail.astype(np.float32)


def pack_top(logits: np.ndarray, size: int) -> np.ndarray:
    """`top` of a block side by side, `(n, 2 * size + 2)` float64, which holds all of it exactly."""
    ids, values, logsumexp, tail = top_logits(logits, size)
    return np.concatenate([ids, values, logsumexp[:, None], tail[:, None]], -1, dtype=np.float64)


def unpack_top(packed: "dask.array.Array", size: int) -> TopK:
    """Lazy arrays of what `pack_top` gave; computed together they share the work."""
    values = packed[:, size : 2 * size].astype(np.float32)
    last = packed[:, 2 * size :].astype(np.float32)
    return TopK(packed[:, :size].astype(np.int32), values, last[:, 0], last[:, 1])

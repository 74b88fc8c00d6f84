"""Positions of an evaluation: which sequences are taken, and how they are cut for the head."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..cache.errors import UsageError

if TYPE_CHECKING:
    import torch

    from ..cache.store import ActivationCache

VOCAB_BYTES = 16 << 20
"""Largest float32 matrix `(rows, vocab)` of a window; about six of them live at a time."""
MAX_ROWS = 4096
"""Most target rows of a window."""


def choose_sequences(
    cache: "ActivationCache", split: str, max_positions: int, seed: int
) -> np.ndarray:
    """Whole sequences of `split` in a seeded random draw, sorted for reading."""
    if max_positions < 1:
        raise UsageError(f"max_positions must be 1 or more, not {max_positions}")
    numbers = cache.split(split)
    if not len(numbers):
        raise UsageError(
            f"the {split} split of this cache is empty; extract more sequences or use split='all'"
        )
    drawn = np.random.default_rng(seed).permutation(numbers)
    fits = np.cumsum(cache.sequence_length[drawn]) <= max_positions
    return np.sort(drawn[: max(1, int(fits.sum()))])


def check_where(cache: "ActivationCache", where: np.ndarray | None) -> None:
    """Raise `UsageError` unless `where` is None or a mask over the positions of `cache`."""
    if where is None:
        return
    dtype, shape = getattr(where, "dtype", type(where).__name__), np.shape(where)
    if dtype != np.dtype(bool) or shape != (cache.positions,):
        raise UsageError(
            f"where must be a bool array ({cache.positions},), one value for each position of "
            f"the cache; got {dtype} {shape}"
        )


@dataclass(frozen=True)
class Window:
    """Target positions s = t+N in order, and all positions that are read for them."""

    start: int
    """Number of the first target among all targets."""
    stop: int
    positions: np.ndarray
    """Positions in the cache that are read, increasing: targets and sources, `(read,)`."""
    number: np.ndarray
    """Number of each of `positions` among those of the chosen sequences, `(read,)`."""
    place: np.ndarray
    """Where each target stands in `positions`, `(targets,)`."""
    index: np.ndarray
    """Place of each target in its sequence, `(targets,)`."""
    slot: np.ndarray
    """Which of the chosen sequences each target belongs to, `(targets,)`."""
    token: "torch.Tensor"
    """Token at each target, `(targets,)` int64."""
    text: "torch.Tensor"
    """Token after each target, -1 at the end of its sequence, `(targets,)` int64."""
    previous: "torch.Tensor"
    """Token before each target, -1 at the start of its sequence, `(targets,)` int64."""
    read: "torch.Tensor"
    """Token at each of `positions`, `(read,)` int64."""

    def targets(self, offset: int) -> np.ndarray:
        """Targets s whose source s - offset lies in the same sequence, by number."""
        return np.flatnonzero(self.index >= offset)

    def sources(self, targets: np.ndarray, offset: int) -> np.ndarray:
        """Where the sources of `targets` stand in `positions`."""
        return np.searchsorted(self.number, self.number[self.place[targets]] - offset)


def windows(
    cache: "ActivationCache",
    sequences: np.ndarray,
    offsets: Sequence[int],
    batch_rows: int | None = None,
    where: np.ndarray | None = None,
) -> Iterator[Window]:
    """Cut the positions of `sequences` into windows, so that every target comes exactly once.

    Targets are all positions, or those of the mask `where` `(positions,)`.
    """
    import torch

    limit = batch_rows or min(MAX_ROWS, max(1, VOCAB_BYTES // (4 * cache.vocab)))
    positions = cache.rows(sequences)
    lengths = cache.sequence_length[sequences]
    slot = np.repeat(np.arange(len(sequences)), lengths)
    index = positions - cache.sequence_start[sequences][slot]
    token = cache.tokens[positions].astype(np.int64)
    text = np.where(index + 1 < lengths[slot], np.append(token[1:], -1), -1)
    previous = np.where(index > 0, np.append(-1, token[:-1]), -1)
    targets = np.arange(len(positions))
    if where is not None:
        targets = np.flatnonzero(where[positions])
        # Sources of scattered targets are rows of their own.
        limit = max(1, limit // len({0, *offsets}))
    for start in range(0, len(targets), limit):
        here = targets[start : start + limit]
        read = np.unique(np.concatenate([here, *(here - offset for offset in offsets)]))
        read = read[read >= 0]
        yield Window(
            start,
            start + len(here),
            positions[read],
            read,
            np.searchsorted(read, here),
            index[here],
            slot[here],
            torch.from_numpy(token[here]),
            torch.from_numpy(text[here]),
            torch.from_numpy(previous[here]),
            torch.from_numpy(token[read]),
        )

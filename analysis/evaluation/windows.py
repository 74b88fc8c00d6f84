"""Positions of an evaluation: which are taken, what is resampled, how they are cut for the head."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...cache.errors import UsageError
from ...cache.tokens.segments import (
    PairScope,
    context_indices,
    document_of,
    neighbour_tokens,
    segment_indices,
)

if TYPE_CHECKING:
    import torch

    from ...cache.store.activation_cache import ActivationCache

VOCAB_BYTES = 16 << 20
"""Largest float32 matrix `(rows, vocab)` of a window; about six of them live at a time."""
MAX_ROWS = 4096
"""Most target rows of a window."""
FEW_DOCUMENTS = 10
"""Fewer documents give intervals that are noticeably too narrow."""
MOST_UNITS = 16384
"""Most units that are resampled; more documents are put together at random into so many groups."""


def choose_sequences(
    cache: "ActivationCache", split: str, max_positions: int, seed: int
) -> np.ndarray:
    """Whole sequences of `split` in a seeded random draw, sorted for reading."""
    if max_positions < 1:
        raise UsageError(f"max_positions must be 1 or more, not {max_positions}")
    numbers = cache.sequences(split)
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
class ResamplingUnits:
    """What the bootstrap resamples: documents, whose positions belong together."""

    name: str
    """`document`, or `sequence` where all positions are of one document."""
    count: int
    """Documents (sequences) evaluated."""
    slot: np.ndarray
    """Number of the unit of each position of the chosen sequences, `(n,)` int64."""
    slots: int
    """Units that are resampled."""

    @classmethod
    def of(cls, cache: "ActivationCache", sequences: np.ndarray, seed: int) -> "ResamplingUnits":
        """The documents of all positions of `sequences`.

        More than `MOST_UNITS` are put together at random: resampling groups of documents estimates
        the same interval, in memory that does not grow.
        """
        positions = cache.positions_of(sequences)
        document, slot = np.unique(document_of(cache, positions), return_inverse=True)
        name = "document"
        if len(document) < 2:
            name, document = "sequence", sequences
            slot = np.repeat(np.arange(len(sequences)), cache.sequence_length[sequences])
        slots = min(len(document), MOST_UNITS)
        if len(document) > slots:
            slot = (np.random.default_rng(seed).permutation(len(document)) % slots)[slot]
        return cls(name, len(document), slot, slots)

    @property
    def note(self) -> str:
        """What is to be said of the intervals; empty for many documents."""
        if self.name == "sequence":
            return (
                "all positions are of one document: intervals resample its sequences and are too "
                "narrow for other documents"
            )
        if self.count < FEW_DOCUMENTS:
            return (
                f"only {self.count} documents were evaluated: intervals from so few are too narrow"
            )
        return ""


@dataclass(frozen=True)
class Targets:
    """The positions of the chosen sequences, as targets t+N of pairs; arrays `(n,)`."""

    positions: np.ndarray
    """Positions in the cache, sequence by sequence."""
    index: np.ndarray
    """Largest offset at which the position is the target of a pair; negative for none."""
    index_in_sequence: np.ndarray
    """The same, were pairs of two documents allowed."""
    chosen: np.ndarray
    """Whether the position is in the mask of the evaluation."""

    @classmethod
    def of(
        cls,
        cache: "ActivationCache",
        sequences: np.ndarray,
        scope: PairScope,
        where: np.ndarray | None = None,
    ) -> "Targets":
        """The positions of `sequences`; pairs in `scope`, targets in the mask `where`."""
        positions = cache.positions_of(sequences)
        # The source t+N - N is one of the first positions if N is more than this.
        most = context_indices(cache, positions) - scope.drop_first
        index, across = (
            np.minimum(segment_indices(cache, sequences, of)[0], most)
            for of in (scope.across_documents, True)
        )
        chosen = np.ones(len(positions), bool) if where is None else where[positions]
        return cls(positions, index, across, chosen)

    @property
    def count(self) -> int:
        """Positions that are targets at offset 0."""
        return int((self.chosen & (self.index >= 0)).sum())

    def crossing(self, within: "Targets", offset: int) -> float:
        """Share of the pairs of sequences that join two documents; 0.0 without a pair.

        `within` are the same positions, with pairs inside one document.
        """
        pairs = int((self.chosen & (self.index_in_sequence >= offset)).sum())
        inside = int((within.chosen & (within.index >= offset)).sum())
        return 1 - inside / pairs if pairs else 0.0


@dataclass(frozen=True)
class EvaluationWindow:
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
    """Largest offset at which each target is that of a pair, `(targets,)`."""
    slot: np.ndarray
    """Number of the unit (document) of each target, `(targets,)`."""
    token: "torch.Tensor"
    """Token at each target, `(targets,)` int64."""
    text: "torch.Tensor"
    """Token after each target in the text, -1 at its end, `(targets,)` int64."""
    previous: "torch.Tensor"
    """Token before each target in the text, -1 at its start, `(targets,)` int64."""
    read: "torch.Tensor"
    """Token at each of `positions`, `(read,)` int64."""

    def targets(self, offset: int) -> np.ndarray:
        """Targets s that are one with their source s - offset in a pair, by number."""
        return np.flatnonzero(self.index >= offset)

    def sources(self, targets: np.ndarray, offset: int) -> np.ndarray:
        """Where the sources of `targets` stand in `positions`."""
        return np.searchsorted(self.number, self.number[self.place[targets]] - offset)


def evaluation_windows(
    cache: "ActivationCache",
    sequences: np.ndarray,
    offsets: Sequence[int],
    batch_rows: int | None = None,
    where: np.ndarray | None = None,
    scope: PairScope | None = None,
    units: ResamplingUnits | None = None,
) -> Iterator[EvaluationWindow]:
    """Cut the positions of `sequences` into windows, so that every target comes exactly once.

    Targets are all positions that `scope` allows, or those of the mask `where` `(positions,)`.
    `slot` is of `units`, by default the documents.
    """
    import torch

    scope, units = scope or PairScope(), units or ResamplingUnits.of(cache, sequences, 0)
    all_targets = Targets.of(cache, sequences, scope, where)

    limit = batch_rows or min(MAX_ROWS, max(1, VOCAB_BYTES // (4 * cache.vocab)))
    positions, index = all_targets.positions, all_targets.index
    token = cache.tokens[positions].astype(np.int64)
    targets = np.flatnonzero(all_targets.chosen & (index >= 0))
    if where is not None:
        # Sources of scattered targets are rows of their own.
        limit = max(1, limit // len({0, *offsets}))
    for start in range(0, len(targets), limit):
        here = targets[start : start + limit]
        text, previous = (
            neighbour_tokens(cache, positions[here], step, scope.across_documents)
            for step in (1, -1)
        )
        read = np.unique(np.concatenate([here, *(here - offset for offset in offsets)]))
        read = read[read >= 0]
        yield EvaluationWindow(
            start,
            start + len(here),
            positions[read],
            read,
            np.searchsorted(read, here),
            index[here],
            units.slot[here],
            torch.from_numpy(token[here]),
            torch.from_numpy(text),
            torch.from_numpy(previous),
            torch.from_numpy(token[read]),
        )

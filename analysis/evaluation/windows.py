"""The positions of an evaluation: which sequences, which pairs (t, t+N), cut into windows.

`evaluate` draws whole sequences of a split (`choose_sequences`), finds at which offsets each of
their positions is the target t+N of a pair (`Targets`), and reads them window by window
(`evaluation_windows`), each small enough for a `(rows, vocab)` matrix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ...cache.errors import UsageError
from ...cache.number_ranges import LARGEST
from ...cache.store.sequence_draw import draw_sequences
from ...cache.tokens.segments import (
    PairScope,
    context_indices,
    neighbour_tokens,
    segment_indices,
)
from ...probes.base.resampling import ResamplingUnits

if TYPE_CHECKING:
    import torch

    from ...cache.store.activation_cache import ActivationCache

VOCAB_BYTES = {"cpu": 16 << 20, "gpu": 256 << 20}
"""Size of a float32 matrix `(rows, vocab)` of a window; about six are in memory at a time."""
MIN_ROWS = 256
"""Rows of a window of a large vocabulary: fewer rows are multiplied at a lower rate."""
MAX_ROWS = 4096
"""Most target rows of a window."""


def choose_sequences(
    cache: "ActivationCache", split: str, max_positions: int, seed: int
) -> np.ndarray:
    """Numbers of whole sequences of `split`, drawn at random by `seed`, ascending.

    Up to `max_positions` positions, but one sequence at least.
    """
    numbers = cache.sequences(split)
    if not len(numbers):
        raise UsageError(
            f"the {split} split of this cache is empty; extract more sequences or use split='all'"
        )
    return draw_sequences(cache, numbers, max_positions, seed)


def class_token_mask(cache: "ActivationCache") -> np.ndarray:
    """Positions of class tokens in a cache of images, `(positions,)` bool.

    Raises `UsageError` where the cache keeps none of them.
    """
    mask = cache.tokens[:] == 0
    if not mask.any():
        raise UsageError(
            "this cache of images keeps no class token; extract with --positions all or cls"
        )
    return mask


def check_where(cache: "ActivationCache", where: np.ndarray | None) -> None:
    """Raise `UsageError` unless `where` is None or a bool mask over the positions of `cache`."""
    if where is None:
        return
    dtype, shape = getattr(where, "dtype", type(where).__name__), np.shape(where)
    if dtype != np.dtype(bool) or shape != (cache.positions,):
        raise UsageError(
            f"where must be a bool array ({cache.positions},), one value for each position of "
            f"the cache; got {dtype} {shape}"
        )


@dataclass(frozen=True, eq=False)
class EvaluationSample:
    """The sequences of an evaluation and the pairs (t, t+N) that count."""

    cache: "ActivationCache"
    sequences: np.ndarray
    """Numbers of whole sequences, ascending."""
    scope: PairScope = PairScope()
    """Whether pairs may join two documents, and how many first positions are no sources."""
    where: np.ndarray | None = None
    """Bool mask over the positions of the cache; only targets in the mask count."""

    @cached_property
    def targets(self) -> "Targets":
        """The positions of the sequences as targets t+N of pairs."""
        return Targets.of(self.cache, self.sequences, self.scope, self.where)

    def crossing_shares(self, offsets: Sequence[int]) -> dict[int, float]:
        """Share of the pairs that join two documents, by offset; 0.0 without a pair.

        All pairs of a sequence are the denominator, whether or not the scope counts them.
        """
        targets = one_document = self.targets
        if self.scope.across_documents:
            inside = PairScope(across_documents=False, drop_first=self.scope.drop_first)
            one_document = Targets.of(self.cache, self.sequences, inside, self.where)
        shares = {}
        for offset in offsets:
            pairs = int((targets.in_mask & (targets.largest_offset_across >= offset)).sum())
            same_document = one_document.in_mask & (one_document.largest_offset >= offset)
            shares[offset] = 1 - int(same_document.sum()) / pairs if pairs else 0.0
        return shares


@dataclass(frozen=True)
class Targets:
    """The positions of whole sequences as targets t+N of pairs; arrays `(n,)`."""

    positions: np.ndarray
    """Positions in the cache, sequence by sequence."""
    largest_offset: np.ndarray
    """Largest offset N at which the position is the target of a pair; negative for no pair."""
    largest_offset_across: np.ndarray
    """The same where pairs of two documents are allowed."""
    in_mask: np.ndarray
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
        # At a larger offset N the source t = target - N is one of the first, dropped positions.
        drop_limit = context_indices(cache, positions) - min(scope.drop_first, LARGEST)
        within, across = (
            np.minimum(segment_indices(cache, sequences, across_documents)[0], drop_limit)
            for across_documents in (scope.across_documents, True)
        )
        in_mask = np.ones(len(positions), bool) if where is None else where[positions]
        return cls(positions, within, across, in_mask)

    @property
    def count(self) -> int:
        """Number of positions that are targets at offset 0."""
        return int((self.in_mask & (self.largest_offset >= 0)).sum())


@dataclass(frozen=True)
class EvaluationWindow:
    """Some targets t+N in order, and all positions that are read for them.

    A target is named by its number in the window, 0 to targets - 1.
    """

    start: int
    """Number of the first target among all targets of the evaluation."""
    stop: int
    """Number after the last target."""
    positions: np.ndarray
    """Positions in the cache to read, ascending: targets and sources, `(read,)`."""
    sample_index: np.ndarray
    """Index of each of `positions` among the positions of the sample, `(read,)`."""
    target_rows: np.ndarray
    """Index of each target in `positions`, `(targets,)`."""
    largest_offset: np.ndarray
    """Largest offset at which each target is in a pair, `(targets,)`."""
    unit_numbers: np.ndarray
    """Number of the resampling unit (document) of each target, `(targets,)`."""
    token: "torch.Tensor"
    """Token at each of `positions`, `(read,)` int64."""
    target_token: "torch.Tensor"
    """Token at each target, `(targets,)` int64."""
    next_token: "torch.Tensor"
    """Token after each target in the text, -1 at the end of the text, `(targets,)` int64."""
    previous_token: "torch.Tensor"
    """Token before each target in the text, -1 at the start of the text, `(targets,)` int64."""

    def part(self, targets: slice, offsets: Sequence[int]) -> "EvaluationWindow":
        """The window of some of the `targets` only, and of the positions read at `offsets`."""
        if targets == slice(0, self.stop - self.start):
            return self
        index = self.sample_index[self.target_rows[targets]]
        sources = [
            index[self.largest_offset[targets] >= offset] - offset
            for offset in offsets
            if offset <= self.largest_offset.max()
        ]
        read = np.unique(np.concatenate([index, *sources]))
        rows = np.searchsorted(self.sample_index, read)
        return EvaluationWindow(
            start=self.start + targets.start,
            stop=self.start + targets.stop,
            positions=self.positions[rows],
            sample_index=read,
            target_rows=np.searchsorted(read, index),
            largest_offset=self.largest_offset[targets],
            unit_numbers=self.unit_numbers[targets],
            token=self.token[rows],
            target_token=self.target_token[targets],
            next_token=self.next_token[targets],
            previous_token=self.previous_token[targets],
        )

    def targets(self, offset: int) -> np.ndarray:
        """Numbers of the targets that are in a pair at `offset`."""
        return np.flatnonzero(self.largest_offset >= offset)

    def nearest_targets(self) -> np.ndarray:
        """Number of the first target at or after each of `positions`, else of the last one."""
        following = np.searchsorted(self.target_rows, np.arange(len(self.positions)))
        return np.minimum(following, len(self.target_rows) - 1)

    def sources(self, targets: np.ndarray, offset: int) -> np.ndarray:
        """Indices in `positions` of the sources t of `targets`, `offset` positions before them."""
        source_index = self.sample_index[self.target_rows[targets]] - offset
        return np.searchsorted(self.sample_index, source_index)


def evaluation_windows(
    sample: EvaluationSample,
    offsets: Sequence[int],
    *,
    batch_rows: int | None = None,
    units: ResamplingUnits | None = None,
    device: "torch.device | None" = None,
) -> Iterator[EvaluationWindow]:
    """Cut the targets of `sample` into windows; every target comes exactly once.

    `batch_rows` limits the rows of a window (default: `VOCAB_BYTES`, `MIN_ROWS` and `MAX_ROWS` for
    `device`). `units` default to the documents.
    """
    import torch

    cache, targets, where = sample.cache, sample.targets, sample.where
    units = units or ResamplingUnits.of(cache, sample.sequences, 0)
    positions, largest_offset = targets.positions, targets.largest_offset
    tokens = cache.tokens[positions].astype(np.int64)
    target_index = np.flatnonzero(targets.in_mask & (largest_offset >= 0))
    # Offsets without a pair have no source, and may be too large for int64.
    offsets = [offset for offset in offsets if offset <= largest_offset.max(initial=-1)]

    limit = batch_rows or default_window_rows(cache.vocab, device)
    if where is not None:
        # Scattered targets have sources of their own, so each target reads a row per offset.
        fewest = 1 if batch_rows else min(MIN_ROWS, limit)
        limit = max(fewest, limit // len({0, *offsets}))

    for start in range(0, len(target_index), limit):
        # Targets of this window, and the sources of all their pairs, as indices in the sample.
        window_targets = target_index[start : start + limit]
        sources = [window_targets - offset for offset in offsets]
        read = np.unique(np.concatenate([window_targets, *sources]))
        read = read[read >= 0]
        next_token, previous_token = (
            neighbour_tokens(cache, positions[window_targets], step, sample.scope.across_documents)
            for step in (1, -1)
        )
        yield EvaluationWindow(
            start=start,
            stop=start + len(window_targets),
            positions=positions[read],
            sample_index=read,
            target_rows=np.searchsorted(read, window_targets),
            largest_offset=largest_offset[window_targets],
            unit_numbers=units.unit_numbers[window_targets],
            token=torch.from_numpy(tokens[read]),
            target_token=torch.from_numpy(tokens[window_targets]),
            next_token=torch.from_numpy(next_token),
            previous_token=torch.from_numpy(previous_token),
        )


def default_window_rows(vocab: int, device: "torch.device | None" = None) -> int:
    """Rows of a window of `vocab` tokens on `device` (default: the CPU)."""
    kind = "cpu" if device is None or device.type == "cpu" else "gpu"
    return min(MAX_ROWS, max(MIN_ROWS, VOCAB_BYTES[kind] // (4 * vocab)))

"""The positions that studies read: whole sequences of a split, drawn by a seed."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ....cache.errors import UsageError
from ....cache.tokens.segments import context_indices, neighbour_tokens
from ....probes.base.resampling import (
    Interval,
    ResamplingUnits,
    bootstrap_interval,
    resampling_counts,
)
from ...evaluation.windows import check_where, choose_sequences, class_token_mask

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache


@dataclass(frozen=True, eq=False)
class PositionSample:
    """Positions of whole sequences of a cache; arrays are `(n,)`, in the order of the cache."""

    cache: "ActivationCache"
    split: str
    sequences: np.ndarray
    """Numbers of the sequences, ascending."""
    seed: int = 0
    where: np.ndarray | None = None
    """Bool mask over the positions of the cache; None takes all of the sequences."""

    @cached_property
    def positions(self) -> np.ndarray:
        """Positions in the cache, int64."""
        positions = self.cache.positions_of(self.sequences)
        return positions if self.where is None else positions[self.where[positions]]

    @property
    def count(self) -> int:
        """Number of positions."""
        return len(self.positions)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token that the model read at each position, int64."""
        return np.asarray(self.cache.tokens[self.positions], np.int64)

    @cached_property
    def text_tokens(self) -> np.ndarray:
        """Next token of the text, -1 at the end of a document, int64."""
        return neighbour_tokens(self.cache, self.positions, 1)

    @cached_property
    def previous_tokens(self) -> np.ndarray:
        """Token before each position, -1 at the start of a document, int64."""
        return neighbour_tokens(self.cache, self.positions, -1)

    @cached_property
    def indices(self) -> np.ndarray:
        """Index of each position in its context, from 0, int64."""
        return context_indices(self.cache, self.positions)

    @cached_property
    def sequence_numbers(self) -> np.ndarray:
        """Number of the sequence of each position, int64."""
        starts = self.cache.sequence_start[self.sequences]
        return self.sequences[np.searchsorted(starts, self.positions, side="right") - 1]

    @cached_property
    def units(self) -> ResamplingUnits:
        """Documents, which intervals resample; of all positions of the sequences."""
        return ResamplingUnits.of(self.cache, self.sequences, self.seed)

    @cached_property
    def unit_numbers(self) -> np.ndarray:
        """Number of the resampling unit (document) of each position, int64."""
        numbers = self.units.unit_numbers
        if self.where is None:
            return numbers
        return numbers[self.where[self.cache.positions_of(self.sequences)]]

    @cached_property
    def weights(self) -> np.ndarray:
        """How often each resample draws each unit, `(resamples, units)` float64."""
        return resampling_counts(self.units.n_resampled, self.seed)

    def mean(self, values: np.ndarray) -> tuple[float | None, Interval]:
        """Mean of the values that are not NaN, `(n,)`, and its 95 % interval over documents."""
        known = ~np.isnan(values)
        if not known.any():
            return None, (None, None)
        units, count = self.unit_numbers[known], self.units.n_resampled
        n = np.bincount(units, minlength=count).astype(np.float64)
        sums = np.bincount(units, values[known].astype(np.float64), minlength=count)
        return float(sums.sum() / n.sum()), bootstrap_interval(n, sums, self.weights)


def choose_positions(
    cache: "ActivationCache",
    split: str = "test",
    max_positions: int = 16384,
    seed: int = 0,
    where: np.ndarray | None = None,
) -> PositionSample:
    """Positions of whole sequences of `split`, drawn at random by `seed`.

    Up to `max_positions`, but one sequence at least; `where` is a bool mask `(positions,)` of those
    that count; by default all, of images the class token. Raises `UsageError` for an empty split,
    and a mask without a position of the sample.
    """
    check_where(cache, where)
    grid = cache.manifest.image_grid
    if grid is not None and where is None:
        where, max_positions = class_token_mask(cache), max_positions * grid.tokens
    sequences = choose_sequences(cache, split, max_positions, seed)
    sequences = sequences[cache.sequence_length[sequences] > 0]
    sample = PositionSample(cache, split, sequences, seed, where)
    if not sample.count:
        raise UsageError(
            f"no position of the split {split!r} is left to read: the mask or the sequences that "
            "were drawn hold none"
        )
    return sample

"""Rows that a causal basis is fitted or measured on: random sequences of a split, in groups.

A group is the unit of work: groups are summed in their order, so that results do not depend on
threads or workers. Rows are read from the cache when they are needed, and never held all at once.
"""

from dataclasses import dataclass

import numpy as np

from ...cache.errors import UsageError
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.sequence_draw import draw_sequences
from ...cache.tokens.segments import context_indices

GROUP_ROWS = 2048
"""Rows of a group."""
REFERENCES = ("mean", "zero", "resample")
"""What ablated coordinates become: those of the mean row, of zero, or of another row."""


@dataclass(frozen=True, eq=False)
class BasisRows:
    """Positions of a cache, and the row that replaces ablated coordinates at each of them."""

    cache: ActivationCache
    layer: int
    positions: np.ndarray
    """Positions in the cache, ascending, `(n,)` int64."""
    reference: np.ndarray | None
    """Reference row `(d_model,)` float32; None for resampling ablation."""
    seed: int
    """Seed of the replacements of resampling ablation."""

    def __post_init__(self) -> None:
        if self.reference is None and len(self.positions) < 2:
            raise UsageError("resampling ablation needs two rows at least; give more positions")

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.positions)

    def groups(self, rows: int = GROUP_ROWS) -> list[slice]:
        """Groups of at most `rows` rows."""
        return [slice(i, min(self.n, i + rows)) for i in range(0, self.n, rows)]

    def states(self, rows: slice) -> np.ndarray:
        """Residual stream of the rows, `(n, d_model)` float32."""
        return self.cache.residual_array(self.layer)[self.positions[rows]]

    def differences(self, rows: slice, states: np.ndarray) -> np.ndarray:
        """The rows' `states` less their reference rows, `(n, d_model)` float32."""
        if self.reference is not None:
            return states - self.reference
        # A cyclic permutation in random order: fixed, and no row replaces itself.
        order = np.random.default_rng(self.seed).permutation(self.n)
        replacement = np.empty(self.n, np.int64)
        replacement[order] = np.roll(order, -1)
        positions, inverse = np.unique(self.positions[replacement[rows]], return_inverse=True)
        return states - self.cache.residual_array(self.layer)[positions][inverse]


def draw_positions(
    cache: ActivationCache, split: str, max_positions: int, seed: int, drop_first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw whole sequences of `split` up to `max_positions` positions.

    Returns the sequences, and their positions without the `drop_first` first of each context,
    `(n,)` int64. Raises `UsageError` for a split without a position.
    """
    numbers = cache.sequences(split)
    if not len(numbers):
        raise UsageError(f"the {split} split of this cache is empty; extract more sequences")
    sequences = draw_sequences(cache, numbers, max_positions, seed)
    positions = cache.positions_of(sequences)
    if drop_first:
        positions = positions[context_indices(cache, positions) >= drop_first]
    if not len(positions):
        raise UsageError(
            f"the {split} split has no position behind the drop_first={drop_first} first of each "
            "sequence; drop fewer"
        )
    return sequences, positions

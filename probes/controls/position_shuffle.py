"""A fixed random permutation of the positions of a cache, slab by slab, so that reads stay fast.

`PositionShuffle` is used by the views of `cache_views.py`: each position meets a position of
another sequence.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.tokens.splits import SPLITS

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

SLABS = 1024
"""Fewest slabs of a split that has as many positions."""
FEW = 16
"""Splits of fewer sequences are permuted position by position, in slabs of one."""
ROUNDS = 200
"""Attempts to give every slab a slab of other sequences."""


class PositionShuffle:
    """Sends each position to one of another sequence of the same split; decided by `seed`.

    The positions of a split, one sequence after the other, are cut into slabs of at most
    `cache.slab_rows`. A random permutation exchanges slabs, but never two that share a sequence;
    another one exchanges the positions inside each slab. So a position meets one that is uniform
    over its split, at any place of any other sequence: only the marginal is left. Neighbours still
    meet neighbours. All slabs have one size: the last one overlaps the slab before, so that each
    position is met once, except for fewer than a slab.

    Reading a run of rows reads whole slabs, as fast as shuffled reading does. Memory: 16 bytes for
    each slab. Rows of a split that is mostly one sequence raise `UsageError`.
    """

    def __init__(self, cache: "ActivationCache", seed: int = 0) -> None:
        if seed < 0:
            raise UsageError(f"seed must be 0 or more, not {seed}")
        self._cache, self._seed, self._start = cache, seed, cache.sequence_start
        self._split_of_sequence = np.full(len(self._start), -1, np.int8)
        self._permutations: dict[int, _SplitPermutation] = {}
        for number, name in enumerate(SPLITS):
            self._split_of_sequence[cache.sequences(name)] = number

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """The positions that `rows` `(n,)` are sent to; positions of no split stay."""
        sequence = np.searchsorted(self._start, rows, "right") - 1
        split, shuffled = self._split_of_sequence[sequence], np.array(rows, np.int64)
        for number in np.unique(split[split >= 0]).tolist():
            in_split = np.flatnonzero(split == number)
            index = rows[in_split] - self._start[sequence[in_split]]
            shuffled[in_split] = self._permutation(number)(sequence[in_split], index)
        return shuffled

    def _permutation(self, split: int) -> "_SplitPermutation":
        """The permutation of a split, by its number; made when first needed."""
        if split not in self._permutations:
            rng = np.random.default_rng((self._seed, split))
            self._permutations[split] = _SplitPermutation(self._cache, SPLITS[split], rng)
        return self._permutations[split]


class _SplitPermutation:
    """The permutation of one split; positions are numbered through its sequences."""

    def __init__(self, cache: "ActivationCache", name: str, rng: np.random.Generator) -> None:
        self.sequences = sequences = cache.sequences(name)
        self.start = cache.sequence_start[sequences]
        lengths = cache.sequence_length[sequences]
        self.ends = np.cumsum(lengths)
        self.before = self.ends - lengths
        total = int(self.ends[-1])
        self.size = min(max(1, total // SLABS), cache.slab_rows) if len(sequences) >= FEW else 1
        self.slabs = -(-total // self.size)
        self.first = np.minimum(np.arange(self.slabs) * self.size, total - self.size)
        self.partner = self._draw_partners(rng, name)
        self.order = rng.permutation(self.size)
        self.rotation = rng.integers(self.size, size=self.slabs)

    def __call__(self, sequence: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Positions that the `index`-th positions of each `sequence` are sent to."""
        # Number of the position in the split, its slab, and its new index in the partner slab.
        number = self.before[np.searchsorted(self.sequences, sequence)] + index
        slab = number // self.size
        index_in_slab = self.order[(number - self.first[slab] + self.rotation[slab]) % self.size]
        # From the number in the split back to a position of the cache.
        partner_number = self.first[self.partner[slab]] + index_in_slab
        partner_sequence = np.searchsorted(self.ends, partner_number, "right")
        return self.start[partner_sequence] + partner_number - self.before[partner_sequence]

    def _draw_partners(self, rng: np.random.Generator, name: str) -> np.ndarray:
        """Partner of each slab for the exchange; partners share no sequence."""
        first_sequence = np.searchsorted(self.ends, self.first, "right")
        last_sequence = np.searchsorted(self.ends, self.first + self.size - 1, "right")

        def share_sequence(i: Any, j: Any) -> Any:
            return (first_sequence[i] <= last_sequence[j]) & (first_sequence[j] <= last_sequence[i])

        # Start from a random permutation, then swap partners until no pair shares a sequence.
        partner, slabs = rng.permutation(self.slabs), np.arange(self.slabs)
        for attempt in range(ROUNDS):
            bad = np.flatnonzero(share_sequence(slabs, partner))
            if not len(bad):
                return partner
            # In turn, bad slabs swap among themselves, and with any slab.
            candidates = (
                rng.permutation(bad) if attempt % 2 else rng.integers(self.slabs, size=len(bad))
            )
            for i, j in zip(bad, candidates, strict=True):
                if not (share_sequence(i, partner[j]) or share_sequence(j, partner[i])):
                    partner[i], partner[j] = partner[j], partner[i]
        raise UsageError(
            f"positions of the {name} split cannot be exchanged between sequences: it has "
            f"{len(self.sequences)}, one of which holds most of its positions; extract more text"
        )

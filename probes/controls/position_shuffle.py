"""A fixed random exchange of the positions of a cache, by slabs, so that reads stay fast."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.tokens.splits import SPLITS

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

SLABS = 1024
"""A split is cut into at least so many slabs, as far as it has positions."""
FEW = 16
"""Splits of fewer sequences are exchanged position by position."""
ROUNDS = 200
"""Attempts to find slabs of other sequences."""


class PositionShuffle:
    """Sends each position to one of another sequence of the same split; decided by `seed`.

    The positions of a split, one sequence after the other, are cut into slabs of at most
    `cache.slab_rows`. Slabs change places at random, but for those that would meet a sequence that
    they hold themselves, and the positions of a slab among themselves. So a position meets one
    that is uniform over its split, at any place of any other sequence: only the marginal is left.
    Positions that are neighbours still meet neighbours. All slabs have one size; the last one
    overlaps the one before, so that each position is met once, but for fewer than a slab.

    Reading a run of rows takes whole slabs, which is as fast as shuffled reading is. Memory: 16
    bytes for each slab. Rows of a split that is mostly one sequence raise `UsageError`.
    """

    def __init__(self, cache: "ActivationCache", seed: int = 0) -> None:
        if seed < 0:
            raise UsageError(f"seed must be 0 or more, not {seed}")
        self._cache, self._seed, self._start = cache, seed, cache.sequence_start
        self._split = np.full(len(self._start), -1, np.int8)
        self._exchanges: dict[int, _Exchange] = {}
        for number, name in enumerate(SPLITS):
            self._split[cache.sequences(name)] = number

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """The positions that `rows` `(n,)` are sent to; those in no split stay."""
        sequence = np.searchsorted(self._start, rows, "right") - 1
        split, out = self._split[sequence], np.array(rows, np.int64)
        for number in np.unique(split[split >= 0]).tolist():
            here = np.flatnonzero(split == number)
            place = rows[here] - self._start[sequence[here]]
            out[here] = self._exchange(number)(sequence[here], place)
        return out

    def _exchange(self, number: int) -> "_Exchange":
        if number not in self._exchanges:
            rng = np.random.default_rng((self._seed, number))
            self._exchanges[number] = _Exchange(self._cache, SPLITS[number], rng)
        return self._exchanges[number]


class _Exchange:
    """The exchange inside one split; positions are numbered through its sequences."""

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
        self.to = self._exchanged(rng, name)
        self.inner = rng.permutation(self.size)
        self.turn = rng.integers(self.size, size=self.slabs)

    def __call__(self, sequence: np.ndarray, place: np.ndarray) -> np.ndarray:
        number = self.before[np.searchsorted(self.sequences, sequence)] + place
        slab = number // self.size
        inside = self.inner[(number - self.first[slab] + self.turn[slab]) % self.size]
        there = self.first[self.to[slab]] + inside
        index = np.searchsorted(self.ends, there, "right")
        return self.start[index] + there - self.before[index]

    def _exchanged(self, rng: np.random.Generator, name: str) -> np.ndarray:
        """Slab -> the slab that it meets, none of which holds a sequence of its own."""
        low = np.searchsorted(self.ends, self.first, "right")
        high = np.searchsorted(self.ends, self.first + self.size - 1, "right")

        def meets_own(i: Any, j: Any) -> Any:
            return (low[i] <= high[j]) & (low[j] <= high[i])

        to, every = rng.permutation(self.slabs), np.arange(self.slabs)
        for round_ in range(ROUNDS):
            bad = np.flatnonzero(meets_own(every, to))
            if not len(bad):
                return to
            # Those that are left among themselves, then with any other.
            others = rng.permutation(bad) if round_ % 2 else rng.integers(self.slabs, size=len(bad))
            for i, j in zip(bad, others, strict=True):
                if not (meets_own(i, to[j]) or meets_own(j, to[i])):
                    to[i], to[j] = to[j], to[i]
        raise UsageError(
            f"positions of the {name} split cannot be exchanged between sequences: it has "
            f"{len(self.sequences)}, one of which holds most of its positions; extract more text"
        )

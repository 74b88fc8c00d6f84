"""Positions t whose states a prompt reads, with the tokens and the model's states up to t+N."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ...cache.errors import UsageError
from ...cache.number_ranges import as_whole_number
from ...cache.tokens.segments import PairScope, neighbour_tokens

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache


@dataclass(frozen=True, eq=False)
class PromptSample:
    """Positions t for which t to t+N lie in one document of one sequence; arrays `(n, ..)`."""

    cache: "ActivationCache"
    split: str
    positions: np.ndarray
    """Positions t in the cache, `(n,)` int64, ascending."""
    max_offset: int
    """The largest N."""

    @classmethod
    def draw(
        cls,
        cache: "ActivationCache",
        split: str,
        max_offset: int,
        max_positions: int,
        *,
        seed: int = 0,
        where: np.ndarray | None = None,
        drop_first: int = 0,
    ) -> "PromptSample":
        """Up to `max_positions` of all such positions of `split`, drawn at random by `seed`.

        `where` is a bool mask over the positions t of the cache; `drop_first` leaves out the first
        positions of each context. Raises `UsageError` where none is left.
        """
        if where is not None and (where.dtype != bool or where.shape != (cache.positions,)):
            raise UsageError(
                f"where must be a bool mask of the {cache.positions} positions, found "
                f"{where.dtype} {where.shape}"
            )
        if as_whole_number(max_positions, "max_positions") < 1:
            raise UsageError(f"max_positions must be 1 or more, not {max_positions}")
        scope = PairScope(drop_first=drop_first).check()
        found = [np.zeros(0, np.int64)]
        for sequences in cache.blocks(cache.sequences(split)):
            positions = cache.positions_of(sequences)
            is_source = scope.largest_offsets(cache, sequences) >= max_offset
            if where is not None:
                is_source &= where[positions]
            found.append(positions[is_source])
        positions = np.concatenate(found)
        if not len(positions):
            raise UsageError(
                f"the split {split!r} has no position with {max_offset} more tokens of its "
                "document behind it"
                + ("" if where is None else ", among those of the mask")
                + "; use smaller offsets, another split or longer texts"
            )
        if len(positions) > max_positions:
            rng = np.random.default_rng(seed)
            positions = np.sort(rng.choice(positions, max_positions, replace=False))
        return cls(cache, split, positions, max_offset)

    @property
    def count(self) -> int:
        """Number n of positions."""
        return len(self.positions)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token at t, `(n,)` int64."""
        return np.asarray(self.cache.tokens.take(self.positions), np.int64)

    @cached_property
    def continuations(self) -> np.ndarray:
        """Tokens at t+1 to t+N, `(n, N)` int64."""
        rows = self.positions[:, None] + np.arange(1, self.max_offset + 1)
        tokens = np.asarray(self.cache.tokens.take(rows.ravel()), np.int64)
        return tokens.reshape(self.count, self.max_offset)

    def next_tokens(self, offset: int) -> np.ndarray:
        """Token of the text after t+`offset`, -1 at the end of a document, `(n,)` int64."""
        return neighbour_tokens(self.cache, self.positions + offset, 1)

    def states(self, layer: int) -> np.ndarray:
        """Residual stream of `layer` at t, `(n, d_model)` float32."""
        return np.asarray(self.cache.residual_array(layer).take(self.positions), np.float32)

    def last_states(self, offset: int) -> np.ndarray:
        """Layer L at t+`offset`, `(n, d_model)` float32: the head gives the model's logits."""
        last = self.cache.residual_array(self.cache.n_blocks)
        return np.asarray(last.take(self.positions + offset), np.float32)

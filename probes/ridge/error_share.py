"""How few rows make most of a squared error: attention sinks, first tokens, massive activations.

A least-squares fit serves the rows with the largest errors. Where a few of them make most of the
error (or of the target's variance), R2, the penalty and the map are about those few, and
`drop_first` leaves the usual ones out (Sun et al., 2402.17762; SAE trainers leave them out too).
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import PairScope, context_indices
from ..training.shuffled_order import draw_sequences
from .solver import AffineMap

Pair = tuple[int, int, int]
"""(layer, offset, target layer)."""
TOP = 0.001
"""Share of the rows that counts as the largest ones; one row at least."""
POSITIONS = 8192
"""Most positions that are looked at."""
BLOCK_ROWS = 2048
"""Most rows that are read at once."""
MOST = 0.5
"""Shares above it are warned of."""
FEWEST = 100
"""Pairs below which chance alone makes large shares: nothing is warned of."""
SHARES = ("top_target", "top_error", "first_target", "first_error")


@dataclass(frozen=True)
class ErrorShare:
    """Parts of sums over the pairs of one (layer, offset, target); None where a sum is 0.

    The target's variance is the sum of |y - mean|^2, the error that of |y - map(x)|^2.
    """

    pairs: int
    """Pairs that were looked at."""
    first_pairs: float
    """Share of the pairs whose source is the first position of its sequence."""
    top_target: float | None
    """Share of the target's variance that the largest 0.1 % of the pairs make."""
    top_error: float | None
    """Share of the squared error that the largest 0.1 % of the pairs make."""
    first_target: float | None
    """Share of the target's variance of the pairs whose source is the first of its sequence."""
    first_error: float | None
    """Share of the squared error of these."""

    @property
    def dominated(self) -> bool:
        """Whether few pairs make most of the error or of the variance."""
        if self.pairs < FEWEST:
            return False
        top = max(self.top_target or 0.0, self.top_error or 0.0)
        first = max(self.first_target or 0.0, self.first_error or 0.0)
        return top > MOST or (first > MOST and first > 4 * self.first_pairs)

    def columns(self) -> dict[str, float | None]:
        """What tables show."""
        return {name: value for name, value in asdict(self).items() if name in SHARES}


def error_shares(
    cache: ActivationCache,
    maps: Mapping[Pair, AffineMap],
    sequences: np.ndarray,
    scope: PairScope,
    where: np.ndarray | None = None,
    max_positions: int = POSITIONS,
) -> dict[Pair, ErrorShare]:
    """Shares of the squared errors of `maps` by (layer, offset, target); pairs in `scope`.

    On whole sequences of `sequences`, a seeded draw of at most `max_positions` positions (of one
    longer sequence the first ones). `where` `(positions,)` bool chooses among targets t+N. Rows
    are read in blocks; products in float32, sums in float64.
    """
    if not len(sequences) or not maps:
        return {}
    chosen = draw_sequences(cache, sequences, max_positions, 0)
    rows, left = cache.positions_of(chosen), scope.largest_offsets(cache, chosen)
    rows, left = rows[:max_positions], left[:max_positions]
    found: dict[Pair, ErrorShare] = {}
    for offset in sorted({offset for _, offset, _ in maps}):
        sources = rows[left >= offset]
        if where is not None:
            sources = sources[where[sources + offset]]
        first = context_indices(cache, sources) == 0
        for target in sorted({m for _, n, m in maps if n == offset}):
            pairs = [pair for pair in maps if pair[1:] == (offset, target)]
            mean = _mean(cache, target, sources + offset)
            spread = np.zeros(len(sources))
            errors = {pair: np.zeros(len(sources)) for pair in pairs}
            for part in _blocks(len(sources), cache.block_rows(BLOCK_ROWS)):
                y = cache.residual_array(target).take(sources[part] + offset)
                spread[part] = _squares(y - mean)
                for pair in pairs:
                    x = cache.residual_array(pair[0]).take(sources[part])
                    errors[pair][part] = _squares(maps[pair].astype(np.float32)(x) - y)
            for pair, error in errors.items():
                found[pair] = _share(spread, error, first)
    return {pair: found[pair] for pair in maps if pair in found}


def _mean(cache: ActivationCache, layer: int, rows: np.ndarray) -> np.ndarray:
    """Mean of `rows` of a layer, `(d_model,)` float32; sums in float64."""
    total = np.zeros(cache.d_model)
    for part in _blocks(len(rows), cache.block_rows(BLOCK_ROWS)):
        total += cache.residual_array(layer).take(rows[part]).sum(axis=0, dtype=np.float64)
    return (total / max(1, len(rows))).astype(np.float32)


def _blocks(rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, rows, size)]


def _squares(rows: np.ndarray) -> np.ndarray:
    """Squared length of each row, `(n,)` float64."""
    return np.einsum("ij,ij->i", rows, rows, dtype=np.float64)


def _share(spread: np.ndarray, error: np.ndarray, first: np.ndarray) -> ErrorShare:
    shares = [
        of(values) for of in (_top, lambda v: _part(v, v[first])) for values in (spread, error)
    ]
    return ErrorShare(len(error), float(first.mean()) if len(first) else 0.0, *shares)


def _top(values: np.ndarray) -> float | None:
    count = -(-len(values) // round(1 / TOP))
    return _part(values, np.partition(values, len(values) - count)[-count:]) if count else None


def _part(values: np.ndarray, some: np.ndarray) -> float | None:
    """Share that `some` have in the sum of all `values`; None if that is 0 or not finite."""
    total = float(values.sum())
    return float(some.sum()) / total if 0 < total < np.inf else None


def domination_message(shares: Mapping[Any, ErrorShare]) -> str:
    """What to say where few pairs make most of an error; empty where none do. Keys begin (l, N)."""
    bad = {pair: share for pair, share in shares.items() if share.dominated}
    if not bad:
        return ""
    pair, worst = max(
        bad.items(), key=lambda item: max(getattr(item[1], name) or 0.0 for name in SHARES)
    )
    says = [
        f"{100 * (getattr(worst, f'{rows}_{what}') or 0.0):.0f} % of {of}"
        for rows in ("top", "first")
        for what, of in (("error", "the squared error"), ("target", "the target's variance"))
    ]
    place = f"layer {pair[0]}, offset {pair[1]}"
    first = f"{100 * worst.first_pairs:.1f} % of the pairs"
    return (
        f"few rows dominate the squared error of {len(bad)} of {len(shares)} maps: at {place}, the "
        f"largest 0.1 % of the pairs make {says[0]} and {says[1]}, those whose source is the first "
        f"position of a sequence ({first}) {says[2]} and {says[3]}. R2, penalty and map are about "
        "these; leave first positions out with drop_first=1 (--drop-first 1)"
    )


def warn_of_domination(shares: Mapping[Any, ErrorShare]) -> None:
    """A `UserWarning` where few pairs make most of an error."""
    if message := domination_message(shares):
        warnings.warn(message, UserWarning, stacklevel=3)

"""Shares of a squared error that few rows make: attention sinks, first tokens, massive activations.

A least-squares fit serves the rows with the largest errors. Where a few of them make most of the
error (or of the target's variance), R2, the penalty and the map are about those few, and
`drop_first` leaves the usual ones out (Sun et al., 2402.17762; SAE trainers leave them out too).
`RidgeProbe`, `TunedLens` and `analysis/evaluation` measure these shares and warn.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...cache.errors import ResiduaWarning
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.sequence_draw import draw_sequences
from ...cache.tokens.segments import PairScope, context_indices
from ..moments.shifted_sums import LayerOffsetTarget
from .solver import AffineMap

TOP = 0.001
"""Share of the rows that counts as the largest ones; one row at least."""
POSITIONS = 8192
"""Most positions that are measured."""
BLOCK_ROWS = 2048
"""Most rows that are read at once."""
MOST = 0.5
"""Shares above this one are warned of."""
FEWEST = 100
"""Pairs below which chance alone makes large shares: no warning."""
SHARES = ("top_target", "top_error", "first_target", "first_error")
"""Fields of `ErrorShare` that tables show."""


@dataclass(frozen=True)
class ErrorShare:
    """Parts of sums over the pairs of one (layer, offset, target); None where a sum is 0.

    The target's variance is the sum of |y - mean|^2, the error that of |y - map(x)|^2.
    """

    pairs: int
    """Pairs that were measured."""
    first_pairs: float
    """Share of the pairs whose source is the first position of its sequence."""
    top_target: float | None
    """Share of the target's variance that the largest 0.1 % of the pairs make."""
    top_error: float | None
    """Share of the squared error that the largest 0.1 % of the pairs make."""
    first_target: float | None
    """Share of the target's variance of the pairs whose source is the first of its sequence."""
    first_error: float | None
    """Share of the squared error of the pairs whose source is the first of its sequence."""

    @property
    def dominated(self) -> bool:
        """Whether few pairs make most of the error or of the variance."""
        if self.pairs < FEWEST:
            return False
        top = max(self.top_target or 0.0, self.top_error or 0.0)
        first = max(self.first_target or 0.0, self.first_error or 0.0)
        return top > MOST or (first > MOST and first > 4 * self.first_pairs)

    def columns(self) -> dict[str, float | None]:
        """The shares alone, as columns of a table."""
        return {name: value for name, value in asdict(self).items() if name in SHARES}


def error_shares(
    cache: ActivationCache,
    maps: Mapping[LayerOffsetTarget, AffineMap],
    sequences: np.ndarray,
    scope: PairScope,
    where: np.ndarray | None = None,
    max_positions: int = POSITIONS,
) -> dict[LayerOffsetTarget, ErrorShare]:
    """Shares of the squared errors of `maps` by (layer, offset, target); pairs in `scope`.

    Measured on whole sequences of `sequences`, a seeded draw of at most `max_positions` positions
    (of a longer sequence the first ones). `where` `(positions,)` bool selects targets t+N. Rows
    are read in blocks; products in float32, sums in float64.
    """
    if not len(sequences) or not maps:
        return {}
    # Positions of the sample, and how many positions follow each of them.
    sample = draw_sequences(cache, sequences, max_positions, 0)
    rows, following = cache.positions_of(sample), scope.largest_offsets(cache, sample)
    rows, following = rows[:max_positions], following[:max_positions]
    shares: dict[LayerOffsetTarget, ErrorShare] = {}
    for offset in sorted({offset for _, offset, _ in maps}):
        # Sources t of the offset; True where t is the first position of its sequence.
        sources = rows[following >= offset]
        if where is not None:
            sources = sources[where[sources + offset]]
        is_first = context_indices(cache, sources) == 0
        for target in sorted({m for _, n, m in maps if n == offset}):
            # |y - mean|^2 and |y - map(x)|^2 of every source.
            pairs = [pair for pair in maps if pair[1:] == (offset, target)]
            mean = _mean_row(cache, target, sources + offset)
            deviations = np.zeros(len(sources))
            errors = {pair: np.zeros(len(sources)) for pair in pairs}
            for block in _block_slices(len(sources), cache.block_rows(BLOCK_ROWS)):
                y = cache.residual_array(target).take(sources[block] + offset)
                deviations[block] = _squared_lengths(y - mean)
                for pair in pairs:
                    x = cache.residual_array(pair[0]).take(sources[block])
                    affine = maps[pair].astype(np.float32)
                    errors[pair][block] = _squared_lengths(affine(x) - y)
            for pair, error in errors.items():
                shares[pair] = ErrorShare(
                    pairs=len(error),
                    first_pairs=float(is_first.mean()) if len(is_first) else 0.0,
                    top_target=_top_share(deviations),
                    top_error=_top_share(error),
                    first_target=_share_of(deviations[is_first], deviations),
                    first_error=_share_of(error[is_first], error),
                )
    return {pair: shares[pair] for pair in maps if pair in shares}


def _mean_row(cache: ActivationCache, layer: int, rows: np.ndarray) -> np.ndarray:
    """Mean of `rows` of a layer, `(d_model,)` float32; sums in float64."""
    total = np.zeros(cache.d_model)
    for block in _block_slices(len(rows), cache.block_rows(BLOCK_ROWS)):
        total += cache.residual_array(layer).take(rows[block]).sum(axis=0, dtype=np.float64)
    return (total / max(1, len(rows))).astype(np.float32)


def _block_slices(rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, rows, size)]


def _squared_lengths(rows: np.ndarray) -> np.ndarray:
    """Squared length of each row, `(n,)` float64."""
    return np.einsum("ij,ij->i", rows, rows, dtype=np.float64)


def _top_share(values: np.ndarray) -> float | None:
    """Share of the largest 0.1 % of `values`, one at least, in their sum."""
    count = -(-len(values) // round(1 / TOP))
    if not count:
        return None
    return _share_of(np.partition(values, len(values) - count)[-count:], values)


def _share_of(part: np.ndarray, values: np.ndarray) -> float | None:
    """Sum of `part` over the sum of all `values`; None if that sum is 0 or not finite."""
    total = float(values.sum())
    return float(part.sum()) / total if 0 < total < np.inf else None


def domination_message(shares: Mapping[Any, ErrorShare]) -> str:
    """Warning text if few pairs make most of an error, else empty; keys begin (layer, offset)."""
    dominated = {pair: share for pair, share in shares.items() if share.dominated}
    if not dominated:
        return ""
    (layer, offset, *_), worst = max(
        dominated.items(), key=lambda item: max(getattr(item[1], name) or 0.0 for name in SHARES)
    )
    error, variance = "the squared error", "the target's variance"
    return (
        f"few rows dominate the squared error of {len(dominated)} of {len(shares)} maps: at layer "
        f"{layer}, offset {offset}, the largest 0.1 % of the pairs make "
        f"{_percent(worst.top_error)} of {error} and {_percent(worst.top_target)} of {variance}, "
        f"those whose source is the first position of a sequence ({100 * worst.first_pairs:.1f} % "
        f"of the pairs) {_percent(worst.first_error)} of {error} and "
        f"{_percent(worst.first_target)} of {variance}. R2, penalty and map are about these; leave "
        "first positions out with drop_first=1 (--drop-first 1)"
    )


def _percent(share: float | None) -> str:
    return f"{100 * (share or 0.0):.0f} %"


def warn_of_domination(shares: Mapping[Any, ErrorShare]) -> None:
    """A `ResiduaWarning` if few pairs make most of an error."""
    if message := domination_message(shares):
        warnings.warn(message, ResiduaWarning, stacklevel=3)

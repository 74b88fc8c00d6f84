"""Spearman correlations of positions, plain and partial, with intervals over documents.

A resample counts the positions of a document as often as the document was drawn; ranks are those of
the resample (midranks of equal values), so that the interval is that of the statistic itself.
"""

from dataclasses import dataclass

import numpy as np

from ....probes.base.resampling import Interval

LEAST_DEFINED = 0.8
"""Share of resamples that must have a correlation for an interval to be given."""


@dataclass(frozen=True)
class RankCorrelation:
    """A Spearman correlation of positions."""

    n: int
    """Positions where all values are known."""
    value: float | None
    """None for fewer than 3 positions, and where a value is the same everywhere."""
    interval: Interval
    """95 % bootstrap interval over documents."""


def correlate_ranks(
    x: np.ndarray,
    y: np.ndarray,
    units: np.ndarray,
    weights: np.ndarray,
    given: np.ndarray | None = None,
) -> RankCorrelation:
    """Spearman correlation of `x` and `y` `(n,)`; the partial one of their ranks with `given`.

    NaN in any is left out. `units` `(n,)` are the numbers of the documents, `weights`
    `(resamples, units)` how often each resample draws them. The partial correlation is
    (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2)).
    """
    columns = [x, y] if given is None else [x, y, given]
    known = ~np.any([np.isnan(column) for column in columns], axis=0)
    codes = [np.unique(column[known], return_inverse=True)[1].ravel() for column in columns]
    units, n = units[known], int(known.sum())
    value = _correlation(codes, np.ones(n)) if n >= 3 else np.nan
    interval: Interval = (None, None)
    if np.isfinite(value) and len(np.unique(units)) >= 2:
        found = np.array([_correlation(codes, drawn[units]) for drawn in weights])
        if np.isfinite(found).mean() >= LEAST_DEFINED:
            low, high = np.nanpercentile(found, (2.5, 97.5))
            interval = float(low), float(high)
    return RankCorrelation(n, float(value) if np.isfinite(value) else None, interval)


def _correlation(codes: list[np.ndarray], weights: np.ndarray) -> float:
    """The correlation of rows that count `weights` `(n,)` times; NaN where it is not defined.

    `codes` are two or three columns `(n,)` of dense ranks from 0.
    """
    total = weights.sum()
    if not total:
        return np.nan
    columns = np.stack([_midranks(column, weights) for column in codes])
    columns -= (columns @ weights / total)[:, None]
    products = (columns * weights) @ columns.T
    scale = np.sqrt(np.diag(products))
    # A column of equal ranks leaves rounding alone.
    if (scale <= 1e-9 * total**1.5).any():
        return np.nan
    r = products / np.outer(scale, scale)
    if len(codes) == 2:
        return float(np.clip(r[0, 1], -1, 1))
    rest = (1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2)
    if rest <= 1e-12:
        return np.nan
    return float(np.clip((r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt(rest), -1, 1))


def _midranks(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean rank of equal values, `(n,)`, where each row stands `weights` times in the list."""
    counts = np.bincount(codes, weights)
    return (np.cumsum(counts) - counts / 2)[codes]

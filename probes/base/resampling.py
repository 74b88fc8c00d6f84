"""Bootstrap over documents (Efron, 1979): units, resampling counts, percentile intervals of means.

Positions of one document are alike, so whole documents are drawn (a cluster bootstrap). Evaluation
(`analysis/evaluation/metrics.py`) and causal bases (`basis/span_evaluation.py`) take intervals
from here.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...cache.tokens.segments import document_of, is_of_images

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

RESAMPLES = 500
"""Bootstrap resamples of the documents behind an interval."""
FEW_DOCUMENTS = 10
"""Fewer documents give intervals that are noticeably too narrow."""
MOST_UNITS = 16384
"""Most units that are resampled; more documents are grouped at random into that many units."""

Interval = tuple[float | None, float | None]
"""Lower and upper bound of a 95 % interval; None without two units or with undefined values."""


@dataclass(frozen=True)
class ResamplingUnits:
    """The units of the bootstrap: documents, because positions of one document are alike."""

    name: str
    """`document`, `image`, or `sequence` where all positions are of one document."""
    count: int
    """Number of documents (or sequences) in the evaluation."""
    unit_numbers: np.ndarray
    """Number of the unit of each position of the sequences, `(n,)` int64."""
    n_resampled: int
    """Number of units; fewer than `count` where documents are grouped."""

    @classmethod
    def of(cls, cache: "ActivationCache", sequences: np.ndarray, seed: int) -> "ResamplingUnits":
        """The documents of all positions of `sequences`.

        More than `MOST_UNITS` documents are grouped at random: resampling groups of documents
        estimates the same interval, in memory that does not grow.
        """
        positions = cache.positions_of(sequences)
        documents, unit_numbers = np.unique(document_of(cache, positions), return_inverse=True)
        name, count = "image" if is_of_images(cache) else "document", len(documents)
        if count < 2:
            name, count = "sequence", len(sequences)
            unit_numbers = np.repeat(np.arange(count), cache.sequence_length[sequences])
        n_resampled = min(count, MOST_UNITS)
        if count > n_resampled:
            group_of = np.random.default_rng(seed).permutation(count) % n_resampled
            unit_numbers = group_of[unit_numbers]
        return cls(name, count, unit_numbers, n_resampled)

    @property
    def note(self) -> str:
        """A warning about intervals from few documents; empty for many documents."""
        if self.name == "sequence":
            return (
                "all positions are of one document: intervals resample its sequences and are too "
                "narrow for other documents"
            )
        if self.count < FEW_DOCUMENTS:
            return (
                f"only {self.count} {self.name}s were evaluated: intervals from so few are too "
                "narrow"
            )
        return ""


def resampling_counts(units: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each resample draws each unit (a document), `(resamples, units)` float64."""
    rng = np.random.default_rng(seed)
    share = np.full(units, 1 / units)
    return rng.multinomial(units, share, size=resamples).astype(np.float64)


def bootstrap_interval(n: np.ndarray, sums: np.ndarray, weights: np.ndarray) -> Interval:
    """Percentile bootstrap of the mean sums.sum() / n.sum() over units (documents).

    `n` and `sums` `(units,)` are the number of positions of each unit and the sum of their values;
    `weights` comes from `resampling_counts`.
    """
    if np.count_nonzero(n) < 2 or not np.isfinite(sums).all():
        return None, None
    count = weights @ n
    means = (weights @ sums)[count > 0] / count[count > 0]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)

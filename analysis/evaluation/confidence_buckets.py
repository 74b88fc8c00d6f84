"""Measures by the model's own confidence: rows for buckets of its largest probability."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .metrics import EvaluationRow, MetricSums

EDGES = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Ends of the buckets (Future Lens): [0, 0.3), [0.3, 0.6), [0.6, 0.9) and [0.9, 1]."""
BUCKETS = tuple(zip(EDGES[:-1], EDGES[1:], strict=True))
"""Lower and upper end of each bucket."""

ResultKey = tuple[str, int | None, int]
"""(name of the probe, layer, offset)."""


@dataclass(frozen=True)
class BucketRow(EvaluationRow):
    """The measures of a `Row` over the pairs whose target the model is so sure of.

    Confidence is the largest probability that the model gives at t+N, where it is predicted.
    """

    confidence_from: float
    """Lower end, which belongs to the bucket."""
    confidence_to: float
    """Upper end, which belongs to the bucket only if it is 1."""
    share: float
    """Part of the pairs of the probe, layer and offset that is in the bucket.

    Shares add up to 1 where the model's logits are a distribution at every target.
    """

    @property
    def bucket(self) -> str:
        """Its name: `30-60 %`."""
        return bucket_name(self.confidence_from, self.confidence_to)


def bucket_name(low: float, high: float) -> str:
    """`30-60 %` from 0.3 and 0.6."""
    return f"{100 * low:.0f}-{100 * high:.0f} %"


def bucket_of(confidence: np.ndarray) -> np.ndarray:
    """Number of the bucket of each probability, `(n,)` int64; ends are rounded to its dtype.

    NaN is in no bucket: its number is `len(BUCKETS)`.
    """
    inner = np.array(EDGES[1:-1], confidence.dtype)
    found = np.searchsorted(inner, confidence, side="right")
    return np.where(np.isnan(confidence), len(BUCKETS), found)


class BucketTally:
    """Sums of every key per cell, a unit and a bucket; only cells that occur take room.

    A unit is what is resampled, a document. Each key takes at most `min(5 units, positions)` rows
    of `MetricSums`: targets without a confidence (see `bucket_of`) have a cell of their own.
    """

    def __init__(self, keys: Sequence[ResultKey], units: int, positions: int) -> None:
        self.units = units
        numbers = len(BUCKETS) + 1
        size = min(units * numbers, positions)
        self.sums = {key: MetricSums(size) for key in keys}
        """`(cells, columns)` by key."""
        self._cell = np.full((units, numbers), -1)
        self._unit, self._bucket = np.full(size, -1), np.full(size, -1)

    def cells(self, slots: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        """Cell of each position from its unit `(n,)` and the model's confidence `(n,)`."""
        buckets = bucket_of(confidence)
        self._number(slots, buckets)
        return self._cell[slots, buckets]

    def _number(self, slots: np.ndarray, buckets: np.ndarray) -> None:
        """Give cells that come for the first time the next numbers."""
        new = self._cell[slots, buckets] < 0
        if not new.any():
            return
        unit, bucket = np.unique(np.stack([slots[new], buckets[new]]), axis=1)
        first = np.count_nonzero(self._unit >= 0)
        numbers = np.arange(first, first + len(unit))
        self._cell[unit, bucket] = numbers
        self._unit[numbers], self._bucket[numbers] = unit, bucket

    def rows(self, weights: np.ndarray) -> tuple[list[EvaluationRow], list[BucketRow]]:
        """Rows of all keys, and of their buckets; a key or bucket without a pair has none.

        `weights` is that of `resampling`: a bucket's interval comes from the same resamples.
        """
        rows: list[EvaluationRow] = []
        parts: list[BucketRow] = []
        for key in self.sums:
            row = self._row(key, weights, self._unit)
            if row is not None:
                rows.append(row)
                parts += self._parts(key, weights, row.n)
        return rows, parts

    def _parts(self, key: ResultKey, weights: np.ndarray, n: int) -> list[BucketRow]:
        found = []
        for number, (low, high) in enumerate(BUCKETS):
            inside = np.where(self._bucket == number, self._unit, -1)
            if (row := self._row(key, weights, inside)) is not None:
                found.append(BucketRow(**asdict(row), confidence_from=low, confidence_to=high,
                                       share=row.n / n))  # fmt: skip
        return found

    def _row(self, key: ResultKey, weights: np.ndarray, unit: np.ndarray) -> EvaluationRow | None:
        return self.sums[key].by(unit, self.units).row(*key, weights)

"""Measures by the model's own confidence: rows for buckets of the model's largest probability.

`evaluate` adds the measures of every result to a `BucketTally`, per resampling unit (a document)
and confidence bucket; `BucketTally.rows` makes `EvaluationRow`s over all pairs and `BucketRow`s per
bucket. The buckets are those of Future Lens (Pal et al., 2311.04897).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .metrics import EvaluationRow, MetricSums

EDGES = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Ends of the buckets: [0, 0.3), [0.3, 0.6), [0.6, 0.9) and [0.9, 1]."""
BUCKETS = tuple(zip(EDGES[:-1], EDGES[1:], strict=True))
"""Lower and upper end of each bucket."""


LEAST_DIFFERENCE = 0.1
"""Difference of precision@1 between buckets that is worth a picture."""


class ResultKey(NamedTuple):
    """One result of an evaluation: a probe read at a layer and an offset."""

    probe: str
    """Name of the probe."""
    layer: int | None
    """Layer that the probe reads; None for a probe that reads tokens alone."""
    offset: int


@dataclass(frozen=True)
class BucketRow(EvaluationRow):
    """The measures of an `EvaluationRow` over the pairs in one confidence bucket.

    Confidence is the largest probability that the model gives at t+N, where the probe is to predict
    the model.
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
        """Name of the bucket: `30-60 %`."""
        return bucket_name(self.confidence_from, self.confidence_to)


def bucket_name(low: float, high: float) -> str:
    """Name of a bucket: `30-60 %` from 0.3 and 0.6."""
    return f"{100 * low:.0f}-{100 * high:.0f} %"


def buckets_differ(rows: Sequence[BucketRow]) -> bool:
    """Whether precision@1 depends on the confidence, in the bucket `rows` of one probe and offset.

    It does where, at some layer, two buckets are `LEAST_DIFFERENCE` apart and their 95 % intervals
    are disjoint; without intervals nothing is known to differ.
    """
    by_layer: dict[int | None, list[tuple[float, float, float]]] = {}
    for row in rows:
        low, value, high = row.precision_at_1_low, row.precision_at_1, row.precision_at_1_high
        if low is not None and value is not None and high is not None:
            by_layer.setdefault(row.layer, []).append((low, value, high))
    return any(
        one[2] < other[0] and other[1] - one[1] >= LEAST_DIFFERENCE
        for buckets in by_layer.values()
        for one, other in itertools.permutations(buckets, 2)
    )


def bucket_of(confidence: np.ndarray) -> np.ndarray:
    """Number of the bucket of each probability, `(n,)` int64; ends are rounded to its dtype.

    NaN is in no bucket: its number is `len(BUCKETS)`.
    """
    inner_edges = np.array(EDGES[1:-1], confidence.dtype)
    numbers = np.searchsorted(inner_edges, confidence, side="right")
    return np.where(np.isnan(confidence), len(BUCKETS), numbers)


class BucketTally:
    """Sums of measures for every result, per cell; a cell is a unit and a confidence bucket.

    A unit is what the bootstrap resamples, a document. Only cells that occur take a row: each key
    has at most `min(5 * units, positions)` rows of `MetricSums`. Targets without a confidence (NaN,
    see `bucket_of`) have a cell of their own.
    """

    def __init__(self, keys: Sequence[ResultKey], units: int, positions: int) -> None:
        self.units = units
        columns = len(BUCKETS) + 1
        size = min(units * columns, positions)
        self.sums: dict[ResultKey, MetricSums] = {key: MetricSums(size) for key in keys}
        """Sums `(cells, columns)` by key."""
        self._cell_of = np.full((units, columns), -1)
        self._unit_of_cell, self._bucket_of_cell = np.full(size, -1), np.full(size, -1)

    def cells(self, unit_numbers: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        """Cell of each target from its unit `(n,)` and the model's confidence `(n,)`."""
        buckets = bucket_of(confidence)
        self._number_new_cells(unit_numbers, buckets)
        return self._cell_of[unit_numbers, buckets]

    def _number_new_cells(self, unit_numbers: np.ndarray, buckets: np.ndarray) -> None:
        """Give the next numbers to cells that occur for the first time."""
        new = self._cell_of[unit_numbers, buckets] < 0
        if not new.any():
            return
        units, buckets = np.unique(np.stack([unit_numbers[new], buckets[new]]), axis=1)
        first = np.count_nonzero(self._unit_of_cell >= 0)
        cells = np.arange(first, first + len(units))
        self._cell_of[units, buckets] = cells
        self._unit_of_cell[cells], self._bucket_of_cell[cells] = units, buckets

    def unit_sums(self, key: ResultKey) -> MetricSums:
        """Sums of one result per unit, over all confidences."""
        return self.sums[key].sum_by_unit(self._unit_of_cell, self.units)

    def rows(self, weights: np.ndarray) -> tuple[list[EvaluationRow], list[BucketRow]]:
        """Rows of all keys, and of their buckets; a key or bucket without a pair has no row.

        `weights` comes from `resampling_counts`: the intervals of a row and of its buckets come
        from the same resamples.
        """
        rows: list[EvaluationRow] = []
        bucket_rows: list[BucketRow] = []
        for key, sums in self.sums.items():
            row = self.unit_sums(key).row(*key, weights)
            if row is None:
                continue
            rows.append(row)
            for number, (low, high) in enumerate(BUCKETS):
                unit_of_cell = np.where(self._bucket_of_cell == number, self._unit_of_cell, -1)
                part = sums.sum_by_unit(unit_of_cell, self.units).row(*key, weights)
                if part is not None:
                    bucket_rows.append(
                        BucketRow(
                            **vars(part),
                            confidence_from=low,
                            confidence_to=high,
                            share=part.n / row.n,
                        )
                    )
        return rows, bucket_rows

"""Rows of the study by confidence: the model's, in the buckets of the paper, and the probe's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....probes.base.resampling import Interval, ResamplingUnits, bootstrap_interval
from ...evaluation.confidence_buckets import BUCKETS, ResultKey, bucket_name
from .pair_measures import DEFINED, HAS_TEXT, HIT, TEXT_HIT, PairMeasures

PUBLISHED = (0.26, 0.57, 0.77, 0.95)
"""Precision@1 at N = 1 by the model's confidence, in the order of `BUCKETS`, of a learned prompt at
layer 14 of GPT-J (Pal et al., 2311.04897). The prompt reads the true next token, which linear
probes do not, and the sizes of the buckets are not published."""
PUBLISHED_NAME = "published: learned prompt, GPT-J"
PUBLISHED_LAYER, PUBLISHED_OFFSET = 14, 1
BINS = 15
"""Bins of equal width of the expected calibration error (Guo et al., 1706.04599)."""
SHOWN_BINS = 10
"""Bins of the curve."""


@dataclass(frozen=True)
class BucketPrecision:
    """Precision@1 where the model's largest probability at t+N lies in one bucket."""

    probe: str
    offset: int
    layer: int | None
    """The layer of largest precision@1 over all confidences."""
    bucket: str
    """Such as `30-60 %`."""
    n: int | None
    """None for the published numbers, whose sizes are not known."""
    share: float | None
    """Part of the pairs that is in the bucket."""
    precision_at_1: float | None
    precision_at_1_interval: Interval


@dataclass(frozen=True)
class CalibrationRow:
    """How far a probe's own confidence, its largest probability, is from its hits."""

    probe: str
    offset: int
    layer: int
    n: int
    """Recorded pairs with a distribution."""
    confidence: float
    """Mean of the probe's largest probability."""
    precision_at_1: float
    """Share of hits of the model's token."""
    ece: float
    """Expected calibration error against the model's token: the mean over pairs of the difference
    between hits and confidence in their bin, without sign."""
    ece_interval: Interval
    n_text: int
    precision_at_1_text: float | None
    ece_text: float | None
    """The same against the text's token."""
    ece_text_interval: Interval


@dataclass(frozen=True)
class CurvePoint:
    """One bin of a probe's own confidence."""

    probe: str
    offset: int
    layer: int
    bin_from: float
    bin_to: float
    n: int
    confidence: float
    """Mean in the bin."""
    precision_at_1: float
    precision_at_1_interval: Interval
    precision_at_1_text: float | None
    """Of the pairs after which the text goes on; None without one."""
    precision_at_1_text_interval: Interval


def bucket_rows(measures: PairMeasures, peaks: Sequence[ResultKey]) -> list[BucketPrecision]:
    """Buckets of each of `peaks`, with the published row beside those of its offset."""
    rows = [
        BucketPrecision(
            probe=row.probe,
            offset=row.offset,
            layer=row.layer,
            bucket=row.bucket,
            n=row.n,
            share=row.share,
            precision_at_1=row.precision_at_1,
            precision_at_1_interval=(row.precision_at_1_low, row.precision_at_1_high),
        )
        for key in peaks
        for row in measures.buckets
        if (row.probe, row.layer, row.offset) == key
    ]
    if any(key.offset == PUBLISHED_OFFSET for key in peaks):
        rows += [
            BucketPrecision(
                probe=PUBLISHED_NAME,
                offset=PUBLISHED_OFFSET,
                layer=PUBLISHED_LAYER,
                bucket=bucket_name(*bucket),
                n=None,
                share=None,
                precision_at_1=precision,
                precision_at_1_interval=(None, None),
            )
            for bucket, precision in zip(BUCKETS, PUBLISHED, strict=True)
        ]
    return rows


def calibration_rows(
    measures: PairMeasures, peaks: Sequence[ResultKey], units: ResamplingUnits
) -> list[CalibrationRow]:
    """Calibration of each of `peaks` over the recorded pairs; none without a defined pair."""
    records = measures.records
    assert records is not None
    rows = []
    for key in peaks:
        assert key.layer is not None
        pairs = _RecordedPairs.of(measures, key, units)
        if not len(pairs.hit):
            continue
        text = records.has(key, HAS_TEXT)[pairs.index]
        of_text = pairs.select(text, records.has(key, TEXT_HIT)[pairs.index][text])
        rows.append(
            CalibrationRow(
                probe=key.probe,
                offset=key.offset,
                layer=key.layer,
                n=len(pairs.hit),
                confidence=float(pairs.confidence.mean()),
                precision_at_1=float(pairs.hit.mean()),
                ece=pairs.error(),
                ece_interval=pairs.interval(measures.weights),
                n_text=int(text.sum()),
                precision_at_1_text=float(of_text.hit.mean()) if text.any() else None,
                ece_text=of_text.error() if text.any() else None,
                ece_text_interval=of_text.interval(measures.weights),
            )
        )
    return rows


def curve_points(
    measures: PairMeasures, peaks: Sequence[ResultKey], units: ResamplingUnits
) -> list[CurvePoint]:
    """Hits by the probe's own confidence, in `SHOWN_BINS` bins; empty bins have no point."""
    points = []
    for key in peaks:
        assert key.layer is not None
        records = measures.records
        assert records is not None
        pairs = _RecordedPairs.of(measures, key, units)
        has_text, text_hit = (records.has(key, bit)[pairs.index] for bit in (HAS_TEXT, TEXT_HIT))
        numbers = bin_numbers(pairs.confidence, SHOWN_BINS)
        for number in np.unique(numbers):
            chosen = numbers == number
            of_text = chosen & has_text
            points.append(
                CurvePoint(
                    probe=key.probe,
                    offset=key.offset,
                    layer=key.layer,
                    bin_from=number / SHOWN_BINS,
                    bin_to=(number + 1) / SHOWN_BINS,
                    n=int(chosen.sum()),
                    confidence=float(pairs.confidence[chosen].mean()),
                    precision_at_1=float(pairs.hit[chosen].mean()),
                    precision_at_1_interval=pairs.share(chosen, pairs.hit, measures.weights),
                    precision_at_1_text=float(text_hit[of_text].mean()) if of_text.any() else None,
                    precision_at_1_text_interval=pairs.share(of_text, text_hit, measures.weights),
                )
            )
    return points


@dataclass(frozen=True, eq=False)
class _RecordedPairs:
    """The defined recorded pairs of one result; arrays `(n,)`."""

    index: np.ndarray
    """Number in the sample."""
    confidence: np.ndarray
    hit: np.ndarray
    unit: np.ndarray
    units: int

    @classmethod
    def of(cls, measures: PairMeasures, key: ResultKey, units: ResamplingUnits) -> "_RecordedPairs":
        records = measures.records
        assert records is not None
        index = np.flatnonzero(records.has(key, DEFINED))
        return cls(
            index=index,
            confidence=records.confidence[key][index].astype(np.float64),
            hit=records.has(key, HIT)[index],
            unit=units.unit_numbers[index],
            units=units.n_resampled,
        )

    def select(self, chosen: np.ndarray, hit: np.ndarray) -> "_RecordedPairs":
        """The pairs `chosen`, with other hits."""
        arrays = self.index[chosen], self.confidence[chosen], hit, self.unit[chosen]
        return _RecordedPairs(*arrays, self.units)

    def share(self, chosen: np.ndarray, hit: np.ndarray, weights: np.ndarray) -> Interval:
        """95 % interval of the share of `hit` among the pairs `chosen`, both `(n,)` bool."""
        n, hits = (
            np.bincount(self.unit[pairs], minlength=self.units).astype(np.float64)
            for pairs in (chosen, chosen & hit)
        )
        return bootstrap_interval(n, hits, weights)

    def error(self) -> float:
        """Expected calibration error."""
        return expected_calibration_error(self.confidence, self.hit)

    def interval(self, weights: np.ndarray) -> Interval:
        """95 % interval over units; an error has no sign, so that resamples lie above 0."""
        if len(np.unique(self.unit)) < 2:
            return None, None
        gaps = np.zeros((self.units, BINS))
        np.add.at(gaps, (self.unit, bin_numbers(self.confidence, BINS)), self.hit - self.confidence)
        n = np.bincount(self.unit, minlength=self.units)
        total = weights @ n
        errors = np.abs(weights @ gaps).sum(1)[total > 0] / total[total > 0]
        low, high = np.percentile(errors, (2.5, 97.5))
        return float(low), float(high)


def bin_numbers(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin of equal width of each confidence in [0, 1], `(n,)` int64; 1 is in the last bin."""
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def expected_calibration_error(confidence: np.ndarray, hit: np.ndarray, bins: int = BINS) -> float:
    """sum over bins of n_b / n |accuracy_b - confidence_b| for pairs `(n,)`, n at least 1."""
    gaps = np.bincount(bin_numbers(confidence, bins), hit - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))

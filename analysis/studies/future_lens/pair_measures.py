"""Measures of probes at pairs (t, t+N) that filters keep, by document: `measure_pairs`.

The measures are those of `residua.evaluate` (`analysis/evaluation`), which reads the windows; what
is kept here are their sums by resampling unit, so that any difference of two results has an
interval, and the hits and confidences of single pairs (`PairRecords`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ....cache.progress import Progress
from ....cache.tokens.segments import PairScope
from ....probes.base.resampling import Interval, ResamplingUnits, bootstrap_interval
from ...evaluation.confidence_buckets import BucketRow, BucketTally, ResultKey
from ...evaluation.metrics import COLUMNS
from ...evaluation.plan import EvaluationPlan
from ...evaluation.window_tally import tally_windows
from ...evaluation.windows import EvaluationSample, EvaluationWindow
from .pair_filters import Masks

if TYPE_CHECKING:
    import torch

    from ....cache.store.activation_cache import ActivationCache

MOST_RECORDED = 1 << 16
"""Most positions whose pairs are recorded one by one."""
HIT, TEXT_HIT, HAS_TEXT, DEFINED = 1, 2, 4, 8
"""Bits of a recorded pair."""


class PairRecords:
    """Hits and confidence of every result at single targets t+N, for the first sampled positions.

    Arrays are indexed by the position's number in the sample; a pair that was not read has no bit.
    """

    def __init__(self, positions: int, keys: Iterable[ResultKey]) -> None:
        self.n: int = min(positions, MOST_RECORDED)
        """Number of sampled positions that are recorded."""
        self.bits: dict[ResultKey, np.ndarray] = {k: np.zeros(self.n, np.uint8) for k in keys}
        """`HIT`: the probe's top token is the model's; `TEXT_HIT`: it is the text's; `HAS_TEXT`:
        the text goes on; `DEFINED`: both distributions are."""
        self.confidence: dict[ResultKey, np.ndarray] = {
            key: np.full(self.n, np.nan, np.float32) for key in self.bits
        }
        """The probe's largest probability."""

    def observe(
        self, key: ResultKey, window: EvaluationWindow, targets: np.ndarray, measures: np.ndarray
    ) -> None:
        """Record the pairs of a window, see `tally_windows`."""
        rows = window.sample_index[window.target_rows[targets]]
        inside = rows < self.n
        rows, measures = rows[inside], measures[inside]
        hit, text, has_text, undefined = (
            np.nan_to_num(measures[:, COLUMNS.index(name)]) > 0
            for name in ("precision_at_1", "precision_at_1_text", "n_text", "n_undefined")
        )
        bits = hit * HIT + text * TEXT_HIT + has_text * HAS_TEXT + ~undefined * DEFINED
        self.bits[key][rows] = bits.astype(np.uint8)
        self.confidence[key][rows] = measures[:, COLUMNS.index("confidence")]

    def has(self, key: ResultKey, bit: int) -> np.ndarray:
        """Whether the pair of each recorded position has `bit`, `(n,)` bool."""
        return (self.bits[key] & bit) > 0


@dataclass(frozen=True, eq=False)
class PairMeasures:
    """Sums of measures of every result over pairs, by resampling unit."""

    sums: dict[ResultKey, np.ndarray]
    """Sums of `COLUMNS`, `(units, columns)` float64."""
    buckets: list[BucketRow]
    """Measures by the model's confidence at t+N."""
    weights: np.ndarray
    """How often each resample draws each unit, `(resamples, units)`."""
    records: PairRecords | None
    products: str
    """Precision of the head's products for probes."""

    def count(self, key: ResultKey, name: str = "n") -> int:
        """Sum of a counting column: `n`, `n_text` or `n_undefined`."""
        return int(self.sums[key][:, COLUMNS.index(name)].sum())

    def mean(self, key: ResultKey, name: str) -> float | None:
        """Mean of a measure over the pairs; None without pairs, and if undefined for one."""
        n, values = self._columns(key, name)
        total = n.sum()
        mean = values.sum() / total if total else np.nan
        return None if np.isnan(mean) else float(mean)

    def interval(self, key: ResultKey, name: str) -> Interval:
        """95 % interval of `mean`."""
        return bootstrap_interval(*self._columns(key, name), self.weights)

    def difference(self, key: ResultKey, other: ResultKey, name: str) -> tuple[float, Interval]:
        """Mean of a measure of `key` less that of `other`, with the interval of the difference.

        Both means are resampled together; NaN and no interval where one is undefined.
        """
        return mean_difference(self._columns(key, name), self._columns(other, name), self.weights)

    def resampled_means(self, key: ResultKey, name: str) -> np.ndarray:
        """The mean in every resample, `(resamples,)` float64; NaN where it draws no pair."""
        n, values = self._columns(key, name)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.weights @ values) / (self.weights @ n)

    def _columns(self, key: ResultKey, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Number of pairs and sum of the measure `name` of each unit."""
        count = "n_text" if name.endswith("_text") else "n"
        sums = self.sums[key]
        return sums[:, COLUMNS.index(count)], sums[:, COLUMNS.index(name)]


def mean_difference(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], weights: np.ndarray
) -> tuple[float, Interval]:
    """Difference of the means of two sums `(n, values)` over the same units, and its interval."""
    (n, values), (n_other, values_other) = one, other
    if not n.sum() or not n_other.sum():
        return np.nan, (None, None)
    difference = float(values.sum() / n.sum() - values_other.sum() / n_other.sum())
    is_known = np.isfinite(values).all() and np.isfinite(values_other).all()
    if np.count_nonzero(n) < 2 or np.count_nonzero(n_other) < 2 or not is_known:
        return difference, (None, None)
    with np.errstate(invalid="ignore", divide="ignore"):
        resampled = (weights @ values) / (weights @ n)
        resampled -= (weights @ values_other) / (weights @ n_other)
    low, high = np.percentile(resampled[np.isfinite(resampled)], (2.5, 97.5))
    return difference, (float(low), float(high))


def measure_pairs(
    cache: "ActivationCache",
    plan: EvaluationPlan,
    sequences: np.ndarray,
    scope: PairScope,
    masks: Masks,
    *,
    units: ResamplingUnits,
    weights: np.ndarray,
    device: "torch.device",
    records: bool = False,
    progress: Progress | None = None,
) -> PairMeasures:
    """Measure the readouts of `plan` at the pairs of `sequences` that `masks` keep.

    Offsets of one mask are read together. With `records`, single pairs are recorded, too.
    """
    groups = list(_groups_of_masks(masks))
    samples = [EvaluationSample(cache, sequences, scope, mask) for mask, _ in groups]
    total = sum(sample.targets.count for sample in samples)
    positions = int(cache.sequence_length[sequences].sum())
    recorded = PairRecords(positions, plan.keys) if records else None
    sums: dict[ResultKey, np.ndarray] = {}
    buckets: list[BucketRow] = []
    done, products = 0, "float32"
    for sample, (_, offsets) in zip(samples, groups, strict=True):
        part = replace(plan, offsets=offsets)
        tally = BucketTally(part.keys, units.n_resampled, sample.targets.count)

        def report(of_part: int, _: int, before: int = done) -> None:
            assert progress is not None
            progress(before + of_part, total)

        products = tally_windows(
            sample,
            part,
            units,
            tally,
            device=device,
            observe=None if recorded is None else recorded.observe,
            progress=None if progress is None else report,
        )
        sums |= {key: tally.unit_sums(key).sums for key in part.keys}
        buckets += tally.rows(weights)[1]
        done += sample.targets.count
    return PairMeasures(sums, buckets, weights, recorded, products)


def _groups_of_masks(masks: Masks) -> Iterator[tuple[np.ndarray | None, tuple[int, ...]]]:
    """Each distinct mask, by identity, with its offsets."""
    offsets_of: dict[int, list[int]] = {}
    for offset, mask in masks.items():
        offsets_of.setdefault(id(mask), []).append(offset)
    for offsets in offsets_of.values():
        yield masks[offsets[0]], tuple(offsets)

"""AUROC of anomaly scores, with a bootstrap over questions: `SplitScores`, `Resamples`.

AUROC is the probability that a document of the positive kind has the larger score, ties counting
one half. A resample draws whole questions; documents of one question, clean or not, stay together,
and all splits and detectors see the same resamples, so that differences are paired.
"""

from dataclasses import dataclass

import numpy as np

from ....probes.base.resampling import Interval, resampling_counts


@dataclass(frozen=True, eq=False)
class Separation:
    """An AUROC, a mean, or a difference of two, with its value in each resample of questions."""

    value: float | None
    """Mean over the splits; None where one of the two kinds is missing."""
    resampled: np.ndarray
    """`(resamples,)` float64; NaN where a resample lacks one of the two kinds."""

    @property
    def interval(self) -> Interval:
        """95 % percentile interval; None where a fifth of the resamples is undefined."""
        known = self.resampled[np.isfinite(self.resampled)]
        if self.value is None or len(known) < 0.8 * len(self.resampled) or not len(known):
            return None, None
        low, high = np.percentile(known, (2.5, 97.5))
        return float(low), float(high)

    def minus(self, other: "Separation") -> "Separation":
        """The paired difference of two separations."""
        value = None
        if self.value is not None and other.value is not None:
            value = self.value - other.value
        return Separation(value, self.resampled - other.resampled)


class QuestionResamples:
    """Resamples of the questions of documents; `questions` `(n,)` are numbers from 0."""

    def __init__(self, questions: np.ndarray, seed: int) -> None:
        self.questions = questions
        self.count: int = int(questions.max(initial=-1)) + 1
        self.weights: np.ndarray = resampling_counts(max(self.count, 1), seed)
        """How often each resample draws each question, `(resamples, questions)`."""

    def separate(
        self, scores: np.ndarray, negative: np.ndarray, positive: np.ndarray
    ) -> Separation:
        """AUROC of `positive` against `negative` documents, both `(n,)` bool, averaged over splits.

        `scores` `(splits, n)` are NaN for documents that a split does not score, which do not
        count in it.
        """
        values: list[float] = []
        resampled = np.zeros(len(self.weights))
        for row in scores:
            known = np.isfinite(row) & (negative | positive)
            if not (known & positive).any() or not (known & negative).any():
                continue
            of_known = self.weights[:, self.questions[known]]
            each = np.concatenate([np.ones((1, known.sum())), of_known])
            found = weighted_auroc(row[known], positive[known], each)
            values.append(float(found[0]))
            resampled += found[1:]
        if not values:
            return Separation(None, np.full(len(self.weights), np.nan))
        if self.count < 2:
            resampled[:] = np.nan
        return Separation(float(np.mean(values)), resampled / len(values))

    def mean(self, values: np.ndarray) -> Separation:
        """Mean of the values that are not NaN, `(n,)`, with its resamples."""
        known = np.isfinite(values)
        if not known.any():
            return Separation(None, np.full(len(self.weights), np.nan))
        weights = self.weights[:, self.questions[known]]
        total = weights.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled = weights @ values[known] / total
        if len(np.unique(self.questions[known])) < 2:
            resampled[:] = np.nan
        return Separation(float(values[known].mean()), resampled)


def weighted_auroc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC of `scores` `(n,)` for each row of `weights` `(rows, n)` of the documents, `(rows,)`.

    NaN where a row gives one of the two kinds no weight.
    """
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    ordered, is_positive = weights[:, order], positive[order]
    of_positive = np.add.reduceat(ordered * is_positive, starts, axis=1)
    of_negative = np.add.reduceat(ordered * ~is_positive, starts, axis=1)
    # Negative weight below each group of equal scores, and half of its own.
    below = np.cumsum(of_negative, 1) - 0.5 * of_negative
    pairs = of_positive.sum(1) * of_negative.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (of_positive * below).sum(1) / pairs, np.nan)

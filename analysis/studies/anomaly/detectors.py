"""Anomaly detectors that are fitted on clean rows alone, and score others: larger is stranger.

Isolation forest, local outlier factor and one-class SVM are scikit-learn's, on standardised
features; `MahalanobisDistance` is the baseline that reads the states themselves.
"""

import warnings
from collections.abc import Callable

import numpy as np

FOREST, FACTOR, SVM, DISTANCE = (
    "isolation forest",
    "local outlier factor",
    "one-class SVM",
    "Mahalanobis",
)
DETECTORS = (FOREST, FACTOR, SVM, DISTANCE)
RELATIVE = "relative Mahalanobis"
NEIGHBOURS = 20
"""Neighbours of the local outlier factor, or all other rows if there are fewer."""
OUTLIER_SHARE = 0.1
"""nu of the one-class SVM."""
SMALLEST_FIT = 10
"""Fewest clean rows that a detector is fitted on."""

Score = Callable[[np.ndarray], np.ndarray]
"""Scores `(n,)` of rows `(n, features)`."""


def fit_detector(name: str, rows: np.ndarray, seed: int) -> Score:
    """Fit a detector of `DETECTORS` on `rows` `(n, features)`, all finite."""
    if name == DISTANCE:
        return MahalanobisDistance(rows).squared
    mean, scale = _column_scales(rows)
    standard = (rows - mean) / scale
    if name == FOREST:
        from sklearn.ensemble import IsolationForest

        model = IsolationForest(random_state=seed).fit(standard)
    elif name == FACTOR:
        from sklearn.neighbors import LocalOutlierFactor

        neighbours = min(NEIGHBOURS, len(rows) - 1)
        with warnings.catch_warnings():
            # Equal rows, of which scikit-learn warns, make large factors of all others.
            warnings.simplefilter("ignore", UserWarning)
            model = LocalOutlierFactor(n_neighbors=neighbours, novelty=True).fit(standard)
    elif name == SVM:
        from sklearn.svm import OneClassSVM

        model = OneClassSVM(nu=OUTLIER_SHARE, gamma="scale").fit(standard)
    else:
        raise ValueError(f"there is no detector {name!r}")
    return lambda others: -np.asarray(model.score_samples((others - mean) / scale), np.float64)


class MahalanobisDistance:
    """Squared distance from the mean of `rows` `(n, features)` in units of their covariance.

    Columns are standardised, then the covariance is shrunk towards a multiple of the identity by
    the share of Ledoit and Wolf (2004), `shrinkage`, so that fewer rows than columns can be used.
    """

    def __init__(self, rows: np.ndarray) -> None:
        from sklearn.covariance import LedoitWolf

        self.mean: np.ndarray
        self.scale: np.ndarray
        self.mean, self.scale = _column_scales(rows)
        model = LedoitWolf(assume_centered=True).fit(self._standard(rows))
        self.precision: np.ndarray = np.asarray(model.precision_)
        self.shrinkage: float = float(model.shrinkage_)

    def _standard(self, rows: np.ndarray) -> np.ndarray:
        return (rows - self.mean) / self.scale

    def squared(self, rows: np.ndarray) -> np.ndarray:
        """z' C^-1 z of each row, z being the standardised row, C the shrunk covariance."""
        standard = self._standard(rows)
        return np.einsum("ij,jk,ik->i", standard, self.precision, standard, optimize=True)

    def relative(self, rows: np.ndarray) -> np.ndarray:
        """`squared`, less the distance z' z under a background of independent columns.

        The relative distance of Ren et al. (2106.09022), simplified: their background is a
        Gaussian of other data, here it is that of the same rows without correlations.
        """
        standard = self._standard(rows)
        return self.squared(rows) - (standard * standard).sum(1)


def _column_scales(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, 1 for a constant one."""
    scale = rows.std(0)
    return rows.mean(0), np.where(scale > 1e-12 * (1 + np.abs(rows).max(0)), scale, 1.0)


def fit_classifier(rows: np.ndarray, positive: np.ndarray) -> Score:
    """Logistic regression on standardised `rows`; its score is the log odds of `positive`."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = _column_scales(rows)
    model = LogisticRegression(max_iter=2000, class_weight="balanced")
    model.fit((rows - mean) / scale, positive)
    return lambda others: np.asarray(model.decision_function((others - mean) / scale), np.float64)

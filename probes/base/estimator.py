"""Base classes of scikit-learn that probes inherit from, or stand-ins where it is not installed.

With the stand-ins, saved probes are read and used, and caches are fitted; fitting arrays needs
scikit-learn. `RidgeProbe` and `VocabProbe` take their bases from here.
"""

# pyright: reportAssignmentType=false, reportRedeclaration=false
from typing import Any

import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.utils.validation import validate_data
except ImportError:
    from .params import Params as BaseEstimator

    class ClassifierMixin:
        """Stand-in without methods: the probes have scores of their own."""

    class MultiOutputMixin:
        """Stand-in without methods."""

    class RegressorMixin:
        """Stand-in without methods: the probes have scores of their own."""

    def validate_data(
        estimator: Any, X: Any, y: Any = None, *, reset: bool = True, dtype: Any = None, **_: Any
    ) -> Any:
        """`X` as finite rows `(n, d)` of the fitted width d; raises `ValueError`.

        Rows of a dtype that is not among `dtype` are cast to the first of these.
        """
        if y is not None:
            raise ValueError("fitting arrays needs scikit-learn: pip install scikit-learn")
        rows = np.asarray(X)
        rows = rows if rows.dtype in dtype else rows.astype(dtype[0])
        width = rows.shape[1] if reset and rows.ndim == 2 else estimator.n_features_in_
        if rows.ndim != 2 or rows.shape[1] != width or not np.isfinite(rows).all():
            raise ValueError(f"expected finite rows (n, {width}), found shape {rows.shape}")
        return rows


__all__ = [
    "BaseEstimator",
    "ClassifierMixin",
    "MultiOutputMixin",
    "RegressorMixin",
    "validate_data",
]

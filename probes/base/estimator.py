"""What probes take from scikit-learn; where it is not installed, enough to read and use them."""

# pyright: reportAssignmentType=false, reportRedeclaration=false
from typing import Any

import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError:
    from .params import NotFitted as NotFittedError
    from .params import Params as BaseEstimator

    class ClassifierMixin:
        """Nothing: the probes have scores of their own."""

    class MultiOutputMixin:
        """Nothing."""

    class RegressorMixin:
        """Nothing."""

    def check_is_fitted(estimator: Any, attributes: str) -> None:
        """Raise `NotFittedError` unless `estimator` has the fitted attribute `attributes`."""
        if not hasattr(estimator, attributes):
            raise NotFittedError(f"this {type(estimator).__name__} is not fitted; call fit first")

    def validate_data(
        estimator: Any, X: Any, y: Any = None, *, reset: bool = True, dtype: Any = None, **_: Any
    ) -> Any:
        """Rows `(n, d)` of finite numbers, of the width that was fitted; raises `ValueError`."""
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
    "NotFittedError",
    "RegressorMixin",
    "check_is_fitted",
    "validate_data",
]

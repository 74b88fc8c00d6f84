"""Operations of the ridge solution that grow with d_model^3, by LAPACK: `HostAlgebra`.

`solver.py` is written for arrays of numpy or tensors of a device alike; what the two name
differently is here, and for a device in `device_algebra.py`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.linalg import get_lapack_funcs

from ..moments.moments import Moments

Spectrum = tuple[np.ndarray, Any]
"""Eigenvalues, ascending, of numpy, and eigenvectors of second moments."""


class HostAlgebra:
    """Matrices of numpy in float64; the products are those of numpy's BLAS."""

    def load(self, folds: Sequence[Moments]) -> Sequence[Moments]:
        """The moments with matrices that these operations take: the same."""
        return folds

    def array(self, values: np.ndarray) -> Any:
        """A vector or matrix of numpy as these operations take it: the same."""
        return values

    def host_array(self, array: Any) -> np.ndarray:
        """A result as a numpy array."""
        return array

    def spectrum(self, matrix: Any) -> Spectrum:
        """Eigenvalues, ascending, and eigenvectors of a symmetric `matrix` `(d, d)`."""
        values, vectors = np.linalg.eigh(matrix)
        return values, vectors

    def row_products(self, a: Any, b: Any) -> Any:
        """Scalar products of the rows of two matrices `(n, d)`, `(n,)`."""
        return np.einsum("ij,ij->i", a, b)

    def total_product(self, a: Any, b: Any) -> Any:
        """Sum of the products of the entries of two matrices of one shape."""
        return np.einsum("ij,ij->", a, b)

    def solve(self, matrix: Any, right: Any) -> Any | None:
        """matrix^-1 right of a positive definite matrix by Cholesky; None if it is singular.

        The diagonal of `matrix` `(d, d)` is 1 but for rounding, and is set to 1. Singular: the
        factorisation fails, or the reciprocal condition number is rounding.
        """
        np.fill_diagonal(matrix, 1.0)
        potrf, pocon, potrs = get_lapack_funcs(("potrf", "pocon", "potrs"), (matrix,))
        norm = np.abs(matrix).sum(axis=0).max()
        factor, failed = potrf(matrix, lower=True)
        if failed or pocon(factor, norm, uplo="L")[0] < len(matrix) * np.finfo(np.float64).eps:
            return None
        return potrs(factor, right, lower=True)[0]


HOST_ALGEBRA = HostAlgebra()

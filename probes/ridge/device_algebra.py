"""The operations of `linear_algebra.py` on a device of torch, in float64: `DeviceAlgebra`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...cache.devices import copy_to_device, copy_to_host, is_out_of_memory, wide_dtype
from ..moments.moments import Moments
from .linear_algebra import HOST_ALGEBRA, HostAlgebra, Spectrum


class DeviceAlgebra(HostAlgebra):
    """Matrices on a device with float64; eigenvectors come from LAPACK where the device has none.

    Torch names the device's own routines: of CUDA those of cuSOLVER.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def load(self, folds: Sequence[Moments]) -> list[Moments]:
        """The moments with their matrices and means on the device."""
        names = ("mean_x", "mean_y", "xx", "xy")
        return [
            replace(fold, **{name: self.array(getattr(fold, name)) for name in names})
            for fold in folds
        ]

    def array(self, values: np.ndarray) -> Any:
        """A vector or matrix of numpy as a tensor on the device."""
        return copy_to_device(torch.from_numpy(np.ascontiguousarray(values)), self.device)

    def host_array(self, array: Any) -> np.ndarray:
        """A tensor as a numpy array."""
        return copy_to_host(array).numpy()

    def spectrum(self, matrix: Any) -> Spectrum:
        """Eigenvalues, ascending, and eigenvectors of a symmetric `matrix` `(d, d)`.

        On the host where the device lacks the routine, its memory does not suffice for it, or it
        does not converge.
        """
        try:
            values, vectors = torch.linalg.eigh(matrix)
            return self.host_array(values), vectors
        except (NotImplementedError, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
            pass
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        values, vectors = HOST_ALGEBRA.spectrum(self.host_array(matrix))
        return values, self.array(vectors)

    def row_products(self, a: Any, b: Any) -> Any:
        """Scalar products of the rows of two matrices `(n, d)`, `(n,)`."""
        return torch.linalg.vecdot(a, b)

    def total_product(self, a: Any, b: Any) -> Any:
        """Sum of the products of the entries of two matrices of one shape."""
        return torch.linalg.vecdot(a, b).sum()

    def solve(self, matrix: Any, right: Any) -> Any | None:
        """matrix^-1 right of a positive definite matrix by Cholesky; None if it is singular.

        As `HostAlgebra.solve`, with the condition number of the inverse itself: LAPACK's estimate
        of it is on the host alone.
        """
        matrix.fill_diagonal_(1.0)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):
            return None
        inverse = torch.cholesky_inverse(factor)
        norms = [m.abs().sum(0).amax() for m in (matrix, inverse)]
        reciprocal = 1 / float(norms[0] * norms[1])
        if not reciprocal >= len(matrix) * torch.finfo(matrix.dtype).eps:
            return None
        return torch.cholesky_solve(right, factor)


def algebra_on(device: "torch.device | None") -> HostAlgebra:
    """The algebra of a device; LAPACK's for None, and for a device without float64."""
    if device is None or wide_dtype(device) != torch.float64:
        return HOST_ALGEBRA
    return DeviceAlgebra(device)

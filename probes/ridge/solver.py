"""Ridge regression from moments: a map by Cholesky, a whole penalty path by one `eigh` per fold.

`RidgeProbe` calls `fit_targets`, the tuned lens `fit_ridge`: cross-validation over the folds of
the moments chooses the penalty (`cross_validate`), then `solve` gives the map of all pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...cache.errors import UsageError
from ..moments.moments import Moments, merge_all
from .linear_algebra import HOST_ALGEBRA, HostAlgebra, Spectrum

GRID = np.logspace(-7, 2, 19)
"""Default penalties, in units of the mean eigenvalue of the second moments."""
Penalties = Sequence[float] | np.ndarray | None
"""Penalties to choose from; None for `GRID`."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """The map x @ weight + bias, with both arrays copied to C order.

    The last bits of a product depend on the memory order of its factors, and a file keeps only
    one order: so a loaded map predicts exactly what the fitted map did.
    """

    weight: np.ndarray
    """`(d_in, d_out)`."""
    bias: np.ndarray
    """`(d_out,)`."""

    def __post_init__(self) -> None:
        for name in ("weight", "bias"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name)))

    def __call__(self, x: Any) -> Any:
        """Map rows `(..., d_in)` of numpy or dask to `(..., d_out)`, in the dtype of the map."""
        rows = x if hasattr(x, "astype") else np.asarray(x)
        return rows.astype(self.weight.dtype, copy=False) @ self.weight + self.bias

    def astype(self, dtype: Any) -> "AffineMap":
        """The map rounded to `dtype`."""
        return AffineMap(self.weight.astype(dtype, copy=False), self.bias.astype(dtype, copy=False))


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """The penalty that cross-validation chose, and the map of all pairs with this penalty."""

    map: AffineMap
    alpha: float
    """The chosen penalty."""
    alphas: np.ndarray
    """Penalties tried, `(penalties,)`."""
    path: np.ndarray
    """Mean squared error of held-out folds per penalty, `(penalties,)`; nan without folds."""
    r2: float
    """Share of the held-out variance, of all outputs together, that is predicted."""
    n: int
    """Number of pairs."""

    @property
    def mse(self) -> float:
        """Mean squared error of held-out folds at the chosen penalty."""
        return float(self.path[np.flatnonzero(self.alphas == self.alpha)[0]])


def fit_targets(
    targets: Sequence[Sequence[Moments]],
    alpha: float | None,
    alphas: Penalties,
    what: str,
    algebra: HostAlgebra = HOST_ALGEBRA,
) -> list[RidgeFit]:
    """`fit_ridge` of several targets of the same rows x, which share the spectra of the folds."""
    spectra: dict[int, Spectrum] | None = {} if len(targets) > 1 else None
    return [fit_ridge(folds, alpha, alphas, what, spectra, algebra=algebra) for folds in targets]


def fit_ridge(
    folds: Sequence[Moments],
    alpha: float | None,
    alphas: Penalties,
    what: str,
    spectra: dict[int, Spectrum] | None = None,
    *,
    algebra: HostAlgebra = HOST_ALGEBRA,
) -> RidgeFit:
    """Choose a penalty by exact cross-validation over `folds`, then fit all pairs with it.

    `alpha` fixes the penalty, `alphas` are the ones to choose from; `what` names the pairs in
    messages. `spectra`, if given, receives the spectrum of each fold's training moments, for
    further targets. Products and decompositions are those of `algebra`, of numpy or of a device.
    Raises `UsageError` if the pairs cannot be fitted.
    """
    folds = algebra.load(folds)
    total = merge_all(folds)
    if total.n == 0:
        raise UsageError(
            f"{what}: there is no pair (t, t+N): all documents, or their parts in one "
            "sequence, are shorter than the offset; use smaller offsets or longer sequences"
        )
    if not (np.isfinite(total.yy) and np.isfinite(float(total.xx.trace()))):
        raise UsageError(f"{what}: the rows hold values that are not finite")
    # Error of every penalty on the held-out folds.
    tried = np.array([alpha]) if alpha is not None else penalties(total, alphas)
    path, held_out = cross_validate(folds, tried, spectra, algebra)
    if held_out and not np.isfinite(path).any():
        raise UsageError(f"{what}: no penalty gives a finite error; scale the rows down")
    if not held_out and alpha is None:
        raise UsageError(
            f"{what}: choosing a penalty needs pairs in at least two folds; "
            "give alpha=, or use more sequences"
        )
    # The best penalty; numpy's argmin alone would choose NaN.
    best = int(np.argmin(np.where(np.isfinite(path), path, np.inf))) if held_out else 0
    best_alpha = float(tried[best])
    # R2 of all outputs together: 1 - held-out squared error / variance.
    r2 = np.nan
    if held_out:
        sse = path[best] * held_out * len(total.mean_y)
        r2 = 1 - sse / total.yy if total.yy else float(sse == 0)
    return RidgeFit(
        map=solve(total, best_alpha, algebra),
        alpha=best_alpha,
        alphas=tried,
        path=path,
        r2=float(r2),
        n=total.n,
    )


def penalties(total: Moments, alphas: Penalties) -> np.ndarray:
    """`alphas` as an array; by default `GRID` times the mean eigenvalue of the moments of x."""
    if alphas is not None:
        return np.asarray(alphas, np.float64)
    return GRID * (float(total.xx.trace()) / len(total.xx) or 1.0)


def cross_validate(
    folds: Sequence[Moments],
    alphas: np.ndarray,
    spectra: dict[int, Spectrum] | None = None,
    algebra: HostAlgebra = HOST_ALGEBRA,
) -> tuple[np.ndarray, int]:
    """Mean squared error per penalty over all held-out pairs, and the number of these pairs."""
    sse, held_out = np.zeros(len(alphas)), 0
    for number, fold in enumerate(folds):
        # Train on all other folds. Merging them is as quick as total minus fold, and cannot cancel.
        others = [other for index, other in enumerate(folds) if index != number]
        if fold.n == 0 or not any(other.n for other in others):
            continue
        train = merge_all(others)
        # A path over several penalties needs the spectrum, which targets share.
        spectrum = None
        if len(alphas) > 1:
            spectrum = None if spectra is None else spectra.get(number)
            if spectrum is None:
                spectrum = algebra.spectrum(train.xx)
            if spectra is not None:
                spectra[number] = spectrum
        sse += path_errors(train, fold, alphas, spectrum, algebra)
        held_out += fold.n
    width = len(folds[0].mean_y)
    mean = sse / (held_out * width) if held_out else np.full(len(alphas), np.nan)
    return mean, held_out


def path_errors(
    train: Moments,
    held_out: Moments,
    alphas: np.ndarray,
    spectrum: Spectrum | None = None,
    algebra: HostAlgebra = HOST_ALGEBRA,
) -> np.ndarray:
    """Squared error on `held_out` of the ridge solutions of `train`, one per penalty.

    With Q, lam the eigenvectors and values of the training moments (the `spectrum`), a solution is
    W = Q G C with G = diag(1 / (lam + alpha)) and C = Q'Sxy. Its squared error on the held-out
    moments H is

        Hyy - 2 tr(W'Hxy) + tr(W'Hxx W) + n |b|^2,

    b the error at the held-out mean. Both traces are sums over the gains g of G, so that each
    penalty costs O(d^2). Computed in float64 as a difference of sums: exact down to about 1e-14 of
    the sum of squares of y.
    """
    if spectrum is None:
        return np.array(
            [held_out_sse(solve(train, float(a), algebra), held_out, algebra) for a in alphas]
        )
    values, vectors = spectrum
    cross = vectors.T @ train.xy
    # tr(W'Hxy) = g . linear, tr(W'Hxx W) = g' quadratic g.
    linear = algebra.row_products(cross, vectors.T @ held_out.xy)
    quadratic = vectors.T @ held_out.xx @ vectors
    quadratic *= cross @ cross.T
    # Differences of the held-out means from those of training.
    shift_x = vectors.T @ (held_out.mean_x - train.mean_x)
    shift_y = held_out.mean_y - train.mean_y
    errors = np.empty(len(alphas))
    for index, alpha in enumerate(alphas):
        gain = algebra.array(inverse(values, float(alpha), train.n))
        bias = shift_y - (gain * shift_x) @ cross
        errors[index] = float(
            held_out.yy - 2 * gain @ linear + gain @ quadratic @ gain + held_out.n * bias @ bias
        )
    return np.maximum(errors, 0.0)


def held_out_sse(
    affine: AffineMap, held_out: Moments, algebra: HostAlgebra = HOST_ALGEBRA
) -> float:
    """Squared error of a map over the pairs of `held_out`: Hyy - 2 tr(W'Hxy) + tr(W'Hxx W) + n b'b.

    W is the weight, b the error at the mean, Hxx, Hxy, Hyy the centred moments.
    """
    weight = algebra.array(affine.weight.astype(np.float64, copy=False))
    bias = held_out.mean_y - held_out.mean_x @ weight - algebra.array(affine.bias)
    explained = algebra.total_product(weight, held_out.xx @ weight - 2 * held_out.xy)
    return max(float(held_out.yy + explained + held_out.n * bias @ bias), 0.0)


def inverse(values: np.ndarray, alpha: float, n: int) -> np.ndarray:
    """1 / (values + alpha) of eigenvalues, 0 where these are rounding: solution of least norm.

    `n` centred rows have rank below n; eigenvalues in other directions are rounding, which a tiny
    `alpha` would blow up.
    """
    shifted = np.maximum(values, 0.0) + alpha
    # Eigenvalues below the rounding of the largest one are none, unless alpha is larger.
    floor = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    is_reliable = shifted > (floor if alpha <= floor else 0.0)
    is_reliable[: max(0, len(values) - n + 1)] = False
    return np.divide(1.0, shifted, out=np.zeros_like(shifted), where=is_reliable)


def solve(moments: Moments, alpha: float, algebra: HostAlgebra = HOST_ALGEBRA) -> AffineMap:
    """The map that minimises SSE + alpha |weight|^2; the bias is not penalised."""
    # Cholesky where the rows have full rank, else eigenvalues, which give the least norm.
    weight = cholesky(moments, alpha, algebra) if moments.n > len(moments.xx) else None
    if weight is None:
        values, vectors = algebra.spectrum(moments.xx)
        gain = algebra.array(inverse(values, alpha, moments.n))
        weight = vectors @ (gain[:, None] * (vectors.T @ moments.xy))
    bias = moments.mean_y - moments.mean_x @ weight
    return AffineMap(algebra.host_array(weight), algebra.host_array(bias))


def cholesky(moments: Moments, alpha: float, algebra: HostAlgebra = HOST_ALGEBRA) -> Any | None:
    """(xx + alpha 1)^-1 xy by Cholesky of the matrix scaled to a unit diagonal; None if singular.

    The scaling makes the result independent of massive columns.
    """
    diagonal = moments.xx.diagonal() + alpha
    if not bool((diagonal > 0).all()):
        return None
    scale = 1 / diagonal**0.5
    matrix = moments.xx * scale[:, None] * scale
    solution = algebra.solve(matrix, scale[:, None] * moments.xy)
    return None if solution is None else scale[:, None] * solution

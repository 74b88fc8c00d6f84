"""Ridge regression from moments: one solution by Cholesky, a whole penalty path by one `eigh`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import get_lapack_funcs

from ...cache.errors import UsageError
from ..moments.moments import Moments, merge_all

GRID = np.logspace(-7, 2, 19)
"""Default penalties, in units of the mean eigenvalue of the second moments."""
Penalties = Sequence[float] | np.ndarray | None
Spectrum = tuple[np.ndarray, np.ndarray]
"""Eigenvalues, ascending, and eigenvectors of second moments."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """`x @ weight + bias`; both arrays lie row by row (C order), whatever order they come in.

    The last bits of a product depend on the order of its factors, and a file keeps only one: so a
    map that was saved and loaded predicts what the fitted one does.
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
        """The same map, rounded to `dtype`."""
        return AffineMap(self.weight.astype(dtype, copy=False), self.bias.astype(dtype, copy=False))


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """What cross-validation chose, and the map that all pairs give with it."""

    map: AffineMap
    alpha: float
    alphas: np.ndarray
    """Penalties tried, `(penalties,)`."""
    path: np.ndarray
    """Mean squared error of held-out folds per penalty, `(penalties,)`; nan without folds."""
    r2: float
    """Share of the held-out variance, of all outputs together, that is predicted."""
    n: int

    @property
    def mse(self) -> float:
        """Mean squared error of held-out folds at the chosen penalty."""
        return float(self.path[np.flatnonzero(self.alphas == self.alpha)[0]])


def fit_targets(
    targets: Sequence[Sequence[Moments]], alpha: float | None, alphas: Penalties, what: str
) -> list[RidgeFit]:
    """`fit_ridge` of several targets of the same rows x, whose spectra are computed once."""
    spectra: dict[int, Spectrum] | None = {} if len(targets) > 1 else None
    return [fit_ridge(folds, alpha, alphas, what, spectra) for folds in targets]


def fit_ridge(
    folds: Sequence[Moments],
    alpha: float | None,
    alphas: Penalties,
    what: str,
    spectra: dict[int, Spectrum] | None = None,
) -> RidgeFit:
    """Choose a penalty by exact cross-validation over `folds`, then fit all pairs with it.

    `what` names the pairs in messages; `spectra`, if given, keeps those of the training moments
    per fold for further targets. Raises `UsageError` if the pairs cannot be fitted.
    """
    total = merge_all(folds)
    if total.n == 0:
        raise UsageError(f"{what}: there is no pair; are all documents shorter than the offset?")
    if not (np.isfinite(total.yy) and np.isfinite(np.trace(total.xx))):
        raise UsageError(f"{what}: the rows hold values that are not finite")
    tried = np.array([alpha]) if alpha is not None else penalties(total, alphas)
    path, held = cross_validate(folds, tried, spectra)
    if held and not np.isfinite(path).any():
        raise UsageError(f"{what}: no penalty gives a finite error; scale the rows down")
    if not held and alpha is None:
        raise UsageError(
            f"{what}: choosing a penalty needs pairs in at least two folds; "
            "give alpha=, or use more sequences"
        )
    # numpy's argmin would choose NaN.
    best = int(np.argmin(np.where(np.isfinite(path), path, np.inf))) if held else 0
    chosen = float(tried[best])
    sse = path[best] * held * len(total.mean_y)
    r2 = (1 - sse / total.yy if total.yy else float(sse == 0)) if held else np.nan
    return RidgeFit(solve(total, chosen), chosen, tried, path, float(r2), total.n)


def penalties(total: Moments, alphas: Penalties) -> np.ndarray:
    """The given penalties, or `GRID` times the mean eigenvalue."""
    if alphas is not None:
        return np.asarray(alphas, np.float64)
    return GRID * (np.trace(total.xx) / len(total.xx) or 1.0)


def cross_validate(
    folds: Sequence[Moments], alphas: np.ndarray, spectra: dict[int, Spectrum] | None = None
) -> tuple[np.ndarray, int]:
    """Mean squared error per penalty over all held-out pairs, and the number of those pairs."""
    sse, held = np.zeros(len(alphas)), 0
    for number, fold in enumerate(folds):
        # Merging the others is as quick as total minus fold, and cannot cancel.
        others = [other for index, other in enumerate(folds) if index != number]
        if fold.n == 0 or not any(other.n for other in others):
            continue
        train = merge_all(others)
        spectrum = None
        if len(alphas) > 1:
            spectrum = None if spectra is None else spectra.get(number)
            if spectrum is None:
                values, vectors = np.linalg.eigh(train.xx)
                spectrum = values, vectors
            if spectra is not None:
                spectra[number] = spectrum
        sse += path_sse(train, fold, alphas, spectrum)
        held += fold.n
    width = len(folds[0].mean_y)
    return (sse / (held * width) if held else np.full(len(alphas), np.nan)), held


def path_sse(
    train: Moments, held: Moments, alphas: np.ndarray, spectrum: Spectrum | None = None
) -> np.ndarray:
    """Squared error on `held` of the ridge solutions of `train`, one per penalty.

    With Q, lam the eigenvectors and values of the training moments (the `spectrum`), a solution
    is Q diag(1 / (lam + alpha)) Q'Sxy, so each penalty costs O(d^2). Computed in float64 as a
    difference of sums: exact down to about 1e-14 of the sum of squares of y.
    """
    if spectrum is None:
        return np.array([held_out_sse(solve(train, float(alpha)), held) for alpha in alphas])
    values, vectors = spectrum
    cross = vectors.T @ train.xy
    linear = np.einsum("ij,ij->i", cross, vectors.T @ held.xy)
    quadratic = vectors.T @ held.xx @ vectors
    quadratic *= cross @ cross.T
    shift_x = vectors.T @ (held.mean_x - train.mean_x)
    shift_y = held.mean_y - train.mean_y
    out = np.empty(len(alphas))
    for index, alpha in enumerate(alphas):
        gain = inverse(values, float(alpha), train.n)
        bias = shift_y - (gain * shift_x) @ cross
        out[index] = held.yy - 2 * gain @ linear + gain @ quadratic @ gain + held.n * bias @ bias
    return np.maximum(out, 0.0)


def held_out_sse(found: AffineMap, held: Moments) -> float:
    """Squared error of a map over the pairs that `held` sums up."""
    weight = found.weight.astype(np.float64, copy=False)
    bias = held.mean_y - held.mean_x @ weight - found.bias
    explained = np.einsum("ij,ij->", weight, held.xx @ weight - 2 * held.xy)
    return max(float(held.yy + explained + held.n * bias @ bias), 0.0)


def inverse(values: np.ndarray, alpha: float, n: int) -> np.ndarray:
    """1 / (values + alpha), and 0 for values that are rounding: the solution of least norm.

    `n` centred rows have rank below n; what they give in other directions is rounding, which a
    tiny `alpha` would blow up.
    """
    shifted = np.maximum(values, 0.0) + alpha
    floor = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    known = shifted > (floor if alpha <= floor else 0.0)
    known[: max(0, len(values) - n + 1)] = False
    return np.divide(1.0, shifted, out=np.zeros_like(shifted), where=known)


def solve(moments: Moments, alpha: float) -> AffineMap:
    """The map that minimises SSE + alpha |weight|^2; the bias is not penalised."""
    weight = cholesky(moments, alpha) if moments.n > len(moments.xx) else None
    if weight is None:
        values, vectors = np.linalg.eigh(moments.xx)
        gain = inverse(values, alpha, moments.n)
        weight = vectors @ (gain[:, None] * (vectors.T @ moments.xy))
    return AffineMap(weight, moments.mean_y - moments.mean_x @ weight)


def cholesky(moments: Moments, alpha: float) -> np.ndarray | None:
    """Solve by Cholesky with a unit diagonal (massive columns do no harm); None if singular."""
    diagonal = np.diagonal(moments.xx) + alpha
    if not np.all(diagonal > 0):
        return None
    scale = 1 / np.sqrt(diagonal)
    matrix = moments.xx * scale[:, None] * scale
    np.fill_diagonal(matrix, 1.0)
    potrf, pocon, potrs = get_lapack_funcs(("potrf", "pocon", "potrs"), (matrix,))
    norm = np.abs(matrix).sum(axis=0).max()
    factor, failed = potrf(matrix, lower=True)
    if failed or pocon(factor, norm, uplo="L")[0] < len(matrix) * np.finfo(np.float64).eps:
        return None
    solution, _ = potrs(factor, scale[:, None] * moments.xy, lower=True)
    return scale[:, None] * solution

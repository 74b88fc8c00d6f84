"""Coordinates in which an ablation's directions are orthonormal: euclidean or whitened.

A basis of k directions is an orthonormal V `(r, k)` in coordinates x = (h - reference) whiten
`(r,)`, mapped back by unwhiten `(r, d)`. Its encoder is (whiten V)' and its decoder V' unwhiten.

euclidean   whiten = unwhiten = I: orthogonal projections, the ablation of the tuned-lens paper
            (Belrose et al., 2303.08112, section 4).
covariance  whiten = U diag(variances)^-1/2, unwhiten = diag(variances)^1/2 U' with the eigenvectors
            U and eigenvalues of the rows' covariance: what is removed is replaced by its
            conditional mean given the rest (LEACE, Belrose et al., 2306.03819), so that ablated
            rows stay where the lens, and the model, have seen rows.
"""

from dataclasses import dataclass

import numpy as np

from ...cache.errors import UsageError
from ..moments.moments import Moments

LEAST_VARIANCE = 1e-12
"""Share of the largest variance below which a direction counts as constant, not as data."""


@dataclass(frozen=True, eq=False)
class AblationCoordinates:
    """Maps between rows of the residual stream and the coordinates of a metric; float64."""

    whiten: np.ndarray
    """`(d, r)`."""
    unwhiten: np.ndarray
    """`(r, d)`; unwhiten whiten is the identity of r dimensions."""
    variances: np.ndarray
    """Eigenvalues of the rows' covariance, descending, `(d,)`."""
    axes: np.ndarray
    """Eigenvectors of the covariance, one a row, in the order of `variances`; `(d, d)`."""

    @classmethod
    def of(cls, moments: Moments, metric: str) -> "AblationCoordinates":
        """Coordinates from the second moments of a layer's rows (`moments.xx`)."""
        variances, vectors = np.linalg.eigh(moments.xx / max(moments.n, 1))
        variances, axes = np.maximum(variances[::-1], 0.0), vectors.T[::-1]
        if metric == "euclidean":
            identity = np.eye(len(axes))
            return cls(identity, identity, variances, axes)
        rank = int((variances > variances[0] * LEAST_VARIANCE).sum()) if variances[0] > 0 else 0
        deviations = np.sqrt(variances[:rank])
        whiten = axes[:rank].T / deviations
        return cls(whiten, deviations[:, None] * axes[:rank], variances, axes)

    @property
    def rank(self) -> int:
        """Number r of coordinates."""
        return self.whiten.shape[1]

    def check_k(self, k: int, layer: int) -> None:
        """Raise `UsageError` unless the rows of `layer` vary in `k` directions at least."""
        if k > self.rank:
            raise UsageError(
                f"layer {layer} varies in {self.rank} directions only, fewer than k = {k}: choose "
                f"k of at most {self.rank}"
            )

    def encoder(self, basis: np.ndarray) -> np.ndarray:
        """Encoder `(k, d)` of orthonormal columns `basis` `(r, k)`."""
        return (self.whiten @ basis).T

    def decoder(self, basis: np.ndarray) -> np.ndarray:
        """Decoder `(k, d)` of orthonormal columns `basis` `(r, k)`."""
        return basis.T @ self.unwhiten

    def principal(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Encoder and decoder `(k, d)` of the `k` directions of largest variance (PCA).

        They are the same in both metrics: eigenvectors are orthogonal in either.
        """
        return self.axes[:k], self.axes[:k]

    def random(self, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Encoder and decoder `(k, d)` of `k` random directions, orthonormal in the metric."""
        draw = np.random.default_rng(seed).normal(size=(self.rank, k))
        basis = np.linalg.qr(draw)[0]
        return self.encoder(basis), self.decoder(basis)

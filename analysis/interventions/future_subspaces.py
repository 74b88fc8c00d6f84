"""The subspace of a layer that tells of a later prediction, without what tells of the next one.

x is the whitened row of layer l at t, z_N = y_N G^1/2 the row of layer L at t + N, weighted by what
the head makes of it (G = E'E with the unembedding E times the gain of the norm, if the head is
explicit). A = cov(x, z_N), B = cov(x, z_0), C = cov(z_0, z_N), all of rows of the train split. The
partial covariance P = A - B (cov(z_0) + c I)^-1 C is what x tells of the prediction at t + N beyond
the one at t; c, a small share of the mean variance of z_0, leaves out what layer L carries without
the head reading it. The left singular vectors of P orthogonal to the first ones of B span the
future subspace: in the covariance metric (LEACE, Belrose et al., 2306.03819) its erasure leaves
what it is uncorrelated with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...cache.errors import UsageError
from ...probes.basis.coordinates import AblationCoordinates
from ...probes.basis.layer_basis import LayerBasis
from ...probes.moments.moments import Accumulator, Moments
from ..studies.trajectories.position_sample import PositionSample
from .layer_runs import same_passage

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

RIDGE = 1e-2
"""Share c of the mean variance of z_0 below which a direction is no part of the next prediction."""


@dataclass(frozen=True, eq=False)
class FutureMoments:
    """Second moments of one layer with the last layer at offsets 0 to N; float64."""

    at_offset: dict[int, Moments]
    """Offset -> moments of (row of the layer at t, row of layer L at t + offset)."""
    last: dict[int, Moments]
    """The same of layer L with itself."""

    @classmethod
    def collect(cls, sample: PositionSample, layer: int, offsets: Sequence[int]) -> "FutureMoments":
        """Read the rows of `sample` once for all offsets; those not finite do not count."""
        cache = sample.cache
        d = cache.d_model
        rows = np.asarray(cache.residual_array(layer).take(sample.positions), np.float32)
        last = np.asarray(cache.residual_array(cache.n_blocks).take(sample.positions), np.float32)
        finite = np.asarray(np.isfinite(rows).all(1) & np.isfinite(last).all(1))
        at_offset, of_last = {}, {}
        # The same rows for all offsets, so that their covariances belong to one population.
        starts = same_passage(sample, max(offsets)) & finite
        for offset in offsets:
            starts[: sample.count - offset] &= finite[offset:]
        numbers = np.flatnonzero(starts)
        if len(numbers) < 2:
            raise UsageError(
                f"the train split has {len(numbers)} positions with {max(offsets)} more after "
                "them, too few for a covariance; extract more text"
            )
        for offset in offsets:
            first, second = Accumulator(d, d), Accumulator(d, d)
            for block in np.array_split(numbers, max(1, len(numbers) // 4096)):
                target = last[block + offset].astype(np.float64)
                first.update(rows[block].astype(np.float64), target)
                second.update(last[block].astype(np.float64), target)
            at_offset[offset], of_last[offset] = first.result(), second.result()
        return cls(at_offset, of_last)

    @property
    def coordinates(self) -> AblationCoordinates:
        """Whitened coordinates of the layer's rows."""
        return AblationCoordinates.of(self.at_offset[0], "covariance")

    def partial(self, offset: int, whiten: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """P `(r, d)`: covariance of whitened rows with z_N beyond what z_0 explains."""
        moments, last = self.at_offset[offset], self.last[offset]
        variance = weights @ (last.xx / last.n) @ weights
        ridge = max(RIDGE * np.trace(variance) / len(variance), 1e-300)
        later = weights @ (last.xy / last.n) @ weights
        explained = np.linalg.solve(variance + ridge * np.eye(len(variance)), later)
        direct = whiten.T @ (moments.xy / moments.n) @ weights
        return direct - self.next_step(whiten, weights) @ explained

    def next_step(self, whiten: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """B `(r, d)`: covariance of whitened rows with z_0."""
        return whiten.T @ (self.at_offset[0].xy / self.at_offset[0].n) @ weights


def readout_weights(cache: "ActivationCache") -> np.ndarray:
    """G^1/2 `(d, d)` with |y G^1/2| the size of the change of the logits by y; or the identity.

    For an explicit head, G = E'E with E the unembedding times the gain of the norm, its rows less
    their mean: a constant for all tokens changes no prediction.
    """
    head = cache.head
    if head.kind != "explicit":
        return np.eye(cache.d_model)
    total, mean = np.zeros((cache.d_model, cache.d_model)), np.zeros(cache.d_model)
    for block in np.array_split(np.arange(head.vocab), max(1, head.vocab // 8192)):
        part = head.unembedding[block].astype(np.float64) * head.norm_weight
        total += part.T @ part
        mean += part.sum(0)
    total -= np.outer(mean, mean) / head.vocab
    values, vectors = np.linalg.eigh(total)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


@dataclass(frozen=True, eq=False)
class FutureSubspace:
    """Orthonormal directions in whitened coordinates, and what they take away."""

    name: str
    basis: np.ndarray
    """`(r, k)` orthonormal."""
    coordinates: AblationCoordinates
    mean: np.ndarray
    """Mean row, `(d,)`."""

    @property
    def k(self) -> int:
        """Number of directions."""
        return self.basis.shape[1]

    @property
    def removed_variance(self) -> float:
        """Share of the variance of the rows that their erasure removes."""
        decoder = self.coordinates.decoder(self.basis)
        return float((decoder**2).sum() / max(self.coordinates.variances.sum(), 1e-300))

    def layer_basis(self) -> LayerBasis:
        """The directions as an ablation to the mean."""
        return LayerBasis(
            self.coordinates.encoder(self.basis).astype(np.float32),
            self.coordinates.decoder(self.basis).astype(np.float32),
            self.mean.astype(np.float32),
        )


def find_subspaces(
    moments: FutureMoments, weights: np.ndarray, k: int, seed: int = 0
) -> list[FutureSubspace]:
    """The future subspaces of all offsets from 1 on, that of the next step, and their controls.

    Names: `future N`; `next step`; `random` and `PCA` of k directions; `random, variance`, of as
    many random directions as remove about the variance of the first future subspace, and `PCA,
    variance`, the k neighbouring principal axes that do.
    Raises `UsageError` if the rows vary in fewer than 2 k directions.
    """
    coordinates = moments.coordinates
    if coordinates.rank < 2 * k:
        raise UsageError(
            f"the rows vary in {coordinates.rank} directions, fewer than 2 x {k}; give a smaller k"
        )
    mean = moments.at_offset[0].mean_x

    def subspace(name: str, basis: np.ndarray) -> FutureSubspace:
        return FutureSubspace(name, basis, coordinates, mean)

    of_next = left_vectors(moments.next_step(coordinates.whiten, weights))[:, :k]
    found = []
    for offset in sorted(moments.at_offset):
        if offset:
            partial = moments.partial(offset, coordinates.whiten, weights)
            partial -= of_next @ (of_next.T @ partial)
            vectors = left_vectors(partial)[:, :k]
            found.append(subspace(f"future {offset}", vectors))
    found.append(subspace("next step", of_next))
    rng = np.random.default_rng([seed, 3])
    random = np.linalg.qr(rng.normal(size=(coordinates.rank, coordinates.rank)))[0]
    # In whitened coordinates the principal axes are the unit vectors, the largest variance first.
    principal = np.eye(coordinates.rank)
    target = found[0].removed_variance
    shares = coordinates.variances[: coordinates.rank] / coordinates.variances.sum()
    windows = np.convolve(shares, np.ones(k), "valid")
    start = int(np.abs(windows - target).argmin())
    found += [
        subspace("random", random[:, :k]),
        subspace("PCA", principal[:, :k]),
        _of_variance(subspace("random, variance", random), target),
        subspace("PCA, variance", principal[:, start : start + k]),
    ]
    return found


def left_vectors(matrix: np.ndarray) -> np.ndarray:
    """Left singular vectors `(r, min(r, d))`, the largest singular value first."""
    return np.linalg.svd(matrix, full_matrices=False)[0]


def _of_variance(subspace: FutureSubspace, target: float) -> FutureSubspace:
    """The first directions of `subspace` whose removed variance is nearest to `target`."""
    decoder = subspace.coordinates.decoder(subspace.basis)
    total = max(subspace.coordinates.variances.sum(), 1e-300)
    removed = np.cumsum((decoder**2).sum(1)) / total
    count = 1 + int(np.abs(removed - target).argmin())
    return FutureSubspace(
        subspace.name, subspace.basis[:, :count], subspace.coordinates, subspace.mean
    )

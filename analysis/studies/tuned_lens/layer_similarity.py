"""How alike layers are: covariances of the residual stream, and the directions that persist.

The covariances come from the moments that fits keep with the cache, else from one pass over the
train split. The similarity of two layers is the Frobenius cosine of their covariances,
<A, B> / (|A| |B|), as in the tuned-lens paper (2303.08112, section 3.1). A few coordinates of large
variance ("rogue dimensions") can make it up, so it is given without them, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from ....cache.errors import UsageError
from ....cache.progress import Progress
from ....probes.moments.moment_sources import obtain_moments
from ....probes.moments.moments import merge_all
from ....probes.moments.pass_plan import MomentRequest
from ...basis.layer_persistence import span_overlap
from ..trajectories.position_sample import PositionSample

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

DIRECTIONS = 8
"""Directions of largest variance whose persistence is measured."""
LARGEST_SHARE = 100
"""Similarities without the largest coordinates leave out one of so many, and one at least."""
RANDOM_DRAWS = 4
"""Sets of random directions behind the chance level of an overlap."""
COORDINATE_POSITIONS = 2048
"""Most positions whose coordinates are compared."""


@dataclass(frozen=True)
class LayerPairRow:
    """How alike two layers of the residual stream are."""

    layer: int
    other: int
    """The higher layer."""
    similarity: float | None
    """Frobenius cosine of the covariances: 1 for equal ones up to a factor."""
    similarity_without_largest: float | None
    """The same without the coordinates that have the largest shares of the variance."""
    cosine_overlap: float | None
    """Mean squared cosine between the spans of the k directions of largest variance."""
    cosine_chance: float
    """The same of two random spans: k / d."""
    coordinate_overlap: float | None
    """Mean squared canonical correlation of the coordinates of the sampled positions on them."""
    coordinate_chance: float | None
    """The same with random directions of `layer` in place of its largest ones."""
    directions: int
    """k."""


@dataclass(frozen=True)
class LayerSpreadRow:
    """How the variance of one layer of the residual stream is spread."""

    layer: int
    n: int
    """Positions of the train split behind the covariance."""
    variance: float
    """Sum of the variances of all coordinates."""
    effective_dimension: float | None
    """(sum of eigenvalues)^2 / sum of their squares: d where all directions vary alike."""
    largest_direction: float | None
    """Share of the variance in the direction with most of it."""
    largest_coordinate: float | None
    """Share of the variance in the coordinate with most of it; large for a rogue dimension."""


@dataclass(frozen=True, eq=False)
class LayerCovariance:
    """Covariance of the residual stream of one layer."""

    n: int
    mean: np.ndarray
    """`(d,)` float64."""
    covariance: np.ndarray
    """`(d, d)` float64."""


def read_covariances(
    cache: "ActivationCache", progress: Progress | None = None
) -> dict[int, LayerCovariance]:
    """Covariance of every layer of `cache`, over its train split; nothing is written.

    Raises `UsageError` for a train split with fewer than two positions.
    """
    sequences = cache.sequences("train")
    if cache.sequence_length[sequences].sum() < 2:
        raise UsageError("the train split has fewer than 2 positions: covariances need more")
    request = MomentRequest.of(cache, None, [0], None)
    found: dict[int, LayerCovariance] = {}
    for moments in obtain_moments(cache, request, keep=False, progress=progress):
        for (layer, _, _), folds in moments.pairs.items():
            total = merge_all(folds)
            found[layer] = LayerCovariance(total.n, total.mean_x, total.xx / total.n)
    return dict(sorted(found.items()))


def spread_rows(covariances: Mapping[int, LayerCovariance]) -> list[LayerSpreadRow]:
    """One row for each layer, ascending."""
    rows = []
    for layer, found in covariances.items():
        variances = np.diag(found.covariance)
        total, squares = float(variances.sum()), float(np.square(found.covariance).sum())
        has_spread = np.isfinite(total) and total > 0
        rows.append(
            LayerSpreadRow(
                layer=layer,
                n=found.n,
                variance=total,
                effective_dimension=total**2 / squares if has_spread else None,
                largest_direction=_largest_variance(found.covariance) / total
                if has_spread
                else None,
                largest_coordinate=float(variances.max()) / total if has_spread else None,
            )
        )
    return rows


def frobenius_cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    """<A, B> / (|A| |B|) of two matrices; None if either is zero or not finite."""
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))
    if not np.isfinite(scale) or scale == 0:
        return None
    return float(np.clip((first * second).sum() / scale, -1.0, 1.0))


def largest_coordinates(covariances: Mapping[int, LayerCovariance]) -> np.ndarray:
    """Numbers of the coordinates with the largest shares of the variance, summed over layers."""
    variances = np.stack([np.diag(found.covariance) for found in covariances.values()])
    totals = variances.sum(1, keepdims=True)
    shares = np.divide(variances, totals, out=np.zeros_like(variances), where=totals > 0).sum(0)
    count = max(1, len(shares) // LARGEST_SHARE)
    return np.sort(np.argsort(-shares, kind="stable")[:count])


def layer_pair_rows(
    sample: PositionSample, covariances: Mapping[int, LayerCovariance], k: int = DIRECTIONS
) -> list[LayerPairRow]:
    """Every pair of layers, the lower one first; coordinates are those of sampled positions."""
    d_model = sample.cache.d_model
    k = min(k, d_model)
    rest = np.setdiff1d(np.arange(d_model), largest_coordinates(covariances))
    rng = np.random.default_rng([sample.seed, 2])
    positions = sample.positions[np.sort(rng.permutation(sample.count)[:COORDINATE_POSITIONS])]
    random = rng.normal(size=(d_model, RANDOM_DRAWS * k))
    finite = {
        layer: found for layer, found in covariances.items() if np.isfinite(found.covariance).all()
    }
    directions = {layer: largest_directions(f.covariance, k) for layer, f in finite.items()}
    coordinates, at_random = {}, {}
    for layer, found in finite.items():
        states = np.asarray(sample.cache.residual_array(layer)[positions], np.float64)
        centred = states[np.isfinite(states).all(1)] - found.mean
        if len(centred) < len(states):
            continue
        coordinates[layer] = centred @ directions[layer]
        at_random[layer] = np.split(centred @ random, RANDOM_DRAWS, axis=1)
    rows = []
    for layer, other in combinations(covariances, 2):
        first, second = covariances[layer].covariance, covariances[other].covariance
        overlap = None
        if layer in directions and other in directions:
            overlap = float(np.square(directions[layer].T @ directions[other]).sum() / k)
        shared = chance = None
        if layer in coordinates and other in coordinates:
            shared = span_overlap(coordinates[layer], coordinates[other])
            drawn = [span_overlap(draw, coordinates[other]) for draw in at_random[layer]]
            known = [value for value in drawn if value is not None]
            chance = float(np.mean(known)) if known else None
        rows.append(
            LayerPairRow(
                layer=layer,
                other=other,
                similarity=frobenius_cosine(first, second),
                similarity_without_largest=frobenius_cosine(
                    first[np.ix_(rest, rest)], second[np.ix_(rest, rest)]
                ),
                cosine_overlap=overlap,
                cosine_chance=k / d_model,
                coordinate_overlap=shared,
                coordinate_chance=chance,
                directions=k,
            )
        )
    return rows


def largest_directions(covariance: np.ndarray, k: int) -> np.ndarray:
    """The k orthonormal directions of largest variance, the largest first, `(d, k)` float64."""
    from scipy.linalg import eigh

    size = len(covariance)
    return eigh(covariance, subset_by_index=(size - k, size - 1))[1][:, ::-1]


def _largest_variance(covariance: np.ndarray) -> float:
    """Variance in the direction with most of it."""
    (direction,) = largest_directions(covariance, 1).T
    return float(direction @ covariance @ direction)

"""What persists from one layer's basis to the next: matched directions and overlap of the spans.

Layers are compared by the coordinates of the same positions, so that rotations and scales of the
residual stream between layers do not matter. `read_directions` (direction_readings.py) reads
`LayerCoordinates` and calls `match_directions` and `span_overlap`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...cache import UsageError
from ...probes.basis import LayerBasis

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

RANDOM_BASES = 4
"""Sets of random directions behind the chance level of the overlap."""


@dataclass(frozen=True)
class DirectionMatch:
    """The direction of the previous fitted layer whose coordinate follows a direction's best."""

    layer: int
    """The previous fitted layer."""
    direction: int
    """Number of the direction there, from 0."""
    correlation: float
    """Pearson correlation of the two coordinates over the same positions."""
    cosine: float
    """Cosine of the two decoders."""


@dataclass(frozen=True, eq=False)
class LayerCoordinates:
    """Coordinates of the same positions on the basis of a layer, and on random directions."""

    layer: int
    basis: LayerBasis
    values: np.ndarray
    """Coordinates on the basis, `(n, k)` float64."""
    random_values: np.ndarray
    """Products with random vectors of the rows less the reference, `(n, RANDOM_BASES * m)`.

    m is the number of directions in the next layer."""

    @classmethod
    def read(
        cls,
        cache: "ActivationCache",
        layer: int,
        basis: LayerBasis,
        positions: np.ndarray,
        random_encoder: np.ndarray,
    ) -> "LayerCoordinates":
        """The coordinates of `positions`, block by block of rows.

        Raises `UsageError` for coordinates that are not finite.
        """
        array, block = cache.residual_array(layer), cache.block_rows()
        values = np.empty((len(positions), basis.k))
        random_values = np.empty((len(positions), len(random_encoder)))
        for start in range(0, len(positions), block):
            rows = array.take(positions[start : start + block]).astype(np.float64)
            values[start : start + block] = basis.coordinates(rows)
            random_values[start : start + block] = (rows - basis.reference) @ random_encoder.T
        if not np.isfinite(values).all():
            raise UsageError(
                f"layer {layer}: the basis gives coordinates that are not finite; fit it again"
            )
        return cls(layer, basis, values, random_values)

    def chance_overlap(self, later: "LayerCoordinates") -> float | None:
        """Mean overlap of the next layer's coordinates with random directions of this layer."""
        draws = np.split(self.random_values, RANDOM_BASES, axis=1)
        overlaps = [span_overlap(draw, later.values) for draw in draws]
        defined = [overlap for overlap in overlaps if overlap is not None]
        return sum(defined) / len(defined) if defined else None


def match_directions(
    previous_layer: int,
    bases: tuple[LayerBasis, LayerBasis],
    coordinates: tuple[np.ndarray, np.ndarray],
) -> list[DirectionMatch | None]:
    """The best match of each direction among the directions of `previous_layer`, by |correlation|.

    `bases` and `coordinates` `(n, k)` are those of the previous layer, then of this layer. None for
    a direction with a constant coordinate, or without any direction to match that varies.
    """
    earlier, later = (standardize(values) for values in coordinates)
    correlations = earlier.T @ later
    earlier_decoder, later_decoder = (unit_rows(basis.decoder) for basis in bases)
    cosines = earlier_decoder @ later_decoder.T
    matches: list[DirectionMatch | None] = []
    for direction, column in enumerate(correlations.T):
        best = int(np.abs(column).argmax())
        correlation, cosine = float(column[best]), float(cosines[best, direction])
        is_match = correlation != 0
        matches.append(
            DirectionMatch(previous_layer, best, correlation, cosine) if is_match else None
        )
    return matches


def span_overlap(first: np.ndarray, second: np.ndarray) -> float | None:
    """Mean squared canonical correlation of two sets of coordinates, `(n, k)` and `(n, m)`.

    The mean is over the min(k, m) canonical pairs (Hotelling, 1936). 1: the smaller set is a linear
    function of the larger one; unrelated sets have some max(k, m) / n. None if either is constant.
    """
    bases = [orthonormal_columns(standardize(values)) for values in (first, second)]
    pairs = min(basis.shape[1] for basis in bases)
    if not pairs:
        return None
    return float(np.square(bases[0].T @ bases[1]).sum() / pairs)


def standardize(values: np.ndarray) -> np.ndarray:
    """Columns of `values` `(n, k)` with mean 0 and norm 1, float64; constant columns become 0."""
    values = np.asarray(values, np.float64)
    centred = values - values.mean(0)
    # Of a constant column, rounding alone is left.
    norms = np.linalg.norm(centred, axis=0)
    rounding = np.linalg.norm(values, axis=0) * np.finfo(np.float64).eps * len(values)
    varies = norms > rounding
    return np.where(varies, centred / np.where(varies, norms, 1.0), 0.0)


def orthonormal_columns(values: np.ndarray) -> np.ndarray:
    """Orthonormal basis of the columns of `values` `(n, k)`, `(n, rank)`."""
    vectors, singular, _ = np.linalg.svd(values, full_matrices=False)
    largest = singular.max(initial=0.0)
    return vectors[:, singular > largest * max(values.shape) * np.finfo(np.float64).eps]


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows of `vectors` `(k, d)` with norm 1, float64; rows of zeros stay."""
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)

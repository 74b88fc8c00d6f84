"""What the directions of causal bases mean to a person: tokens, passages, matches (`LayerReading`).

`read_directions` reads the cache, without the model. analysis/basis_report/basis_page.py shows the
readings; `LayerReading.to_dict` gives them as JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache import MismatchError, Progress, UsageError, as_whole_number, format_ranges
from ...cache.files.json_files import plain_value
from ...probes.basis.basis_rows import draw_positions
from ...probes.basis.layer_basis import LayerBasis
from ...probes.ridge import AffineMap
from ..token_texts import TokenNames
from .direction_passages import Passage, PassageFinder
from .layer_persistence import (
    RANDOM_BASES,
    DirectionMatch,
    LayerCoordinates,
    match_directions,
    span_overlap,
)
from .token_changes import (
    TokenChange,
    measure_token_changes,
    promoted_tokens,
    suppressed_tokens,
)

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

TOKEN_ROWS = 256
"""Positions over which the changes of log-probabilities are averaged."""


@dataclass(frozen=True)
class DirectionReading:
    """Tokens, passages and match in the layer below, of one direction."""

    direction: int
    """Number of the direction, from 0."""
    energy: float | None
    """KL in nats when the direction alone is ablated, on rows of the fit."""
    influence: float | None
    """The same on held-out rows."""
    deviation: float
    """Standard deviation of the coordinate over the positions read."""
    promoted: tuple[TokenChange, ...]
    """Tokens whose log-probability rises most along the decoder, the largest change first."""
    suppressed: tuple[TokenChange, ...]
    """Tokens whose log-probability falls most, the most negative change first."""
    highest: tuple[Passage, ...]
    """Positions with the largest coordinate, at most one per document, the largest first."""
    lowest: tuple[Passage, ...]
    """Positions with the smallest coordinate, at most one per document, the smallest first."""
    match: DirectionMatch | None
    """The best match in the previous fitted layer; None in the first one."""


@dataclass(frozen=True)
class LayerReading:
    """The directions of one layer, and the overlap of their span with the previous layer's."""

    layer: int
    k: int
    """Number of directions."""
    split: str
    """Split of the positions read."""
    n: int
    """Number of positions over which coordinates, passages and correlations are taken."""
    n_token_rows: int
    """Number of these positions over which the token changes are averaged."""
    directions: tuple[DirectionReading, ...]
    previous_layer: int | None
    """The previous fitted layer; None in the first one."""
    overlap: float | None
    """Mean squared canonical correlation of the coordinates of this and the previous layer."""
    chance_overlap: float | None
    """The same with as many random directions in the previous layer, mean of several draws."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON."""
        return plain_value(asdict(self))


def read_directions(
    cache: "ActivationCache",
    bases: Mapping[int, LayerBasis],
    maps: Mapping[int, AffineMap],
    *,
    rows_of_metrics: Sequence[Mapping[str, Any]],
    positions: int = 16384,
    seed: int = 0,
    n_tokens: int = 12,
    n_passages: int = 5,
    split: str = "test",
    drop_first: int = 0,
    progress: Progress | None = None,
) -> dict[int, LayerReading]:
    """Readings of the directions of `bases`, by layer, from random positions of `split`.

    `maps` are the lens's maps of the same layers to the last layer; `rows_of_metrics` are the rows
    of `CausalBasis.metrics()`, whose `energies` and `influences` are repeated per direction. At
    most `positions` positions are drawn with `seed`, none of the first `drop_first` of a context.
    Each direction lists `n_tokens` tokens and `n_passages` passages at either end. Memory holds
    the coordinates of two layers and one block of rows. `progress` counts layers.

    Raises `UsageError` for a layer without map or metrics and for a split with less than two
    positions, `NotFoundError` for a layer that the cache lacks, `MismatchError` for a basis or a
    map of another width.
    """
    metrics_of_layer = {int(row["layer"]): row for row in rows_of_metrics}
    counts = {"positions": positions, "drop_first": drop_first}
    counts |= {"n_tokens": n_tokens, "n_passages": n_passages}
    for name, value in counts.items():
        if as_whole_number(value, name) < 0:
            raise UsageError(f"{name} must be 0 or more, not {value}")
    layers = sorted(bases)
    for layer in layers:
        _check_layer(cache, layer, bases, maps, metrics_of_layer)

    # The same positions for all layers, and some of them for the tokens.
    rng = np.random.default_rng(seed)
    drawn = np.sort(draw_positions(cache, split, positions, seed, drop_first).positions)
    if len(drawn) < 2:
        raise UsageError(
            f"two positions are needed at least; the {split} split gives {len(drawn)} for "
            f"positions={positions} and drop_first={drop_first}"
        )
    token_rows = np.sort(rng.choice(len(drawn), min(TOKEN_ROWS, len(drawn)), replace=False))
    names = TokenNames(cache)
    finder = PassageFinder(cache, drawn, names)

    readings: dict[int, LayerReading] = {}
    previous: LayerCoordinates | None = None
    for number, layer in enumerate(layers):
        basis, row = bases[layer], metrics_of_layer[layer]
        next_k = bases[layers[number + 1]].k if number + 1 < len(layers) else 0
        random_encoder = rng.standard_normal((RANDOM_BASES * next_k, cache.d_model))
        current = LayerCoordinates.read(cache, layer, basis, drawn, random_encoder)

        # Tokens and matches of all directions.
        deviations = current.values.std(0)
        rows = cache.residual_array(layer).take(drawn[token_rows])
        changes = measure_token_changes(cache, basis, maps[layer], rows, deviations)
        matches: list[DirectionMatch | None] = [None] * basis.k
        if previous is not None:
            values = previous.values, current.values
            matches = match_directions(previous.layer, (previous.basis, basis), values)

        directions = []
        for direction, deviation in enumerate(deviations.tolist()):
            # A constant coordinate has no extremes.
            highest, lowest = (), ()
            if deviation > 0:
                coordinates = current.values[:, direction] / deviation
                highest, lowest = finder.extremes(coordinates, n_passages)
            directions.append(
                DirectionReading(
                    direction=direction,
                    energy=row["energies"][direction],
                    influence=row["influences"][direction],
                    deviation=deviation,
                    promoted=promoted_tokens(changes[direction], n_tokens, names),
                    suppressed=suppressed_tokens(changes[direction], n_tokens, names),
                    highest=highest,
                    lowest=lowest,
                    match=matches[direction],
                )
            )
        readings[layer] = LayerReading(
            layer=layer,
            k=basis.k,
            split=split,
            n=len(drawn),
            n_token_rows=len(token_rows),
            directions=tuple(directions),
            previous_layer=None if previous is None else previous.layer,
            overlap=None if previous is None else span_overlap(previous.values, current.values),
            chance_overlap=None if previous is None else previous.chance_overlap(current),
        )
        previous = current
        if progress is not None:
            progress(number + 1, len(layers))
    return readings


def _check_layer(
    cache: "ActivationCache",
    layer: int,
    bases: Mapping[int, LayerBasis],
    maps: Mapping[int, AffineMap],
    metrics_of_layer: Mapping[int, Mapping[str, Any]],
) -> None:
    """Raise unless cache, map and metrics fit the basis of `layer`; see `read_directions`."""
    cache.residual_array(layer)
    for name, found in (("map", maps), ("row of metrics", metrics_of_layer)):
        if layer not in found:
            layers = format_ranges(sorted(found))
            raise UsageError(f"layer {layer} has a basis but no {name}; given are layers {layers}")
    basis, affine, width = bases[layer], maps[layer], cache.d_model
    expected = {
        "encoder of the basis": (basis.encoder, (basis.k, width)),
        "decoder of the basis": (basis.decoder, (basis.k, width)),
        "reference of the basis": (basis.reference, (width,)),
        "weight of the map": (affine.weight, (width, width)),
        "bias of the map": (affine.bias, (width,)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape or not basis.k:
            raise MismatchError(
                f"layer {layer}: the {name} has shape {array.shape}, expected {shape} with k > 0; "
                "use a basis and a lens of the same model as the cache"
            )
    row = metrics_of_layer[layer]
    for name in ("energies", "influences"):
        values = row.get(name)
        if values is None or len(values) != basis.k:
            count = "none" if values is None else len(values)
            raise UsageError(
                f"the metrics of layer {layer} need {basis.k} {name} (one each), not {count}"
            )

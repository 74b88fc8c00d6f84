"""KL of ablating spans and single directions of bases on rows, with intervals over documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..base.resampling import ResamplingUnits, bootstrap_interval, resampling_counts
from .ablation_objective import AblationObjective, Directions
from .layer_basis import LayerBasis
from .metric_rows import MeanKL, span_sizes


@dataclass(frozen=True)
class InfluenceMeasures:
    """KL of ablations of several bases on the same rows, in nats."""

    n: int
    """Number of rows."""
    units: int
    """Number of documents (or sequences) of the rows."""
    spans: dict[str, dict[int, MeanKL]]
    """Basis -> number k of its first directions -> KL of ablating their span."""
    directions: list[float]
    """KL of ablating each direction of the first basis alone."""


def measure_influence(
    objective: AblationObjective,
    bases: Mapping[str, LayerBasis],
    units: ResamplingUnits,
    index: np.ndarray,
    seed: int,
) -> InfluenceMeasures:
    """Measure spans of all `bases`, and each direction of the first, on the objective's rows.

    `index` `(n,)` is the index of each row among the positions of `units`. Intervals are percentile
    bootstraps over documents.
    """
    first = next(iter(bases.values()))
    ablations: list[tuple[str, int]] = []
    directions: list[Directions] = []
    for name, basis in bases.items():
        for size in span_sizes(basis.k):
            ablations.append((name, size))
            directions.append(directions_of(basis, range(size)))
    directions += [directions_of(first, [i]) for i in range(first.k)]

    unit_numbers = units.unit_numbers[index]
    sums = objective.sum_losses(directions, unit_numbers, units.n_resampled)
    rows_of_unit = np.bincount(unit_numbers, minlength=units.n_resampled).astype(np.float64)
    weights = resampling_counts(units.n_resampled, seed)
    spans: dict[str, dict[int, MeanKL]] = {name: {} for name in bases}
    for (name, size), values in zip(ablations, sums, strict=False):
        low, high = bootstrap_interval(rows_of_unit, values, weights)
        spans[name][size] = {"kl": float(values.sum() / objective.n), "low": low, "high": high}
    alone = (sums[len(ablations) :].sum(1) / objective.n).tolist()
    return InfluenceMeasures(objective.n, units.count, spans, alone)


def directions_of(basis: LayerBasis, numbers: Sequence[int]) -> Directions:
    """Encoder and decoder of some directions of `basis`, float64."""
    chosen = list(numbers)
    return basis.encoder[chosen].astype(np.float64), basis.decoder[chosen].astype(np.float64)

"""Fit of the causal basis of one layer: rows, method, baselines, measures on held-out rows.

`CausalBasis.fit` calls `fit_layer` for each layer. A checkpoint is saved after every evaluation
that took long enough, so that a killed fit goes on from there to the same basis.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...cache.errors import UsageError
from ...cache.store.activation_cache import ActivationCache
from ..base.resampling import ResamplingUnits
from ..moments.moments import Moments
from ..ridge.solver import AffineMap
from ..training.checkpoint import Checkpoint
from ..training.threads import CPU
from .ablation_objective import AblationObjective, ObjectiveSpec, undefined_kl_error
from .basis_methods import BasisFinder, BasisProgress
from .basis_rows import BasisRows, draw_positions
from .coordinates import AblationCoordinates
from .fit_settings import BasisFitSettings
from .layer_basis import LayerBasis
from .metric_rows import with_number_keys
from .span_evaluation import directions_of, measure_influence

CHECKPOINT_SECONDS = 30.0
"""Time between two checkpoints, in seconds."""
EVALUATIONS = {"joint": 45, "greedy": 150, "one-shot": 1, "fisher": 1}
"""Evaluations that a method takes at most, or about (per 8 directions), for progress."""


@dataclass(frozen=True, eq=False)
class FittedLayer:
    """Basis of a layer, the bases beside it, and the row of `CausalBasis.metrics`."""

    basis: LayerBasis
    pca: LayerBasis
    """The k directions of largest variance."""
    random: LayerBasis
    """k random directions, orthonormal in the metric."""
    row: dict[str, Any]


@dataclass(frozen=True, eq=False)
class LayerFitTask:
    """Layer, lens map and resources of one fit."""

    cache: ActivationCache
    layer: int
    map: AffineMap
    """The lens's map from the layer to the last one."""
    settings: BasisFitSettings
    memory: int
    """Bytes for what evaluations share."""
    scratch: Path | None = None
    client: Any = None
    checkpoint: Checkpoint | None = None
    device: torch.device | None = None
    """Device of products, of each worker of `client`; None for the CPU."""

    def objective(self, rows: BasisRows, keeps: bool = True) -> AblationObjective:
        """The objective on `rows`; it `keeps` what evaluations share, in memory or scratch file."""
        memory, scratch = (self.memory, self.scratch) if keeps else (0, None)
        spec = ObjectiveSpec(rows, self.map, memory, scratch, device=self.device or CPU)
        return AblationObjective(spec, self.client)


def fit_layer(
    task: LayerFitTask, moments: Moments, report: Callable[[float, float], None]
) -> FittedLayer:
    """Fit the basis of a layer from the second `moments` of its rows.

    `report` is called with (evaluations so far, evaluations expected).
    """
    cache, settings = task.cache, task.settings
    drawn = draw_positions(cache, "train", settings.positions, settings.seed, settings.drop_first)
    # By LAPACK on every device: PCA and the random directions follow the signs of eigenvectors.
    coordinates = AblationCoordinates.of(moments, settings.metric)
    coordinates.check_k(settings.k, task.layer)
    reference = _reference_row(settings, moments)
    rows = BasisRows(cache, task.layer, drawn.positions, reference, settings.seed)

    # Find the basis, and measure each of its directions on the rows of the fit.
    with task.objective(rows) as objective:
        finder = BasisFinder(objective, coordinates, settings.k, _load_progress(task.checkpoint))
        finder.report = _Reporter(task, finder.progress, report)
        columns = finder.find(settings.method)
        columns = _with_signs(columns, coordinates, rows)
        # A basis fitted by resampling, too, needs a row to ablate to: the mean.
        row_of_basis = moments.mean_x if reference is None else reference
        basis, pca, random = (
            LayerBasis(encoder, decoder, row_of_basis)
            for encoder, decoder in (
                (coordinates.encoder(columns), coordinates.decoder(columns)),
                coordinates.principal(settings.k),
                coordinates.random(settings.k, settings.seed),
            )
        )
        alone = [directions_of(basis, [i]) for i in range(basis.k)]
        one_unit = np.zeros(rows.n, np.int64)
        energies = objective.sum_losses(alone, one_unit, 1)[:, 0] / rows.n
    progress = finder.progress
    if not np.isfinite(energies).all():
        raise undefined_kl_error(task.layer)

    row = {
        "layer": task.layer,
        "k": settings.k,
        "method": settings.method,
        "metric": settings.metric,
        "n": rows.n,
        "energies": energies.tolist(),
        "evaluations": round(progress.evaluations, 2),
        "cpu_seconds": round(progress.seconds, 3),
        **_held_out_measures(task, {"span": basis, "pca": pca, "random": random}),
    }
    return FittedLayer(basis, pca, random, row)


def _reference_row(settings: BasisFitSettings, moments: Moments) -> np.ndarray | None:
    """The row whose coordinates replace ablated ones; None for resampling ablation."""
    if settings.reference == "resample":
        return None
    if settings.reference == "zero":
        return np.zeros(len(moments.mean_x), np.float32)
    return moments.mean_x.astype(np.float32)


def _with_signs(
    columns: np.ndarray, coordinates: AblationCoordinates, rows: BasisRows
) -> np.ndarray:
    """`columns` with signs such that the coordinates of the rows are skewed to the positive.

    The KL does not depend on signs; with these, a direction points to its rare, large values.
    """
    group = rows.groups()[0]
    values = rows.differences(group, rows.states(group)) @ coordinates.encoder(columns).T
    skewness = ((values - values.mean(0)) ** 3).sum(0)
    return columns * np.where(skewness < 0, -1.0, 1.0)


def _held_out_measures(task: LayerFitTask, bases: dict[str, LayerBasis]) -> dict[str, Any]:
    """Columns of the row that come from the test split; None where the split is empty."""
    cache, settings = task.cache, task.settings
    empty: dict[str, Any] = {"n_test": 0, "units": 0, "influences": None}
    empty |= dict.fromkeys(bases)
    try:
        drawn = draw_positions(
            cache, "test", settings.test_positions, settings.seed, settings.drop_first
        )
    except UsageError:
        return empty
    resample = settings.reference == "resample"
    if resample and len(drawn.positions) < 2:
        return empty
    reference = None if resample else bases["span"].reference
    rows = BasisRows(cache, task.layer, drawn.positions, reference, settings.seed)
    units = ResamplingUnits.of(cache, drawn.sequences, settings.seed)
    # Every product is used once: nothing is worth keeping.
    with task.objective(rows, keeps=False) as objective:
        measures = measure_influence(objective, bases, units, drawn.index, settings.seed)
    return {
        "n_test": measures.n,
        "units": measures.units,
        "influences": measures.directions,
        **measures.spans,
    }


class _Reporter:
    """Reports progress and saves checkpoints after evaluations."""

    def __init__(
        self, task: LayerFitTask, progress: BasisProgress, report: Callable[[float, float], None]
    ) -> None:
        self._checkpoint, self._progress, self._report = task.checkpoint, progress, report
        expected = EVALUATIONS[task.settings.method]
        self._expected = expected * (task.settings.k / 8 if expected > 1 else 1)
        self._saved = time.monotonic()

    def __call__(self) -> None:
        seconds = time.monotonic() - self._saved
        if self._checkpoint is not None and seconds >= CHECKPOINT_SECONDS:
            save_progress(self._checkpoint, self._progress)
            self._saved = time.monotonic()
        self._report(self._progress.evaluations, self._expected)


def save_progress(checkpoint: Checkpoint, progress: BasisProgress) -> None:
    """Save the progress of a running fit."""
    numbers, arrays = progress.state()
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    step = int(progress.evaluations * 100) + 1
    checkpoint.save({"step": step, "progress": numbers}, tensors)


def _load_progress(checkpoint: Checkpoint | None) -> BasisProgress | None:
    """The progress that a killed fit saved."""
    saved = None if checkpoint is None else checkpoint.load()
    if saved is None or "progress" not in saved[0]:
        return None
    return BasisProgress.restore(
        saved[0]["progress"], {name: tensor.numpy() for name, tensor in saved[1].items()}
    )


def save_fitted(checkpoint: Checkpoint, fitted: FittedLayer) -> None:
    """Save a finished layer, so that a killed fit of several layers does not fit it again."""
    tensors = {
        f"{name}.{part}": torch.from_numpy(getattr(getattr(fitted, name), part).copy())
        for name in ("basis", "pca", "random")
        for part in ("encoder", "decoder", "reference")
    }
    checkpoint.save({"step": 1 << 30, "row": fitted.row}, tensors)


def load_fitted(checkpoint: Checkpoint) -> FittedLayer | None:
    """The finished layer of a checkpoint, or None."""
    saved = checkpoint.load()
    if saved is None or "row" not in saved[0]:
        return None
    state, tensors = saved
    bases = {
        name: LayerBasis(
            *(tensors[f"{name}.{part}"].numpy() for part in ("encoder", "decoder", "reference"))
        )
        for name in ("basis", "pca", "random")
    }
    return FittedLayer(**bases, row=with_number_keys(state["row"]))


def checkpoint_of(
    folder: Path, cache: ActivationCache, layer: int, settings: BasisFitSettings, lens: str
) -> Checkpoint:
    """Checkpoint of the fit of a layer, in a subfolder of its own; `lens` identifies the map."""
    identity = {"cache": cache.id, "layer": layer, "lens": lens, **asdict(settings)}
    return Checkpoint(folder / f"layer-{layer}", identity)

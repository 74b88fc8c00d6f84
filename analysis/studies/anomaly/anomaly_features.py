"""Features of documents for anomaly detection: trajectories under lenses, and states."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....cache.progress import Progress
from ....probes.base.readout import Readout
from ..trajectories.position_sample import PositionSample
from ..trajectories.readings import Trajectories, measure_trajectories
from .anomaly_documents import AnomalyDocuments

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

MEASURES = ("log_p_final", "entropy")
"""Measures of a trajectory, per layer."""


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of all documents under one name."""

    name: str
    """Such as `ridge trajectory`."""
    values: np.ndarray
    """`(documents, features)` float64; NaN where undefined."""


def trajectory_features(
    documents: AnomalyDocuments,
    lenses: Mapping[str, Readout],
    options: Mapping[str, int],
    device: str,
    progress: Progress | None,
) -> tuple[list[FeatureSet], np.ndarray]:
    """Feature sets of all lenses, of the last layer alone, and the model's top tokens.

    For each lens log q of the model's top token and the entropy at all its layers; with `options`
    (word -> token) a second set, log q of each option at all layers; means over the positions of a
    document. The top tokens `(documents,)` are those at its last position.
    """
    sample = documents.sample
    readings = measure_trajectories(
        sample, lenses, measures=MEASURES, device=device, progress=progress
    )
    sets = [
        FeatureSet(
            f"{name} trajectory",
            documents.mean_of_positions(
                np.concatenate([of_lens.values[measure] for measure in MEASURES], 1).astype(float)
            ),
        )
        for name, of_lens in readings.items()
    ]
    if options:
        of_options = _option_log_p(sample, lenses, options, device, progress)
        sets += [
            FeatureSet(f"{name} options", documents.mean_of_positions(values))
            for name, values in of_options.items()
        ]
    first: Trajectories = next(iter(readings.values()))
    last = np.stack([first.values[measure][:, -1] for measure in MEASURES], 1)
    sets.append(FeatureSet("last layer", documents.mean_of_positions(last.astype(float))))
    return sets, first.top[documents.answer_rows, -1]


def _option_log_p(
    sample: PositionSample,
    lenses: Mapping[str, Readout],
    options: Mapping[str, int],
    device: str,
    progress: Progress | None,
) -> dict[str, np.ndarray]:
    """log q of each option at all layers, `(positions, layers x options)` float64, by lens."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in lenses}
    for token in options.values():
        readings = measure_trajectories(
            sample, lenses, measures=(), tracked=token, device=device, progress=progress
        )
        for name, of_lens in readings.items():
            columns[name].append(of_lens.values["tracked_log_p"].astype(float))
    return {name: np.concatenate(values, 1) for name, values in columns.items()}


def state_features(cache: "ActivationCache", documents: AnomalyDocuments) -> dict[int, np.ndarray]:
    """Mean state of each document by layer, `(documents, d_model)` float64."""
    positions = documents.sample.positions
    return {
        layer: documents.mean_of_positions(
            np.asarray(cache.residual_array(layer)[positions], np.float64)
        )
        for layer in cache.layers
    }

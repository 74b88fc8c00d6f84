"""Fit of all translators of a tuned lens, in groups of (layer, offset) pairs that fit memory.

`TunedLens.fit` calls `fit_translator_groups`. For each group, `fit_group` takes the ridge maps from
moments (`moments/obtain_moments.py`), fits the translators by KL (`LensFitRun` in
`translator_fit.py`) and saves a checkpoint at every check. Groups run one after the other, or on
the workers of a dask cluster; neither changes the result.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...cache.cluster import results, threads_of
from ...cache.errors import UsageError
from ...cache.files.json_files import json_digest
from ...cache.store.activation_cache import ActivationCache
from ..base.readout import LayerOffset
from ..base.resources import available_cores, default_memory
from ..moments.moment_sources import obtain_moments
from ..moments.moments import merge_all
from ..moments.pass_plan import MomentRequest
from ..ridge.solver import AffineMap, fit_ridge
from ..training.checkpoint import Checkpoint, lock_folder
from .natural_gradient import InputWhitening, NaturalGradientMap
from .translator_fit import LensFitRun, LensFitSettings, Report, TranslatorState, identity_map

FOLDS = 5
"""Folds of the cross-validation that chooses ridge's penalty."""
MATRICES = 8
"""Float64 matrices `(d, d)` in memory per translator during its fit."""

Group = tuple[tuple[int, ...], tuple[int, ...]]
"""Layers and offsets that are fitted together."""


@dataclass(frozen=True, eq=False)
class FittedTranslator:
    """Fitted map of one (layer, offset), with its row of `TunedLens.metrics`."""

    map: AffineMap
    row: dict[str, Any]


def fit_translator_groups(
    cache: ActivationCache,
    layers: Sequence[int],
    offsets: Sequence[int],
    settings: LensFitSettings,
    client: Any = None,
    memory: int | None = None,
    folder: Path | None = None,
    report: Report | None = None,
) -> dict[LayerOffset, FittedTranslator]:
    """Fit every layer and offset, group by group, or on the workers of `client`.

    `memory` in bytes bounds this process, or each worker; `folder` holds the checkpoints.
    """
    check_lens_request(cache, layers, offsets, settings)
    groups = divide_pairs(cache, layers, offsets, client, memory or default_memory())
    fit = partial(fit_group, settings=settings, folder=folder)

    def report_group(number: int, stage: str, done: int, total: int) -> None:
        """Report the progress of one group as a share of all groups."""
        if report is not None and total:
            report(stage, number * total + done, len(groups) * total)

    fitted: dict[LayerOffset, FittedTranslator] = {}
    with lock_folder(folder):
        if client is None:
            for number, group in enumerate(groups):
                fitted |= fit(cache, group, report=partial(report_group, number))
        else:
            calls = [(cache, group) for group in groups]
            for number, group_result in enumerate(results(client, fit, calls)):
                fitted |= group_result
                report_group(number, "lens", settings.steps, settings.steps)
        if folder is not None:
            for group in groups:
                group_checkpoint(folder, cache, fitted_pairs(cache, group), settings).remove()
    # The last layer at offset 0 is the model itself.
    if cache.n_blocks in layers and 0 in offsets:
        row = {"start": "model", "kl_logit": 0.0, "kl_ridge": 0.0, "kl": 0.0, "steps": 0}
        fitted[cache.n_blocks, 0] = FittedTranslator(identity_map(cache.d_model), row)
    return {pair: fitted[pair] for pair in sorted(fitted)}


def check_lens_request(
    cache: ActivationCache, layers: Sequence[int], offsets: Sequence[int], settings: LensFitSettings
) -> None:
    """Raise `NotFoundError` for a layer that the cache lacks, `UsageError` for wrong parameters."""
    for layer in (*layers, cache.n_blocks):
        cache.residual_array(layer)
    if not layers or not offsets or min(offsets) < 0:
        raise UsageError("name at least one layer and one offset; offsets are 0 or more")
    if settings.steps < 0 or settings.batch < 1 or settings.seed < 0:
        raise UsageError("steps and seed must be 0 or more, batch 1 or more")
    positive = [settings.damping, *settings.rates]
    if not all(np.isfinite(number) and number > 0 for number in positive):
        raise UsageError("lr and damping must be positive numbers")


def divide_pairs(
    cache: ActivationCache, layers: Sequence[int], offsets: Sequence[int], client: Any, memory: int
) -> list[Group]:
    """Groups that fit `memory`, at least as many as workers: fewer layers, then fewer offsets."""
    layers, offsets = tuple(sorted(set(layers))), tuple(sorted(set(offsets)))
    threads = {"": available_cores()} if client is None else threads_of(client)
    # The larger of two phases: every thread sums moments of its own (two matrices for each fold),
    # and their total is one more; then a translator is fitted with MATRICES.
    moment_matrices = 2 * FOLDS * (max(threads.values(), default=1) + 1)
    pair_bytes = 8 * cache.d_model**2 * max(moment_matrices, MATRICES)
    pairs_in_memory = max(1, memory // pair_bytes)
    layers_per_worker = -(-len(layers) // max(1, len(threads)))
    group_layers = max(1, min(layers_per_worker, pairs_in_memory // len(offsets)))
    group_offsets = min(len(offsets), pairs_in_memory)
    return [
        (layers[i : i + group_layers], offsets[j : j + group_offsets])
        for i in range(0, len(layers), group_layers)
        for j in range(0, len(offsets), group_offsets)
    ]


def fit_group(
    cache: ActivationCache,
    group: Group,
    settings: LensFitSettings,
    folder: Path | None = None,
    report: Report | None = None,
) -> dict[LayerOffset, FittedTranslator]:
    """Fit the translators of one group; continues from its checkpoint in `folder`, if any."""
    pairs = fitted_pairs(cache, group)
    if not pairs:
        return {}
    checkpoint = None if folder is None else group_checkpoint(folder, cache, pairs, settings)
    report = report or (lambda stage, done, total: None)
    with lock_folder(None if checkpoint is None else checkpoint.folder):
        translators = _fit_translators(cache, group, settings, checkpoint, report)
    fitted = {}
    for pair, translator in translators.items():
        translator.restore_best()
        fitted[pair] = FittedTranslator(translator.fit.map(), translator.row())
    return fitted


def _fit_translators(
    cache: ActivationCache,
    group: Group,
    settings: LensFitSettings,
    checkpoint: Checkpoint | None,
    report: Report,
) -> dict[LayerOffset, TranslatorState]:
    """The translators of a group after their last step; continues from `checkpoint`, if any."""
    pairs = fitted_pairs(cache, group)
    saved = None if checkpoint is None else checkpoint.load()
    if saved is None:
        ridge, translators = start_run(cache, group, pairs, settings, partial(report, "moments"))
        run = LensFitRun(cache, translators, settings)
        run.begin(ridge)
        del ridge
        if settings.steps:
            run.sweep()
    else:
        state, tensors = saved
        translators = restore_translators(state, tensors, settings.damping)
        run = LensFitRun(cache, translators, settings)
        run.step = state["step"]

    def report_and_save() -> None:
        report("lens", run.step, settings.steps)
        if checkpoint is not None:
            save_run(checkpoint, run)

    report_and_save()
    run.run(report_and_save)
    return translators


def fitted_pairs(cache: ActivationCache, group: Group) -> list[LayerOffset]:
    """The pairs of a group that are fitted: all except the last layer at offset 0, the model."""
    layers, offsets = group
    pairs = [(layer, offset) for layer in layers for offset in offsets]
    return [pair for pair in pairs if pair != (cache.n_blocks, 0)]


def start_run(
    cache: ActivationCache,
    group: Group,
    pairs: Sequence[LayerOffset],
    settings: LensFitSettings,
    report: Any,
) -> tuple[dict[LayerOffset, AffineMap], dict[LayerOffset, TranslatorState]]:
    """Ridge maps, and new translators with whitened inputs, from one pass over the moments."""
    # Moments that a ridge probe saved with the cache serve here too, and the other way round.
    request = MomentRequest.of(cache, *group, None, folds=FOLDS, **vars(settings.scope))
    moment_sets = obtain_moments(cache, request, memory=1 << 62, progress=report)
    folds_of = {pair[:2]: folds for moments in moment_sets for pair, folds in moments.pairs.items()}
    ridge, translators = {}, {}
    for pair in pairs:
        folds = folds_of[pair]
        ridge_fit = fit_ridge(folds, None, None, f"layer {pair[0]}, offset {pair[1]}")
        ridge[pair] = ridge_fit.map.astype(np.float32)
        inputs = InputWhitening.of(merge_all(folds), ridge_fit.alpha)
        translators[pair] = TranslatorState(
            fit=NaturalGradientMap(inputs, settings.damping), alpha=ridge_fit.alpha, n=ridge_fit.n
        )
    return ridge, translators


def group_checkpoint(
    folder: Path, cache: ActivationCache, pairs: Sequence[LayerOffset], settings: LensFitSettings
) -> Checkpoint:
    """Checkpoint of a group, in a subfolder named by the digest of its identity."""
    names = [f"{layer}.{offset}" for layer, offset in pairs]
    identity = {"cache": cache.id, "pairs": names, **asdict(settings)}
    return Checkpoint(folder / json_digest(identity)[:16], identity)


def save_run(checkpoint: Checkpoint, run: LensFitRun) -> None:
    """Save the number of steps and the states of all translators."""
    rows, tensors = [], {}
    for (layer, offset), translator in run.translators.items():
        rows.append({"layer": layer, "offset": offset, **translator.row()})
        for name, tensor in translator.tensors():
            tensors[f"{layer}.{offset}.{name}"] = tensor
    checkpoint.save({"step": run.step, "tracks": rows}, tensors)


def restore_translators(
    state: dict[str, Any], tensors: dict[str, Tensor], damping: float
) -> dict[LayerOffset, TranslatorState]:
    """The translators that `save_run` saved."""
    translators = {}
    for row in state["tracks"]:
        prefix = f"{row['layer']}.{row['offset']}."
        translator_tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        pair = row["layer"], row["offset"]
        translators[pair] = TranslatorState.of(row, translator_tensors, damping)
    return translators

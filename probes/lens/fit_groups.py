"""Fit of all translators of a tuned lens: starts from moments, one run for all, checkpoints.

`TunedLens.fit` calls `fit_translator_groups`. `fit_group` takes the ridge maps from moments
(`moments/obtain_moments.py`), a part of them at a time, fits all translators by KL (`LensFitRun` in
`translator_fit.py`) and saves a checkpoint at every check. Translators that need more than the
memory lie in a temporary file, so that all share every batch and the model's distribution. With a
dask cluster, its workers share the layers; that does not change the result.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.cluster import results, threads_of
from ...cache.devices import choose_device
from ...cache.errors import UsageError
from ...cache.files.json_files import json_digest
from ...cache.head.row_buffers import free_reused_rows
from ...cache.store.activation_cache import ActivationCache
from ..base.readout import LayerOffset
from ..base.resources import default_memory
from ..moments.moment_sources import obtain_moments
from ..moments.moments import merge_all
from ..moments.pass_plan import MomentRequest
from ..ridge.device_algebra import algebra_on
from ..ridge.solver import AffineMap, fit_ridge
from ..training.checkpoint import Checkpoint, lock_folder
from ..training.scratch_file import ScratchFile
from .natural_gradient import InputWhitening, NaturalGradientMap
from .translator_fit import (
    CopyTensor,
    LensFitRun,
    LensFitSettings,
    Report,
    TranslatorState,
    identity_map,
)

FOLDS = 5
"""Folds of the cross-validation that chooses ridge's penalty."""
STATE_MATRICES = 15
"""Float32 matrices `(d, d)` of a translator: `InputWhitening`, `NaturalGradientMap.STATE`, its best
map and, during the sweep, its start."""
SAMPLE_ROWS, SAMPLE_FACTOR = 1 << 16, 64
"""Rows of the moments that translators start from: so many, or so many times d if these are more.

A ridge map of n rows has d / n more squared error than the best map, here 1/64 at most; the steps
correct it."""

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
    device: str = "cpu",
) -> dict[LayerOffset, FittedTranslator]:
    """Fit every layer and offset, all at once, or on the workers of `client`.

    `memory` in bytes bounds this process, or each worker; `folder` holds the checkpoints.
    """
    check_lens_request(cache, layers, offsets, settings)
    groups = divide_pairs(layers, offsets, client)
    fit = partial(
        fit_group,
        settings=settings,
        folder=folder,
        memory=memory or default_memory(),
        device=device,
    )

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


def divide_pairs(layers: Sequence[int], offsets: Sequence[int], client: Any) -> list[Group]:
    """All layers and offsets; with a `client`, as many groups of layers as it has workers."""
    layers, offsets = tuple(sorted(set(layers))), tuple(sorted(set(offsets)))
    workers = 1 if client is None else max(1, len(threads_of(client)))
    group_layers = -(-len(layers) // workers)
    return [(layers[i : i + group_layers], offsets) for i in range(0, len(layers), group_layers)]


def fit_group(
    cache: ActivationCache,
    group: Group,
    settings: LensFitSettings,
    folder: Path | None = None,
    report: Report | None = None,
    memory: int | None = None,
    device: str = "cpu",
) -> dict[LayerOffset, FittedTranslator]:
    """Fit the translators of one group; continues from its checkpoint in `folder`, if any."""
    pairs = fitted_pairs(cache, group)
    if not pairs:
        return {}
    checkpoint = None if folder is None else group_checkpoint(folder, cache, pairs, settings)
    report = report or (lambda stage, done, total: None)
    resources = FitResources.of(len(pairs), cache.d_model, memory or default_memory(), device)
    with lock_folder(None if checkpoint is None else checkpoint.folder):
        try:
            translators = _fit_translators(cache, group, settings, checkpoint, report, resources)
        finally:
            free_reused_rows()
    fitted = {}
    for pair, translator in translators.items():
        translator.restore_best()
        fitted[pair] = FittedTranslator(translator.fit.map(), translator.row())
    return fitted


@dataclass(frozen=True)
class FitResources:
    """Where a fit runs: its device, the memory of its translators and that of its moments."""

    device: torch.device
    copy: CopyTensor
    """Copies a tensor to where the translators lie."""
    memory: int
    """Bytes for moments."""

    @classmethod
    def of(cls, translators: int, d_model: int, memory: int, device: str) -> "FitResources":
        """Translators lie on the device; on the CPU, those that take over half of `memory` lie in
        a temporary file."""
        chosen = choose_device(device)
        size = translators * STATE_MATRICES * 4 * (d_model + 64) ** 2
        if chosen.type != "cpu":
            return cls(chosen, lambda tensor: tensor.to(chosen, copy=True), memory)
        if size <= memory // 2:
            return cls(chosen, torch.Tensor.clone, memory - size)
        return cls(chosen, ScratchFile(size).copy, memory)


def _fit_translators(
    cache: ActivationCache,
    group: Group,
    settings: LensFitSettings,
    checkpoint: Checkpoint | None,
    report: Report,
    resources: FitResources,
) -> dict[LayerOffset, TranslatorState]:
    """The translators of a group after their last step; continues from `checkpoint`, if any."""
    pairs = fitted_pairs(cache, group)
    saved = None if checkpoint is None else checkpoint.load()
    if saved is None:
        moments_report = partial(report, "moments")
        translators = start_run(cache, group, pairs, settings, moments_report, resources)
        run = LensFitRun(cache, translators, settings, resources.device)
        run.begin()
        if settings.steps:
            run.sweep()
    else:
        state, tensors = saved
        translators = restore_translators(state, tensors, settings.damping, resources.copy)
        run = LensFitRun(cache, translators, settings, resources.device)
        run.step = state["step"]

    def report_and_save() -> None:
        report("lens", run.step, settings.steps)
        if checkpoint is not None:
            save_run(checkpoint, run)

    report_and_save()
    run.run(report_and_save)
    if run.step < settings.steps:
        report("lens", settings.steps, settings.steps)
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
    resources: FitResources,
) -> dict[LayerOffset, TranslatorState]:
    """New translators with whitened inputs that start from ridge, from kept or sampled moments."""
    # Moments that a ridge probe saved with the cache serve here too. Else some of the rows are
    # enough: the fit corrects the maps. Not float32, which is half the work: the rounding of its
    # sums, different for other groups of layers, turns the axes that the fit is made in.
    request = MomentRequest.of(
        cache,
        *group,
        None,
        folds=FOLDS,
        max_positions=max(SAMPLE_ROWS, SAMPLE_FACTOR * cache.d_model),
        **vars(settings.scope),
    )
    translators: dict[LayerOffset, TranslatorState] = {}
    device = None if resources.device.type == "cpu" else resources.device
    algebra = algebra_on(device)
    for moments in obtain_moments(
        cache, request, memory=resources.memory, progress=report, device=device
    ):
        for (layer, offset, _), folds in moments.pairs.items():
            if (layer, offset) not in pairs:
                continue
            source = f"layer {layer}, offset {offset}"
            ridge = fit_ridge(folds, None, None, source, algebra=algebra)
            inputs = InputWhitening.of(merge_all(folds), ridge.alpha)
            fit = NaturalGradientMap(inputs, settings.damping, resources.copy)
            fit.set_map(ridge.map)
            translators[layer, offset] = TranslatorState(fit=fit, alpha=ridge.alpha, n=ridge.n)
        # Free the matrices before the next pass allocates its own.
        del moments
    return {pair: translators[pair] for pair in pairs}


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
        rows.append({"layer": layer, "offset": offset, **translator.checkpoint_row()})
        for name, tensor in translator.tensors():
            tensors[f"{layer}.{offset}.{name}"] = tensor
    checkpoint.save({"step": run.step, "tracks": rows}, tensors)


def restore_translators(
    state: dict[str, Any], tensors: dict[str, Tensor], damping: float, copy: CopyTensor
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
        translators[pair] = TranslatorState.of(row, translator_tensors, damping, copy)
    return translators

"""Cuts the fit of translators into groups that fit the memory, and keeps where each stands."""

from collections.abc import Sequence
from contextlib import suppress
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
from ..moments.moments import merge_all
from ..moments.obtain_moments import obtain_moments
from ..moments.pass_plan import MomentRequest
from ..ridge.solver import AffineMap, fit_ridge
from ..training.checkpoint import Checkpoint
from .natural_gradient import InputWhitening, NaturalGradientMap
from .translator_fit import LensFitRun, LensFitSettings, Report, TranslatorState, identity_map

FOLDS = 5
"""Folds over which ridge's penalty is chosen."""
MATRICES = 8
"""Float64 matrices `(d, d)` that a translator takes while it is fitted."""


@dataclass(frozen=True, eq=False)
class FittedTranslators:
    """A translator and what is said of it."""

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
) -> dict[LayerOffset, FittedTranslators]:
    """Fit every layer and offset, group by group, or on the workers of `client`."""
    check_lens_request(cache, layers, offsets, settings)
    groups = divide_pairs(cache, layers, offsets, client, memory or default_memory())
    total = _Total(len(groups), settings.steps, report)
    call = partial(fit_group, settings=settings, folder=folder)
    found: dict[LayerOffset, FittedTranslators] = {}
    if client is None:
        for number, (some, ahead) in enumerate(groups):
            found |= call(cache, some, ahead, report=partial(total, number))
    else:
        calls = [(cache, *group) for group in groups]
        for number, some in enumerate(results(client, call, calls)):
            found |= some
            total(number, "lens", settings.steps, settings.steps)
    if folder is not None:
        for group in groups:
            checkpoint(folder, cache, pairs_of(cache, group), settings).remove()
        with suppress(OSError):
            folder.rmdir()
    model = cache.n_blocks, 0
    if cache.n_blocks in layers and 0 in offsets:
        row = {"start": "model", "kl_logit": 0.0, "kl_ridge": 0.0, "kl": 0.0, "steps": 0}
        found[model] = FittedTranslators(identity_map(cache.d_model), row)
    return {pair: found[pair] for pair in sorted(found)}


def check_lens_request(
    cache: ActivationCache, layers: Sequence[int], offsets: Sequence[int], settings: LensFitSettings
) -> None:
    """Raise a `UsageError` for a request that cannot be right."""
    for layer in (*layers, cache.n_blocks):
        cache.residual_array(layer)
    if not layers or not offsets or min(offsets) < 0:
        raise UsageError("name at least one layer and one offset; offsets are 0 or more")
    if settings.steps < 0 or settings.batch < 1 or settings.seed < 0:
        raise UsageError("steps and seed must be 0 or more, batch 1 or more")
    positive = [settings.damping, *settings.rates]
    if not all(np.isfinite(number) and number > 0 for number in positive):
        raise UsageError("lr and damping must be positive numbers")


Group = tuple[tuple[int, ...], tuple[int, ...]]
"""Layers and offsets."""


def divide_pairs(
    cache: ActivationCache, layers: Sequence[int], offsets: Sequence[int], client: Any, memory: int
) -> list[Group]:
    """Groups that fit `memory`, as many as workers at least: fewer layers, then fewer offsets."""
    layers, offsets = tuple(sorted(set(layers))), tuple(sorted(set(offsets)))
    threads = {"": available_cores()} if client is None else threads_of(client)
    # Every thread adds up moments of its own; after them a translator needs less than they did.
    pair = 8 * cache.d_model**2 * max(2 * FOLDS * (max(threads.values(), default=1) + 1), MATRICES)
    room = max(1, memory // pair)
    share = -(-len(layers) // max(1, len(threads)))
    wide = max(1, min(share, room // len(offsets)))
    deep = min(len(offsets), room)
    return [
        (layers[i : i + wide], offsets[j : j + deep])
        for i in range(0, len(layers), wide)
        for j in range(0, len(offsets), deep)
    ]


class _Total:
    """Reports the steps of all groups as one count."""

    def __init__(self, groups: int, steps: int, report: Report | None) -> None:
        self.groups, self.steps, self.report = groups, steps, report

    def __call__(self, group: int, stage: str, done: int, total: int) -> None:
        if self.report is not None and total:
            self.report(stage, group * total + done, self.groups * total)


def fit_group(
    cache: ActivationCache,
    layers: tuple[int, ...],
    offsets: tuple[int, ...],
    settings: LensFitSettings,
    folder: Path | None = None,
    report: Report | None = None,
) -> dict[LayerOffset, FittedTranslators]:
    """Fit the translators of some layers and offsets; they share every batch."""
    pairs = pairs_of(cache, (layers, offsets))
    if not pairs:
        return {}
    saved = None if folder is None else checkpoint(folder, cache, pairs, settings)
    say = report or (lambda stage, done, total: None)
    found = None if saved is None else saved.load()
    if found is None:
        ridge, tracks = start_run(
            cache, (layers, offsets), pairs, settings, partial(say, "moments")
        )
        course = LensFitRun(cache, tracks, settings)
        course.begin(ridge)
        del ridge
        if settings.steps:
            course.sweep()
    else:
        tracks = restore_run(*found, settings.damping)
        course = LensFitRun(cache, tracks, settings)
        course.step = found[0]["step"]

    def at_check() -> None:
        say("lens", course.step, settings.steps)
        if saved is not None:
            rows = [{"layer": la, "offset": n, **t.row()} for (la, n), t in tracks.items()]
            tensors = {f"{la}.{n}.{k}": v for (la, n), t in tracks.items() for k, v in t.tensors()}
            saved.save({"step": course.step, "tracks": rows}, tensors)

    at_check()
    course.run(at_check)
    out = {}
    for pair, track in tracks.items():
        track.back()
        out[pair] = FittedTranslators(track.fit.map(), track.row())
    return out


def start_run(
    cache: ActivationCache,
    group: Group,
    pairs: Sequence[LayerOffset],
    settings: LensFitSettings,
    report: Any,
) -> tuple[dict[LayerOffset, AffineMap], dict[LayerOffset, TranslatorState]]:
    """Ridge maps, and translators that have their inputs' coordinates, from one pass."""
    asked = MomentRequest.of(cache, *group, None, folds=FOLDS, **vars(settings.scope))
    # Moments that a ridge probe left with the cache serve here too, and the other way round.
    found = obtain_moments(cache, asked, memory=1 << 62, progress=report)
    by_pair = {pair[:2]: parts for moments in found for pair, parts in moments.pairs.items()}
    ridge, tracks = {}, {}
    for pair in pairs:
        folds = by_pair[pair]
        found = fit_ridge(folds, None, None, f"layer {pair[0]}, offset {pair[1]}")
        inputs = InputWhitening.of(merge_all(folds), found.alpha)
        ridge[pair] = found.map.astype(np.float32)
        tracks[pair] = TranslatorState(
            NaturalGradientMap(inputs, settings.damping), found.alpha, found.n
        )
    return ridge, tracks


def checkpoint(
    folder: Path, cache: ActivationCache, pairs: Sequence[LayerOffset], settings: LensFitSettings
) -> Checkpoint:
    """Where a group is kept: a folder of its own."""
    names = [f"{layer}.{offset}" for layer, offset in pairs]
    identity = {"cache": cache.id, "pairs": names, **asdict(settings)}
    return Checkpoint(folder / json_digest(identity)[:16], identity)


def pairs_of(cache: ActivationCache, group: Group) -> list[LayerOffset]:
    """The pairs of a group that are fitted: all but the model itself."""
    layers, offsets = group
    return [(la, n) for la in layers for n in offsets if (la, n) != (cache.n_blocks, 0)]


def restore_run(
    state: dict[str, Any], tensors: dict[str, Tensor], damping: float
) -> dict[LayerOffset, TranslatorState]:
    """The tracks of a checkpoint."""
    tracks = {}
    for row in state["tracks"]:
        mark = f"{row['layer']}.{row['offset']}."
        own = {k[len(mark) :]: t for k, t in tensors.items() if k.startswith(mark)}
        tracks[row["layer"], row["offset"]] = TranslatorState.of(row, own, damping)
    return tracks

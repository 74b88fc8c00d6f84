"""Moments that a fit asks for: read where they are kept, else collected in as few passes as can be.

`RidgeProbe.fit` and the tuned lens (`lens/fit_groups.py`) call `obtain_moments`. The steps lie in
`kept_moments.py` (find, load, save), `pass_plan.py` (plan) and `collect_moments.py` (collect).
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...cache.errors import CorruptError, MismatchError, ResiduaWarning
from ...cache.format.manifest import SHORT_ID
from ...cache.progress import Progress
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.lineage import cache_lineage
from ..base.resources import ProgressCounter, default_memory
from .kept_moments import (
    Inherited,
    find_kept,
    inherited_moments,
    load_kept,
    reason_not_to_keep,
    save_moments,
)
from .moment_collection import collect_pass, collect_passes
from .moment_set import MomentSet, merge_pairs
from .moments import Moments
from .pass_plan import SOLVE_MATRICES, CachePass, MomentRequest, plan_passes, reason_of_passes
from .row_identity import layer_digest, same_documents, same_rows, same_sequences, sequences_digest
from .shifted_sums import LayerOffsetTarget

if TYPE_CHECKING:
    import torch


@dataclass
class MomentSources:
    """Where the moments of a fit came from; counts of (layer, offset, target)."""

    kept: int = 0
    """Read from the cache's folder of kept moments."""
    extended: int = 0
    """Read from a cache that this one extends, and completed by a pass over the new sequences."""
    computed: int = 0
    """Collected by a pass over all sequences."""
    positions: int = 0
    """Positions read, by all passes together."""
    bytes: int = 0
    """Bytes of all moments of the fit."""
    saved: int = 0
    """Bytes that were written into the cache."""
    why: str = ""
    """Why collected moments are not kept; empty if they are."""


def obtain_moments(
    cache: ActivationCache,
    request: MomentRequest,
    *,
    keep: bool | None = None,
    memory: int | None = None,
    client: Any = None,
    progress: Progress | None = None,
    sources: MomentSources | None = None,
    device: "torch.device | None" = None,
) -> Iterator[MomentSet]:
    """The moments of `request` in groups that fit `memory` bytes; `sources` is filled in.

    New moments are kept with the cache if `keep`, by default where `reason_not_to_keep` gives no
    reason; a disk that fills up or fails meanwhile does not end the fit. A `ResiduaWarning` before
    the first pass says what does not fit the memory (`reason_of_passes`). Raises `UsageError` or
    `NoSpaceError` before the first pass where `keep` is impossible. Products are computed on
    `device`, None for numpy on the CPU.
    """
    sources = MomentSources() if sources is None else sources
    memory = memory or default_memory()
    sources.bytes = request.bytes(cache.d_model)

    # Read the moments that are kept with the cache, as many at a time as can be solved.
    entry_of = find_kept(cache, request)
    kept_pairs = [pair for pair in request.pairs if pair in entry_of]
    for pairs in _solvable_groups(kept_pairs, request.folds, memory, cache.d_model):
        try:
            moments = load_kept(entry_of, pairs, cache.d_model)
        except CorruptError:  # the damaged folder was removed: collect its moments again, below
            for pair in pairs:
                del entry_of[pair]
            continue
        sources.kept += len(moments.pairs)
        yield moments
        del moments
    lacking = set(request.pairs) - set(entry_of)
    if not lacking:
        return

    # Decide before any pass whether the other moments will be kept.
    size = sum(part.bytes(cache.d_model) for part in request.for_pairs(lacking))
    is_sample = request.is_sample(cache)
    sources.why = "of a sample" if is_sample else reason_not_to_keep(cache, size, keep)

    def plan_pairs(pairs: Iterable[LayerOffsetTarget], first_sequence: int = 0) -> list[CachePass]:
        return [
            plan
            for part in request.for_pairs(pairs)
            for plan in plan_passes(
                cache,
                part,
                first_sequence=first_sequence,
                memory=memory,
                client=client,
                device=device,
            )
        ]

    # Plan passes over the new sequences alone where a cache that this one extends has moments of
    # the others, and over all sequences for the rest.
    passes: list[tuple[CachePass, Inherited | None]] = []
    for inherited in () if is_sample else inherited_moments(cache, request, lacking):
        lacking = lacking - set(inherited.entry_of)
        plans = plan_pairs(inherited.entry_of, inherited.sequences)
        passes += [(plan, inherited) for plan in plans]
    passes += [(plan, None) for plan in plan_pairs(lacking)]
    if new := [plan for plan, inherited in passes if inherited is None]:
        reason = reason_of_passes(new, request.for_pairs(lacking), memory, cache.d_model)
        if reason is not None:
            warnings.warn(reason, ResiduaWarning, stacklevel=2)

    # Run the passes; complete, keep and hand over the moments of each.
    counter = ProgressCounter(sum(plan.positions(cache) for plan, _ in passes), progress)
    while passes:
        plan, inherited = passes.pop(0)
        moments = collect_pass(cache, plan, client, counter)
        sources.positions += plan.positions(cache)
        if inherited is None:
            sources.computed += len(moments.pairs)
        else:
            try:
                moments = _add_inherited(cache, moments, inherited)
            except CorruptError:  # the inherited moments are damaged: read all sequences instead
                plans = plan_pairs(moments.pairs)
                counter.total += sum(plan.positions(cache) for plan in plans)
                passes += [(plan, None) for plan in plans]
                continue
            sources.extended += len(moments.pairs)
        if not sources.why:
            try:
                sources.saved += save_moments(cache, moments)
            except OSError as error:
                sources.why = f"moments could not be written: {error.strerror or error}"
        yield moments
        # Free the matrices before the next pass allocates its own.
        del moments


def _solvable_groups(
    pairs: list[LayerOffsetTarget], folds: int, memory: int, d_model: int
) -> Iterator[list[LayerOffsetTarget]]:
    """`pairs` in groups: the moments of each, and the work of one solution, fit the memory."""
    matrix = 8 * d_model**2
    group_size = max(1, (memory - matrix * SOLVE_MATRICES) // (2 * matrix * folds))
    for start in range(0, len(pairs), group_size):
        yield pairs[start : start + group_size]


def _add_inherited(cache: ActivationCache, new: MomentSet, inherited: Inherited) -> MomentSet:
    """The moments of all sequences: those of the `new` ones merged with `inherited` moments."""

    def inherited_folds(pair: LayerOffsetTarget) -> tuple[Moments, ...]:
        return load_kept(inherited.entry_of, [pair], cache.d_model).pairs[pair]

    pairs = merge_pairs(new.pairs, inherited_folds)
    return replace(new, pairs=pairs, sequences=sequences_digest(cache.sequences(str(new.split))))


def extend(moments: MomentSet, cache: ActivationCache, **options: Any) -> MomentSet:
    """`moments` of a cache that `cache` extends, completed by a pass over its new sequences.

    `options` are those of `collect_passes`. Raises `MismatchError` unless `cache` begins with the
    rows that `moments` count.
    """
    # Check that the cache begins with the same sequences, documents and rows.
    base = next((old for old in cache_lineage(cache) if old.id == moments.cache_id), None)
    layers, split = set(moments.content), str(moments.split)
    if (
        base is None
        or moments.sequences != sequences_digest(base.sequences(split))
        or moments.content != {layer: layer_digest(base, layer) for layer in layers}
        or not same_sequences(base, cache, split, moments.folds)
        or not same_documents(base, cache, moments.across_documents)
        or not all(same_rows(base, cache, layer) for layer in layers)
    ):
        raise MismatchError(
            f"cache {cache.id[:SHORT_ID]} does not begin with the rows of these moments, of cache "
            f"{str(moments.cache_id)[:SHORT_ID]}; collect them anew"
        )
    # Collect the moments of the new sequences, and merge them with those of the others.
    request = MomentRequest(
        layers=(),
        offsets=(),
        targets=(),
        folds=moments.folds,
        split=split,
        products=str(moments.products),
        across_documents=moments.across_documents,
        drop_first=moments.drop_first,
    )
    options["first_sequence"] = len(base.sequence_length)
    pairs, extended = {}, moments
    for part in request.for_pairs(moments.pairs):
        for extended in collect_passes(cache, part, **options):
            pairs |= merge_pairs(extended.pairs, moments.pairs.__getitem__)
    content = {layer: layer_digest(cache, layer) for layer in layers}
    return replace(
        extended, pairs=pairs, sequences=sequences_digest(cache.sequences(split)), content=content
    )

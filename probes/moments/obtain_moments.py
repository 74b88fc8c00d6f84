"""Supplies the moments that a fit asks for: kept ones first, then from as few rows as can be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ...cache.errors import CorruptError, MismatchError
from ...cache.format.manifest import SHORT_ID
from ...cache.progress import Progress
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.lineage import cache_lineage
from ..base.resources import ProgressCounter, default_memory
from .collect_moments import collect_passes, run_pass
from .kept_moments import (
    Inherited,
    find_kept,
    inherited_moments,
    load_kept,
    reason_not_to_keep,
    save_moments,
)
from .moment_set import MomentSet, merged
from .pass_plan import SOLVE_MATRICES, CachePass, MomentRequest, plan_passes
from .row_identity import layer_digest, same_documents, same_rows, same_sequences, sequences_digest
from .shifted_sums import LayerOffsetTarget


@dataclass
class MomentSources:
    """Where the moments of a fit came from."""

    kept: int = 0
    """(layer, offset, target) that were found with the cache."""
    extended: int = 0
    """Those found with a cache that this one extends: only new sequences were read."""
    computed: int = 0
    """Those that took all sequences."""
    positions: int = 0
    """Positions read, by all passes together."""
    bytes: int = 0
    """Bytes of all moments of the fit."""
    saved: int = 0
    """Bytes that were written into the cache."""
    why: str = ""
    """Why moments that were computed are not kept; empty if they are."""


def obtain_moments(
    cache: ActivationCache,
    request: MomentRequest,
    *,
    keep: bool | None = None,
    memory: int | None = None,
    client: Any = None,
    progress: Progress | None = None,
    account: MomentSources | None = None,
) -> Iterator[MomentSet]:
    """The moments of `request` in groups, within `memory` bytes.

    Those kept with the cache are read. Those kept with a cache that this one extends are brought
    up to date by a pass over the new sequences. The rest takes a pass over all. New ones are
    kept if `keep`, by default where `why_not` says nothing against it; a disk that fills up or
    fails meanwhile does not end the fit. Raises `UsageError` or `NoSpaceError` at once where
    `keep` cannot be.
    """
    account = MomentSources() if account is None else account
    memory = memory or default_memory()
    account.bytes = request.bytes(cache.d_model)
    source = find_kept(cache, request)
    for found in kept(request, source, memory, cache.d_model):
        account.kept += len(found.pairs)
        yield found
        del found
    lacking = set(request.pairs) - set(source)
    if not lacking:
        return
    size = sum(group.bytes(cache.d_model) for group in request.of_pairs(lacking))
    account.why = reason_not_to_keep(cache, size, keep)
    work = passes(cache, request, lacking, memory, client)
    count = ProgressCounter(sum(plan.positions(cache) for plan, _ in work), progress)
    while work:
        plan, old = work.pop(0)
        found = run_pass(cache, plan, client, count)
        account.positions += plan.positions(cache)
        if old is not None:
            try:
                found = add_inherited(cache, found, old)
            except CorruptError:
                again = plan_full_passes(cache, request, set(found.pairs), memory, client)
                count.total += sum(other.positions(cache) for other in again)
                work += [(other, None) for other in again]
                continue
            account.extended += len(found.pairs)
        else:
            account.computed += len(found.pairs)
        _keep(cache, found, account)
        yield found
        del found


def kept(
    request: MomentRequest, source: dict[LayerOffsetTarget, Any], memory: int, d_model: int
) -> Iterator[MomentSet]:
    """The moments that `source` names, in groups; takes damaged ones out of `source`."""
    for group in groups(request, source, memory, d_model):
        try:
            found = load_kept(source, group)
        except CorruptError:  # what can be computed again is no loss; the folder is gone
            for pair in group:
                del source[pair]
            continue
        yield found
        del found


def passes(
    cache: ActivationCache,
    request: MomentRequest,
    lacking: set[LayerOffsetTarget],
    memory: int,
    client: Any,
) -> list[tuple[CachePass, Inherited | None]]:
    """Passes for the `lacking` pairs: over new sequences where old moments go on, else over all."""
    work: list[tuple[CachePass, Inherited | None]] = []
    for old in inherited_moments(cache, request, lacking):
        lacking = lacking - set(old.source)
        for group in request.of_pairs(old.source):
            plans = plan_passes(cache, group, first=old.first, memory=memory, client=client)
            work += [(plan, old) for plan in plans]
    return work + [
        (plan, None) for plan in plan_full_passes(cache, request, lacking, memory, client)
    ]


def extend(moments: MomentSet, cache: ActivationCache, **options: Any) -> MomentSet:
    """`moments` of a cache that `cache` extends, brought up to date by its new sequences alone.

    `options` are those of `collect_passes`. Raises `MismatchError` unless `cache` begins with the
    rows that were counted.
    """
    old = next((one for one in cache_lineage(cache) if one.id == moments.cache_id), None)
    layers, split = set(moments.content), str(moments.split)
    if (
        old is None
        or moments.sequences != sequences_digest(old.sequences(split))
        or moments.content != {layer: layer_digest(old, layer) for layer in layers}
        or not same_sequences(old, cache, split, moments.folds)
        or not same_documents(old, cache, moments.across_documents)
        or not all(same_rows(old, cache, layer) for layer in layers)
    ):
        raise MismatchError(
            f"cache {cache.id[:SHORT_ID]} does not begin with the rows of these moments, of cache "
            f"{str(moments.cache_id)[:SHORT_ID]}; collect them anew"
        )
    request = MomentRequest(
        (), (), (), moments.folds, split, str(moments.products), moments.across_documents,
        moments.drop_first,
    )  # fmt: skip
    options["first"], pairs, found = len(old.sequence_length), {}, moments
    for group in request.of_pairs(moments.pairs):
        for found in collect_passes(cache, group, **options):
            pairs |= merged(found.pairs, moments.pairs.__getitem__)
    content = {layer: layer_digest(cache, layer) for layer in layers}
    return replace(
        found, pairs=pairs, sequences=sequences_digest(cache.sequences(split)), content=content
    )


def plan_full_passes(
    cache: ActivationCache,
    request: MomentRequest,
    pairs: set[LayerOffsetTarget],
    memory: int,
    client: Any,
) -> list[CachePass]:
    """Passes over all sequences for `pairs`."""
    asked = request.of_pairs(pairs)
    return [
        plan for group in asked for plan in plan_passes(cache, group, memory=memory, client=client)
    ]


def add_inherited(cache: ActivationCache, new: MomentSet, old: Inherited) -> MomentSet:
    """The moments of new sequences together with those of the old ones."""
    numbers = sequences_digest(cache.sequences(str(new.split)))
    pairs = merged(new.pairs, lambda pair: load_kept(old.source, [pair]).pairs[pair])
    return replace(new, pairs=pairs, sequences=numbers)


def groups(
    request: MomentRequest, source: dict[LayerOffsetTarget, Any], memory: int, d_model: int
) -> Iterator[list[LayerOffsetTarget]]:
    """The pairs of `source`, as many at a time as `memory` can hold while they are solved."""
    matrix = 8 * d_model**2
    room = max(1, (memory - matrix * SOLVE_MATRICES) // (2 * matrix * request.folds))
    pairs = [pair for pair in request.pairs if pair in source]
    for start in range(0, len(pairs), room):
        yield pairs[start : start + room]


def _keep(cache: ActivationCache, moments: MomentSet, account: MomentSources) -> None:
    if account.why:
        return
    try:
        account.saved += save_moments(cache, moments)
    except OSError as error:
        account.why = f"moments could not be written: {error.strerror or error}"

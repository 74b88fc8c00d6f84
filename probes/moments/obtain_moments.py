"""Supplies the moments that a fit asks for: kept ones first, then from as few rows as can be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ...cache.errors import CorruptError, MismatchError
from ...cache.format.manifest import SHORT_ID
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.lineage import lineage
from ..base.resources import Counter, Progress, default_memory
from .collect_moments import collect_passes, run_pass
from .kept_moments import Inherited, find, inherited, load, save, why_not
from .moment_set import MomentSet, merged
from .pass_plan import SOLVE_MATRICES, Pass, Request, plan_passes
from .row_identity import content_of, counted, same_documents, same_rows, same_sequences
from .shifted_sums import Pair


@dataclass
class Account:
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


def supply(
    cache: ActivationCache,
    request: Request,
    *,
    keep: bool | None = None,
    memory: int | None = None,
    client: Any = None,
    progress: Progress | None = None,
    account: Account | None = None,
) -> Iterator[MomentSet]:
    """The moments of `request` in groups, within `memory` bytes.

    Those kept with the cache are read. Those kept with a cache that this one extends are brought
    up to date by a pass over the new sequences. The rest takes a pass over all. New ones are
    kept if `keep`, by default where `why_not` says nothing against it; a disk that fills up or
    fails meanwhile does not end the fit. Raises `UsageError` or `NoSpaceError` at once where
    `keep` cannot be.
    """
    account = Account() if account is None else account
    memory = memory or default_memory()
    account.bytes = request.bytes(cache.d_model)
    source = find(cache, request)
    for found in kept(request, source, memory, cache.d_model):
        account.kept += len(found.pairs)
        yield found
        del found
    lacking = set(request.pairs) - set(source)
    if not lacking:
        return
    size = sum(group.bytes(cache.d_model) for group in request.of_pairs(lacking))
    account.why = why_not(cache, size, keep)
    work = passes(cache, request, lacking, memory, client)
    count = Counter(sum(plan.positions(cache) for plan, _ in work), progress)
    while work:
        plan, old = work.pop(0)
        found = run_pass(cache, plan, client, count)
        account.positions += plan.positions(cache)
        if old is not None:
            try:
                found = brought_up(cache, found, old)
            except CorruptError:
                again = full(cache, request, set(found.pairs), memory, client)
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
    request: Request, source: dict[Pair, Any], memory: int, d_model: int
) -> Iterator[MomentSet]:
    """The moments that `source` names, in groups; takes damaged ones out of `source`."""
    for group in groups(request, source, memory, d_model):
        try:
            found = load(source, group)
        except CorruptError:  # what can be computed again is no loss; the folder is gone
            for pair in group:
                del source[pair]
            continue
        yield found
        del found


def passes(
    cache: ActivationCache, request: Request, lacking: set[Pair], memory: int, client: Any
) -> list[tuple[Pass, Inherited | None]]:
    """Passes for the `lacking` pairs: over new sequences where old moments go on, else over all."""
    work: list[tuple[Pass, Inherited | None]] = []
    for old in inherited(cache, request, lacking):
        lacking = lacking - set(old.source)
        for group in request.of_pairs(old.source):
            plans = plan_passes(cache, group, first=old.first, memory=memory, client=client)
            work += [(plan, old) for plan in plans]
    return work + [(plan, None) for plan in full(cache, request, lacking, memory, client)]


def extend(moments: MomentSet, cache: ActivationCache, **options: Any) -> MomentSet:
    """`moments` of a cache that `cache` extends, brought up to date by its new sequences alone.

    `options` are those of `collect_passes`. Raises `MismatchError` unless `cache` begins with the
    rows that were counted.
    """
    old = next((one for one in lineage(cache) if one.id == moments.cache_id), None)
    layers, split = set(moments.content), str(moments.split)
    if (
        old is None
        or moments.sequences != counted(old.split(split))
        or moments.content != {layer: content_of(old, layer) for layer in layers}
        or not same_sequences(old, cache, split, moments.folds)
        or not same_documents(old, cache, moments.across_documents)
        or not all(same_rows(old, cache, layer) for layer in layers)
    ):
        raise MismatchError(
            f"cache {cache.id[:SHORT_ID]} does not begin with the rows of these moments, of cache "
            f"{str(moments.cache_id)[:SHORT_ID]}; collect them anew"
        )
    request = Request(
        (), (), (), moments.folds, split, str(moments.products), moments.across_documents,
        moments.drop_first,
    )  # fmt: skip
    options["first"], pairs, found = len(old.sequence_length), {}, moments
    for group in request.of_pairs(moments.pairs):
        for found in collect_passes(cache, group, **options):
            pairs |= merged(found.pairs, moments.pairs.__getitem__)
    content = {layer: content_of(cache, layer) for layer in layers}
    return replace(found, pairs=pairs, sequences=counted(cache.split(split)), content=content)


def full(
    cache: ActivationCache, request: Request, pairs: set[Pair], memory: int, client: Any
) -> list[Pass]:
    """Passes over all sequences for `pairs`."""
    asked = request.of_pairs(pairs)
    return [
        plan for group in asked for plan in plan_passes(cache, group, memory=memory, client=client)
    ]


def brought_up(cache: ActivationCache, new: MomentSet, old: Inherited) -> MomentSet:
    """The moments of new sequences together with those of the old ones."""
    numbers = counted(cache.split(str(new.split)))
    pairs = merged(new.pairs, lambda pair: load(old.source, [pair]).pairs[pair])
    return replace(new, pairs=pairs, sequences=numbers)


def groups(
    request: Request, source: dict[Pair, Any], memory: int, d_model: int
) -> Iterator[list[Pair]]:
    """The pairs of `source`, as many at a time as `memory` can hold while they are solved."""
    matrix = 8 * d_model**2
    room = max(1, (memory - matrix * SOLVE_MATRICES) // (2 * matrix * request.folds))
    pairs = [pair for pair in request.pairs if pair in source]
    for start in range(0, len(pairs), room):
        yield pairs[start : start + room]


def _keep(cache: ActivationCache, moments: MomentSet, account: Account) -> None:
    if account.why:
        return
    try:
        account.saved += save(cache, moments)
    except OSError as error:
        account.why = f"moments could not be written: {error.strerror or error}"

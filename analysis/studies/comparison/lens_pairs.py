"""Which lenses of two models are compared: the logit lens, and fitted lenses of one kind."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ....cache.errors import MismatchError, UsageError
from ....cache.format.manifest import SHORT_ID
from ....probes.base.readout import Readout
from ....probes.lens.logit_lens import LogitLens
from ....probes.saved.save import check_belongs

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache


def pair_lenses(
    first: "ActivationCache", other: "ActivationCache", lenses: Mapping[str, Readout]
) -> tuple[dict[str, tuple[Readout, Readout]], list[str]]:
    """A lens of each model by name: the logit lens, and given lenses of one kind; with notes.

    A lens belongs to the model whose cache it was fitted on, or to both where the heads agree.
    Raises `MismatchError` for a lens of neither model.
    """
    paired: dict[str, tuple[Readout, Readout]] = {
        "logit": (LogitLens.of(first, 0), LogitLens.of(other, 0))
    }
    owned: tuple[dict[str, Readout], dict[str, Readout]] = ({}, {})
    for name, lens in lenses.items():
        owners = caches_of(lens, (first, other))
        if not owners:
            raise MismatchError(
                f"{name} is a lens of neither model: give lenses that were fitted on cache "
                f"{first.id[:SHORT_ID]} or {other.id[:SHORT_ID]}"
            )
        for k, cache in enumerate((first, other)):
            if cache not in owners:
                continue
            if lens.kind in owned[k]:
                raise UsageError(
                    f"two lenses of kind {lens.kind} can read cache {cache.id[:SHORT_ID]}: give "
                    "one of each kind for each model"
                )
            owned[k][lens.kind] = lens
    notes = []
    for kind in dict.fromkeys([*owned[0], *owned[1]]):
        if kind in owned[0] and kind in owned[1]:
            paired[kind] = owned[0][kind], owned[1][kind]
        else:
            lacking = (other if kind in owned[0] else first).id[:SHORT_ID]
            notes.append(
                f"the {kind} lens is left out: cache {lacking} has none (residua fit {kind} "
                f"{lacking})"
            )
    return paired, notes


def caches_of(lens: Readout, caches: "Sequence[ActivationCache]") -> "list[ActivationCache]":
    """The cache that `lens` was fitted on if it is among `caches`, else those of its head."""
    exact = [cache for cache in caches if getattr(lens, "cache_id_", None) == cache.id]
    return exact or [cache for cache in caches if belongs_to(lens, cache)]


def belongs_to(lens: Readout, cache: "ActivationCache") -> bool:
    """Whether `lens` was fitted for the model of `cache`."""
    try:
        check_belongs(lens, cache)
    except MismatchError:
        return False
    return True


def layers_at_offset_0(lens: Readout, cache: "ActivationCache") -> tuple[int, ...]:
    """Layers of `cache` that `lens` reads at offset 0."""
    read = {layer for layer, offset in lens.pairs() if layer is not None and offset == 0}
    return tuple(sorted(read & set(cache.layers)))

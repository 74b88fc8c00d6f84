"""Finds the lens that a saved causal basis was fitted with, among the probes under a root.

A basis records the kind of its lens and a digest of each map, so that the lens is found under any
name; `residua fit basis` needs none of this, since it has the lens.
"""

from pathlib import Path
from typing import Any

from ...cache.errors import NotFoundError, ResiduaError
from ...cache.store.activation_cache import ActivationCache
from ...probes.basis.causal_basis import CausalBasis, lens_maps, map_digest
from ...probes.lens.logit_lens import LogitLens
from ...probes.ridge import AffineMap
from ...probes.saved.library import load_probe_for
from ...probes.saved.probe_list import list_probes


def find_basis_maps(cache: ActivationCache, basis: CausalBasis, root: Path) -> dict[int, AffineMap]:
    """The maps of the lens of `basis`, by layer: the logit lens's, or a saved probe's under `root`.

    Raises `NotFoundError` where no probe under `root` has the very maps.
    """
    basis.check_fitted()
    kind = basis.lens_["kind"]
    expected = {int(layer): digest for layer, digest in basis.lens_["maps"].items()}
    layers = list(basis.bases_)
    for lens in _lenses_of_kind(cache, kind, basis.offset, root):
        try:
            maps = lens_maps(cache, lens, layers, basis.offset)
        except ResiduaError:  # a lens of other layers or offsets
            continue
        if all(map_digest(maps[layer]) == expected.get(layer) for layer in layers):
            return maps
    raise NotFoundError(
        f"the {kind} lens that this basis was fitted with is not under {root}: fit it again "
        "for the tokens and passages of its directions"
    )


def _lenses_of_kind(cache: ActivationCache, kind: str, offset: int, root: Path) -> Any:
    """The logit lens, or the saved probes of `kind` that were fitted on `cache`."""
    if kind == LogitLens.kind:
        yield LogitLens.of(cache, offset)
        return
    for entry in list_probes(root):
        if entry["kind"] == kind and entry["cache"] == cache.id:
            try:
                yield load_probe_for(cache, Path(entry["path"]))
            except ResiduaError:  # damaged
                continue

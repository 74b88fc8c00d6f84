"""Caches, probes and files of lenses that commands of studies name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...cache.errors import UsageError
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.catalog import find_cache
from ...probes.lens.jacobian_lens_files import read_jacobian_lens
from ...probes.saved.library import find_probe, load_probe_for
from ...probes.saved.save import load_probe
from ..console.probe_names import split_name
from ..console.saved_actions import find_saved
from ..evaluation.probe_names import name_readouts

LENS_FILES = (".pt", ".safetensors")
"""Endings of files of Jacobian lenses."""


def load_caches_and_probes(
    arguments: Sequence[str], root: Path
) -> "tuple[list[ActivationCache], list[Any] | dict[str, Any]]":
    """The caches and the probes that `arguments` name, in their order; `NAME=PROBE` for a probe."""
    caches, probes = [], []
    for argument in arguments:
        name, saved = split_name(argument)
        if name is None and find_saved(saved, root).kind == "cache":
            caches.append(find_cache(saved, root))
        else:
            probes.append(argument)
    return caches, load_probes(probes, root)


def load_probes(arguments: Sequence[str], root: Path) -> "list[Any] | dict[str, Any]":
    """The probes of `PROBE` and `NAME=PROBE` arguments, whatever model they are of."""
    named = [split_name(argument) for argument in arguments]
    probes = [load_probe(find_probe(probe, root)) for _, probe in named]
    return _with_names([name for name, _ in named], probes)


def load_lenses(
    cache: ActivationCache, arguments: Sequence[str], root: Path
) -> "list[Any] | dict[str, Any]":
    """Lenses for `cache`: files of Jacobian lenses, and saved probes of its model."""
    names, lenses = [], []
    for argument in arguments:
        name, lens = split_name(argument)
        path = Path(lens)
        is_file = path.suffix in LENS_FILES and not path.is_dir()
        names.append(name)
        lenses.append(
            read_jacobian_lens(path, cache)
            if is_file
            else load_probe_for(cache, find_probe(lens, root))
        )
    return _with_names(names, lenses)


def _with_names(names: Sequence[str | None], probes: list[Any]) -> "list[Any] | dict[str, Any]":
    """A list without given names, else by name; raises `UsageError` for a name given twice."""
    if all(name is None for name in names):
        return probes
    by_name: dict[str, Any] = {}
    for name, default, probe in zip(names, name_readouts(probes), probes, strict=True):
        name = default if name is None else name
        if name in by_name:
            raise UsageError(f"two probes are named {str(name)!r}; give one of them another name")
        by_name[name] = probe
    return by_name

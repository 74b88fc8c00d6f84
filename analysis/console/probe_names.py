"""Probes as the command line names them: `PROBE`, or `NAME=PROBE` with a name of one's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...cache.errors import UsageError
from ...cache.store.activation_cache import ActivationCache
from ...probes.saved.library import find_probe, load_probe_for
from ..evaluation.probe_names import name_readouts

LOGIT_LENS = "logit"
"""Name of the logit lens, which is no saved probe."""


def split_name(argument: str) -> tuple[str | None, str]:
    """The given name and the probe of `NAME=PROBE`; None and the probe of an argument without one.

    A path that exists is a probe, whatever is in its name.
    """
    name, equals, probe = argument.partition("=")
    if not equals or "/" in name or Path(argument).exists():
        return None, argument
    if not name or not probe:
        raise UsageError(f"{argument!r} names no probe; write NAME=PROBE, such as long=ridge-3f2a")
    return name, probe


def load_named_probes(
    cache: ActivationCache,
    arguments: Sequence[str],
    root: Path,
    force: bool = False,
    offsets: Sequence[int] | None = None,
) -> "list[Any] | dict[str, Any]":
    """The probes of `PROBE` and `NAME=PROBE` arguments, checked to belong to `cache`.

    A list without names; else by name, where a probe without a name is called by its kind. With
    `offsets`, `logit` is the logit lens at these. Raises `UsageError` for a name given twice.
    """
    named = [split_name(argument) for argument in arguments]
    probes = []
    for _, probe in named:
        if probe == LOGIT_LENS and offsets is not None:
            from ...probes.lens.logit_lens import LogitLens

            probes.append(LogitLens.of(cache, offsets))
        else:
            probes.append(load_probe_for(cache, find_probe(probe, root), force))
    if all(name is None for name, _ in named):
        return probes
    by_name: dict[str, Any] = {}
    for (name, _), default, probe in zip(named, name_readouts(probes), probes, strict=True):
        name = default if name is None else name
        if name in by_name:
            raise UsageError(f"two probes are named {str(name)!r}; give one of them another name")
        by_name[name] = probe
    return by_name

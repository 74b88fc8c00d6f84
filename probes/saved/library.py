"""Saved probes under a root folder: where a fit is saved, and how a name finds a probe.

<root>/probes/<kind>-<cache>-n<offsets>-<digest of the parameters>/     written by `save_probe`
<root>/checkpoints/<same name>/                                         state of an unfinished fit
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.errors import MismatchError, NotFoundError, ResiduaWarning, UsageError
from ...cache.files.disk_errors import check_target
from ...cache.files.json_files import json_digest
from ...cache.files.paths import as_path, is_remote
from ...cache.number_ranges import as_tuple, format_ranges
from .save import check_belongs, load_probe, saved_params

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

FOLDER = "probes"
CHECKPOINTS = "checkpoints"
OFFSETS_LENGTH = 24
"""Longest list of offsets in a name, in characters; of more, the first and the last are named."""


def probe_path(root: Path, probe: Any, cache_id: str | None = None) -> Path:
    """`<root>/probes/<kind>-<cache>-n<offsets>-<parameters>`: the same fit has the same name.

    Such as `ridge-3f2a51c09d7e-n0-3-8acc50e0` for offsets 0 to 3. `cache_id` is needed for a probe
    that is not fitted yet.
    """
    # `ridge/shuffled` becomes `shuffled-ridge`: a name that begins with `ridge` finds no control.
    kind = "-".join(reversed(probe.kind.split("/")))
    cache, parameters = (cache_id or probe.cache_id_)[:12], json_digest(saved_params(probe))[:8]
    return root / FOLDER / "-".join([kind, cache, *_offsets_in_name(probe), parameters])


def _offsets_in_name(probe: Any) -> list[str]:
    """`n0-3`, `n0+2+5`, or `n0..96` for a long list; nothing for a probe without offsets."""
    while hasattr(probe, "probe"):  # a control
        probe = probe.probe
    value = getattr(probe, "offsets", getattr(probe, "offset", None))
    if value is None:
        return []
    offsets = sorted(set(as_tuple(value, "offsets")))
    text = format_ranges(offsets).replace(", ", "+")
    return [f"n{text if len(text) <= OFFSETS_LENGTH else f'{offsets[0]}..{offsets[-1]}'}"]


def earlier_probe_path(root: Path, probe: Any, cache_id: str) -> Path:
    """The folder that `probe` had before names said the offsets."""
    path = probe_path(root, probe, cache_id)
    offsets = "".join(f"-{part}" for part in _offsets_in_name(probe))
    return path.with_name(path.name.replace(offsets, "", 1) if offsets else path.name)


def checkpoint_path(
    root: Path, probe: Any, cache_id: str, folder: Path | None = None, suffix: str = ""
) -> Path | None:
    """Checkpoint folder of a fit, the same when the killed fit is started again.

    The folder lies in `folder`, by default that of all checkpoints under `root`; `suffix` ends its
    name. Raises `UsageError` if `folder` cannot be written; without a `folder`, a root that cannot
    be written gives None and a `ResiduaWarning`: the fit runs, but cannot be resumed.
    """
    path = (folder or root / CHECKPOINTS) / (probe_path(root, probe, cache_id).name + suffix)
    try:
        if is_remote(path):
            raise UsageError(f"{path} is on no disk of this machine, and checkpoints need one")
        check_target(path)
    except UsageError as error:
        if folder is not None:
            raise
        warnings.warn(
            f"this fit keeps no checkpoint, and begins anew if it is interrupted: {error}"
            " (--checkpoint)",
            ResiduaWarning,
            stacklevel=2,
        )
        return None
    return path


def new_probe_path(root: Path, probe: Any, cache_id: str, out: Path | None = None) -> Path:
    """Folder to save `probe` in: `out`, or `probe_path` under `root`.

    A fit that is there under its earlier name keeps that. Raises `UsageError` before the fit if the
    folder cannot be written.
    """
    earlier = earlier_probe_path(root, probe, cache_id)
    path = out or (earlier if earlier.is_dir() else probe_path(root, probe, cache_id))
    if path.is_file():
        raise UsageError(f"{path} is a file; name a folder for the probe")
    check_target(path)
    return path


def find_probe(name: str, root: Path) -> Path:
    """The probe at the path `name`, or the only one under `root` with a name that begins so."""
    path = as_path(name)
    if (path / "config.json").is_file():
        return path
    folder = root / FOLDER
    entries = folder.iterdir() if folder.is_dir() else ()
    probes = sorted(p for p in entries if p.is_dir() and not p.name.startswith("."))
    matches = [p for p in probes if name and p.name.startswith(name)]
    if len(matches) > 1:
        names = ", ".join(p.name for p in matches)
        raise UsageError(f"{name!r} begins the names of {len(matches)} probes: {names}")
    if not matches:
        names = ", ".join(p.name for p in probes) or "none"
        raise NotFoundError(f"no probe {name!r} (under {root}: {names}); fit one with residua fit")
    return matches[0]


def load_probe_for(cache: "ActivationCache", path: Path, force: bool = False) -> Any:
    """The probe at `path`, checked to belong to `cache` (see `check_belongs` for `force`)."""
    probe = load_probe(path)
    try:
        check_belongs(probe, cache, force)
    except MismatchError as error:
        raise MismatchError(f"{path}: {error}") from None
    return probe

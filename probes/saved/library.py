"""Saved probes under a root folder: where a fit is saved, and how a name finds a probe.

<root>/probes/<kind>-<cache>-<digest of the parameters>/        written by `save_probe`
<root>/checkpoints/<same name>/                                 state of an unfinished fit
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.errors import MismatchError, NotFoundError, UsageError
from ...cache.files.disk_errors import check_target
from ...cache.files.json_files import json_digest
from ...cache.files.paths import as_path
from .save import check_belongs, load_probe, saved_params

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

FOLDER = "probes"
CHECKPOINTS = "checkpoints"


def probe_path(root: Path, probe: Any, cache_id: str | None = None) -> Path:
    """`<root>/probes/<kind>-<cache>-<parameters>`: the same fit again has the same name.

    `cache_id` is needed for a probe that is not fitted yet.
    """
    parameters = json_digest(saved_params(probe))[:8]
    # `ridge/shuffled` becomes `shuffled-ridge`: a name that begins with `ridge` finds no control.
    kind = "-".join(reversed(probe.kind.split("/")))
    return root / FOLDER / f"{kind}-{(cache_id or probe.cache_id_)[:12]}-{parameters}"


def checkpoint_path(root: Path, probe: Any, cache_id: str) -> Path:
    """Checkpoint folder of a fit, the same when the killed fit is started again."""
    return root / CHECKPOINTS / probe_path(root, probe, cache_id).name


def new_probe_path(root: Path, probe: Any, cache_id: str, out: Path | None = None) -> Path:
    """Folder to save `probe` in: `out`, or `probe_path` under `root`.

    Raises `UsageError` before the fit if the folder cannot be written.
    """
    path = out or probe_path(root, probe, cache_id)
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
    probes = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
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
    # Reports tell probes of one kind apart by their folders.
    probe.folder_ = str(path)
    return probe

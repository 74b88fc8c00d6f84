"""Where probes lie under a root, and how a name finds one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.errors import MismatchError, NotFoundError, UsageError
from ...cache.files.disk_errors import check_target
from ...cache.files.json_files import json_digest
from ...cache.files.paths import as_path
from .save import check_belongs, load_probe, plain_params

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

FOLDER = "probes"
CHECKPOINTS = "checkpoints"


def probe_path(root: Path, probe: Any, cache_id: str | None = None) -> Path:
    """`<root>/probes/<kind>-<cache>-<parameters>`: the same fit again has the same name.

    A probe that is not fitted yet has no cache of its own: name its `cache_id`.
    """
    parameters = json_digest(plain_params(probe.get_params()))[:8]
    # A control is no answer to who asks for the probe by the beginning of its name.
    kind = "-".join(reversed(probe.kind.split("/")))
    return root / FOLDER / f"{kind}-{(cache_id or probe.cache_id_)[:12]}-{parameters}"


def checkpoint_path(root: Path, probe: Any, cache_id: str) -> Path:
    """Where the same fit, killed and started again, finds its checkpoint."""
    return root / CHECKPOINTS / probe_path(root, probe, cache_id).name


def new_place(root: Path, probe: Any, cache_id: str, out: Path | None = None) -> Path:
    """Where the probe will be saved, `out` or its place under `root`.

    Raises `UsageError` before the fit if nothing can be written there.
    """
    path = out or probe_path(root, probe, cache_id)
    if path.is_file():
        raise UsageError(f"{path} is a file; name a folder for the probe")
    check_target(path)
    return path


def find_probe(name: str, root: Path) -> Path:
    """The probe at the path `name`, or the one under `root` whose name begins with it."""
    path = as_path(name)
    if (path / "config.json").is_file():
        return path
    folder = root / FOLDER
    there = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    found = [p for p in there if name and p.name.startswith(name)]
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise UsageError(f"{name!r} begins the names of {len(found)} probes: {names}")
    if not found:
        names = ", ".join(p.name for p in there) or "none"
        raise NotFoundError(f"no probe {name!r} (under {root}: {names}); fit one with residua fit")
    return found[0]


def load_probe_for(cache: "ActivationCache", path: Path, force: bool = False) -> Any:
    """The probe at `path`, checked against the geometry of `cache` unless `force`."""
    probe = load_probe(path)
    try:
        check_belongs(probe, cache, force)
    except MismatchError as error:
        raise MismatchError(f"{path}: {error}") from None
    # Tells probes of one kind apart in a report.
    probe.folder_ = str(path)
    return probe

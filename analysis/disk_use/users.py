"""What names a cache or probe, so that it must stay: probes, extending caches, jobs, pins, fits.

`users_of(root)` looks at everything under a root; `check_unused` is what removal asks once a folder
is out of sight. A cache or probe that cannot be read is named by whatever seems to name it.
"""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...cache.errors import InUseError
from ...cache.files.paths import is_remote, list_folder
from ...cache.format.manifest import EXTENDS, SHORT_ID
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.catalog import UNREADABLE, list_paths
from ...probes.saved.config_file import read_config
from ...probes.saved.library import CHECKPOINTS
from ...probes.saved.probe_list import UNREADABLE as UNREADABLE_PROBE
from ...probes.saved.probe_list import probe_folders
from .checkpoint_folders import is_fit_running
from .job_folders import JobOnDisk, list_jobs
from .pins import list_pins


@dataclass(frozen=True)
class User:
    """Something that names a cache or probe."""

    kind: str
    """`probe`, `cache` (which extends it), `job`, `pin` or `fit` (which runs)."""
    name: str
    """Name of the probe, cache, job, or of the folder of the fit's checkpoints."""
    note: str = ""
    """Reason of a pin, command and state of a job."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a user."""
        return asdict(self)

    def __str__(self) -> str:
        name = self.name[:SHORT_ID] if self.kind == "cache" else self.name
        if self.kind == "cache":
            return f"cache {name}, which extends it"
        if self.kind == "pin":
            return f"a pin ({self.note})" if self.note else "a pin"
        return f"{self.kind} {name}" + (f" ({self.note})" if self.note else "")


ItemName = tuple[str, str]
"""`cache` or `probe`, and the name of its folder."""


def users_of(root: Path, state: Path | None = None) -> dict[ItemName, list[User]]:
    """Cache or probe under `root` -> what names it; nothing for what nobody names.

    `state` is a service's own folder, where that is not under the root.
    """
    caches = {path.name: _read_cache(path) for path in list_paths(root)}
    probes = probe_folders(root)
    users: dict[ItemName, list[User]] = {}

    def note(kind: str, name: str, user: User) -> None:
        users.setdefault((kind, name), []).append(user)

    for folder, (_, extended, _) in caches.items():
        for base in caches:
            if extended is not None and base != folder and caches[base][0] == extended:
                note("cache", base, User("cache", folder))
    for probe in probes:
        for name in _caches_of_probe(probe, {name: entry[0] for name, entry in caches.items()}):
            note("cache", name, User("probe", probe.name))
    for job in list_jobs(root, state):
        if job.has_ended:
            continue
        user = User("job", job.path.name, f"{job.command}, {job.state}".strip(", "))
        for name, (cache_id, _, is_complete) in caches.items():
            if _job_needs_cache(job, name, cache_id, is_complete):
                note("cache", name, user)
        for probe in probes:
            if job.names(probe.name):
                note("probe", probe.name, user)
    for pin in list_pins(root):
        for kind in ("cache", "probe") if pin.kind == "unknown" else (pin.kind,):
            note(kind, pin.name, User("pin", pin.name, pin.reason))
    for checkpoint in _running_fits(root):
        for name, (cache_id, _, _) in caches.items():
            if f"-{cache_id[:SHORT_ID]}" in checkpoint.name:
                note("cache", name, User("fit", checkpoint.name, "running"))
    return users


def check_unused(
    root: Path, item: ItemName, state: Path | None = None, ignored: Collection[ItemName] = ()
) -> None:
    """Raise `InUseError` if anything but the `ignored` caches and probes names `item`.

    `item` may be out of sight: hidden under another name by its removal.
    """
    if blockers := blocking_users(root, item, state, ignored):
        raise InUseError(refusal(item, blockers))


def blocking_users(
    root: Path, item: ItemName, state: Path | None = None, ignored: Collection[ItemName] = ()
) -> list[User]:
    """What names `item`, which need not be in sight, beside the `ignored` caches and probes."""
    kind, name = item
    blockers = []
    if kind == "cache":
        for path in list_paths(root):
            if _read_cache(path)[1] == name:
                blockers.append(User("cache", path.name))
        blockers += [
            User("probe", probe.name)
            for probe in probe_folders(root)
            if name in _caches_of_probe(probe, {name: name})
        ]
        blockers += [
            User("fit", folder.name, "running")
            for folder in _running_fits(root)
            if f"-{name[:SHORT_ID]}" in folder.name
        ]
    for job in list_jobs(root, state):
        if not job.has_ended and job.names(name):
            blockers.append(User("job", job.path.name, f"{job.command}, {job.state}"))
    pins = [pin for pin in list_pins(root) if pin.name == name and pin.kind in (kind, "unknown")]
    blockers += [User("pin", pin.name, pin.reason) for pin in pins]
    return [user for user in blockers if (user.kind, user.name) not in ignored]


def refusal(item: ItemName, users: Collection[User]) -> str:
    """The message of a removal that `users` forbid."""
    kind, name = item
    shown = name[:SHORT_ID] if kind == "cache" else name
    names = "; ".join(str(user) for user in list(users)[:5])
    more = f"; and {len(users) - 5} more" if len(users) > 5 else ""
    advice = "--force removes it all the same"
    if any(user.kind == "pin" for user in users):
        advice = "`residua pin --remove` takes a pin away, " + advice
    return f"{kind} {shown} is still named by {names}{more}; it was left alone ({advice})"


def _read_cache(path: Path) -> tuple[str, str | None, bool]:
    """Id of a cache, id of the cache that it extends, whether all its parts are there."""
    try:
        cache = ActivationCache(path)
        extended = cache.manifest.extra.get(EXTENDS)
        return cache.id, extended if isinstance(extended, str) else None, cache.complete
    except UNREADABLE:
        return path.name, None, False


def _caches_of_probe(probe: Path, caches: dict[str, str]) -> Iterator[str]:
    """Folders of `caches`, folder -> id, on which the probe in the folder `probe` was fitted.

    Of a damaged probe, those whose id begins as its name says.
    """
    try:
        fitted_on = read_config(probe / "config.json").get("cache")
        yield from (name for name, cache_id in caches.items() if cache_id == fitted_on)
    except UNREADABLE_PROBE:
        yield from (n for n, cache_id in caches.items() if f"-{cache_id[:SHORT_ID]}" in probe.name)


def _job_needs_cache(job: JobOnDisk, name: str, cache_id: str, is_complete: bool) -> bool:
    """Whether a job that goes on names a cache, or may be about to finish it."""
    if job.names(name) or job.names(cache_id):
        return True
    return not is_complete and job.command in ("extract", "repair", "")


def _running_fits(root: Path) -> list[Path]:
    """Folders of checkpoints under `root` in which a fit works."""
    if is_remote(root):
        return []
    folders = (path for path in list_folder(root / CHECKPOINTS) if path.is_dir())
    return sorted(path for path in folders if is_fit_running(path))

"""Leftovers of killed work under a root: told by their names, and removed under their locks.

`leftover_of` knows the names that writers give to unfinished files and folders (cache/README.md,
*Crashes*). A name alone never decides: whoever works there holds a lock, and `remove_leftover`
takes that lock first. Where the file system has no locks, what is younger than a day stays.
"""

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...cache.errors import CorruptError, InUseError, NotFoundError
from ...cache.files.confined_files import check_folders, remove_confined
from ...cache.files.leases import is_file_of, is_locked, lease_part, try_lock
from ...cache.files.object_leases import EXPIRY_SECONDS, object_lease
from ...cache.files.paths import is_remote, list_folder, store_of
from ...cache.files.removal import POLL_SECONDS
from ...cache.files.removal import PREFIX as REMOVAL_PREFIX
from ...cache.files.staging import UNLOCKED_SECONDS
from ...cache.format.layout import MAX_PARTS
from ...cache.sharing.flat_export import STAGING_PREFIX as EXPORT_PREFIX
from ...cache.sharing.hub import PULL_SECONDS
from ...cache.sharing.root_transfer import PREFIX as COPY_PREFIX
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.cache_creation import STAGING_PREFIX as CACHE_PREFIX
from ...probes.moments.kept_moments import FOLDER as MOMENTS
from ...probes.saved.library import FOLDER as PROBES
from ...probes.saved.save import FILES as PROBE_FILES
from ...probes.saved.save import STAGING_PREFIX as PROBE_PREFIX
from .job_folders import JOBS, STATE_FOLDERS
from .pins import FOLDER as PINS

DAY = 24 * 3600.0
HEX = r"[0-9a-f]{32}"
CACHE_ID = re.compile(r"[0-9a-f]{64}")
ROOT_FOLDERS = (
    (re.compile(re.escape(CACHE_PREFIX) + HEX), "a cache whose making was stopped", 0.0),
    (re.compile(re.escape(REMOVAL_PREFIX) + HEX), "a removal that was stopped", 0.0),
    (re.compile(re.escape(COPY_PREFIX) + HEX), "a copy that was stopped", PULL_SECONDS),
    (re.compile(rf"\.pull-{HEX}"), "a pull that was stopped", PULL_SECONDS),
    (re.compile(rf"{re.escape(EXPORT_PREFIX)}{HEX}\.tmp"), "an export that was stopped", 0.0),
)
"""Hidden folders of a root: name, what they are, and the age from which they go.

A copy or a pull goes on in its folder when it is started again."""
INNER_FOLDER = re.compile(
    rf"{re.escape(REMOVAL_PREFIX)}{HEX}|{re.escape(CACHE_PREFIX)}{HEX}|{re.escape(PROBE_PREFIX)}{HEX}\.tmp|\.{HEX}\.tmp"
)
"""Hidden folders in those of probes, moments and jobs."""
STORE_TRIAL = re.compile(rf"\.probe-{HEX}")
TEMPORARY = re.compile(r"\..+\.\d{1,10}\.tmp", re.DOTALL)
"""Files that `write_atomically`, writers of shards and links make, `.<name>.<pid>.tmp`."""
PARTIAL = re.compile(rf".*\.{HEX}\.partial", re.DOTALL)
"""Files that zarr makes beside those that it replaces."""
SHARD = re.compile(r"(residual/\d{1,5}|logits/[a-z]+)/c/(\d{1,7})(/0)?", re.ASCII)
"""A shard below `arrays.zarr`: its array, its part."""
TEMPORARY_SHARD = re.compile(
    r"(?:residual/\d{1,5}|logits/[a-z]+)/c/(?:(\d{1,7})/\.0|\.(\d{1,7}))\.\d{1,10}\.tmp", re.ASCII
)
TEMPORARY_RECORD = re.compile(r"\.(\d{8})\.(?:\d+\.)?json\.\d{1,10}\.tmp", re.ASCII)
LEASE_OBJECT = re.compile(r"([a-z]+|\d{8})\.\d+\.json", re.ASCII)
LEASE_SECONDS = 10 * EXPIRY_SECONDS
"""Age from which the object of a lease is listed as one of a dead holder."""


@dataclass(frozen=True)
class Leftover:
    """A file or folder that killed work left, or that somebody is just making."""

    name: str
    """Path below the root, with `/`."""
    what: str
    """What it is, for people."""
    guard: str
    """What its maker locks: `folder` (itself), `file` (itself), `part` (a lease), `layers`, `lease`
    (the object is one), `upload` (the lease of making), `none`."""
    least_age: float = 0.0
    """Seconds without a change before it counts as left."""
    part: int = 0
    """Part of the cache, where the guard is `part`."""

    @property
    def cache(self) -> str:
        """Name of the cache's folder, for guards of a cache."""
        return self.name.partition("/")[0]


def leftover_of(parts: Sequence[str], remote: bool = False) -> Leftover | None:
    """The leftover to which the file of this path belongs, by its names alone; None for others.

    `parts` are the names from the root on; that a folder is a cache, the caller knows.
    """
    top, name = parts[0], "/".join(parts)
    if remote:
        return _leftover_object(parts)
    for pattern, what, least_age in ROOT_FOLDERS:
        if len(parts) > 1 and pattern.fullmatch(top):
            return Leftover(top, what, "folder", least_age)
    if top == PROBES and len(parts) > 2:
        if INNER_FOLDER.fullmatch(parts[1]):
            return Leftover("/".join(parts[:2]), "a probe that was not finished", "folder")
        temporary = {f".{file}." for file in PROBE_FILES}
        if TEMPORARY.fullmatch(parts[2]) and parts[2].startswith(tuple(temporary)):
            return Leftover(name, "a file that was not finished", "file")
        return None
    if top in STATE_FOLDERS:
        if len(parts) > 3 and parts[1] == JOBS and INNER_FOLDER.fullmatch(parts[2]):
            return Leftover("/".join(parts[:3]), "a job that was not finished", "folder")
        return None
    if top == PINS:
        is_temporary = len(parts) == 2 and TEMPORARY.fullmatch(parts[1])
        return Leftover(name, "a pin that was not finished", "file") if is_temporary else None
    return _leftover_in_cache(parts)


def _leftover_in_cache(parts: Sequence[str]) -> Leftover | None:
    """As `leftover_of`, for a file in a cache on disk."""
    name, last = "/".join(parts), parts[-1]
    if len(parts) > 3 and parts[1] == MOMENTS and INNER_FOLDER.fullmatch(parts[2]):
        return Leftover("/".join(parts[:3]), "moments that were not finished", "folder")
    what = "a file that was not finished"
    if parts[1:2] == ("arrays.zarr",) or (len(parts) > 1 and parts[1] == "arrays.zarr"):
        below = "/".join(parts[2:])
        if match := TEMPORARY_SHARD.fullmatch(below):
            return Leftover(name, what, "part", part=int(match[1] or match[2]))
        if PARTIAL.fullmatch(last):
            return Leftover(name, what, "layers")
        if TEMPORARY.fullmatch(last):
            return Leftover(name, what, "file", DAY)
        return None
    if not TEMPORARY.fullmatch(last) or len(parts) < 2:
        return None
    if parts[1] == "journal" and (match := TEMPORARY_RECORD.fullmatch(last)):
        return Leftover(name, what, "part", part=int(match[1]))
    return Leftover(name, what, "file")


def _leftover_object(parts: Sequence[str]) -> Leftover | None:
    """As `leftover_of`, in an object store, where objects appear whole."""
    name = "/".join(parts)
    if len(parts) == 1 and STORE_TRIAL.fullmatch(parts[0]):
        return Leftover(name, "a trial of the store", "none", DAY)
    if len(parts) == 3 and parts[1] == "leases" and LEASE_OBJECT.fullmatch(parts[2]):
        return Leftover(name, "a lease of a dead process", "lease", LEASE_SECONDS)
    return None


def interrupted_upload(cache_id: str) -> Leftover:
    """Objects of a cache in a store that has no manifest, which is written last."""
    return Leftover(cache_id, "an upload that was stopped", "upload", 3600.0)


def lost_part(cache_id: str, part: int) -> Leftover:
    """Shards of a part of a cache on disk that no record names."""
    name = f"{cache_id}/part {part}"
    return Leftover(name, "shards that no record names", "part", part=part)


def is_in_use(root: Path, leftover: Leftover, now: float | None = None) -> bool:
    """Whether somebody works at `leftover`, or may do so; makes no file."""
    if leftover.guard in ("lease", "upload", "none"):
        return False  # asked for when it goes, which takes as long as leases take to expire
    path = root / leftover.name
    if leftover.guard == "part":
        path = root / leftover.cache / "leases" / f"{leftover.part:08d}.lock"
    elif leftover.guard == "layers":
        path = root / leftover.cache / "leases" / "layers.lock"
    locked = is_locked(path)
    if locked is not None:
        return locked
    try:
        age = (time.time() if now is None else now) - os.lstat(path).st_mtime
    except OSError:
        return False
    return age < UNLOCKED_SECONDS


def remove_leftover(root: Path, leftover: Leftover) -> None:
    """Remove `leftover` under the lock of its maker; raises `InUseError` if somebody works there.

    Nothing there is no error: its maker went on, or another collected it.
    """
    if is_remote(root):
        _remove_objects(root, leftover)
        return
    guards = {"folder": _locked_path, "file": _locked_path, "part": _locked_part}
    with guards.get(leftover.guard, _locked_layers)(root, leftover):
        remove_confined(root, leftover.name)


def remove_lost_part(root: Path, cache_id: str, part: int) -> int:
    """Remove the shards of a part that no record names, under its lease; the number of files.

    Raises `InUseError` while a process writes the part, `CorruptError` if a record is damaged.
    """
    leftover = lost_part(cache_id, part)
    with _locked_part(root, leftover):
        cache = ActivationCache(root / cache_id)
        shards = unrecorded_shards(cache, part)
        for shard in shards:
            remove_confined(cache.path, shard)
    return len(shards)


def unrecorded_shards(cache: ActivationCache, part: int) -> list[str]:
    """Names of the shards of `part`, below a cache on disk, that no record names."""
    recorded = cache.journal.arrays_of(part)
    names = []
    for folder in ("residual", "logits"):
        for array in sorted(list_folder(cache.path / "arrays.zarr" / folder)):
            if f"{folder}/{array.name}" in recorded:
                continue
            for shard in (f"c/{part}/0", f"c/{part}"):
                name = f"arrays.zarr/{folder}/{array.name}/{shard}"
                if SHARD.fullmatch(name.partition("/")[2]) and (cache.path / name).is_file():
                    names.append(name)
    return names


@contextmanager
def _locked_path(root: Path, leftover: Leftover) -> Iterator[None]:
    """Lock the file or folder itself within the context."""
    path = root / leftover.name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        locked = try_lock(descriptor)
        if locked is None:
            locked = time.time() - os.fstat(descriptor).st_mtime > UNLOCKED_SECONDS
        if not locked or not is_file_of(descriptor, path):
            raise InUseError(f"{path} is being written by another process")
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _locked_part(root: Path, leftover: Leftover) -> Iterator[None]:
    """Hold the lease of the leftover's part within the context."""
    cache = _checked_cache(root, leftover)
    with lease_part(cache / "leases", min(leftover.part, MAX_PARTS)) as lease:
        if lease is None:
            raise InUseError(f"part {leftover.part} of {cache} is being written")
        yield


@contextmanager
def _locked_layers(root: Path, leftover: Leftover) -> Iterator[None]:
    """Hold the lock of a cache's new layers within the context, if nobody has it."""
    file = _checked_cache(root, leftover) / "leases" / "layers.lock"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InUseError(f"{file.parent.parent} gets new layers just now") from None
    finally:
        os.close(descriptor)


def _checked_cache(root: Path, leftover: Leftover) -> Path:
    """Folder of the leftover's cache, whose folder of leases is a real one."""
    cache = root / leftover.cache
    check_folders(cache, ("leases", "journal", "arrays.zarr"))
    if not (cache / "leases").is_dir():
        raise NotFoundError(f"{cache} has no folder of leases")
    return cache


def _remove_objects(root: Path, leftover: Leftover) -> None:
    """Remove a leftover in an object store."""
    path = root / leftover.name
    if leftover.guard == "none":
        path.unlink(missing_ok=True)
        return
    cache = root / leftover.cache
    name = "create"
    if leftover.guard == "lease":
        match = LEASE_OBJECT.fullmatch(path.name)
        if match is None:
            raise CorruptError(f"{path} is no lease")
        name = match[1]
    # A holder of another machine counts as dead once its object has not changed for a while.
    until = time.monotonic() + EXPIRY_SECONDS + 2 * POLL_SECONDS
    while True:
        try:
            with object_lease(cache / "leases", name) as lease:
                if lease is not None:
                    if leftover.guard == "upload":
                        _remove_upload(cache)
                    return  # a released lease takes the objects of dead holders with it
        except OSError as error:
            if error.errno != errno.EBUSY:  # else its holder wrote the lease while it was read
                raise
        if time.monotonic() > until:
            raise InUseError(f"the lease {name} of {cache} is held by a living process")
        time.sleep(POLL_SECONDS)


def _remove_upload(cache: Path) -> None:
    """Remove the objects of a cache without a manifest, but for its leases."""
    if (cache / "manifest.json").is_file():
        raise InUseError(f"{cache} has been finished meanwhile")
    store, key = store_of(cache)
    leases = f"{key.rstrip('/')}/leases/"
    if objects := [name for name in store.find(key) if not name.startswith(leases)]:
        store.rm(objects)

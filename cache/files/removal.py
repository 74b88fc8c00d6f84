"""Removes folders of caches and probes: at once for readers, and never one that is being written.

A folder is renamed to `.rm-*` beside its place, which takes it away whole, and then emptied. What a
killed removal left is removed by the next one. In an object store, which has no rename, the object
that makes the folder valid goes first.
"""

import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from ..errors import InUseError, UsageError
from .json_files import sync_folder
from .leases import lease_holder, try_lock
from .object_leases import EXPIRY_SECONDS, object_lease, object_lease_holder
from .paths import is_remote, list_folder, store_of
from .staging import sweep_staging

PREFIX = ".rm-"
"""Beginning of the names of folders that are being removed."""
LOCK_FOLDER = "leases"
"""Folder of lock files; folders of moments that a fit fills have locks of their own."""
POLL_SECONDS = 0.5
"""Pause between two attempts to take a lease whose holder may be dead."""


def _allow(folder: Path) -> None:
    """Object to no removal."""


def remove_folder(path: Path, marker: str, check: Callable[[Path], None] = _allow) -> None:
    """Remove the folder `path`, a cache or a probe; `marker` is the file that makes it one.

    Hard links that other folders have to its files stay whole. `check` is called with the folder
    once that is locked and out of sight: if it raises, the folder is back as it was. Raises
    `UsageError` for a link, and `InUseError` while another process holds a lock in the folder;
    where the file system has no locks, nothing tells a writer.
    """
    if is_remote(path):
        _remove_objects(path, marker, check)
        return
    if path.is_symlink():
        raise UsageError(
            f"{path} is a link to {os.readlink(path)}: remove the folder that it names"
        )
    sweep_staging(path.parent, f"{PREFIX}*")
    removed = path.with_name(f"{PREFIX}{uuid.uuid4().hex}")
    with ExitStack() as stack:
        locked: set[int] = set()
        _take_locks(stack, locked, path, path)
        os.rename(path, removed)
        try:
            # A writer that came between the look at the locks and the new name has one now.
            _take_locks(stack, locked, removed, path)
            check(removed)
        except BaseException:
            os.rename(removed, path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(removed)


def _take_locks(stack: ExitStack, locked: set[int], folder: Path, name: Path) -> None:
    """Lock what writers lock in `folder`, and the folder itself, until `stack` is closed.

    `locked` has the inodes that are locked already. Raises `InUseError`, which calls the folder
    `name`, if another process holds a lock.
    """
    for file in _lock_files(folder):
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # gone, or a link of strangers: no lock of a writer
            continue
        stack.callback(os.close, descriptor)
        if (inode := os.fstat(descriptor).st_ino) in locked:
            continue
        if try_lock(descriptor) is False:
            raise InUseError(
                f"{name} is being written by {_holder(folder, file)}; wait for its end, or stop "
                "it, and remove the folder then"
            )
        locked.add(inode)


def _lock_files(folder: Path) -> list[Path]:
    """Files and folders in `folder` that its writers lock, and the folder itself."""
    files = [folder]
    for below, pattern in ((LOCK_FOLDER, "*.lock"), ("moments", ".*.tmp")):
        if not (folder / below).is_symlink():
            files += sorted((folder / below).glob(pattern))
    return files


def _holder(folder: Path, file: Path) -> str:
    """Process and host that hold the lock `file`, as far as they are known."""
    if re.fullmatch(r"[0-9]{8}\.lock", file.name):
        return lease_holder(folder / LOCK_FOLDER, int(file.stem))
    return "another process"


def _remove_objects(path: Path, marker: str, check: Callable[[Path], None]) -> None:
    """Remove the objects under the remote folder `path`, `marker` first, and its leases last.

    A lease that is not known to be free is watched for as long as leases take to expire.
    """
    leases = path / LOCK_FOLDER
    with ExitStack() as stack:
        for name in sorted({entry.name.partition(".")[0] for entry in list_folder(leases)}):
            until = time.monotonic() + EXPIRY_SECONDS + 2 * POLL_SECONDS
            while stack.enter_context(object_lease(leases, name)) is None:
                if time.monotonic() > until:
                    holder = object_lease_holder(leases, name)
                    raise InUseError(
                        f"{path} is being written by {holder}; wait for its end, or stop it, and "
                        "remove the folder then"
                    )
                time.sleep(POLL_SECONDS)
        check(path)
        (path / marker).unlink(missing_ok=True)
        store, key = store_of(path)
        prefix = f"{store_of(leases)[1].rstrip('/')}/"
        objects = [name for name in store.find(key) if not name.startswith(prefix)]
        if objects:
            store.rm(objects)
    with suppress(FileNotFoundError):
        store.rm(store_of(path)[1], recursive=True)


def exclusive_bytes(path: Path) -> tuple[int, int]:
    """Bytes of the files under `path` that removal frees, and of those that other folders link.

    A file that has several names under `path` counts once.
    """
    if is_remote(path):
        store, key = store_of(path)
        return sum(entry["size"] or 0 for entry in store.find(key, detail=True).values()), 0
    names_of: dict[tuple[int, int], int] = {}
    freed = shared = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            status = os.lstat(file)
            if stat.S_ISDIR(status.st_mode):
                continue
            inode = status.st_dev, status.st_ino
            names_of[inode] = names_of.get(inode, 0) + 1
            # Of a file with several names, the last of them frees it.
            freed += status.st_size if names_of[inode] == status.st_nlink else 0
            shared += status.st_size if names_of[inode] == 1 else 0
    return freed, shared - freed

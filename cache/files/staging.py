"""Staging folders: filled beside the target and then renamed, so that the target appears whole.

Caches (`create_cache`, `pull_cache`), exports and kept moments are written this way. A staging
folder is locked while its maker lives; the folder of a maker that died is swept, or taken up again
by the next maker if the folder is resumable. An object store cannot rename folders: there, the
staging folder is uploaded, and the object that makes the target valid is written last.
"""

import ctypes
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .json_files import make_folder, sync_folder, sync_tree
from .leases import is_file_of, try_lock
from .paths import is_remote

UNLOCKED_SECONDS = 24 * 3600.0
"""Age at which a staging folder counts as abandoned where the file system has no locks."""
TEMPORARY_PREFIX = "residua-"
"""Beginning of the names of folders in the system's folder for temporary files."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Arguments of Linux's renameat2: paths as usual, and the exchange of two names."""
RENAME_SWAP = 2
"""Argument of macOS' renamex_np: the exchange of two names."""


@contextmanager
def staging_folder(
    parent: Path, prefix: str, suffix: str = "", mode: int = 0o777
) -> Iterator[Path]:
    """A new folder `<prefix><random><suffix>` in `parent`, locked within the context.

    The end of the context removes the folder, unless `publish_folder` has renamed it. Give a
    `prefix` that begins with a dot, so that readers of `parent` skip the folder. If `parent` is in
    an object store, the folder is a temporary one of this machine, to be uploaded. `mode` are the
    permissions of the folder, less the process's umask.
    """
    if is_remote(parent):
        with temporary_folder() as folder:
            yield folder
        return
    make_folder(parent)
    while True:
        staging = parent / f"{prefix}{uuid.uuid4().hex}{suffix}"
        staging.mkdir(mode)
        try:
            descriptor = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:  # another process swept the folder before it was locked
            continue
        try:
            if try_lock(descriptor) is False or not is_file_of(descriptor, staging):
                continue
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return
        finally:
            os.close(descriptor)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder of this process alone, in the system's folder for temporary files.

    Folders that killed processes of this user left there are removed first.
    """
    parent = Path(tempfile.gettempdir())
    sweep_staging(parent, f"{TEMPORARY_PREFIX}*.tmp")
    with staging_folder(parent, TEMPORARY_PREFIX, ".tmp", mode=0o700) as folder:
        yield folder


@contextmanager
def resumable_staging_folder(path: Path, discard_on: tuple[type[Exception], ...]) -> Iterator[Path]:
    """The folder `path`, new or left by a maker that failed, locked within the context.

    The folder is removed at the end of the context, and by the errors `discard_on`; any other error
    leaves the folder for the next maker. Raises `BlockingIOError` while another process fills the
    folder.
    """
    make_folder(path.parent)
    while True:
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # its last maker removed it just now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_file_of(descriptor, path):
                continue
            os.utime(path)  # in use again: `sweep_staging` counts from now
            try:
                yield path
            except discard_on:
                shutil.rmtree(path, ignore_errors=True)
                raise
            else:
                shutil.rmtree(path, ignore_errors=True)
            return
        finally:
            os.close(descriptor)


def publish_folder(staging: Path, target: Path, marker: str | None = None) -> None:
    """Rename `staging` to `target`, durably and at once; an empty folder `target` is replaced.

    If another process published `target` first, their folder stays: a target with the file `marker`
    is no error. Any other failure to rename raises `OSError`.
    """
    sync_tree(staging)
    try:
        os.rename(staging, target)
    except OSError:
        if marker is None or not (target / marker).is_file():
            raise
    sync_folder(target.parent)


def exchange_folder(staging: Path, target: Path) -> bool:
    """Exchange the folders `staging` and `target` at once, durably: readers see either whole.

    False, with nothing done, where the system or the file system cannot exchange two names.
    """
    sync_tree(staging)
    if not _exchange_names(os.fsencode(staging), os.fsencode(target)):
        return False
    sync_folder(target.parent)
    return True


def _exchange_names(first: bytes, second: bytes) -> bool:
    """Call renameat2 of Linux, or renamex_np of macOS, which Python lacks."""
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        return library.renameat2(AT_FDCWD, first, AT_FDCWD, second, RENAME_EXCHANGE) == 0
    if hasattr(library, "renamex_np"):
        return library.renamex_np(first, second, RENAME_SWAP) == 0
    return False


def sweep_staging(parent: Path, pattern: str, unused_seconds: float = 0.0) -> None:
    """Remove the staging folders in `parent` whose names match `pattern` and whose makers died.

    Folders that were changed in the last `unused_seconds` stay. Without file locks, a folder older
    than `UNLOCKED_SECONDS` counts as abandoned.
    """
    for staging in parent.glob(pattern):
        try:
            descriptor = os.open(staging, os.O_RDONLY)
        except OSError:
            continue
        try:
            age = time.time() - os.fstat(descriptor).st_mtime
            abandoned = try_lock(descriptor)
            if abandoned is None:
                abandoned = age > UNLOCKED_SECONDS
            if abandoned and age >= unused_seconds:
                shutil.rmtree(staging, ignore_errors=True)
        finally:
            os.close(descriptor)

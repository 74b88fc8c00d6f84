"""Staging folders: filled beside the target and then renamed, so that the target appears whole.

Caches (`create_cache`, `pull_cache`), exports and kept moments are written this way. A staging
folder is locked while its maker lives; the folder of a maker that died is swept, or taken up again
by the next maker if the folder is resumable. An object store cannot rename folders: there, the
staging folder is uploaded, and the object that makes the target valid is written last.
"""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from .json_files import make_folder, sync_folder, sync_tree
from .leases import try_lock
from .paths import is_remote

UNLOCKED_SECONDS = 24 * 3600.0
"""Age at which a staging folder counts as abandoned where the file system has no locks."""


@contextmanager
def staging_folder(parent: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """A new folder `<prefix><random><suffix>` in `parent`, locked within the context.

    The end of the context removes the folder, unless `publish_folder` has renamed it. Give a
    `prefix` that begins with a dot, so that readers of `parent` skip the folder. If `parent` is in
    an object store, the folder is a temporary one of this machine, to be uploaded.
    """
    if is_remote(parent):
        with TemporaryDirectory(prefix="residua-") as folder:
            yield Path(folder)
        return
    make_folder(parent)
    while True:
        staging = parent / f"{prefix}{uuid.uuid4().hex}{suffix}"
        staging.mkdir()
        try:
            descriptor = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:  # another process swept the folder before it was locked
            continue
        try:
            if try_lock(descriptor) is False or not _is_open(descriptor, staging):
                continue
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return
        finally:
            os.close(descriptor)


@contextmanager
def resumable_staging_folder(path: Path, discard_on: tuple[type[Exception], ...]) -> Iterator[Path]:
    """The folder `path`, new or left by a maker that failed, locked within the context.

    The folder is removed at the end of the context, and by the errors `discard_on`; any other error
    leaves the folder for the next maker. Raises `BlockingIOError` while another process fills the
    folder.
    """
    make_folder(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield path
        except discard_on:
            shutil.rmtree(path, ignore_errors=True)
            raise
        else:
            shutil.rmtree(path, ignore_errors=True)
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


def sweep_staging(parent: Path, pattern: str) -> None:
    """Remove the staging folders in `parent` whose names match `pattern` and whose makers died.

    Without file locks, a folder older than `UNLOCKED_SECONDS` counts as abandoned.
    """
    for staging in parent.glob(pattern):
        try:
            descriptor = os.open(staging, os.O_RDONLY)
        except OSError:
            continue
        try:
            abandoned = try_lock(descriptor)
            if abandoned is None:
                abandoned = time.time() - os.fstat(descriptor).st_mtime > UNLOCKED_SECONDS
            if abandoned:
                shutil.rmtree(staging, ignore_errors=True)
        finally:
            os.close(descriptor)


def _is_open(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the folder that was opened as `descriptor`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False

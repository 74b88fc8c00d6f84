"""Copies a cache from one root to another by path: a shared disk of a cluster, an object store.

`copy_cache` is the public function; `residua push CACHE ROOT` and `residua pull PATH` call it. On
one disk the copy has hard links to the files of the cache, which never change in place.
"""

import hashlib
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from ..errors import CorruptError, IncompleteError, MismatchError, UsageError
from ..files.confined_files import check_regular, open_confined
from ..files.json_files import make_folder
from ..files.paths import is_remote, total_bytes
from ..files.staging import resumable_staging_folder, sweep_staging, temporary_folder
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.cache_creation import CACHE_FOLDERS, publish_cache
from .flat_files import check_space, write_errors
from .hub import PULL_SECONDS, PulledCache, cache_files, check_bytes, open_complete

PREFIX = ".copy-"
"""Beginning of the names of folders that a copy fills."""


def copy_cache(
    cache: ActivationCache,
    root: Path,
    *,
    expect: str | None = None,
    verify: bool = True,
    progress: StageProgress | None = None,
) -> PulledCache:
    """Copy a complete cache into `root`, another root; the copy is verified before it appears.

    `expect` is the beginning of an id: a cache with another id raises `MismatchError`. Moments and
    the names of local files stay behind. `progress` is called for the stages `copy` and `verify`
    (files, shards). A cache that `root` has already is left alone (status `hit`).

    An interrupted copy goes on where it stopped. Raises `IncompleteError` for an unfinished cache,
    `CorruptError` for damaged bytes, `NoSpaceError`, and `UsageError` for a root that cannot be
    written or while another process makes the same copy.
    """
    if expect is not None and not cache.id.startswith(expect):
        raise MismatchError(f"{cache.path} is cache {cache.id[:12]}, not {expect[:12]}")
    cache.check_complete()
    target = root / cache.id
    if (target / "manifest.json").is_file():
        return PulledCache(open_complete(target), "hit", None)
    names = sorted(cache_files(cache.path))
    with write_errors(root), ExitStack() as stack:
        # Files are copied to a disk; a root in an object store gets them afterwards.
        parent = root
        if is_remote(root):
            parent = stack.enter_context(temporary_folder())
        make_folder(parent)
        sweep_staging(parent, f"{PREFIX}*", unused_seconds=PULL_SECONDS)
        digest = hashlib.sha256(f"{cache.path.absolute()}@{cache.id}".encode()).hexdigest()[:32]
        try:
            staging = stack.enter_context(
                resumable_staging_folder(
                    parent / f"{PREFIX}{digest}", (CorruptError, IncompleteError, MismatchError)
                )
            )
        except BlockingIOError:
            raise UsageError("another process is copying this cache; wait for it") from None
        _copy_files(cache, names, staging, progress)
        if verify:
            check_bytes(staging, progress)
        ActivationCache(staging).check_complete()
        publish_cache(staging, target)
    return PulledCache(ActivationCache(target), "copied", None)


def _copy_files(
    cache: ActivationCache, names: list[str], staging: Path, progress: StageProgress | None
) -> None:
    """Link or copy the files `names` of `cache` into `staging`; what is there already stays."""
    for folder in CACHE_FOLDERS:
        (staging / folder).mkdir(exist_ok=True)
    has_links = _can_link(cache.path, staging)
    if not has_links:
        done = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
        need = cache.bytes - total_bytes(cache.path / "moments") - done
        check_space(staging, max(0, need), "free some, or name another root")
    for number, name in enumerate(names):
        if progress is not None:
            progress("copy", number, len(names))
        target = staging / name
        if target.is_file():
            continue
        check_regular(cache.path, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if has_links:
            os.link(cache.path / name, target, follow_symlinks=False)
            continue
        # Whole or not at all, for a copy that goes on after an interruption.
        temporary = target.with_name(f".{target.name}.part")
        with open_confined(cache.path, name) as source, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        os.replace(temporary, target)
    if progress is not None:
        progress("copy", len(names), len(names))


def _can_link(source: Path, staging: Path) -> bool:
    """Whether files of `source` can have a hard link in `staging`: one disk, one owner."""
    if is_remote(source):
        return False
    trial = staging / ".link"
    trial.unlink(missing_ok=True)  # of a copy that was killed
    try:
        os.link(source / "manifest.json", trial, follow_symlinks=False)
    except OSError:
        return False
    trial.unlink()
    return True

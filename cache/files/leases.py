"""Leases: which process may write a part of a cache, or change the cache as a whole.

On disk a lease is a file under `leases/`, locked with flock: the kernel drops the lock when its
process ends in any way, so a lock never has to expire and is never taken over. The file names the
holder, for messages alone, and stays. In an object store, which has no locks, a lease is an object
that expires (`object_leases.py`), so a holder must `check` it before every commit. Extraction,
repair and growth take the lease of a part by `lease_part`; creation and new layers use `hold_lock`.
"""

import fcntl
import os
import re
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from ..errors import UsageError
from .json_files import make_folder
from .object_leases import held_object_leases, object_lease, object_lease_holder
from .paths import is_remote

LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
"""A lock file is never a link: its content is written, and a stranger's cache may hold links."""
MAX_VANISHED = 1000
"""Times that the folder of a lock may vanish while the lock is taken."""
WAIT_SECONDS = 0.2
"""Pause between two attempts to take a lease in an object store."""


class Lease(Protocol):
    """A lease that this process holds: a `FileLease` or an `ObjectLease`."""

    def check(self) -> None:
        """Raise `LeaseLostError` if another worker took the lease over meanwhile."""
        ...


class FileLease:
    """A file lock of the kernel, which no other process can take over."""

    def check(self) -> None:
        """Do nothing: the lock lasts as long as the process or the context."""


@contextmanager
def lease_part(folder: Path, part: int) -> Iterator[Lease | None]:
    """Hold the lease of `part` within the context; yields None if another process has the lease.

    `folder` is the cache's `leases/`. Raises `UsageError` if the file system has no locks.
    """
    if is_remote(folder):
        with object_lease(folder, f"{part:08d}") as lease:
            yield lease
        return
    descriptor = os.open(_lock_file(folder, part), LOCK_FLAGS, 0o644)
    try:
        is_locked = try_lock(descriptor)
        if is_locked is None:
            raise UsageError(
                f"the file system of {folder} has no file locks, so that two processes could "
                "write one part; choose a --root on another disk, or mount this one with locks"
            )
        if is_locked:
            _write_holder(descriptor)
        yield FileLease() if is_locked else None
    finally:
        # Closing the file drops the lock.
        os.close(descriptor)


@contextmanager
def hold_lock(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock `name` within the context, after waiting for any process that has the lock."""
    if is_remote(folder):
        while True:
            with object_lease(folder, name) as lease:
                if lease is not None:
                    yield
                    return
            time.sleep(WAIT_SECONDS)
    descriptor = os.open(folder / f"{name}.lock", LOCK_FLAGS, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def wait_for_lock(file: Path) -> Iterator[None]:
    """Lock `file` within the context, after waiting for any process that has locked it.

    The file and its folder are made. The holder may remove both before the end of the context:
    who waits for a file that was removed makes and locks a new one. Without file locks (some
    network disks) the context is entered at once.
    """
    vanished = 0
    while True:
        try:
            make_folder(file.parent)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another process removed the folder just now
            vanished += 1
            if vanished > MAX_VANISHED:
                raise
            continue
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_file_of(descriptor, file):
                yield
                return
        finally:
            os.close(descriptor)


def is_file_of(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the file or folder that was opened as `descriptor`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder without waiting.

    Returns False if another process has the lock, None if the file system has no locks. A stopped
    process keeps its locks; a process that ends, in any way, loses them.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def lease_holder(folder: Path, part: int) -> str:
    """Process and host of the last holder of the lease of `part`, such as `process 12 on host`."""
    if is_remote(folder):
        return object_lease_holder(folder, f"{part:08d}")
    try:
        pid, host = _lock_file(folder, part).read_text().split()
    except (OSError, ValueError):
        return "another process"
    return f"process {pid} on {host}"


def _lock_file(folder: Path, part: int) -> Path:
    return folder / f"{part:08d}.lock"


def _write_holder(descriptor: int) -> None:
    """Write process and host into the lock file, for `lease_holder`."""
    with suppress(OSError):  # a full disk matters to messages alone
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def held_leases(folder: Path, parts: Collection[int]) -> dict[int, str]:
    """Part -> holder of those of `parts` whose lease a process of this machine has just now.

    The leases are not touched: a reader that tried to lock one would keep a worker from it. The
    kernel lists its locks in /proc/locks; empty on systems without it, and for processes of other
    machines. In an object store a lease of a dead holder counts until another worker takes it over.
    """
    if is_remote(folder):
        return held_object_leases(folder, parts)
    locked = _kernel_locks()
    held = {}
    for part in parts if locked else ():
        with suppress(OSError):
            if _place_of(os.lstat(_lock_file(folder, part))) in locked:
                held[part] = lease_holder(folder, part)
    return held


def _kernel_locks() -> set[tuple[int, int, int]]:
    """Device (major, minor) and inode of the files that processes of this machine have locked."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return set()
    locked = set[tuple[int, int, int]]()
    for line in lines:  # 1: FLOCK  ADVISORY  WRITE 4711 fd:01:123456 0 EOF
        if match := re.search(r" FLOCK .* ([0-9a-f]+):([0-9a-f]+):(\d+) ", line):
            locked.add((int(match[1], 16), int(match[2], 16), int(match[3])))
    return locked


def _place_of(status: os.stat_result) -> tuple[int, int, int]:
    return os.major(status.st_dev), os.minor(status.st_dev), status.st_ino


def is_locked(path: Path) -> bool | None:
    """Whether a process has locked the file or folder `path` on a disk; no link is followed.

    False for what is not there, None if the file system has no locks. A lock that the kernel lists
    is not touched; else the file is locked for a moment, to see.
    """
    try:
        if _place_of(os.lstat(path)) in _kernel_locks():
            return True
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:  # a link, or nothing that may be opened: no lock of ours
        return None
    try:
        taken = try_lock(descriptor)
        return None if taken is None else not taken
    finally:
        os.close(descriptor)

"""Leases: who works on which part, by file locks that the kernel drops when a process dies.

In an object store, which has no locks, by objects that expire (`objectlease`).
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from ..errors import UsageError
from .object_leases import object_lease, object_lease_holder
from .paths import is_remote

WAIT_SECONDS = 0.2
"""Pause between looks at a lease in an object store that another worker has."""


class Lease(Protocol):
    """A lease that is held."""

    def check(self) -> None:
        """Raise `LeaseLostError` if another worker took it over meanwhile."""
        ...


class FileLease:
    """A lock that the kernel keeps: nobody takes it over."""

    def check(self) -> None:
        """It is held as long as the process lives."""


@contextmanager
def lease_part(folder: Path, part: int) -> Iterator[Lease | None]:
    """Hold the lease of `part` within the context; yields None if another process has it.

    Raises `UsageError` where the file system has no locks.
    """
    if is_remote(folder):
        with object_lease(folder, f"{part:08d}") as held:
            yield held
        return
    descriptor = os.open(_path(folder, part), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        mine = try_lock(descriptor)
        if mine is None:
            raise UsageError(
                f"the file system of {folder} has no file locks, so that two processes could "
                "write one part; choose a --root on another disk, or mount this one with locks"
            )
        if mine:
            _sign(descriptor)
        yield FileLease() if mine else None
    finally:
        os.close(descriptor)


@contextmanager
def hold_lock(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock `name` within the context; waits for a process that has it."""
    if is_remote(folder):
        while True:
            with object_lease(folder, name) as held:
                if held is not None:
                    yield
                    return
            time.sleep(WAIT_SECONDS)
    descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder; False if another process holds it, None if there are no locks.

    A process that is stopped keeps its locks; one that dies, in whatever way, loses them.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def lease_holder(folder: Path, part: int) -> str:
    """Who wrote last into the lease file of `part`, such as `process 12 on host`."""
    if is_remote(folder):
        return object_lease_holder(folder, f"{part:08d}")
    try:
        pid, host = _path(folder, part).read_text().split()
    except (OSError, ValueError):
        return "another process"
    return f"process {pid} on {host}"


def _path(folder: Path, part: int) -> Path:
    return folder / f"{part:08d}.lock"


def _sign(descriptor: int) -> None:
    """Write who holds the lease into its file, for people; a full disk does not matter here."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)

"""Leases: who works on which part, by file locks that the kernel drops when a process dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lease(folder: Path, part: int) -> Iterator[bool]:
    """Hold the lease of `part` within the context; yields False if another process has it."""
    descriptor = os.open(folder / f"{part:08d}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)

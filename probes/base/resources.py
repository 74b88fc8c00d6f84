"""Cores, BLAS threads and memory that a fit may use, and its progress."""

import os
import threading
from contextlib import AbstractContextManager
from typing import Any

from ...cache.cluster import threads_of
from ...cache.progress import Progress


class ProgressCounter:
    """Counts positions of several threads and tells a callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, positions: int) -> None:
        with self._lock:
            self.done += positions
            if self._progress is not None:
                self._progress(self.done, self.total)


def one_blas_thread() -> AbstractContextManager[Any]:
    """Limit BLAS to one thread in the whole process, while each core works on its own task.

    To be entered by the thread that waits for the tasks: what a task's thread asks for is undone
    by the first task that ends.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def available_cores(client: Any = None) -> int:
    """Threads of the cluster of `client`, or cores that this process may use."""
    from dask.system import CPU_COUNT

    return CPU_COUNT if client is None else max(1, sum(threads_of(client).values()))


MEMORY = 2 << 30
"""Default budget in bytes, where a quarter of the machine's memory is not less."""


def default_memory() -> int:
    """`MEMORY`, or a quarter of the machine's memory if that is less; bytes."""
    return min(MEMORY, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)

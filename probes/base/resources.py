"""Cores, BLAS threads and memory that a fit may use, and a progress count for its threads."""

import os
import threading
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ...cache.cluster import threads_of
from ...cache.devices import choose_accelerator
from ...cache.progress import Progress

if TYPE_CHECKING:
    import torch

MEMORY = 2 << 30
"""Largest default budget of a fit, in bytes; less on machines with less than four times that."""


def default_memory() -> int:
    """Default budget of a fit in bytes: `MEMORY`, or a quarter of a smaller machine's memory."""
    return min(MEMORY, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)


def available_cores(client: Any = None) -> int:
    """Threads of the cluster of `client` (of `dask.distributed`), or cores of this process."""
    from dask.system import CPU_COUNT

    return CPU_COUNT if client is None else max(1, sum(threads_of(client).values()))


def device_of_fit(
    device: "str | torch.device" = "auto", client: Any = None
) -> "torch.device | None":
    """The device of a fit; None for the CPU, where `auto` finds no GPU, or with a `client`.

    Workers of `client` compute on their CPUs unless a device is named, which each of them then has.
    Raises `ModelError` for a device that cannot be used.
    """
    if client is None:
        return choose_accelerator(device)
    if device == "auto" or str(device) == "cpu":
        return None
    import torch

    return torch.device(device)


def one_blas_thread() -> AbstractContextManager[Any]:
    """Limit BLAS to one thread in the whole process, while each core works on its own task.

    The thread that waits for the tasks must enter the context: a limit set in the thread of a
    task is undone by the first task that ends.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


class ProgressCounter:
    """Adds up the positions of several threads and reports (done, total) to a callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.done: int = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, positions: int) -> None:
        """Count `positions` more; called from any thread."""
        with self._lock:
            self.done += positions
            if self._progress is not None:
                self._progress(self.done, self.total)

"""Threads that share independent fits; each runs its own, fixed number of torch's threads.

`ThreadCrew` serves the regressions of a vocabulary probe (`vocabulary/descent.py`) and the groups
of rows of a causal basis; on a device, whose work comes from one thread, it has none. `thread_pool`
also serves `top_tokens.py` and the workers of a cluster.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import get_num_threads, set_num_threads

from .softmax_loss import ParameterTensors

CPU = torch.device("cpu")
_starting = threading.Lock()


@dataclass
class ThreadCrew:
    """Threads that share the regressions of a fit, with gradient buffers for each thread."""

    workers: int
    """Number of threads; 0: the thread that calls `map` does the work."""
    threads: int = 1
    """Number of torch's threads of each worker."""
    _local: threading.local = field(default_factory=threading.local)

    @classmethod
    def of(cls, regressions: int, device: torch.device = CPU) -> "ThreadCrew":
        """A thread for each regression, at most as many as torch uses; torch's are shared out.

        On a `device` other than the CPU the calling thread does the work.
        """
        if device.type != "cpu":
            return cls(0)
        cores = torch.get_num_threads()
        workers = max(1, min(regressions, cores))
        return cls(workers, max(1, cores // workers))

    def __enter__(self) -> "ThreadCrew":
        self._pool = thread_pool(self.workers, self.threads) if self.workers else None
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Results of `work(item)` for all items, in their order; the first error is raised."""
        return list(map(work, items) if self._pool is None else self._pool.map(work, items))

    def gradient_buffers(self, parameters: ParameterTensors) -> ParameterTensors:
        """Tensors shaped as `parameters`, reused for every regression that this thread fits."""
        shapes = tuple((name, tuple(value.shape)) for name, value in parameters.items())
        buffers = self._local.__dict__.setdefault("buffers", {})
        if shapes not in buffers:
            buffers[shapes] = {name: torch.empty_like(v) for name, v in parameters.items()}
        return buffers[shapes]


def thread_pool(workers: int, threads: int = 1) -> ThreadPoolExecutor:
    """A pool of `workers` threads, each of which runs `threads` of torch's threads.

    torch gives a new thread the number that any thread last set. The number from before is set
    again afterwards, so that threads outside the pool do not inherit that of the pool.
    """
    ready = threading.Barrier(workers + 1)

    def start() -> None:
        get_num_threads()  # torch otherwise sets the inherited number later, over ours
        set_num_threads(threads)
        ready.wait()

    with _starting:
        number_before = _call_in_new_thread(get_num_threads)
        pool = ThreadPoolExecutor(workers, initializer=start)
        # A pool starts a thread for each submitted call; wait until all have set their number.
        for _ in range(workers):
            pool.submit(int)
        ready.wait()
        _call_in_new_thread(set_num_threads, number_before)
    return pool


def _call_in_new_thread(function: Callable[..., Any], *args: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()

"""Threads that share independent work; each runs its own, fixed number of torch's threads."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import get_num_threads, set_num_threads

from .softmax_loss import ParameterTensors

_starting = threading.Lock()


def thread_pool(workers: int, threads: int = 1) -> ThreadPoolExecutor:
    """`workers` threads, each of which runs `threads` of torch's.

    torch gives every thread that is new the number that any thread asked for last. The one from
    before is put back, so that nothing leaks into the threads of others.
    """
    ready = threading.Barrier(workers + 1)

    def start() -> None:
        get_num_threads()  # asks torch for the number of new threads, which it would do later
        set_num_threads(threads)
        ready.wait()

    with _starting:
        before = _in_a_new_thread(get_num_threads)
        pool = ThreadPoolExecutor(workers, initializer=start)
        for _ in range(workers):
            pool.submit(int)
        ready.wait()
        _in_a_new_thread(set_num_threads, before)
    return pool


def _in_a_new_thread(work: Callable[..., Any], *args: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *args).result()


@dataclass
class ThreadCrew:
    """Threads that share the regressions, and room for gradients for each of them."""

    workers: int
    threads: int = 1
    """torch's threads of each worker."""
    _local: threading.local = field(default_factory=threading.local)

    @classmethod
    def of(cls, regressions: int) -> "ThreadCrew":
        """A thread for each regression, as far as there are cores."""
        there = torch.get_num_threads()
        workers = max(1, min(regressions, there))
        return cls(workers, max(1, there // workers))

    def __enter__(self) -> "ThreadCrew":
        self._pool = thread_pool(self.workers, self.threads)
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def each(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """`work` done for all items; the first error is raised."""
        return list(self._pool.map(work, items))

    def room(self, like: ParameterTensors) -> ParameterTensors:
        """Tensors shaped as `like`, the same ones for every regression that this thread fits."""
        key = tuple((name, tuple(value.shape)) for name, value in like.items())
        kept = self._local.__dict__.setdefault("room", {})
        if key not in kept:
            kept[key] = {name: torch.empty_like(value) for name, value in like.items()}
        return kept[key]

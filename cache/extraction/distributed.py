"""One extraction by the workers of a dask.distributed cluster, which share a root through leases.

One worker makes the empty cache; then every worker loads the model and writes the parts that no
other holds. Parts of a worker that dies are taken over, in the end by the driver itself.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster import connected, threads_of
from ..errors import UsageError
from ..files.paths import is_remote
from ..forward.stage_times import StageTimes
from ..forward.write_parts import done_positions, missing_parts
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.catalog import cache_root
from .answer_request import Extraction, answer_request
from .request import ExtractionRequest

if TYPE_CHECKING:
    from distributed import Client, Future

POLL_SECONDS = 0.25
"""Least pause between looks at the journal."""
GRACE_SECONDS = 10.0
"""Time without any worker after which the driver goes on alone; a nanny restarts dead ones."""
MOST_DEATHS = 3
"""Workers that die, per worker, before the driver finishes alone."""
NO_PART = "1000000000/1000000000"
"""A share of the parts so small that none is in it: the cache is made, and left empty."""


def answer_at_address(
    scheduler: str,
    request: ExtractionRequest,
    progress: StageProgress | None = None,
    stages: StageTimes | None = None,
) -> Extraction:
    """`run_on` the workers of the scheduler at an address like `tcp://host:8786`."""
    with connected(scheduler) as client:
        assert client is not None
        return answer_on_cluster(client, request, progress, stages)


def answer_on_cluster(
    client: "Client",
    request: ExtractionRequest,
    progress: StageProgress | None = None,
    stages: StageTimes | None = None,
) -> Extraction:
    """Answer `request` by all workers of `client`, which see the same files as the driver.

    Raises what a worker raised if all of them failed; workers that die are only slower.
    """
    if request.part is not None:
        raise UsageError("part and a scheduler exclude each other: its workers share all parts")
    began = time.perf_counter()
    request = _absolute(request)
    stages = StageTimes() if stages is None else stages
    made = _make(client, request)
    written = int(made["written"])
    if made["status"] != "hit":
        cache = ActivationCache(made["path"])
        for done in _share(client, request, cache, progress):
            stages.merge(done["stages"])
            written += done["written"]
    last = answer_request(request, None, stages)
    seconds = time.perf_counter() - began
    return replace(last, status=made["status"], written=written + last.written, seconds=seconds)


def _absolute(request: ExtractionRequest) -> ExtractionRequest:
    """The request with paths that mean the same in every worker's folder."""
    names = {}
    for field in ("model", "data"):
        path = Path(getattr(request, field)).expanduser()
        if path.exists():
            names[field] = str(path.resolve())
    root = cache_root(request.root)
    return replace(request, root=root if is_remote(root) else root.resolve(), **names)


def _make(client: "Client", request: ExtractionRequest) -> dict[str, Any]:
    """Find the cache or make it, empty, on one worker; here if no worker lives long enough."""
    threads_of(client)
    request = replace(request, part=NO_PART)
    future = client.submit(_work, request, pure=False)
    seen = time.monotonic()

    def is_working() -> bool:
        nonlocal seen
        if client.nthreads():
            seen = time.monotonic()
        return future.status == "pending" and time.monotonic() - seen < GRACE_SECONDS

    try:
        _watch(is_working)
        _raise_failure([future])
        return future.result() if future.status == "finished" else _work(request)
    finally:
        future.cancel()


def _work(request: ExtractionRequest) -> dict[str, Any]:
    """What one worker does; the result travels without the cache."""
    return answer_request(request).to_dict()


def _share(
    client: "Client",
    request: ExtractionRequest,
    cache: ActivationCache,
    progress: StageProgress | None,
) -> list[dict[str, Any]]:
    """Let every worker write parts until none is missing; what those that finished did."""
    crew = WorkerTasks(client, request)

    def tell() -> None:
        if progress is not None:
            progress("extract", done_positions(cache), cache.positions)

    try:
        _watch(crew.is_working, tell)
        if not crew.done and missing_parts(cache):
            _raise_failure(crew.failed)
        return crew.done
    finally:
        crew.dismiss()


class WorkerTasks:
    """One task on every worker of `client`, also on those that come later.

    Tasks are bound to their workers: dask would hand the task of one that died to another, which
    has its own. Workers that die again and again are given up.
    """

    def __init__(self, client: "Client", request: ExtractionRequest) -> None:
        self.client = client
        self.request = request
        self.done: list[dict[str, Any]] = []
        self.failed: list[Future] = []
        self._tasks: dict[str, Future] = {}
        self._ended: set[str] = set()
        self._deaths = 0
        self._seen = time.monotonic()

    def is_working(self) -> bool:
        """Whether some worker is at it, or may still come back."""
        there: Any = self.client.nthreads()
        for address in list(self._tasks):
            self._check(address, address in there)
        if there and self._deaths < MOST_DEATHS * (len(there) + 1):
            self._seen = time.monotonic()
            if self._tasks or not self._ended:
                self._hire(set(there) - set(self._tasks) - self._ended)
        waits = not self._ended and time.monotonic() - self._seen < GRACE_SECONDS
        return bool(self._tasks) or waits

    def _hire(self, addresses: set[str]) -> None:
        for address in addresses:
            self._tasks[address] = self.client.submit(
                _work, self.request, workers=[address], pure=False
            )

    def _check(self, address: str, is_there: bool) -> None:
        """Note what became of the task of a worker."""
        task = self._tasks[address]
        if task.status == "finished" and is_there:
            with suppress(TimeoutError):  # it dies just now
                self.done.append(task.result(timeout=GRACE_SECONDS))
        elif task.status == "error":
            self.failed.append(task)
        elif is_there and task.status == "pending":
            return
        else:
            task.cancel()
            self._deaths += 1
            del self._tasks[address]
            return
        self._ended.add(address)
        del self._tasks[address]

    def dismiss(self) -> None:
        """Let go of every task."""
        for task in [*self._tasks.values(), *self.failed]:
            task.cancel()


def _watch(is_working: Callable[[], bool], tell: Callable[[], None] = lambda: None) -> None:
    """Call `tell` now and then while `is_working`, and once after."""
    while is_working():
        began = time.monotonic()
        tell()
        # A journal of many parts takes long to read: never more than a tenth of the time.
        time.sleep(max(POLL_SECONDS, 10 * (time.monotonic() - began)))
    tell()


def _raise_failure(futures: "list[Future]") -> None:
    """Raise the error of a worker that did not just die."""
    from distributed.scheduler import KilledWorker

    for future in futures:
        if future.status == "error" and not isinstance(error := future.exception(), KilledWorker):
            assert isinstance(error, BaseException)
            raise error

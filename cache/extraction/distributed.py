"""One extraction by all workers of a dask.distributed cluster, which write under a shared root.

One worker makes the empty cache. Then every worker loads the model and writes the parts that no
other worker has leased (`files/leases.py`). Workers that die are replaced by the others, in the
end by the driver, the process that holds the client. `residua.extract(client=...)` and
`residua extract --scheduler` come here; every worker runs `answer_request`.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster import connected, threads_of
from ..documents.data_files import STANDARD_INPUT, is_pattern
from ..errors import UsageError
from ..files.paths import is_remote
from ..forward.stage_times import StageTimes
from ..forward.write_parts import done_positions, missing_parts
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.catalog import cache_root
from .answer import Extraction, answer_request
from .request import ExtractionRequest

if TYPE_CHECKING:
    from distributed import Client, Future

POLL_SECONDS = 0.25
"""Shortest pause between two looks at the tasks and the journal."""
GRACE_SECONDS = 10.0
"""Time without any worker after which the driver goes on alone; a nanny restarts dead workers."""
MOST_DEATHS = 3
"""Deaths per worker after which the driver goes on alone."""
EMPTY_SHARE = "1000000000/1000000000"
"""A share of the parts with no part in it: the cache is made and left empty."""


def answer_at_address(
    scheduler: str,
    request: ExtractionRequest,
    progress: StageProgress | None = None,
    stages: StageTimes | None = None,
) -> Extraction:
    """`answer_on_cluster` for the scheduler at an address like `tcp://host:8786`."""
    with connected(scheduler) as client:
        assert client is not None
        return answer_on_cluster(client, request, progress, stages)


def answer_on_cluster(
    client: "Client",
    request: ExtractionRequest,
    progress: StageProgress | None = None,
    stages: StageTimes | None = None,
) -> Extraction:
    """Answer `request` with all workers of `client`, which must see the driver's files.

    Raises the error of a worker if all workers failed. Workers that die only cost time.
    """
    if request.given:
        raise UsageError(
            "workers of a cluster read model and texts themselves; give paths or hub ids, not a "
            "loaded model or texts in Python"
        )
    if request.part is not None:
        raise UsageError("part and a scheduler exclude each other: its workers share all parts")
    if request.data == STANDARD_INPUT:
        raise UsageError(
            "the workers of a scheduler cannot read standard input; write the texts into a file "
            "that they see"
        )
    began = time.perf_counter()
    request = _with_absolute_paths(request)
    stages = StageTimes() if stages is None else stages

    # One worker finds the cache or makes it, empty.
    first = _find_or_make_cache(client, request)
    written = int(first["written"])

    # All workers write parts.
    if first["status"] != "hit":
        cache = ActivationCache(first["path"])
        for result in _write_parts_on_workers(client, request, cache, progress):
            stages.merge(result["stages"])
            written += result["written"]

    # The driver writes what no worker wrote, and opens the cache.
    last = answer_request(request, None, stages)
    return replace(
        last,
        status=first["status"],
        written=written + last.written,
        seconds=time.perf_counter() - began,
    )


def _with_absolute_paths(request: ExtractionRequest) -> ExtractionRequest:
    """The request with absolute paths: workers run in other folders than the driver."""
    absolute = {}
    for name in ("model", "data"):
        path = Path(getattr(request, name)).expanduser()
        if path.exists():  # else a hub id
            absolute[name] = str(path.resolve())
        elif is_pattern(getattr(request, name)):
            absolute[name] = str(path.absolute())
    root = cache_root(request.root)
    return replace(request, root=root if is_remote(root) else root.resolve(), **absolute)


def _find_or_make_cache(client: "Client", request: ExtractionRequest) -> dict[str, Any]:
    """Find the cache or make it, empty, on any worker; on the driver if all workers died."""
    threads_of(client)  # raises if the cluster has no worker
    request = replace(request, part=EMPTY_SHARE)
    task = client.submit(_answer_on_worker, request, pure=False)
    last_seen = time.monotonic()

    def is_pending() -> bool:
        nonlocal last_seen
        if client.nthreads():
            last_seen = time.monotonic()
        return task.status == "pending" and time.monotonic() - last_seen < GRACE_SECONDS

    try:
        _poll(is_pending)
        _raise_worker_error([task])
        return task.result() if task.status == "finished" else _answer_on_worker(request)
    finally:
        task.cancel()


def _answer_on_worker(request: ExtractionRequest) -> dict[str, Any]:
    """The task of one worker; returns the extraction's JSON object, not the cache."""
    return answer_request(request).to_dict()


def _write_parts_on_workers(
    client: "Client",
    request: ExtractionRequest,
    cache: ActivationCache,
    progress: StageProgress | None,
) -> list[dict[str, Any]]:
    """Let every worker write parts until none is missing; the results of finished workers.

    Raises the error of a worker if no worker finished and parts are missing.
    """
    tasks = WorkerTasks(client, request)

    def report_progress() -> None:
        if progress is not None:
            progress("extract", done_positions(cache), cache.positions)

    try:
        _poll(tasks.are_running, report_progress)
        if not tasks.results and missing_parts(cache):
            _raise_worker_error(tasks.failed)
        return tasks.results
    finally:
        tasks.cancel()


class WorkerTasks:
    """One task on every worker of `client`, workers that join later included.

    A task is bound to its worker: dask would move the task of a dead worker to another worker,
    which has a task already. After `MOST_DEATHS` deaths per worker no task is submitted again.
    """

    def __init__(self, client: "Client", request: ExtractionRequest) -> None:
        self.client = client
        self.request = request
        self.results: list[dict[str, Any]] = []
        """Results of finished tasks."""
        self.failed: list[Future[Any]] = []
        """Tasks that raised an error."""
        self._running: dict[str, Future] = {}
        """Address of the worker -> task."""
        self._ended: set[str] = set()
        """Addresses of workers whose task finished or failed."""
        self._deaths = 0
        self._last_seen = time.monotonic()

    def are_running(self) -> bool:
        """Whether a task runs, or a worker may still come back; also submits missing tasks."""
        workers: Any = self.client.nthreads()
        for address in list(self._running):
            self._collect(address, is_alive=address in workers)

        # New workers get a task, while none has finished all parts and deaths are few.
        if workers and self._deaths < MOST_DEATHS * (len(workers) + 1):
            self._last_seen = time.monotonic()
            if self._running or not self._ended:
                self._submit(set(workers) - set(self._running) - self._ended)

        may_return = not self._ended and time.monotonic() - self._last_seen < GRACE_SECONDS
        return bool(self._running) or may_return

    def _submit(self, addresses: set[str]) -> None:
        for address in addresses:
            self._running[address] = self.client.submit(
                _answer_on_worker, self.request, workers=[address], pure=False
            )

    def _collect(self, address: str, is_alive: bool) -> None:
        """Move the task of a worker to results, failures or deaths, unless the task still runs."""
        task = self._running[address]
        if task.status == "finished" and is_alive:
            with suppress(TimeoutError):  # the worker died before the result was fetched
                self.results.append(task.result(timeout=GRACE_SECONDS))
        elif task.status == "error":
            self.failed.append(task)
        elif is_alive and task.status == "pending":
            return
        else:
            task.cancel()
            self._deaths += 1
            del self._running[address]
            return
        self._ended.add(address)
        del self._running[address]

    def cancel(self) -> None:
        """Cancel every task, also the failed ones, which dask would keep."""
        for task in [*self._running.values(), *self.failed]:
            task.cancel()


def _poll(is_running: Callable[[], bool], report: Callable[[], None] = lambda: None) -> None:
    """Call `report` now and then while `is_running()`, and once after."""
    while is_running():
        began = time.monotonic()
        report()
        # A journal of many parts takes long to read: at most a tenth of the time goes there.
        time.sleep(max(POLL_SECONDS, 10 * (time.monotonic() - began)))
    report()


def _raise_worker_error(tasks: "list[Future]") -> None:
    """Raise the first error of `tasks` that is not the death of a worker."""
    from distributed.scheduler import KilledWorker

    for task in tasks:
        if task.status == "error" and not isinstance(error := task.exception(), KilledWorker):
            assert isinstance(error, BaseException)
            raise error

"""The dask workers of jobs: a cluster of this process, or a scheduler elsewhere.

`JobWorkers` submits one attempt at a time to each worker, so that the death of a worker concerns
one job alone. What dask keeps is trusted for nothing but the address of a worker: attempts write
their end to disk, and the queue submits again what was lost.
"""

import logging
import os
from glob import glob
from typing import TYPE_CHECKING, Any

from ...cache.cluster import check_address
from .job_attempt import AttemptOrder, run_attempt
from .job_settings import JobSettings

if TYPE_CHECKING:
    from distributed import Client, Future

ANSWER_SECONDS = 5.0
"""Time that the scheduler has for an answer."""
GPU = "GPU"
"""Resource of dask that a worker with a GPU has: `dask worker --resources GPU=1`."""
CONFIG = {
    # One task in flight per worker; deaths are counted by the queue, from the files of a job.
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.scheduler.allowed-failures": 1000,
    "distributed.worker.daemon": False,
    "distributed.admin.large-graph-warning-threshold": "1GB",
}


def count_gpus() -> int:
    """GPUs that this process sees, without asking a driver."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(glob("/dev/nvidia[0-9]*"))


class JobWorkers:
    """Workers that run attempts: `connect`, `submit`, `idle_worker`; used by one thread."""

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._cluster: Any = None
        self._client: Client | None = None
        self._resources: dict[str, dict[str, Any]] = {}
        """Address of a worker -> its resources, as last seen."""

    @property
    def threads(self) -> int | None:
        """Threads of one job."""
        if self._settings.threads is not None or self._settings.scheduler is not None:
            return self._settings.threads
        cores = len(os.sched_getaffinity(0))
        return max(1, cores // max(1, len(self._resources)))

    @property
    def is_connected(self) -> bool:
        """Whether the scheduler answered when it was last asked."""
        return self._client is not None

    def connect(self) -> str | None:
        """Connect to the scheduler, or start the cluster; returns why that failed, or None."""
        from distributed import Client

        if self._client is not None:
            return None
        address = self._settings.scheduler
        try:
            if address is None:
                self._cluster = self._cluster or start_cluster(self._settings)
                address = str(self._cluster.scheduler_address)
            else:
                check_address(address)
            self._client = Client(
                address,
                timeout=ANSWER_SECONDS,
                set_as_default=False,
                security=None if self._cluster is None else self._cluster.security,
            )
        except Exception as error:  # of dask, of the system, of a library that is missing
            where = self._settings.scheduler or "its own workers"
            return f"waits for the scheduler {where}: {error}"[:500]
        return None

    def look(self) -> str | None:
        """Ask the scheduler for its workers; returns why no job can run, or None.

        A scheduler that does not answer is forgotten: `connect` again.
        """
        if self._client is None:
            return "waits for the scheduler"
        try:
            scheduler: Any = self._client.scheduler
            identity: Any = self._client.sync(
                scheduler.identity, n_workers=-1, callback_timeout=ANSWER_SECONDS
            )
        except Exception as error:  # whatever a broken connection raises
            self.disconnect()
            where = self._settings.scheduler or "of this process"
            return f"the scheduler {where} does not answer ({type(error).__name__}); waits for it"
        workers: dict[str, Any] = identity["workers"]
        self._resources = {
            address: dict(worker.get("resources") or {}) for address, worker in workers.items()
        }
        return None if workers else "waits for a worker"

    def has_worker(self, address: str) -> bool:
        """Whether the worker was there at the last look."""
        return address in self._resources

    def idle_worker(self, busy: set[str], prefers_gpu: bool) -> str | None:
        """Address of a worker that has no job; None if all have one.

        A job that prefers a GPU waits for one, if any worker has one; other jobs take workers
        without GPU first.
        """
        with_gpu = [name for name, has in self._resources.items() if has.get(GPU)]
        others = [name for name in self._resources if name not in with_gpu]
        candidates = with_gpu or others if prefers_gpu else others or with_gpu
        return next((name for name in candidates if name not in busy), None)

    def submit(self, order: AttemptOrder, worker: str) -> "Future":
        """Run an attempt on `worker`."""
        assert self._client is not None
        has_gpu = bool(self._resources.get(worker, {}).get(GPU))
        return self._client.submit(
            run_attempt,
            order,
            pure=False,
            workers=[worker],
            allow_other_workers=False,
            resources={GPU: 1} if has_gpu else None,
        )

    def disconnect(self) -> None:
        """Forget the scheduler."""
        client, self._client, self._resources = self._client, None, {}
        if client is not None:
            try:
                client.close(timeout=ANSWER_SECONDS)
            except Exception:  # the connection may be broken in any way
                return

    def close(self) -> None:
        """Close the client, and the cluster that was started here."""
        self.disconnect()
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.close(timeout=ANSWER_SECONDS)


def start_cluster(settings: JobSettings) -> Any:
    """A cluster of this machine: workers without GPU, and one for each GPU.

    It listens on the loopback interface; other users of the machine have no certificate for it.
    """
    from dask import config
    from distributed import Nanny, Scheduler, SpecCluster
    from distributed.security import Security

    gpus = count_gpus() if settings.gpus is None else settings.gpus
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    server: dict[str, Any] = {
        "host": "127.0.0.1",
        "protocol": "tls://",
        "security": Security.temporary(),
        "dashboard_address": "127.0.0.1:0",
        "dashboard": False,
    }
    shared = {**server, "nthreads": 1, "memory_limit": 0, "silence_logs": logging.ERROR}
    workers: dict[str, Any] = {}
    for number in range(settings.workers):
        # With a GPU in the machine, jobs on other workers must not take it.
        environment = {"CUDA_VISIBLE_DEVICES": ""} if gpus else {}
        workers[f"cpu-{number}"] = {"cls": Nanny, "options": {**shared, "env": environment}}
    for number in range(gpus):
        name = visible[number] if number < len(visible) and visible[number] else str(number)
        options = {**shared, "env": {"CUDA_VISIBLE_DEVICES": name}, "resources": {GPU: 1}}
        workers[f"gpu-{number}"] = {"cls": Nanny, "options": options}
    cluster: dict[str, Any] = {
        "workers": workers,
        "scheduler": {"cls": Scheduler, "options": server},
        "security": server["security"],
        "silence_logs": logging.ERROR,
    }
    with config.set(CONFIG):
        return SpecCluster(**cluster)

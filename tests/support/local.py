"""Clusters of dask on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client, LocalCluster


@contextmanager
def local_client(workers: int = 2, threads: int = 1, processes: bool = False) -> Iterator[Client]:
    """A client of new workers: processes, or else threads of this one."""
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=threads, processes=processes,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):  # fmt: skip
        yield client

"""A dask cluster on this machine, for tests: `local_client`."""

from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client, LocalCluster


@contextmanager
def local_client(workers: int = 2, threads: int = 1, processes: bool = False) -> Iterator[Client]:
    """A client of new workers: processes, or threads of this process."""
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            processes=processes,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client

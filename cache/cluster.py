"""Clusters of dask.distributed: a client of one at an address, its workers, and their results."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from distributed import Client

ANSWER_SECONDS = 10
"""How long a scheduler is waited for."""
GRACE_SECONDS = 10.0
"""How long a cluster without workers is waited for."""


@contextmanager
def connected(scheduler: str | None) -> "Iterator[Client | None]":
    """A client of the scheduler at an address like `tcp://host:8786`; None without an address."""
    if scheduler is None:
        yield None
        return
    from distributed import Client

    check_address(scheduler)
    try:
        client = Client(scheduler, timeout=ANSWER_SECONDS, set_as_default=False)
    except OSError as error:  # TimeoutError is one
        raise UsageError(
            f"no dask scheduler answers at {scheduler} ({error}); start one with `dask scheduler`"
        ) from None
    with client:
        yield client


def check_address(scheduler: str) -> None:
    """Raise `UsageError` for what cannot be an address; a client that met it would hang."""
    from distributed.comm.addressing import parse_address, parse_host_port
    from distributed.comm.registry import get_backend
    from distributed.security import Security

    try:
        scheme, place = parse_address(scheduler)
        get_backend(scheme)
        if scheme != "inproc":
            parse_host_port(place)
        if scheme == "tls" and not Security().get_connection_args("client").get("ssl_context"):
            raise ValueError("no certificate: see distributed.comm.tls in dask's configuration")
    except ValueError as error:
        raise UsageError(
            f"{scheduler!r} is no address of a dask scheduler ({error}); write it like "
            "tcp://host:8786"
        ) from None


def threads_of(client: Any) -> dict[str, int]:
    """Threads of each worker; raises `UsageError` if there is none after `GRACE_SECONDS`."""
    try:
        client.wait_for_workers(1, timeout=GRACE_SECONDS)
    except TimeoutError:
        raise UsageError("the cluster has no workers; start some with `dask worker`") from None
    return client.nthreads()


def results(
    client: Any, work: Callable[..., Any], calls: Iterable[tuple[Any, ...]]
) -> Iterator[Any]:
    """`work(*call)` for all `calls`, on the workers of `client`, in the order of `calls`.

    What is not done yet when the reader leaves is cancelled.
    """
    futures = [client.submit(work, *call, pure=False) for call in calls]
    try:
        for future in futures:
            yield future.result()
            future.release()
    finally:
        for future in futures:
            future.cancel()

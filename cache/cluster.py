"""dask.distributed: a client for a scheduler's address, its workers, and results of calls on them.

Extraction and fits take `scheduler="tcp://host:8786"` or a client; tasks run on the workers with
`results`. distributed is imported only if a scheduler is named.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from distributed import Client

ANSWER_SECONDS = 10
"""Time to wait for the scheduler's answer, in seconds."""
GRACE_SECONDS = 10.0
"""Time to wait for a first worker, in seconds."""


@contextmanager
def connected(scheduler: str | None) -> "Iterator[Client | None]":
    """A client of the scheduler at the address `scheduler`; None if `scheduler` is None.

    Raises `UsageError` if the address is invalid or no scheduler answers.
    """
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
    """Raise `UsageError` unless `scheduler` can be an address: a client would wait for ever."""
    from distributed.comm.addressing import parse_address, parse_host_port
    from distributed.comm.registry import get_backend
    from distributed.security import Security

    try:
        scheme, location = parse_address(scheduler)
        get_backend(scheme)
        if scheme != "inproc":
            parse_host_port(location)
        if scheme == "tls" and not Security().get_connection_args("client").get("ssl_context"):
            raise ValueError("no certificate: see distributed.comm.tls in dask's configuration")
    except ValueError as error:
        raise UsageError(
            f"{scheduler!r} is no address of a dask scheduler ({error}); write it like "
            "tcp://host:8786"
        ) from None


def threads_of(client: Any) -> dict[str, int]:
    """Worker address -> its number of threads.

    Raises `UsageError` if no worker has come after `GRACE_SECONDS`.
    """
    try:
        client.wait_for_workers(1, timeout=GRACE_SECONDS)
    except TimeoutError:
        raise UsageError("the cluster has no workers; start some with `dask worker`") from None
    return client.nthreads()


def results(
    client: Any,
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    workers: Sequence[str] | None = None,
) -> Iterator[Any]:
    """Run `function(*call)` for all `calls` on the workers of `client`; yields in their order.

    With `workers`, addresses, call i prefers worker i of them, in turn: what a worker keeps serves
    the same calls again. Calls that have not ended when the reader stops are cancelled.
    """
    futures = []
    for number, call in enumerate(calls):
        preferred = None if workers is None else [workers[number % len(workers)]]
        options = {} if preferred is None else {"workers": preferred, "allow_other_workers": True}
        futures.append(client.submit(function, *call, pure=False, **options))
    try:
        for future in futures:
            yield future.result()
            future.release()
    finally:
        for future in futures:
            future.cancel()

"""Commits one part in a thread of its own while the model computes the next one."""

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

from .errors import LeaseLostError

Batches = Generator[int | None, None, None]
"""Extracts a part: rows after each batch, None when all that is left to do is to commit."""


class Commits:
    """At most one commit on its way; a part that another worker took over is dropped."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "commit")
        self._last: Future[None] | None = None

    def take(self, batches: Batches) -> None:
        """Let `batches` go on to its end, after the commit before it; raises that one's error."""
        self.wait()
        self._last = self._pool.submit(_finish, batches)

    def wait(self) -> None:
        """Return when nothing is on its way; raises the error of what was."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Let the commit on its way end, whatever comes of it."""
        self._pool.shutdown()


def _finish(batches: Batches) -> None:
    with suppress(LeaseLostError):
        for _ in batches:
            pass


@contextmanager
def commits() -> Iterator[Commits]:
    """Commits of one extraction; the last one has ended when the context does."""
    found = Commits()
    try:
        yield found
        found.wait()
    finally:
        found.close()

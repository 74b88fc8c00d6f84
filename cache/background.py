"""One background thread: runs calls in order, or prepares the items of an iterator ahead.

`PartExtraction` hands the rows of each batch to a `BackgroundThread`, which writes them while the
model computes the next batch; `write_missing_parts` commits parts in another one. Training prepares
minibatches with `iterate_in_background`.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
POLL_SECONDS = 0.1
"""Time between two looks of a thread that cannot go on, in case its reader has left."""


class BackgroundThread:
    """A thread that runs calls in the order of `put`; at most `depth` calls wait for the thread.

    After the first error no further call runs; the error is raised by the next `put` or `wait`, or
    at the end of the context. The end of the context waits for all calls.
    """

    def __init__(self, depth: int = 2) -> None:
        self._calls: queue.Queue[tuple[Callable[..., object], tuple[Any, ...]] | None]
        self._calls = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run_calls, daemon=True)

    def put(self, function: Callable[..., object], *args: Any) -> None:
        """Run `function(*args)` in the thread; waits while `depth` calls are queued.

        Raises the error of an earlier call.
        """
        self._raise_error()
        self._calls.put((function, args))

    def wait(self) -> None:
        """Return when every call has ended; raises the first error."""
        self._calls.join()
        self._raise_error()

    def __enter__(self) -> "BackgroundThread":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self._calls.put(None)
        self._thread.join()
        if kind is None:
            self._raise_error()

    def _run_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            function, args = call
            if self._error is None:
                try:
                    function(*args)
                except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                    self._error = error
            # The next `get` may wait for long: the arguments must not live until then.
            del call, function, args
            self._calls.task_done()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def iterate_in_background(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """Yield `items` in order, of which a thread computes up to `depth` ahead of the reader.

    An error of the iterator is raised here, after the items before the error. A reader that stops
    early ends the thread.
    """
    ready: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue(depth)
    closed = threading.Event()

    def put(entry: tuple[Item] | BaseException | None) -> bool:
        """Queue `entry`; False if the reader has left."""
        while not closed.is_set():
            try:
                ready.put(entry, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def compute_items() -> None:
        try:
            for item in items:
                if not put((item,)):
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the reader's thread
            put(error)

    thread = threading.Thread(target=compute_items, daemon=True)
    thread.start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]
    finally:
        closed.set()
        thread.join()

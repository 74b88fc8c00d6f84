"""Writes the parts that a cache lacks: leased one by one, so that any number of processes share."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import Interrupted
from .grow import ancestor
from .lease import lease
from .runner import PartRunner
from .store import ActivationCache

if TYPE_CHECKING:
    from .stack import Stack

Progress = Callable[[str, int, int], None]
WAIT_SECONDS = 0.2
"""Pause between looks at parts that other processes hold."""


def fill(
    cache: ActivationCache,
    stack: "Stack",
    progress: Progress | None = None,
    share: tuple[int, int] = (1, 1),
    on_error: str = "quarantine",
) -> int:
    """Write every (part, layer) that is not committed; returns the positions written here.

    Parts that another process holds are waited for, and taken over if that process dies. Of a
    `share` (i, n) only every n-th part is written, and nothing is waited for. SIGTERM ends the
    work after the part in hand with `Interrupted`.
    """
    runner = PartRunner(cache, stack, ancestor(cache), on_error)
    written = 0
    with stop_signal() as stopped:
        while missing := missing_parts(cache, share):
            before = written
            for part in missing:
                for rows in _write(cache, runner, part):
                    written += rows
                    if progress is not None:
                        progress("extract", _done(cache, missing) + written, cache.positions)
                if stopped.is_set():
                    raise Interrupted(
                        f"stopped after part {part}; the same command goes on from here"
                    )
            if share != (1, 1):
                break
            if written == before:
                time.sleep(WAIT_SECONDS)
    return written


def _done(cache: ActivationCache, missing: list[int]) -> int:
    """Positions that were there when the work began."""
    return cache.positions - sum(
        stop - start
        for start, stop in (cache.manifest.layout.rows(part, cache.positions) for part in missing)
    )


def missing_parts(cache: ActivationCache, share: tuple[int, int] = (1, 1)) -> list[int]:
    """Parts that lack a layer, of the share (i, n): every n-th, from the i-th on."""
    found = cache.journal.parts()
    names = {f"residual/{layer}" for layer in cache.target_layers}
    number, shares = share
    return [
        part
        for part in range(number - 1, cache.parts, shares)
        if part not in found or names - set(found[part].arrays)
    ]


def _write(cache: ActivationCache, runner: PartRunner, part: int) -> Iterator[int]:
    """Write one part, unless another process holds it or has finished it meanwhile."""
    with lease(cache.path / "leases", part) as mine:
        if not mine:
            return
        record = cache.journal.parts().get(part)
        held = set(record.arrays) if record else set()
        layers = tuple(la for la in cache.target_layers if f"residual/{la}" not in held)
        if layers:
            yield from runner.write_part(part, layers)


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, once; a second SIGTERM ends the process as usual."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(*_: object) -> None:
        stopped.set()
        signal.signal(signal.SIGTERM, previous)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, previous)

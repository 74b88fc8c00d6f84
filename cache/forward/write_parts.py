"""Writes the parts that a cache lacks, so that any number of processes share the work.

A process holds the lease of a part while it writes the part. The model runs in a `PartRunner`, each
part is written by a `PartExtraction`; an extraction (`answer_request`) calls `write_missing_parts`.
"""

import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..background import BackgroundThread
from ..errors import Interrupted, LeaseLostError
from ..files.disk_errors import translate_disk_errors
from ..files.leases import lease_holder, lease_part
from ..files.paths import is_remote
from ..format.layout import array_key, array_name
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.cache_extension import link_part
from ..store.lineage import open_ancestor
from .part_extraction import PartExtraction
from .part_runner import PartRunner
from .stage_times import StageTimes

if TYPE_CHECKING:
    from ..model.blocks import DecoderBlocks

WAIT_SECONDS = 0.2
"""Longest pause between two looks at parts that other processes write."""
FIRST_WAIT_SECONDS = 0.01
"""First pause, for parts that are just being committed; each further one is twice as long."""
NOTICE_SECONDS = 10.0
"""Time without any part to write after which progress names the process that is waited for."""


def write_missing_parts(
    cache: ActivationCache,
    stack: "DecoderBlocks",
    progress: StageProgress | None = None,
    share: tuple[int, int] = (1, 1),
    on_error: str = "quarantine",
    stages: StageTimes | None = None,
) -> int:
    """Write every (part, array) that is not committed; returns the positions written here.

    Parts that another process writes are waited for, and taken over if that process dies. With a
    `share` (i, n) only every n-th part is written, from the i-th on, and no process is waited for.
    `progress` is called with the stage `extract`, in positions. The seconds and bytes of each stage
    of the work are added to `stages`.

    SIGTERM ends the work after the current part with `Interrupted`, SIGINT after the current batch
    with `KeyboardInterrupt`. A disk that is full or gone raises an error of
    `translate_disk_errors`.
    """
    report = progress or (lambda *_: None)
    written = 0
    with translate_disk_errors(cache.path), stop_signals() as stop, BackgroundThread() as commits:
        runner = PartRunner(cache, stack, open_ancestor(cache), on_error, stages)
        idle_since, wait = time.monotonic(), FIRST_WAIT_SECONDS
        while missing := missing_parts(cache, share):
            # One round over the parts that were missing at its beginning.
            done_before = done_positions(cache)
            written_before = written
            for part in missing:
                with closing(_write_part(runner, part, commits)) as batches:
                    for rows in batches:
                        written += rows
                        done = done_before + written - written_before
                        report("extract", done, cache.positions)
                        stop.check()
                if stop.after_part.is_set():
                    commits.wait()
                    _check_finished(cache, share)
                    return written
            commits.wait()

            # Parts that are still missing are being written by other processes.
            if share != (1, 1):
                break
            if written > written_before:
                idle_since, wait = time.monotonic(), FIRST_WAIT_SECONDS
                continue
            if time.monotonic() - idle_since > NOTICE_SECONDS:
                holder = lease_holder(cache.path / "leases", missing[0])
                report(f"waiting for {holder}", done_before, cache.positions)
            stop.after_batch.wait(wait)
            wait = min(2 * wait, WAIT_SECONDS)
            stop.check()
    return written


def _write_part(
    runner: PartRunner, part: int, commits: BackgroundThread
) -> Generator[int, None, None]:
    """Write one part, unless another process writes or has finished it; yields rows per batch.

    The part is committed by `commits`, while the model computes the next part: at most one commit
    runs at a time, and the lease is held until the commit has ended.
    """
    cache = runner.cache
    with ExitStack() as resources:
        lease = resources.enter_context(lease_part(cache.path / "leases", part))
        if lease is None:
            return
        committed = cache.journal.arrays_of(part)
        keys = tuple(array_key(name) for name in cache.target_names if name not in committed)
        if not keys:
            return
        sweep_part(cache, part)
        names = [array_name(key) for key in keys]
        if runner.ancestor is not None and link_part(runner.ancestor, cache, part, names):
            start, stop = cache.manifest.layout.rows(part, cache.positions)
            yield stop - start
            return
        extraction = resources.enter_context(PartExtraction(runner, part, keys, lease))
        yield from extraction.write_batches()
        commits.wait()
        commits.put(_commit_part, extraction, resources.pop_all())


def _commit_part(extraction: PartExtraction, resources: ExitStack) -> None:
    """Commit a part, then release its files and its lease.

    A part that another worker took over is dropped: that worker commits the part.
    """
    with suppress(LeaseLostError), resources:
        extraction.commit()


def sweep_part(cache: ActivationCache, part: int) -> None:
    """Remove temporary files of writers of this part that died; the caller holds the lease."""
    if is_remote(cache.path):  # objects appear whole or not at all
        return
    arrays = cache.path / "arrays.zarr"
    temporary = list(cache.journal.folder.glob(f".{part:08d}.*.tmp"))
    temporary += arrays.glob(f"residual/*/c/{part}/.*.tmp")
    temporary += arrays.glob(f"logits/*/c/{part}/.*.tmp")
    temporary += arrays.glob(f"logits/*/c/.{part}.*.tmp")
    for path in temporary:
        path.unlink(missing_ok=True)


def _check_finished(cache: ActivationCache, share: tuple[int, int]) -> None:
    """Raise `Interrupted` if parts are still to be written."""
    if missing := missing_parts(cache, share):
        raise Interrupted(
            f"stopped by SIGTERM with {len(missing)} parts still to be written; "
            "the same command goes on from here"
        )


def done_positions(cache: ActivationCache) -> int:
    """Number of positions in parts that have all arrays."""
    rows = [cache.manifest.layout.rows(part, cache.positions) for part in missing_parts(cache)]
    return cache.positions - sum(stop - start for start, stop in rows)


def missing_parts(cache: ActivationCache, share: tuple[int, int] = (1, 1)) -> list[int]:
    """Parts that lack an array, of the share (i, n): every n-th part, from the i-th on."""
    records = cache.journal.parts()
    names = set(cache.target_names)
    first, step = share
    return [
        part
        for part in range(first - 1, cache.n_parts, step)
        if part not in records or names - set(records[part].arrays)
    ]


@dataclass(frozen=True)
class StopSignals:
    """Requests to stop, set by signals."""

    after_part: threading.Event
    """Set by SIGTERM: finish the current part, then stop."""
    after_batch: threading.Event
    """Set by SIGINT: finish the current batch, then drop the current part and stop."""

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if SIGINT came."""
        if self.after_batch.is_set():
            raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Turn the first SIGTERM and SIGINT into events; a second signal acts as usual.

    Outside the main thread, which alone may handle signals, the events are never set."""
    stop = StopSignals(threading.Event(), threading.Event())
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    events = {signal.SIGTERM: stop.after_part, signal.SIGINT: stop.after_batch}

    def set_event(number: int, _: object) -> None:
        events[signal.Signals(number)].set()
        signal.signal(number, previous_handlers[signal.Signals(number)])

    previous_handlers = {number: signal.signal(number, set_event) for number in events}
    try:
        yield stop
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

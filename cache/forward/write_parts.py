"""Writes the parts that a cache lacks: leased one by one, so that any number of processes share."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import Interrupted
from ..files.disk_errors import disk_errors
from ..files.leases import lease_holder, lease_part
from ..files.paths import is_remote
from ..format.layout import array_key
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.lineage import open_ancestor
from .part_runner import Batches, PartRunner, commits
from .stage_times import StageTimes

if TYPE_CHECKING:
    from ..model.blocks import DecoderBlocks

WAIT_SECONDS = 0.2
"""Pause between looks at parts that other processes hold."""
NOTICE_SECONDS = 10.0
"""Time without any part to write after which progress says who is waited for."""


def write_missing_parts(
    cache: ActivationCache,
    stack: "DecoderBlocks",
    progress: StageProgress | None = None,
    share: tuple[int, int] = (1, 1),
    on_error: str = "quarantine",
    stages: StageTimes | None = None,
) -> int:
    """Write every (part, array) that is not committed; returns the positions written here.

    Parts that another process holds are waited for, and taken over if that process dies. Of a
    `share` (i, n) only every n-th part is written, and nothing is waited for. SIGTERM ends the
    work after the part in hand with `Interrupted`, SIGINT after the batch in hand; a disk that is
    full or gone with an error of `disk_errors`. `stages` books how long each stage of the work
    was busy. A part is committed while the model computes the next one.
    """
    tell = progress or (lambda *_: None)
    written = 0
    with disk_errors(cache.path), stop_signals() as stop, commits() as committing:
        runner = PartRunner(cache, stack, open_ancestor(cache), on_error, stages)
        idle_since = time.monotonic()
        while missing := missing_parts(cache, share):
            done, before = done_positions(cache), written
            for part in missing:
                batches = _write(cache, runner, part)
                try:
                    for rows in batches:
                        if rows is None:
                            committing.take(batches)
                            break
                        written += rows
                        tell("extract", done + written - before, cache.positions)
                        stop.check()
                except BaseException:
                    batches.close()
                    raise
                if stop.after_part.is_set():
                    committing.wait()
                    _stop(cache, share)
                    return written
            committing.wait()
            if share != (1, 1):
                break
            if written > before:
                idle_since = time.monotonic()
                continue
            if time.monotonic() - idle_since > NOTICE_SECONDS:
                tell(f"waiting for {lease_holder(cache.path / 'leases', missing[0])}", done,
                     cache.positions)  # fmt: skip
            stop.after_batch.wait(WAIT_SECONDS)
            stop.check()
    return written


def _stop(cache: ActivationCache, share: tuple[int, int]) -> None:
    """Raise `Interrupted` unless there is nothing left to do."""
    if left := missing_parts(cache, share):
        raise Interrupted(
            f"stopped by SIGTERM with {len(left)} parts still to be written; "
            "the same command goes on from here"
        )


def done_positions(cache: ActivationCache) -> int:
    """Positions of the parts that lack nothing."""
    rows = [cache.manifest.layout.rows(part, cache.positions) for part in missing_parts(cache)]
    return cache.positions - sum(stop - start for start, stop in rows)


def missing_parts(cache: ActivationCache, share: tuple[int, int] = (1, 1)) -> list[int]:
    """Parts that lack an array, of the share (i, n): every n-th, from the i-th on."""
    found = cache.journal.parts()
    names = set(cache.target_names)
    number, shares = share
    return [
        part
        for part in range(number - 1, cache.n_parts, shares)
        if part not in found or names - set(found[part].arrays)
    ]


def _write(cache: ActivationCache, runner: PartRunner, part: int) -> Batches:
    """Write one part, unless another process holds it or has finished it meanwhile."""
    with lease_part(cache.path / "leases", part) as mine:
        if not mine:
            return
        held = cache.journal.arrays_of(part)
        keys = tuple(array_key(name) for name in cache.target_names if name not in held)
        if keys:
            _sweep(cache, part)
            yield from runner.write_part(part, keys, held=mine)


def _sweep(cache: ActivationCache, part: int) -> None:
    """Remove what writers of this part that died left; only the holder of its lease may."""
    if is_remote(cache.path):  # there, files appear whole or not at all
        return
    arrays = cache.path / "arrays.zarr"
    left = list(cache.journal.folder.glob(f".{part:08d}.*.tmp"))
    for pattern in (f"residual/*/c/{part}/.*.tmp", f"logits/*/c/{part}/.*.tmp",
                    f"logits/*/c/.{part}.*.tmp"):  # fmt: skip
        left += arrays.glob(pattern)
    for path in left:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class StopSignals:
    """What signals ask for."""

    after_part: threading.Event
    """Set by SIGTERM: finish the part in hand."""
    after_batch: threading.Event
    """Set by SIGINT: drop the part in hand, but at a point where nothing is left half done."""

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if SIGINT came."""
        if self.after_batch.is_set():
            raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Turn the first SIGTERM and SIGINT into events; the second one acts as usual."""
    stop = StopSignals(threading.Event(), threading.Event())
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    events = {signal.SIGTERM: stop.after_part, signal.SIGINT: stop.after_batch}

    def note(number: int, _: object) -> None:
        events[signal.Signals(number)].set()
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.signal(number, note) for number in events}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""Progress as lines of a log, for work without a terminal: a batch job, output in a file."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from ...cache.progress import Progress
from .terminal import UNITS

SECONDS = 30.0
"""Time between two lines of a stage."""


@dataclass
class StageState:
    """Where a stage began, and when its last line was printed."""

    began: float
    first: int
    """Amount that was done when this run began: resumed work does not count for the rate."""
    printed: float
    finished: bool = False


class ProgressLines:
    """Prints a line on stderr when a stage begins, every half minute, and at its end.

    Such as `extract: 81,920 of 1,000,000 positions (8 %), 2,731/s, 0:05:36 left`. Has the methods
    of `Meter`.
    """

    def __init__(
        self, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._clock = clock
        self._stages: dict[str, StageState] = {}
        self._notes: dict[str, Callable[[], str]] = {}

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def stage(self, name: str, done: int, total: int) -> None:
        """Note that stage `name` has done `done` of `total`; a `StageProgress` callback."""
        now = self._clock()
        state = self._stages.get(name)
        if state is None or (state.finished and done < total):  # begins, for the first time or anew
            state = self._stages[name] = StageState(began=now, first=done, printed=now)
            self._print(name, f"{done:,} of {total:,} {UNITS.get(name, 'positions')}")
        is_last = done >= total and not state.finished
        if (now - state.printed < self._seconds and not is_last) or state.finished:
            return
        state.printed, state.finished = now, done >= total
        self._print(name, self._format(name, state, now, done, total))

    def progress_of(self, name: str) -> Progress:
        """The callback `(done, total)` of stage `name`."""
        return lambda done, total: self.stage(name, done, total)

    def note(self, name: str, text: Callable[[], str]) -> None:
        """Add `text()` to the later lines of stage `name`."""
        self._notes[name] = text

    def _format(self, name: str, state: StageState, now: float, done: int, total: int) -> str:
        """Amount, share, rate since the stage began in this run, and time that is left."""
        elapsed = now - state.began
        rate = (done - state.first) / elapsed if elapsed > 0 else 0.0
        unit = UNITS.get(name, "positions")
        parts = [f"{done:,} of {total:,} {unit} ({done / total if total else 1:.0%})"]
        parts += [f"{rate:,.0f}/s"] if rate else []
        if done >= total:
            parts.append(f"done in {format_duration(elapsed)}")
        elif rate:
            parts.append(f"{format_duration((total - done) / rate)} left")
        note = self._notes[name]() if name in self._notes else ""
        return ", ".join(parts) + (f"; {note}" if note else "")

    def _print(self, name: str, text: str) -> None:
        print(f"{name}: {text}", file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: `0:05:36`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"

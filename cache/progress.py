"""Progress of long work: callbacks, and what shows it in terminals, notebooks and logs.

Long work calls a function with how far it is. `progress="auto"` of `extract`, `fit` and `evaluate`
shows bars in a terminal (`ProgressBars`) or a notebook (`NotebookBars`); elsewhere, as in a batch
job, `ProgressLog` writes lines to the logger `residua`. The commands show the same through `Meter`
(analysis/console/terminal.py).
"""

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from .errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Task
    from rich.text import Text

Progress = Callable[[int, int], None]
"""Called with (done, total), in the unit that the caller of the work documents."""
StageProgress = Callable[[str, int, int], None]
"""Called with (stage, done, total) by work of several stages, such as `tokenize` and `extract`."""
Auto = Literal["auto"]
"""Bars in terminals and notebooks, lines of the logger `residua` elsewhere."""
LOGGER = logging.getLogger("residua")
LOG_SECONDS = 30.0
"""Time between two lines of the log about one stage."""
UNITS = {
    "answers": "readings",
    "basis": "evaluations",
    "count": "tokens",
    "lens": "steps",
    "readings": "layers",
    "tokenize": "documents",
    "verify": "shards",
}
"""Unit of a stage's progress; positions for other stages."""
_BARS_LOCK = threading.Lock()
"""Held while bars are shown: a terminal has room for those of one call."""


class StageDisplay(Protocol):
    """Shows the progress of stages; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def stage(self, name: str, done: int, total: int) -> None:
        """Show that stage `name` has done `done` of `total`; called from any thread."""
        ...


@contextmanager
def show_stages(progress: StageProgress | Auto | None) -> Iterator[StageProgress | None]:
    """Context that gives the callback of work of several stages.

    `progress` itself if it is a function or None (no progress is shown); the callback of a display
    for `auto`. Raises `UsageError` for anything else.
    """
    if progress is None or callable(progress):
        yield progress
        return
    if progress != "auto":
        raise UsageError(
            f'progress must be "auto", a function or None (nothing is shown), not {progress!r}'
        )
    with choose_display() as display:
        yield display.stage


@contextmanager
def show_stage(progress: Progress | Auto | None, name: str) -> Iterator[Progress | None]:
    """`show_stages` for work of one stage, `name`, whose callback takes (done, total)."""
    if progress is None or callable(progress):
        yield progress
        return
    with show_stages(progress) as report:
        assert report is not None
        yield lambda done, total: report(name, done, total)


def progress_of_stage(progress: StageProgress | None, name: str) -> Progress | None:
    """The callback (done, total) of stage `name`; None where nothing is shown."""
    if progress is None:
        return None
    return lambda done, total: progress(name, done, total)


def choose_display() -> StageDisplay:
    """Bars in a notebook or on a terminal, else lines in the log."""
    if _BARS_LOCK.locked():
        return ProgressLog()
    if _is_notebook():
        return NotebookBars()
    return ProgressBars() if stderr_is_terminal() else ProgressLog()


def stderr_is_terminal() -> bool:
    """Whether a person sees stderr as it is written; FORCE_COLOR says so, too, as for rich."""
    try:
        return bool(os.environ.get("FORCE_COLOR")) or sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stderr, or a closed one
        return False


def _is_notebook() -> bool:
    """Whether this process is the kernel of a notebook, with tqdm to show bars there."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if not hasattr(shell, "kernel"):
        return False
    try:
        with _without_advice_of_tqdm():
            import tqdm.auto  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def _without_advice_of_tqdm() -> Iterator[None]:
    """Context without warnings: where no ipywidgets are installed, tqdm warns, and writes text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class ProgressBars:
    """Bars of stages on a terminal's stderr, with rate and time left (by rich)."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            ProgressColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.text import Text

        class RateColumn(ProgressColumn):
            def render(self, task: "Task") -> "Text":
                speed = task.finished_speed or task.speed
                return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", "cyan")

        class ProgressWithNotes(RichProgress):
            """Notes have a line of their own: beside a bar they would not fit a terminal."""

            def get_renderables(self) -> "Iterator[RenderableType]":
                yield from super().get_renderables()
                for task in self.tasks:
                    if note := notes.get(task.description, str)():
                        yield Text(f"{'':>11}{note}", "dim", no_wrap=True, overflow="ellipsis")

        notes = self._notes = dict[str, Callable[[], str]]()
        self._progress = ProgressWithNotes(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            TaskProgressColumn(),
            RateColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._has_room = _BARS_LOCK.acquire(blocking=False)
        if self._has_room:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._has_room:
            try:
                self._progress.stop()
            finally:
                _BARS_LOCK.release()

    def stage(self, name: str, done: int, total: int) -> None:
        """Show that stage `name` has done `done` of `total`."""
        with self._lock:
            if name not in self._tasks:
                unit = UNITS.get(name, "positions")
                self._tasks[name] = self._progress.add_task(name, total=total, unit=unit)
        self._progress.update(self._tasks[name], completed=done, total=total)

    def note(self, name: str, text: Callable[[], str]) -> None:
        """Show `text()` under the bar of stage `name`; called at every redraw."""
        self._notes[name] = text


class NotebookBars:
    """Bars of stages in a notebook (by tqdm): widgets where they are installed, else text."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}
        self._ended: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for bar in self._bars.values():
            bar.close()

    def stage(self, name: str, done: int, total: int) -> None:
        """Show that stage `name` has done `done` of `total`."""
        with _without_advice_of_tqdm():
            from tqdm.auto import tqdm

        with self._lock:
            if done < total:
                self._ended.discard(name)
            elif name in self._ended:
                return
            if name not in self._bars:
                with _without_advice_of_tqdm():
                    self._bars[name] = tqdm(
                        total=total,
                        desc=name,
                        unit=f" {UNITS.get(name, 'positions')}",
                        unit_scale=True,
                    )
            bar = self._bars[name]
            bar.total = total
            bar.update(done - bar.n)
            if done >= total:
                # Closed now, a bar keeps its time and rate, and the next one needs no line below.
                self._bars.pop(name).close()
                self._ended.add(name)


class ProgressLog:
    """Lines about stages: when a stage begins, every half minute, and at its end.

    A stage shorter than `least_seconds` has no line. `write` takes a line; by default it goes to
    the logger `residua`, level INFO.
    """

    def __init__(
        self, least_seconds: float = 0.0, write: Callable[[str], None] = LOGGER.info
    ) -> None:
        self.least_seconds = least_seconds
        self._write = write
        self._stages: dict[str, _LoggedStage] = {}
        self._notes: dict[str, Callable[[], str]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def stage(self, name: str, done: int, total: int) -> None:
        """Note that stage `name` has done `done` of `total`, and log a line now and then."""
        now = time.monotonic()
        with self._lock:
            stage = self._stages.get(name)
            if stage is None or done < stage.done:
                stage = self._stages[name] = _LoggedStage(now, done, now + self.least_seconds)
            stage.done = done
            unit = UNITS.get(name, "positions")
            seconds = now - stage.began
            if done >= total:
                if not stage.ended and seconds >= self.least_seconds:
                    text = f"{total:,} {unit} in {_time(seconds)}"
                    self._write(f"{name}: {text}{self._note(name)}")
                stage.ended = True
            elif now >= stage.next_line:
                stage.next_line = now + LOG_SECONDS
                text = stage.describe(total, unit, seconds)
                self._write(f"{name}: {text}{self._note(name)}")

    def note(self, name: str, text: Callable[[], str]) -> None:
        """Add `text()` to the lines of stage `name`."""
        self._notes[name] = text

    def _note(self, name: str) -> str:
        note = self._notes[name]() if name in self._notes else ""
        return f"; {note}" if note else ""


class _LoggedStage:
    """State of one stage of a `ProgressLog`."""

    def __init__(self, began: float, done: int, next_line: float) -> None:
        self.began = began
        self.first_done = done
        """Done before this call: a resumed work begins in the middle."""
        self.done = done
        self.next_line = next_line
        self.ended = False

    def describe(self, total: int, unit: str, seconds: float) -> str:
        """`3,200 of 12,000 steps, 41 steps/s, 3 min left`."""
        count = f"{self.done:,} of {total:,} {unit}"
        rate = (self.done - self.first_done) / seconds if seconds > 0 else 0.0
        if not rate:
            return count
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return f"{count}, {speed} {unit}/s, {_time((total - self.done) / rate)} left"


def _time(seconds: float) -> str:
    """A time as text: `4.1 s`, `12 min`, `3.5 h`."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

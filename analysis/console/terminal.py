"""What a terminal shows: progress with rates on stderr, tables on stdout.

The commands of cli.py show a `Meter` while they work; messages.py prints tables with `print_table`.
Names in caches and models are other people's: `visible_text` shows their control characters, so
that none reaches the terminal. While a command works, `other_output_on_stderr` keeps stdout free of
what libraries print.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ...cache.progress import (
    LOG_SECONDS,
    Progress,
    ProgressBars,
    ProgressLog,
    StageDisplay,
    stderr_is_terminal,
)
from .job_report import JobProgress, job_folder

PIPE_WIDTH = 160
"""Width of tables in a pipe or file, in letters."""
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that a terminal obeys (all but tab and line end), that turn the direction of text, or
that cannot be printed."""


class Meter:
    """Progress of named stages on stderr: bars on a terminal, else lines of the log.

    Off a terminal, a stage that takes longer than half a minute has a line each half minute: the
    log of a batch job says what is going on. With `lines`, every stage has lines, on a terminal,
    too. Nothing is shown if `quiet`. A command that runs as a job of the service reports to its
    folder (job_report.py).
    """

    def __init__(self, quiet: bool = False, lines: bool = False) -> None:
        self._display: StageDisplay | None = None
        if (folder := job_folder()) is not None:
            self._display = JobProgress(folder, ProgressLog(LOG_SECONDS, print_line))
            return
        if quiet:
            return
        if stderr_is_terminal() and not lines:
            self._display = ProgressBars()
        else:
            self._display = ProgressLog(0.0 if lines else LOG_SECONDS, print_line)

    def __enter__(self) -> "Meter":
        if self._display is not None:
            self._display.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._display is not None:
            self._display.__exit__(kind, value, trace)

    def stage(self, name: str, done: int, total: int) -> None:
        """Show that stage `name` has done `done` of `total`; a `StageProgress` callback."""
        if self._display is not None:
            self._display.stage(name, done, total)

    def progress_of(self, name: str) -> Progress:
        """The callback `(done, total)` of stage `name`."""
        return lambda done, total: self.stage(name, done, total)

    def note(self, name: str, text: Callable[[], str]) -> None:
        """Show `text()` with stage `name`: under its bar, at every redraw, or in its lines."""
        if isinstance(self._display, ProgressBars | ProgressLog | JobProgress):
            self._display.note(name, text)


def print_line(text: str) -> None:
    """Print `text` on stderr after the time of day; commands turn `logging` off."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def print_warning(text: str) -> None:
    """Print a line that is no progress on stderr."""
    print(visible_text(text), file=sys.stderr, flush=True)


def visible_text(text: str) -> str:
    """`text` with every control character written as an escape, such as `\\x1b`."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class VisibleStream:
    """A text stream that writes `visible_text` to `stream`."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(visible_text(text))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def other_output_on_stderr() -> Iterator[None]:
    """Context in which all that is written to stdout goes to stderr: by Python, C, a subprocess."""
    sys.stdout.flush()
    saved = None
    with suppress(OSError):  # a closed stdout or stderr
        saved = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout; numbers are right-aligned, None is a dash."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(visible_text(title)) or None, box=box.SIMPLE_HEAD, title_justify="left"
    )
    for number, name in enumerate(columns):
        numeric = all(isinstance(row[number], int | float | None) for row in rows) and bool(rows)
        table.add_column(
            escape(visible_text(name)), justify="right" if numeric else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(escape(format_cell(cell)) for cell in row))
    # Colours are escapes, too: they go past the stream that shows escapes. A pipe or file has no
    # width of its own to fold to.
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(file=getattr(sys.stdout, "stream", sys.stdout), width=width).print(table)


def format_cell(cell: object) -> str:
    """A cell of a table as text: `-` for None, three digits of a float, `1,234` for an int."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        if cell and abs(cell) < 5e-4:
            return f"{cell:.1e}"
        return f"{cell:.3f}" if abs(cell) < 1e4 else f"{cell:.4g}"
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return visible_text(str(cell).replace("\n", "\\n"))


def format_bytes(count: int) -> str:
    """A number of bytes as text: `1.5 MB` (powers of 1000)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def bandwidths(stages: dict[str, Any]) -> str:
    """`StageTimes.to_dict` as text: `forward 3.1k tok/s · copy 12 GB/s`; empty if no stage ran."""
    if stages["bottleneck"] is None:
        return ""
    tokens_per_second = round(stages["forward"]["tokens_per_second"] or 0)
    rate = format_bytes(tokens_per_second).rstrip("B").replace(" ", "")
    parts = [f"forward {rate} tok/s"]
    for name in ("copy", "write"):
        if bandwidth := stages[name]["bandwidth"]:
            parts.append(f"{name} {format_bytes(round(bandwidth))}/s")
    return f"{' · '.join(parts)} (bottleneck: {stages['bottleneck']})"


def short_source_name(name: str | None) -> str:
    """Name of a model or data set for a table: the last part of a path, a hub id unchanged."""
    if name is None:
        return "-"
    path = Path(name)
    return path.name if path.is_absolute() or len(path.parts) > 2 else name

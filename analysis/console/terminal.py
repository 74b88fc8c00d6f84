"""What a terminal shows: progress with rates on stderr, tables on stdout.

The commands of cli.py show a `Meter` while they work; messages.py prints tables with `print_table`.
Names in caches and models are other people's: `visible_text` shows their control characters, so
that none reaches the terminal. While a command works, `other_output_on_stderr` keeps stdout free of
what libraries print.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...cache.progress import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Task
    from rich.text import Text

PIPE_WIDTH = 160
"""Width of tables in a pipe or file, in letters."""
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that a terminal obeys (all but tab and line end), that turn the direction of text, or
that cannot be printed."""
UNITS = {
    "basis": "evaluations",
    "lens": "steps",
    "readings": "layers",
    "tokenize": "documents",
    "verify": "shards",
}
"""Unit of a stage's progress; positions for other stages."""


class Meter:
    """Live progress of named stages on stderr: bar, rate, time left; silent without a terminal."""

    def __init__(self, quiet: bool = False) -> None:
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
        console = Console(stderr=True)
        self._progress = ProgressWithNotes(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            TaskProgressColumn(),
            RateColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "Meter":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def stage(self, name: str, done: int, total: int) -> None:
        """Show that stage `name` has done `done` of `total`; a `StageProgress` callback."""
        if name not in self._tasks:
            unit = UNITS.get(name, "positions")
            self._tasks[name] = self._progress.add_task(name, total=total, unit=unit)
        self._progress.update(self._tasks[name], completed=done, total=total)

    def progress_of(self, name: str) -> Progress:
        """The callback `(done, total)` of stage `name`."""
        return lambda done, total: self.stage(name, done, total)

    def note(self, name: str, text: Callable[[], str]) -> None:
        """Show `text()` under the progress of stage `name`; called at every redraw."""
        self._notes[name] = text


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

"""What people see in a terminal: progress with rates on stderr, tables on stdout."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Task
    from rich.text import Text

    from ..evaluation.result import Evaluation

PIPE_WIDTH = 160
UNITS = {"lens": "steps", "tokenize": "documents", "verify": "shards"}
"""Unit of a stage's progress; positions where nothing is said."""


class Meter:
    """Live progress of named stages on stderr: bar, rate, time left; silent without a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            ProgressColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: "Task") -> "Text":
                speed = task.finished_speed or task.speed
                return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", "cyan")

        class Noted(Progress):
            """With notes on a line of their own: beside a bar they would not fit a terminal."""

            def get_renderables(self) -> "Iterator[RenderableType]":
                yield from super().get_renderables()
                for task in self.tasks:
                    if note := notes.get(task.description, str)():
                        yield Text(f"{'':>11}{note}", "dim", no_wrap=True, overflow="ellipsis")

        notes = self._notes = dict[str, Callable[[], str]]()
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description:>10}"),
            BarColumn(),
            TaskProgressColumn(),
            Rate(),
            TimeRemainingColumn(),
        )
        self._progress = Noted(*columns, console=console, disable=quiet or not console.is_terminal)
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
        """Stage `name` has done `done` of `total`."""
        if name not in self._tasks:
            unit = UNITS.get(name, "positions")
            self._tasks[name] = self._progress.add_task(name, total=total, unit=unit)
        self._progress.update(self._tasks[name], completed=done, total=total)

    def note(self, name: str, say: Callable[[], str]) -> None:
        """Show what `say` returns under the progress of stage `name`; asked at every redraw."""
        self._notes[name] = say

    def of(self, name: str) -> Callable[[int, int], None]:
        """The callback `(done, total)` of one stage."""
        return lambda done, total: self.stage(name, done, total)


@contextmanager
def meter(quiet: bool) -> Iterator[Meter]:
    """A running `Meter`."""
    with Meter(quiet) as shown:
        yield shown


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout; numbers are right-aligned, None is a dash."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(title) or None, box=box.SIMPLE_HEAD, title_justify="left")
    for number, name in enumerate(columns):
        numeric = all(isinstance(row[number], int | float | None) for row in rows) and bool(rows)
        shown.add_column(escape(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(escape(format_text(cell)) for cell in row))
    # A pipe or file has no width of its own to fold to.
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(shown)


def format_text(cell: object) -> str:
    """A cell of a table."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        if cell and abs(cell) < 5e-4:
            return f"{cell:.1e}"
        return f"{cell:.3f}" if abs(cell) < 1e4 else f"{cell:.4g}"
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return str(cell)


def format_bytes(count: int) -> str:
    """Bytes for people: 1.5 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def bandwidths(stages: dict[str, Any]) -> str:
    """`StageTimes.to_dict` as text: forward 3.1k tok/s · copy 12 GB/s; empty if none ran."""
    if stages["bottleneck"] is None:
        return ""
    rate = format_bytes(round(stages["forward"]["tokens_per_second"] or 0)).rstrip("B").rstrip()
    shown = [f"forward {rate.replace(' ', '')} tok/s"]
    for name in ("copy", "write"):
        if bandwidth := stages[name]["bandwidth"]:
            shown.append(f"{name} {format_bytes(round(bandwidth))}/s")
    return f"{' · '.join(shown)} (bottleneck: {stages['bottleneck']})"


def print_evaluation(found: "Evaluation") -> None:
    """Print KL and precision@1 by layer, one table per offset, and what to know of them."""
    from ..report.tables import offset_tables

    for part in offset_tables(found):
        print_table(part.caption, part.columns, part.rows)
    for line in found.facts():
        print(line)


def short(name: str | None) -> str:
    """The last part of a path; hub ids are left whole."""
    if name is None:
        return "-"
    path = Path(name)
    return path.name if path.is_absolute() or len(path.parts) > 2 else name

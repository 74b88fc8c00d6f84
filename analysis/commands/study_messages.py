"""What commands of studies print for people."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..console.terminal import print_table
from ..studies.results.study_cells import cell_text

if TYPE_CHECKING:
    from ..studies.results.study_result import StudyResult, StudyTable


def print_studies(
    results: Sequence["StudyResult"], written: Sequence[str], skipped: Mapping[str, str] | None
) -> None:
    """Print the tables and sentences of studies, what was skipped, and the files."""
    for result in results:
        if len(results) > 1:
            print(f"\n== {result.title}")
        subject = result.subject
        print(
            f"{subject.n:,} {subject.n_of} of split {subject.split}, {subject.n_units:,} "
            f"{subject.units}s"
        )
        for table in result.tables:
            _print_rows(table)
        for sentence in (*result.says, *result.does_not_say, *result.notes):
            print(f"- {sentence}")
    for name, reason in (skipped or {}).items():
        print(f"skipped {name}: {reason}")
    for path in written:
        print(f"written: {path}")


def _print_rows(table: "StudyTable") -> None:
    """Print the first rows of a table; nothing of a table that terminals leave out."""
    rows = table.rows[: table.most_shown]
    if not rows:
        return
    cells = [tuple(_cell(getattr(row, name)) for name in table.headings) for row in rows]
    print_table(table.title, tuple(table.headings.values()), cells)
    if len(rows) < len(table.rows):
        print(f"... {len(table.rows) - len(rows):,} more rows with --json, --csv or --html")


def _cell(value: object) -> object:
    """A cell: numbers stay numbers, which are aligned to the right."""
    if value is None or isinstance(value, int | float | str):
        return value
    return cell_text(value)

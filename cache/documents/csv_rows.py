"""Rows of .csv (RFC 4180) and .tsv (text/tab-separated-values) files, for `row_files.py`.

Every cell is text. The csv module of Python parses quoted cells; this file adds cells of any
length, CR inside cells, .tsv without quotes, and errors with line numbers.
"""

import csv
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DataError
from ..files.text_lines import text_lines
from .row_source import Row, RowFile

SEPARATORS = {"csv": ",", "tsv": "\t"}
"""Default separator of the columns, by format."""
_CARRIAGE_RETURN = re.compile(r"\r(?!\n|\Z)")
_STAND_IN = "\udc0d"
"""Replaces a CR inside a line, which the csv module would take for a line end; half a surrogate
pair, so no UTF-8 text contains it."""
JOINED_LINES = 10_000
"""Largest number of lines of one row of a .tsv file."""


def csv_rows(file: RowFile, text_column: str | None) -> Iterator[tuple[str, Row]]:
    """Yield each row with its location (`line 3`), by RFC 4180.

    A quoted cell may hold separators, doubled quotes and line ends.
    """
    lines = _CountedLines(text_lines(file.path))
    reader = csv.reader(
        (_CARRIAGE_RETURN.sub(_STAND_IN, line) for line in lines),
        delimiter=file.separator or SEPARATORS[file.format],
        strict=True,
    )
    header: list[str] | None = None
    while True:
        first_line = lines.number + 1
        try:
            with _long_cells():
                cells = next(reader, None)
        except csv.Error as error:
            file.fail(f"line {first_line}", f"{error} (quotes are those of RFC 4180)")
        if cells is None:
            break
        cells = [cell.replace(_STAND_IN, "\r") for cell in cells]
        if header is None:
            if cells:
                header = _column_names(file, cells, lines.last, text_column)
            continue
        if not cells:  # an empty line is no row, except of one column
            if len(header) > 1:
                continue
            cells = [""]
        _check_cell_count(file, first_line, cells, header)
        yield f"line {first_line}", dict(zip(header, cells, strict=True))


def tsv_rows(file: RowFile, text_column: str | None) -> Iterator[tuple[str, Row]]:
    """Yield each row with its location (`line 3`), by text/tab-separated-values.

    The format has no quotes, but some writers quote cells as in .csv. A file with a quoted header
    is read as .csv. In another file a cell is unquoted only if nothing else explains its quotes:
    the cell is quoted as a whole and quotes inside are doubled, or the line has the right number
    of cells only with quotes.
    """
    separator = file.separator or SEPARATORS["tsv"]
    lines = _CountedLines(text_lines(file.path))

    # The header is the first line that is not empty.
    first_line = next((line for line in lines if line.strip("\r\n")), "")
    cells = first_line.rstrip("\r\n").split(separator)
    if all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells):
        yield from csv_rows(file, text_column)
        return
    header = _column_names(file, cells, first_line, text_column)

    unquoted_count = 0
    for line in lines:
        number = lines.number
        line = line.rstrip("\r\n") if line.endswith(("\n", "\r")) else line
        if not line and len(header) > 1:
            continue
        cells = line.split(separator)
        if len(cells) == len(header):
            for column, cell in enumerate(cells):
                if cell.startswith('"') and (unquoted := _unquote(cell)) is not None:
                    cells[column] = unquoted
                    unquoted_count += 1
        elif '"' in line and (parsed := _parse_quoted(line, lines, separator, len(header))):
            cells = parsed
            unquoted_count += 1
        _check_cell_count(file, number, cells, header)
        yield f"line {number}", dict(zip(header, cells, strict=True))
    if unquoted_count:
        file.notes.append(
            f"quotes as in .csv were removed from {unquoted_count} cells or rows of "
            f"{file.path.name}"
        )


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let the csv module read cells of more than 128 KiB, its default limit."""
    limit = csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


class _CountedLines:
    """An iterator of lines that holds the number of lines read (`number`) and the `last` line."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.number, self.last = 0, ""

    def __iter__(self) -> "_CountedLines":
        return self

    def __next__(self) -> str:
        self.last = next(self._lines)
        self.number += 1
        return self.last


def _column_names(file: RowFile, cells: list[str], line: str, text_column: str | None) -> list[str]:
    """Names of the columns from the header's `cells`; repeated names get a number.

    Raises `DataError` if the header `line` shows that another separator is used, or if
    `text_column` occurs twice.
    """
    if file.separator is None and len(cells) == 1 and not line.startswith('"'):
        present = next((mark for mark in "\t;|," if mark in cells[0]), None)
        if present is not None:
            default_name, present_name = (
                "tab" if mark == "\t" else repr(mark) for mark in (SEPARATORS[file.format], present)
            )
            raise DataError(
                f"{file.path.name}: the first line has no {default_name} but {present_name}; say "
                f"what separates the columns with --separator {present_name}, or with "
                f"--separator {default_name} if it is one column"
            )
    names: list[str] = []
    for number, name in enumerate(cells, 1):
        if name in names:
            if name == text_column:
                file.fail("line 1", f"the column {name!r} occurs twice in the header")
            numbered_name = f"{name}.{number}"
            file.notes.append(
                f"column {name!r} occurs twice; the one at place {number} is {numbered_name!r}"
            )
            name = numbered_name
        names.append(name)
    return names


def _check_cell_count(file: RowFile, line: int, cells: list[str], header: list[str]) -> None:
    """Raise `DataError` if a row has more or fewer cells than the header."""
    if len(cells) != len(header):
        file.fail(
            f"line {line}",
            f"it has {len(cells)} {'cell' if len(cells) == 1 else 'cells'}, the header "
            f"{len(header)}; quote cells that hold the separator or the end of a line, or choose "
            "another --separator",
        )


def _unquote(cell: str) -> str | None:
    """Text of a cell quoted as a whole with doubled quotes inside; None for any other cell."""
    quoted_text = cell[1:-1]
    if len(cell) < 2 or cell[-1] != '"' or (quoted_text and '""' not in quoted_text):
        return None
    has_single_quote = '"' in quoted_text.replace('""', "")
    return None if has_single_quote else quoted_text.replace('""', '"')


def _parse_quoted(
    line: str, following: Iterator[str], separator: str, count: int
) -> list[str] | None:
    """The `count` cells of a line with quoted cells; None if the line does not have so many.

    While a quote is open, lines are taken from `following` and joined.
    """
    pieces, quotes = [line], line.count('"')
    for _ in range(JOINED_LINES):
        if quotes % 2 == 0:
            try:
                with _long_cells():
                    rows = list(csv.reader(pieces, delimiter=separator, strict=True))
            except csv.Error:
                return None
            return rows[0] if len(rows) == 1 and len(rows[0]) == count else None
        next_line = next(following, None)
        if next_line is None:
            return None
        if len(pieces) == 1:
            pieces[0] += "\n"
        pieces.append(next_line)
        quotes += next_line.count('"')
    return None

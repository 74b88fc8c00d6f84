"""Rows of .csv (RFC 4180) and .tsv (text/tab-separated-values); every cell is text."""

import csv
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DataError
from .row_source import Row, RowFile
from .text_lines import text_lines

SEPARATORS = {"csv": ",", "tsv": "\t"}
"""What separates the columns, where nothing else is asked for."""
_CARRIAGE_RETURN = re.compile(r"\r(?!\n|\Z)")
_STAND_IN = "\udc0d"
"""Stands for a CR inside a line while the csv module, which takes it for an end, reads the line:
half a surrogate pair, which no UTF-8 text has."""
JOINED_LINES = 10_000
"""Most lines of one row of a .tsv file."""


def csv_rows(file: RowFile, text: str | None) -> Iterator[tuple[str, Row]]:
    """Rows by RFC 4180: a quoted cell may hold separators, doubled quotes and ends of lines."""
    lines = _Counted(text_lines(file.path))
    reader = csv.reader(
        (_CARRIAGE_RETURN.sub(_STAND_IN, line) for line in lines),
        delimiter=file.separator or SEPARATORS[file.format],
        strict=True,
    )
    header: list[str] | None = None
    while True:
        first = lines.number + 1
        try:
            with _long_cells():
                cells = next(reader, None)
        except csv.Error as error:
            file.fail(f"line {first}", f"{error} (quotes are those of RFC 4180)")
        if cells is None:
            break
        cells = [cell.replace(_STAND_IN, "\r") for cell in cells]
        if header is None:
            if cells:
                header = _header(file, cells, lines.last, text)
            continue
        if not cells:  # an empty line is no row, except of one column
            if len(header) > 1:
                continue
            cells = [""]
        _check_cells(file, first, cells, header)
        yield f"line {first}", dict(zip(header, cells, strict=True))


def tsv_rows(file: RowFile, text: str | None) -> Iterator[tuple[str, Row]]:
    """Rows of text/tab-separated-values, which has no quotes: a quote is a character of its cell.

    Writers that know .csv only do quote, though. A file whose header is quoted is read as .csv
    is. Else a cell is unquoted where nothing but quoting explains it: it is quoted as a whole and
    the quotes in it are doubled, or its line has the right number of cells only so.
    """
    separator = file.separator or SEPARATORS["tsv"]
    lines = _Counted(text_lines(file.path))
    first = next((line for line in lines if line.strip("\r\n")), "")
    cells = first.rstrip("\r\n").split(separator)
    if all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells):
        yield from csv_rows(file, text)
        return
    header = _header(file, cells, first, text)
    quoted = 0
    for line in lines:
        number = lines.number
        line = line.rstrip("\r\n") if line.endswith(("\n", "\r")) else line
        if not line and len(header) > 1:
            continue
        cells = line.split(separator)
        if len(cells) == len(header):
            for place, cell in enumerate(cells):
                if cell.startswith('"') and (plain := _unquoted(cell)) is not None:
                    cells[place] = plain
                    quoted += 1
        elif '"' in line and (joined := _quoted_cells(line, lines, separator, len(header))):
            cells = joined
            quoted += 1
        _check_cells(file, number, cells, header)
        yield f"line {number}", dict(zip(header, cells, strict=True))
    if quoted:
        file.notes.append(
            f"quotes as in .csv were removed from {quoted} cells or rows of {file.path.name}"
        )


@contextmanager
def _long_cells() -> Iterator[None]:
    """Allow the csv module cells of any length, which it refuses beyond 128 KiB."""
    limit = csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


class _Counted:
    """Lines, with the number of those that were read, and the last one."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.number, self.last = 0, ""

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> str:
        self.last = next(self._lines)
        self.number += 1
        return self.last


def _header(file: RowFile, cells: list[str], line: str, text: str | None) -> list[str]:
    """The names of the columns; raises `DataError` if another separator is plainly meant."""
    if file.separator is None and len(cells) == 1 and not line.startswith('"'):
        other = next((mark for mark in "\t;|," if mark in cells[0]), None)
        if other is not None:
            used, shown = (
                "tab" if mark == "\t" else repr(mark) for mark in (SEPARATORS[file.format], other)
            )
            raise DataError(
                f"{file.path.name}: the first line has no {used} but {shown}; say what separates "
                f"the columns with --separator {'tab' if shown == 'tab' else shown}, or with "
                f"--separator {'tab' if used == 'tab' else used} if it is one column"
            )
    names: list[str] = []
    for number, name in enumerate(cells, 1):
        if name in names:
            if name == text:
                file.fail("line 1", f"the column {name!r} occurs twice in the header")
            new = f"{name}.{number}"
            file.notes.append(f"column {name!r} occurs twice; the one at place {number} is {new!r}")
            name = new
        names.append(name)
    return names


def _check_cells(file: RowFile, line: int, cells: list[str], header: list[str]) -> None:
    if len(cells) != len(header):
        file.fail(
            f"line {line}",
            f"it has {_counted(len(cells), 'cell')}, the header {len(header)}; quote cells that "
            "hold the separator or the end of a line, or choose another --separator",
        )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _unquoted(cell: str) -> str | None:
    """What a cell means that is quoted as a whole with doubled quotes in it, None for others."""
    inner = cell[1:-1]
    if len(cell) < 2 or cell[-1] != '"' or (inner and '""' not in inner):
        return None
    return None if '"' in inner.replace('""', "") else inner.replace('""', '"')


def _quoted_cells(
    line: str, following: Iterator[str], separator: str, count: int
) -> list[str] | None:
    """The `count` cells of a line that quotes some, with as many of the following as it needs."""
    pieces, quotes = [line], line.count('"')
    for _ in range(JOINED_LINES):
        if quotes % 2 == 0:
            try:
                with _long_cells():
                    rows = list(csv.reader(pieces, delimiter=separator, strict=True))
            except csv.Error:
                return None
            return rows[0] if len(rows) == 1 and len(rows[0]) == count else None
        more = next(following, None)
        if more is None:
            return None
        if len(pieces) == 1:
            pieces[0] += "\n"
        pieces.append(more)
        quotes += more.count('"')
    return None

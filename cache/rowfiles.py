"""Rows of .jsonl, .json, .csv, .tsv and .parquet files, one at a time, as the file says them.

Cells of .csv and .tsv are text, whatever they look like; an empty cell is the empty text. Values
of JSON and parquet keep their kinds. Nothing is taken for missing but JSON's and parquet's null,
and a key that a row lacks. What cannot be read is a `DataError` that names the line.
"""

import csv
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from .disk import disk_errors
from .errors import DataError
from .lines import BLOCK_BYTES, COMPRESSIONS, open_bytes, text_blocks, text_lines
from .policy import COLUMNS
from .textcolumn import ColumnSample, kind_of

FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
"""Ending -> format."""
SEPARATORS = {"csv": ",", "tsv": "\t"}
"""What separates the columns, where nothing else is asked for."""
SAMPLE_ROWS = 1000
SAMPLE_CHARACTERS = 4 << 20
PARQUET_ROWS = 64
"""Rows of one read of a parquet file."""
JOINED_LINES = 10_000
"""Most lines of one row of a .tsv file."""

Row = dict[str, Any]


@dataclass
class RowFile:
    """A file of rows; reading it twice gives the same rows."""

    path: Path
    format: str
    """One of the values of `FORMATS`."""
    separator: str | None = None
    """Separator of the columns of .csv and .tsv that was asked for."""
    scratch: Path | None = None
    """Folder of temporary files."""
    notes: list[str] = field(default_factory=list)
    """What was decided while reading, for people."""

    def sample(self) -> dict[str, ColumnSample]:
        """The columns, by their first rows or by the file's own schema."""
        if self.format == "parquet":
            return _parquet_sample(self)
        columns: dict[str, ColumnSample] = {}
        size = 0
        for _, row in islice(self._rows(None), SAMPLE_ROWS):
            for name, value in row.items():
                columns.setdefault(name, ColumnSample()).add(value)
                size += len(value) if isinstance(value, str) else 0
            if size > SAMPLE_CHARACTERS:
                break
        self.notes.clear()
        return columns

    def rows(self, text_column: str, others: bool) -> Iterator[tuple[str, Row]]:
        """Each row with its place, like `line 3`; without `others` it may lack other columns."""
        yield from self._rows([text_column] if not others else None, text_column)

    def _rows(
        self, columns: list[str] | None, text: str | None = None
    ) -> Iterator[tuple[str, Row]]:
        if self.format == "json":
            return _json_rows(self, text)
        if self.format == "parquet":
            return _parquet_rows(self, columns, text)
        return _csv_rows(self, text) if self.format == "csv" else _tsv_rows(self, text)

    def fail(self, place: str, reason: str) -> NoReturn:
        """Raise the error of a place that cannot be read."""
        raise DataError(f"{self.path} cannot be read as {self.format}: {place}: {reason}") from None


# JSON


class _Repeated(dict):
    """An object in which names occur twice; the last value of each counts."""

    names: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    names = [name for name, _ in pairs]
    repeated = _Repeated(value)
    repeated.names = tuple(dict.fromkeys(name for name in names if names.count(name) > 1))
    return repeated


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_LONG_NUMBERS = json.JSONDecoder(object_pairs_hook=_object, parse_int=str)
"""Keeps whole numbers as text: Python refuses those of more than 4300 digits."""
_SPACE = re.compile(r"[ \t\n\r]*")


def _decode(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at `at`, and its end."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _LONG_NUMBERS.raw_decode(text, at)


def _json_rows(file: RowFile, text: str | None) -> Iterator[tuple[str, Row]]:
    """Rows of a list, of values that follow each other, or of lines."""
    values = _JsonValues(file)
    listed = values.next_character() == "["
    by_line = not listed and not _ending_is(file.path, ".json")
    found = _json_lines(file) if by_line else values.of_list() if listed else values.of_sequence()
    repeated: set[str] = set()
    for line, value in found:
        place = f"line {line}"
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            file.fail(place, f"expected an object per row, found {kind_of(value)}")
        if isinstance(value, _Repeated):
            if text in value.names:
                file.fail(place, f"the column {text!r} occurs twice in one row")
            for name in set(value.names) - repeated:
                repeated.add(name)
                file.notes.append(
                    f"column {name!r} occurs twice in one row ({place}); its last value counts"
                )
        yield place, value


def _json_lines(file: RowFile) -> Iterator[tuple[int, Any]]:
    """Number and value of each line; empty lines are no rows."""
    for number, line in enumerate(_translated_lines(file.path), 1):
        start = _SPACE.match(line).end()  # pyright: ignore[reportOptionalMemberAccess]
        if start == len(line):
            continue
        try:
            value, stop = _decode(line, start)
        except json.JSONDecodeError as error:
            file.fail(f"line {number}", f"{error.msg} (character {error.pos + 1})")
        except RecursionError:
            file.fail(f"line {number}", "lists or objects are nested too deeply")
        stop = _SPACE.match(line, stop).end()  # pyright: ignore[reportOptionalMemberAccess]
        if stop < len(line):
            file.fail(
                f"line {number}",
                f"more follows its value (character {stop + 1}); write one value per line",
            )
        yield number, value


def _translated_lines(path: Path) -> Iterator[str]:
    """Lines without their ends, which are LF, CRLF or CR: no string of JSON holds one."""
    pieces: list[str] = []
    for block in text_blocks(path):
        *lines, rest = block.split("\n")
        if lines:
            yield "".join(pieces) + lines[0]
            yield from lines[1:]
            pieces.clear()
        pieces.append(rest)
    yield "".join(pieces)


class _JsonValues:
    """Reads JSON values one after the other; only a block and one value are in memory."""

    def __init__(self, file: RowFile) -> None:
        self._file = file
        self._blocks = text_blocks(file.path)
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def next_character(self) -> str:
        """The next character that is no space, the empty text at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # pyright: ignore
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more(1)

    def of_list(self) -> Iterator[tuple[int, Any]]:
        """Line and value of each item of the list that begins here."""
        self.next_character()
        self._at += 1
        if self.next_character() != "]":
            while True:
                self.next_character()
                yield self._value()
                following = self.next_character()
                if following == "]":
                    break
                if following != ",":
                    shown = repr(following) if following else "the end of the file"
                    self._fail(f"expected ',' or ']' in the list of rows, found {shown}")
                self._at += 1
        self._at += 1
        if self.next_character():
            self._fail("more follows the list of rows")

    def of_sequence(self) -> Iterator[tuple[int, Any]]:
        """Line and value of each value up to the end of the file."""
        while self.next_character():
            yield self._value()

    def _value(self) -> tuple[int, Any]:
        while True:
            try:
                value, stop = _decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._is_cut(error):
                    self._at = error.pos
                    self._fail(error.msg)
            except RecursionError:
                self._fail("lists or objects are nested too deeply")
            else:
                if stop < len(self._text) or self._ended:  # else a number could go on
                    line = self._line + self._text.count("\n", 0, self._at)
                    self._at = stop
                    return line, value
            self._more(2 * (len(self._text) - self._at))

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the text ends too early for the value, rather than being wrong."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16

    def _more(self, least: int) -> None:
        """Read on until at least `least` characters lie ahead; drop those that are behind."""
        self._line += self._text.count("\n", 0, self._at)
        pieces = [self._text[self._at :]]
        ahead = len(pieces[0])
        while ahead < max(least, 1):
            block = next(self._blocks, None)
            if block is None:
                self._ended = True
                break
            pieces.append(block)
            ahead += len(block)
        self._text, self._at = "".join(pieces), 0

    def _fail(self, reason: str) -> NoReturn:
        line = self._line + self._text.count("\n", 0, self._at)
        self._file.fail(f"line {line}", reason)


# .csv and .tsv


@contextmanager
def _long_cells() -> Iterator[None]:
    """Allow the csv module cells of any length, which it refuses beyond 128 KiB."""
    limit = csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv_rows(file: RowFile, text: str | None) -> Iterator[tuple[str, Row]]:
    """Rows by RFC 4180: a quoted cell may hold separators, doubled quotes and ends of lines."""
    lines = _Counted(text_lines(file.path))
    reader = csv.reader(lines, delimiter=file.separator or SEPARATORS[file.format], strict=True)
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


def _tsv_rows(file: RowFile, text: str | None) -> Iterator[tuple[str, Row]]:
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
        yield from _csv_rows(file, text)
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


# parquet


@contextmanager
def _parquet_file(file: RowFile) -> Iterator[Any]:
    """The opened file, from a temporary uncompressed copy where it is compressed as a whole."""
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile(dir=file.scratch) as copy:
        source: Any = str(file.path)
        if file.path.suffix.lower() in COMPRESSIONS:
            with open_bytes(file.path) as packed, disk_errors(_folder(file.scratch)):
                shutil.copyfileobj(packed, copy, BLOCK_BYTES)
            copy.seek(0)
            source = pyarrow.PythonFile(copy, mode="r")
        try:
            with pyarrow.parquet.ParquetFile(
                source, memory_map=False, buffer_size=BLOCK_BYTES, pre_buffer=False
            ) as opened:
                yield opened
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"{file.path} cannot be read as parquet: {reason[0]}") from None


def _folder(scratch: Path | None) -> Path:
    return Path(tempfile.gettempdir()) if scratch is None else scratch


def _parquet_sample(file: RowFile) -> dict[str, ColumnSample]:
    """The columns of the schema, with the first texts of those that hold text."""
    import pyarrow

    columns: dict[str, ColumnSample] = {}
    with _parquet_file(file) as opened:
        schema = opened.schema_arrow
        for entry in schema:
            if entry.name in columns:
                columns[entry.name].kinds.add("twice")
                continue
            if pyarrow.types.is_null(entry.type):
                columns[entry.name] = ColumnSample()
                continue
            columns[entry.name] = ColumnSample.of_type(_kind_of_type(entry.type))
            if pyarrow.types.is_nested(entry.type):
                columns[entry.name].add_layout(str(entry.type))
        texts = [name for name, column in columns.items() if column.is_text]
        if texts and opened.metadata.num_rows:
            batch = next(opened.iter_batches(PARQUET_ROWS, columns=texts))
            for name, values in zip(batch.schema.names, batch.columns, strict=True):
                if name in texts:
                    columns[name].words.extend(v for v in values.to_pylist() if v is not None)
    return columns


def _kind_of_type(found: Any) -> str:
    """What a column of a pyarrow type holds, in the words of `textcolumn.kind_of`."""
    import pyarrow.types as types

    if types.is_dictionary(found):
        return _kind_of_type(found.value_type)
    if hasattr(found, "storage_type"):  # an extension of a plain type
        return _kind_of_type(found.storage_type)
    if types.is_string(found) or types.is_large_string(found) or _is_view(found, "string"):
        return "text"
    if (
        types.is_binary(found)
        or types.is_large_binary(found)
        or types.is_fixed_size_binary(found)
        or _is_view(found, "binary")
    ):
        return "bytes"
    if types.is_boolean(found):
        return "a truth value"
    if types.is_integer(found):
        return "a whole number"
    if types.is_floating(found):
        return "a number"
    return "a list or object" if types.is_nested(found) else str(found)


def _is_view(found: Any, name: str) -> bool:
    import pyarrow.types as types

    return getattr(types, f"is_{name}_view", lambda _: False)(found)


def _parquet_rows(
    file: RowFile, columns: list[str] | None, text: str | None
) -> Iterator[tuple[str, Row]]:
    """Rows of `columns`, by default of all that hold plain values or decide on positions."""
    with _parquet_file(file) as opened:
        names = opened.schema_arrow.names
        kinds = {entry.name: _kind_of_type(entry.type) for entry in opened.schema_arrow}
        for name in sorted({name for name in names if names.count(name) > 1}):
            del kinds[name]
            file.notes.append(f"the columns {name!r} are left out: there are two of that name")
        if columns is None:
            plain = ("text", "bytes", "a truth value", "a whole number", "a number")
            columns = [
                name for name, kind in kinds.items() if kind in plain or name in (text, *COLUMNS)
            ]
        columns = [name for name in columns if name in kinds]
        number = 0
        for batch in opened.iter_batches(PARQUET_ROWS, columns=columns):
            values = [column.to_pylist() for column in batch.columns]
            for row in zip(*values, strict=True):
                yield f"row {number}", dict(zip(batch.schema.names, row, strict=True))
                number += 1


def _ending_is(path: Path, ending: str) -> bool:
    """Whether the name ends so, apart from the ending of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((s for s in reversed(suffixes) if s not in COMPRESSIONS), "") == ending

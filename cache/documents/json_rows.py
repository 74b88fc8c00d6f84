"""Rows of JSON files, for `row_files.py`: a list of objects, a sequence, or one object per line.

`json_rows` tells the three apart by the first character and the file ending. Only a block of the
file and one row are in memory.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..files.text_lines import text_blocks
from .row_source import Row, RowFile
from .text_column import kind_in_words


def json_rows(file: RowFile, text_column: str | None) -> Iterator[tuple[str, Row]]:
    """Yield each row with its location, such as `line 3`; a string is a row with the column `text`.

    Raises `DataError` for a row that is no object, or in which `text_column` occurs twice.
    """
    stream = _JsonValues(file)
    if stream.next_character() == "[":
        values = stream.list_items()
    elif file.ending == ".json":
        values = stream.remaining_values()
    else:
        values = _line_values(file)
    noted_columns: set[str] = set()
    for line, value in values:
        location = f"line {line}"
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            file.fail(location, f"expected an object per row, found {kind_in_words(value)}")
        if isinstance(value, _ObjectWithRepeats):
            if text_column in value.repeated_names:
                file.fail(location, f"the column {text_column!r} occurs twice in one row")
            for name in set(value.repeated_names) - noted_columns:
                noted_columns.add(name)
                file.notes.append(
                    f"column {name!r} occurs twice in one row ({location}); its last value counts"
                )
        yield location, value


class _ObjectWithRepeats(dict):
    """A JSON object in which names occur twice; the last value of each name counts."""

    repeated_names: tuple[str, ...] = ()


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of a JSON object: an `_ObjectWithRepeats` if a name occurs twice."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    names = [name for name, _ in pairs]
    repeated = _ObjectWithRepeats(value)
    repeated.repeated_names = tuple(dict.fromkeys(n for n in names if names.count(n) > 1))
    return repeated


_DECODER = json.JSONDecoder(object_pairs_hook=_build_object)
_LONG_NUMBER_DECODER = json.JSONDecoder(object_pairs_hook=_build_object, parse_int=str)
"""Reads whole numbers as text: Python refuses to convert more than 4300 digits."""
_SPACE = re.compile(r"[ \t\n\r]*")


def _decode(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and the index of its end."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _LONG_NUMBER_DECODER.raw_decode(text, start)


def _line_values(file: RowFile) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each line; empty lines are no rows."""
    for number, line in enumerate(_lines(file.path), 1):
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


def _lines(path: Path) -> Iterator[str]:
    """Yield lines without their ends (LF, CRLF or CR); JSON strings contain no line ends."""
    pieces: list[str] = []
    for block in text_blocks(path):
        *lines, unfinished = block.split("\n")
        if lines:
            yield "".join(pieces) + lines[0]
            yield from lines[1:]
            pieces.clear()
        pieces.append(unfinished)
    yield "".join(pieces)


class _JsonValues:
    """Reads the JSON values of a file in order; a block and a value are in memory."""

    def __init__(self, file: RowFile) -> None:
        self._file = file
        self._blocks = text_blocks(file.path)
        # Text read but not consumed begins at index `_start` of `_text`.
        self._text, self._start, self._is_at_end = "", 0, False
        # Number of the line that holds the character at index `_line_start` of `_text`.
        self._line, self._line_start = 1, 0

    def next_character(self) -> str:
        """Skip white space and return the next character; the empty text at the end of the file."""
        while True:
            self._start = _SPACE.match(self._text, self._start).end()  # pyright: ignore
            if self._start < len(self._text) or self._is_at_end:
                return self._text[self._start : self._start + 1]
            self._read_ahead(1)

    def list_items(self) -> Iterator[tuple[int, Any]]:
        """Yield line and value of each item of the list at the next character."""
        self.next_character()
        self._start += 1
        if self.next_character() != "]":
            while True:
                self.next_character()
                yield self._read_value()
                following = self.next_character()
                if following == "]":
                    break
                if following != ",":
                    actual = repr(following) if following else "the end of the file"
                    self._fail(f"expected ',' or ']' in the list of rows, found {actual}")
                self._start += 1
        self._start += 1
        if self.next_character():
            self._fail("more follows the list of rows")

    def remaining_values(self) -> Iterator[tuple[int, Any]]:
        """Yield line and value of each value up to the end of the file."""
        while self.next_character():
            yield self._read_value()

    def _read_value(self) -> tuple[int, Any]:
        """Line and value of the next JSON value; doubles the text read while the value is cut."""
        while True:
            try:
                value, stop = _decode(self._text, self._start)
            except json.JSONDecodeError as error:
                if self._is_at_end or not self._is_cut(error):
                    self._start = error.pos
                    self._fail(error.msg)
            except RecursionError:
                self._fail("lists or objects are nested too deeply")
            else:
                if (
                    stop < len(self._text) or self._is_at_end
                ):  # else more digits of a number may follow
                    line = self._count_lines()
                    self._start = stop
                    return line, value
            self._read_ahead(2 * (len(self._text) - self._start))

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Return whether the text read so far ends inside the value (no syntax error)."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16

    def _read_ahead(self, characters: int) -> None:
        """Read until `characters` are not consumed, or the file ends; drop the consumed ones."""
        self._count_lines()
        pieces = [self._text[self._start :]]
        available = len(pieces[0])
        while available < max(characters, 1):
            block = next(self._blocks, None)
            if block is None:
                self._is_at_end = True
                break
            pieces.append(block)
            available += len(block)
        self._text, self._start, self._line_start = "".join(pieces), 0, 0

    def _count_lines(self) -> int:
        """Line number of the next character."""
        self._line += self._text.count("\n", self._line_start, self._start)
        self._line_start = self._start
        return self._line

    def _fail(self, reason: str) -> NoReturn:
        self._file.fail(f"line {self._count_lines()}", reason)

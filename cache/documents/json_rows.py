"""Rows of JSON: a list of objects, objects that follow each other, or one per line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from .row_source import Row, RowFile
from .text_column import kind_of
from .text_lines import text_blocks


def json_rows(file: RowFile, text: str | None) -> Iterator[tuple[str, Row]]:
    """Rows of a list, of values that follow each other, or of lines."""
    values = _JsonValues(file)
    listed = values.next_character() == "["
    by_line = not listed and file.ending != ".json"
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
        self._text, self._at, self._ended = "", 0, False
        self._line, self._line_at = 1, 0  # the line of the character at `_line_at`

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
                    line = self._number_of_line()
                    self._at = stop
                    return line, value
            self._more(2 * (len(self._text) - self._at))

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the text ends too early for the value, rather than being wrong."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16

    def _more(self, least: int) -> None:
        """Read on until at least `least` characters lie ahead; drop those that are behind."""
        self._number_of_line()
        pieces = [self._text[self._at :]]
        ahead = len(pieces[0])
        while ahead < max(least, 1):
            block = next(self._blocks, None)
            if block is None:
                self._ended = True
                break
            pieces.append(block)
            ahead += len(block)
        self._text, self._at, self._line_at = "".join(pieces), 0, 0

    def _number_of_line(self) -> int:
        self._line += self._text.count("\n", self._line_at, self._at)
        self._line_at = self._at
        return self._line

    def _fail(self, reason: str) -> NoReturn:
        self._file.fail(f"line {self._number_of_line()}", reason)

"""Documents of plain text files (.txt): `TextFile`, whose texts lie on the disk.

`load_documents` wraps a `TextFile` into `Documents`. The files are read once in blocks
(`text_lines.py`) and copied as UTF-8 to a temporary file; only the bounds of the documents are in
memory, 16 bytes each.
"""

import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ..files.disk_errors import translate_disk_errors
from ..files.text_lines import BLOCK_BYTES, text_blocks
from .long_text import LONG_BYTES, LongText

SEPARATOR = "<|endoftext|>"
"""Mark between the documents of a .txt file, if the file has any."""
IN_MEMORY = 16 << 20
"""Bytes up to which the copy stays in memory."""


class TextFile:
    """A sequence of the documents of text files, as str or, of long ones, `LongText`.

    A document is a piece between two `SEPARATOR`s; in a file without them a line, with `lines`, or
    the whole file. Documents without text are left out; `blank` counts those between two
    separators. The copy, an unnamed temporary file in `folder`, disappears with the object. Raises
    `DataError` if a file is not UTF-8.
    """

    def __init__(
        self, paths: Path | Sequence[Path], lines: bool, folder: Path | None = None
    ) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=str(self._folder))  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._starts, self._stops = array("q"), array("q")
        self.blank: int = 0
        """Documents without text between two separators."""
        begin = 0
        for path in [paths] if isinstance(paths, Path) else paths:
            end, has_separator, has_text = self._copy(path, begin)
            if has_separator or lines:
                self._add_pieces(begin, end, has_separator)
            elif has_text:  # the whole file is one document
                self._starts.append(begin)
                self._stops.append(end)
            begin = end

    def _add_pieces(self, begin: int, end: int, has_separator: bool) -> None:
        """Add the documents of the file whose copy has the bytes `begin` to `end`.

        One document per piece (without the line ends around the separators), or per line.
        """
        mark = SEPARATOR.encode() if has_separator else b"\n"
        for start, stop, piece in self._pieces(mark, begin, end):
            if piece is None:
                text_start, text_stop = self._text_of_long_piece(start, stop, has_separator)
            else:
                text_start, text_stop = _text_of_piece(piece, has_separator)
                text_start, text_stop = start + text_start, start + text_stop
            if text_start < text_stop:
                self._starts.append(text_start)
                self._stops.append(text_stop)
            elif has_separator and start > begin and stop < end:
                self.blank += 1

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> str | LongText:
        start, stop = self._starts[number], self._stops[number]
        if stop - start > LONG_BYTES:
            return LongText(self._file, start, stop)
        return self._read(start, stop).decode()

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Bytes of each of the documents `numbers`, int64."""
        starts, stops = (np.frombuffer(bounds, np.int64) for bounds in (self._starts, self._stops))
        return stops[numbers] - starts[numbers]

    def _copy(self, path: Path, begin: int) -> tuple[int, bool, bool]:
        """Copy the text as UTF-8 to the byte `begin`, the end of the copy so far.

        Return the new end, whether the text has a `SEPARATOR`, and whether it is not blank.
        """
        has_separator, tail, has_text = False, "", False
        self._file.seek(begin)
        for text in text_blocks(path):
            # `tail` is the end of the block before: a separator may lie across two blocks.
            has_separator = has_separator or SEPARATOR in (tail := tail + text)
            tail = tail[1 - len(SEPARATOR) :]
            has_text = has_text or bool(text.strip())
            with translate_disk_errors(self._folder):
                self._file.write(text.encode())
        with translate_disk_errors(self._folder):
            end = self._file.tell()
            self._file.seek(0)  # writes the buffer
        return end, has_separator, has_text

    def _read(self, start: int, stop: int) -> bytes:
        self._file.seek(start)
        return self._file.read(stop - start)

    def _pieces(self, mark: bytes, begin: int, end: int) -> Iterator[tuple[int, int, bytes | None]]:
        """Yield first byte, end and bytes of each piece between two `mark`s of `begin` to `end`.

        The bytes of a piece longer than `LONG_BYTES` are None, so that memory is bounded.
        """
        start = kept_from = position = begin  # of the piece, of `pending`, of the next block
        pending = b""  # bytes of the piece; of a long one only those in which a mark may begin
        while block := self._read(position, min(position + BLOCK_BYTES, end)):
            position += len(block)
            *pieces, pending = (pending + block).split(mark)
            for piece in pieces:
                stop = kept_from + len(piece)
                yield start, stop, piece if kept_from == start else None
                start = kept_from = stop + len(mark)
            if len(pending) > max(LONG_BYTES, len(mark)):
                kept_from += len(pending) - (len(mark) - 1)
                pending = pending[len(pending) - (len(mark) - 1) :]
        yield start, position, pending if kept_from == start else None

    def _text_of_long_piece(self, start: int, stop: int, strip: bool) -> tuple[int, int]:
        """First byte and end of the text of a piece, see `_text_of_piece`."""
        if not any(text.strip() for text in LongText(self._file, start, stop).blocks()):
            return stop, stop
        while strip and self._read(start, start + 1) == b"\n":
            start += 1
        while strip and self._read(stop - 1, stop) == b"\n":
            stop -= 1
        return start, stop


def _text_of_piece(piece: bytes, strip: bool) -> tuple[int, int]:
    """First byte and end of the text in `piece`, equal if there is none.

    With `strip` the line ends around the text are no part of it.
    """
    if not piece.decode().strip():
        return len(piece), len(piece)
    if not strip:
        return 0, len(piece)
    return len(piece) - len(piece.lstrip(b"\n")), len(piece.rstrip(b"\n"))

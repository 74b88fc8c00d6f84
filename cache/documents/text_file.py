"""Documents of a plain text file, of any size: they lie on the disk and are read by number."""

import tempfile
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ..files.disk_errors import disk_errors
from .text_lines import BLOCK_BYTES, text_blocks

SEPARATOR = "<|endoftext|>"
"""Where a .txt file has this mark, it separates documents."""
IN_MEMORY = 16 << 20
"""Bytes of text that need no file."""


class TextFile:
    """The documents of a text file, a sequence of str; those without text are left out.

    How many lie between two marks is `blank`; an empty line is none.

    One document per piece between `SEPARATOR`s, else per line if `lines`, else the whole file.
    A copy in UTF-8, with a temporary file's fate, serves what is compressed or has other ends of
    lines. Raises `DataError` if the file is not UTF-8.
    """

    def __init__(self, path: Path, lines: bool, folder: Path | None = None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=str(self._folder))  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._starts, self._stops = array("q"), array("q")
        self.blank = 0
        size, marked, filled = self._copy(path)
        if not marked and not lines:
            if filled:
                self._starts.append(0)
                self._stops.append(size)
            return
        for start, piece in self._pieces(SEPARATOR.encode() if marked else b"\n"):
            kept = piece.strip(b"\n") if marked else piece
            if kept.decode().strip():
                first = start + len(piece) - len(piece.lstrip(b"\n")) if marked else start
                self._starts.append(first)
                self._stops.append(first + len(kept))
            elif marked and start > 0 and start + len(piece) < size:
                self.blank += 1

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> str:
        start = self._starts[number]
        self._file.seek(start)
        return self._file.read(self._stops[number] - start).decode()

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Bytes of the documents `numbers`."""
        starts, stops = (np.frombuffer(v, np.int64) for v in (self._starts, self._stops))
        return stops[numbers] - starts[numbers]

    def _copy(self, path: Path) -> tuple[int, bool, bool]:
        """Keep the text as UTF-8; its bytes, and whether there is a `SEPARATOR` and any text."""
        found, end, filled = False, "", False
        for text in text_blocks(path):
            found = found or SEPARATOR in (end := end + text)
            end = end[1 - len(SEPARATOR) :]
            filled = filled or bool(text.strip())
            with disk_errors(self._folder):
                self._file.write(text.encode())
        with disk_errors(self._folder):
            size = self._file.tell()
            self._file.seek(0)  # what is still in the buffer is written now
        return size, found, filled

    def _pieces(self, mark: bytes) -> Iterator[tuple[int, bytes]]:
        """Place and bytes of what lies between the marks."""
        self._file.seek(0)
        start, rest = 0, b""
        while block := self._file.read(BLOCK_BYTES):
            *whole, rest = (rest + block).split(mark)
            for piece in whole:
                yield start, piece
                start += len(piece) + len(mark)
        yield start, rest

"""Documents of a plain text file (.txt): `TextFile`, whose texts lie on the disk.

`load_documents` wraps a `TextFile` into `Documents`. The file is read once in blocks
(`text_lines.py`) and copied as UTF-8 to a temporary file; only the bounds of the documents are in
memory, 16 bytes each.
"""

import tempfile
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ..files.disk_errors import translate_disk_errors
from .text_lines import BLOCK_BYTES, text_blocks

SEPARATOR = "<|endoftext|>"
"""Mark between the documents of a .txt file, if the file has any."""
IN_MEMORY = 16 << 20
"""Bytes up to which the copy stays in memory."""


class TextFile:
    """A sequence of the documents of a text file, as str.

    A document is a piece between two `SEPARATOR`s; in a file without them a line, with `lines`, or
    the whole file. Documents without text are left out; `blank` counts those between two
    separators. The copy, an unnamed temporary file in `folder`, disappears with the object. Raises
    `DataError` if the file is not UTF-8.
    """

    def __init__(self, path: Path, lines: bool, folder: Path | None = None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=str(self._folder))  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._starts, self._stops = array("q"), array("q")
        self.blank = 0
        """Documents without text between two separators."""
        size, has_separator, has_text = self._copy(path)

        # The whole file is one document.
        if not has_separator and not lines:
            if has_text:
                self._starts.append(0)
                self._stops.append(size)
            return

        # One document per piece (without the line ends around the separators), or per line.
        for start, piece in self._pieces(SEPARATOR.encode() if has_separator else b"\n"):
            document = piece.strip(b"\n") if has_separator else piece
            if document.decode().strip():
                leading = len(piece) - len(piece.lstrip(b"\n")) if has_separator else 0
                self._starts.append(start + leading)
                self._stops.append(start + leading + len(document))
            elif has_separator and start > 0 and start + len(piece) < size:
                self.blank += 1

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> str:
        start = self._starts[number]
        self._file.seek(start)
        return self._file.read(self._stops[number] - start).decode()

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Bytes of each of the documents `numbers`, int64."""
        starts, stops = (np.frombuffer(bounds, np.int64) for bounds in (self._starts, self._stops))
        return stops[numbers] - starts[numbers]

    def _copy(self, path: Path) -> tuple[int, bool, bool]:
        """Copy the text as UTF-8; return its bytes, whether it has a `SEPARATOR`, and any text."""
        has_separator, tail, has_text = False, "", False
        for text in text_blocks(path):
            # `tail` is the end of the block before: a separator may lie across two blocks.
            has_separator = has_separator or SEPARATOR in (tail := tail + text)
            tail = tail[1 - len(SEPARATOR) :]
            has_text = has_text or bool(text.strip())
            with translate_disk_errors(self._folder):
                self._file.write(text.encode())
        with translate_disk_errors(self._folder):
            size = self._file.tell()
            self._file.seek(0)  # writes the buffer
        return size, has_separator, has_text

    def _pieces(self, mark: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield first byte and bytes of each piece between two `mark`s."""
        self._file.seek(0)
        start, unfinished = 0, b""
        while block := self._file.read(BLOCK_BYTES):
            *pieces, unfinished = (unfinished + block).split(mark)
            for piece in pieces:
                yield start, piece
                start += len(piece) + len(mark)
        yield start, unfinished

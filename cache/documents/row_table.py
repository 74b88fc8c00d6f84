"""Documents of a file of rows: a copy of the texts and labels lies on the disk, read by number."""

import json
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import DataError
from ..files.disk_errors import disk_errors
from .documents import Documents, Reading, decode_text
from .labels import (
    EXPLICIT,
    MISSING,
    OTHER,
    POSITION_COLUMNS,
    Labels,
    kind_of_cell,
    kind_of_value,
    label_arrays,
)
from .row_files import read_rows, read_sample
from .row_source import RowFile
from .text_column import ColumnSample, check_column_exists, choose_text_column, kind_of

IN_MEMORY = 16 << 20
"""Bytes that need no file."""


class DocumentSpool:
    """Pieces of bytes by number, in a temporary file without a name in `folder`.

    The file ends with the object or the process, even a killed one. A full disk raises
    `NoSpaceError`.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=str(self._folder))  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, piece: bytes) -> None:
        """Put a piece at the end; all are appended before the first is read."""
        try:
            self._file.write(piece)
        except OSError as error:
            with disk_errors(self._folder):
                raise error
        self._ends.append(self._ends[-1] + len(piece))

    def __getitem__(self, number: int) -> bytes:
        start, stop = self._ends[number], self._ends[number + 1]
        try:
            self._file.seek(start)  # what is still in the buffer is written now
        except OSError as error:
            with disk_errors(self._folder):
                raise error
        return self._file.read(stop - start)

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Bytes of the pieces `numbers`."""
        ends = np.frombuffer(self._ends, np.int64)
        return ends[numbers + 1] - ends[numbers]


class RowTable(Documents):
    """The documents of a `RowFile`, one per row; its other columns of plain values are labels.

    The file is read once, here: later changes of it do not matter. Without `labels` only the
    texts are kept. Raises `DataError`.
    """

    def __init__(self, file: RowFile, text_column: str | None = None, labels: bool = True) -> None:
        self._data = str(file.path)
        columns = read_sample(file)
        name, found = choose_text_column(columns, text_column, self._data)
        if file.format in ("csv", "tsv", "parquet"):  # their first rows name all columns
            check_column_exists(columns, name, self._data)
        self._texts_file, self._missing = DocumentSpool(file.scratch), bytearray()
        self._records = DocumentSpool(file.scratch) if labels else None
        self._kinds: dict[str, Counter[str]] = {}
        self._is_there = found is not None
        kind_of_label = kind_of_cell if file.format in ("csv", "tsv") else kind_of_value
        only = found in ("the only column", "the only column of text")
        for place, row in read_rows(file, name, labels or only):
            self._add_text(row, name, place)
            if only:
                _check_only(row, name, place, columns, self._data)
            if self._records is not None:
                record = {column: v for column, v in row.items() if column != name}
                for column, value in record.items():
                    self._kinds.setdefault(column, Counter())[kind_of_label(value)] += 1
                kept = {c: v for c, v in record.items() if _is_kept(c, v)}
                self._records.append(json.dumps(kept, default=str).encode())
        if not len(self):
            raise DataError(f"{self._data} has no rows; give a file with texts")
        if not self._is_there:
            check_column_exists(columns, name, self._data)
        if labels:
            for column, sample in columns.items():  # those that the file did not give
                if column not in self._kinds and column != name and "twice" not in sample.kinds:
                    self._kinds[column] = Counter({OTHER: len(self)})
        for kinds in self._kinds.values():
            kinds[MISSING] += len(self) - kinds.total()
        self.reading = Reading(name, found, file.notes)

    def __len__(self) -> int:
        return len(self._texts_file)

    def _add_text(self, row: dict[str, Any], name: str, place: str) -> None:
        self._is_there |= name in row
        text = decode_text(row.get(name), self._data, place)
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{self._data}, {place}: the text column {name!r} holds {kind_of(text)}, expected "
                "text; write it in quotes, or choose another --text-column"
            )
        self._missing.append(text is None)
        # Half a surrogate pair, which JSON can write, is kept; it is told where texts are used.
        self._texts_file.append((text or "").encode("utf-8", "surrogatepass"))

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        return self._texts_file.sizes(numbers)

    def texts(self, numbers: list[int]) -> list[str | None]:
        return [
            None
            if self._missing[number]
            else self._texts_file[number].decode("utf-8", "surrogatepass")
            for number in numbers
        ]

    def has_column(self, column: str) -> bool:
        return column in self._kinds

    def column_values(self, numbers: list[int], column: str) -> list[Any]:
        if not self.has_column(column):
            return super().column_values(numbers, column)
        return [record.get(column) for record in self._read(numbers)]

    def _read(self, numbers: list[int] | np.ndarray) -> Iterator[dict[str, Any]]:
        """The other columns of the documents `numbers`."""
        assert self._records is not None
        return (json.loads(self._records[number]) for number in numbers)

    def labels(self, numbers: np.ndarray) -> Labels:
        kinds = {column: found for column, found in self._kinds.items() if column != EXPLICIT}
        return label_arrays(lambda: self._read(numbers), kinds)


def _is_kept(column: str, value: Any) -> bool:
    """Whether a value is a label's or decides which positions are kept."""
    return value is None or isinstance(value, str | int | float) or column in POSITION_COLUMNS


def _check_only(
    row: dict[str, Any], name: str, place: str, columns: dict[str, ColumnSample], data: str
) -> None:
    """Raise `DataError` where a row has a column that could be the text, unlike the first rows."""
    for column, value in row.items():
        is_new = column not in columns or not columns[column].kinds
        if column != name and is_new and value and isinstance(value, str | list | dict):
            raise DataError(
                f"{data} has no obvious text column: {name!r} is the only one before {place}, "
                f"which has {column!r}, too; choose with --text-column"
            )

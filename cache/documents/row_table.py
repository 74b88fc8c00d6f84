"""Documents of a file of rows (.jsonl, .json, .csv, .tsv, .parquet): `RowTable`.

`load_documents` makes a `RowTable` of a `RowFile`. All rows are read once (`row_files.py`); texts
and label columns are copied to two `DocumentSpool`s (temporary files) and read by row number.
"""

import json
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import DataError
from ..files.disk_errors import translate_disk_errors
from .documents import Documents, Reading, Text, decode_text
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
from .long_text import LONG_BYTES, LongText
from .row_files import read_rows, read_sample
from .row_source import RowFile
from .text_column import ColumnSample, check_column_exists, choose_text_column, kind_in_words

IN_MEMORY = 16 << 20
"""Bytes up to which a spool stays in memory."""


class DocumentSpool:
    """A sequence of byte strings in an unnamed temporary file of `folder` (None: the system's).

    The file disappears with the object or the process, even if the process is killed. A full disk
    raises `NoSpaceError`.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=str(self._folder))  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, piece: bytes) -> None:
        """Append a byte string; no more may be appended after the first is read."""
        try:
            self._file.write(piece)
        except OSError as error:
            with translate_disk_errors(self._folder):
                raise error
        self._ends.append(self._ends[-1] + len(piece))

    def __getitem__(self, number: int) -> bytes:
        start, stop = self.bounds(number)
        try:
            self._file.seek(start)  # writes the buffer, so the disk may be full
        except OSError as error:
            with translate_disk_errors(self._folder):
                raise error
        return self._file.read(stop - start)

    def bounds(self, number: int) -> tuple[int, int]:
        """First byte and end of the byte string `number` in the file."""
        return self._ends[number], self._ends[number + 1]

    def text(self, number: int) -> Text:
        """The byte string `number` as text; a long one stays in the file."""
        start, stop = self.bounds(number)
        if stop - start > LONG_BYTES:
            return LongText(self._file, start, stop)
        return self[number].decode("utf-8", "surrogatepass")

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Length in bytes of each of the byte strings `numbers`, int64."""
        ends = np.frombuffer(self._ends, np.int64)
        return ends[numbers + 1] - ends[numbers]


class RowTable(Documents):
    """The documents of a `RowFile`, one per row; the other columns of plain values are labels.

    The constructor reads the whole file, so later changes of the file do not matter. Without
    `labels` only texts are stored. Raises `DataError`.
    """

    def __init__(self, file: RowFile, text_column: str | None = None, labels: bool = True) -> None:
        self._data = file.label
        self._is_csv = file.format in ("csv", "tsv")

        # Choose the text column by the first rows.
        samples = read_sample(file)
        name, reason = choose_text_column(samples, text_column, self._data)
        if file.format in ("csv", "tsv", "parquet"):  # header or schema name all columns
            check_column_exists(samples, name, self._data)
        is_only_column = reason in ("the only column", "the only column of text")

        # Read all rows: texts to one spool, the other columns as JSON to another.
        self._texts_file, self._is_missing = DocumentSpool(file.scratch), bytearray()
        self._records = DocumentSpool(file.scratch) if labels else None
        self._kinds: dict[str, Counter[str]] = {}
        column_exists = reason is not None
        for location, row in read_rows(file, name, other_columns=labels or is_only_column):
            column_exists |= name in row
            self._add_text(row, name, location)
            if is_only_column:
                _check_no_other_text(row, name, location, samples, self._data)
            if self._records is not None:
                self._add_record(self._records, row, name)

        # Checks and counts that need all rows.
        if not len(self):
            raise DataError(f"{self._data} has no rows; give a file with texts")
        if not column_exists:
            check_column_exists(samples, name, self._data)
        if labels:
            for column, sample in samples.items():  # columns that read_rows left out
                if column not in self._kinds and column != name and "twice" not in sample.kinds:
                    self._kinds[column] = Counter({OTHER: len(self)})
        for kinds in self._kinds.values():
            kinds[MISSING] += len(self) - kinds.total()
        self.reading = Reading(name, reason, file.notes)

    def __len__(self) -> int:
        return len(self._texts_file)

    def _add_text(self, row: dict[str, Any], name: str, location: str) -> None:
        """Store the text of `row`; raises `DataError` if the column `name` holds no text."""
        text = decode_text(row.get(name), self._data, location)
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{self._data}, {location}: the text column {name!r} holds {kind_in_words(text)}, "
                "expected text; write it in quotes, or choose another --text-column"
            )
        self._is_missing.append(text is None)
        # JSON can hold half a surrogate pair; reason_to_drop reports such a text when it is used.
        self._texts_file.append((text or "").encode("utf-8", "surrogatepass"))

    def _add_record(self, records: DocumentSpool, row: dict[str, Any], text_column: str) -> None:
        """Count the kinds of the values beside the text, and store labels and position columns."""
        kind_of = kind_of_cell if self._is_csv else kind_of_value
        record = {column: value for column, value in row.items() if column != text_column}
        for column, value in record.items():
            self._kinds.setdefault(column, Counter())[kind_of(value)] += 1
        stored = {
            column: value
            for column, value in record.items()
            if value is None or isinstance(value, str | int | float) or column in POSITION_COLUMNS
        }
        records.append(json.dumps(stored, default=str).encode())

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        return self._texts_file.sizes(numbers)

    def texts(self, numbers: list[int]) -> Sequence[Text | None]:
        return [
            None if self._is_missing[number] else self._texts_file.text(number)
            for number in numbers
        ]

    def has_column(self, column: str) -> bool:
        return column in self._kinds

    def column_values(self, numbers: list[int], column: str) -> list[Any]:
        if not self.has_column(column):
            return super().column_values(numbers, column)
        return [record.get(column) for record in self._read_records(numbers)]

    def _read_records(self, numbers: list[int] | np.ndarray) -> Iterator[dict[str, Any]]:
        """Columns other than the text, of the documents `numbers`: column -> value."""
        assert self._records is not None
        return (json.loads(self._records[number]) for number in numbers)

    def labels(self, numbers: np.ndarray) -> Labels:
        kinds = {column: counts for column, counts in self._kinds.items() if column != EXPLICIT}
        return label_arrays(lambda: self._read_records(numbers), kinds)


def _check_no_other_text(
    row: dict[str, Any], name: str, location: str, samples: dict[str, ColumnSample], data: str
) -> None:
    """Raise `DataError` if a row has a possible text column unknown to the samples."""
    for column, value in row.items():
        is_new = column not in samples or not samples[column].kinds
        if column != name and is_new and value and isinstance(value, str | list | dict):
            raise DataError(
                f"{data} has no obvious text column: {name!r} is the only one before {location}, "
                f"which has {column!r}, too; choose with --text-column"
            )

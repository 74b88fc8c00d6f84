"""Documents of files of rows (.jsonl, .json, .csv, .tsv, .parquet): `RowTable`.

`load_documents` makes a `RowTable` of `RowFile`s. All rows are read once (`row_files.py`); texts
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
from .documents import Documents, Reading, RenderConversation, Text, decode_text, unmasked_ids
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
from .text_column import (
    ATTENTION_MASK,
    ColumnSample,
    check_column_exists,
    choose_text_column,
    kind_in_words,
)

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
    """The documents of files of rows, one per row; the other columns of plain values are labels.

    The constructor reads the files whole, so later changes of them do not matter. `data` names
    them in messages. Without `labels` only the documents are stored. `render` gives the text of a
    conversation, a list of turns. Raises `DataError`.
    """

    def __init__(
        self,
        files: RowFile | Sequence[RowFile],
        text_column: str | None = None,
        labels: bool = True,
        data: str | None = None,
        render: RenderConversation | None = None,
    ) -> None:
        files = [files] if isinstance(files, RowFile) else files
        self._data = files[0].label if data is None else data
        self._is_csv = files[0].format in ("csv", "tsv")
        self._render = render

        # Choose the text column by the first rows.
        samples = next(filter(None, map(read_sample, files)), {})
        choice = choose_text_column(samples, text_column, self._data, render is not None)
        self._column = choice.name
        self.holds_token_ids: bool = choice.holds == "token ids"
        self.is_rendered: bool = choice.holds == "conversations"
        is_only_column = choice.reason in ("the only column", "the only column of text")

        # Read all rows: texts to one spool, the other columns as JSON to another.
        scratch = files[0].scratch
        self._texts_file, self._is_missing = DocumentSpool(scratch), bytearray()
        self._records = DocumentSpool(scratch) if labels else None
        self._kinds: dict[str, Counter[str]] = {}
        column_exists = choice.reason is not None
        for file in files:
            self._check_header(file, samples if len(files) == 1 else None)
            rows = read_rows(file, choice.name, other_columns=labels or is_only_column)
            for location, row in rows:
                column_exists |= choice.name in row
                self._add_document(row, file.label, location)
                if is_only_column:
                    _check_no_other_text(row, choice.name, location, samples, file.label)
                if self._records is not None:
                    self._add_record(self._records, row)

        # Checks and counts that need all rows.
        if not len(self):
            raise DataError(f"{self._data} has no rows; give a file with texts")
        if not column_exists:
            check_column_exists(samples, choice.name, self._data)
        if labels:
            for column, sample in samples.items():  # columns that read_rows left out
                is_label = column not in (choice.name, self._mask_column)
                if column not in self._kinds and is_label and "twice" not in sample.kinds:
                    self._kinds[column] = Counter({OTHER: len(self)})
        for kinds in self._kinds.values():
            kinds[MISSING] += len(self) - kinds.total()
        notes = [note for file in files for note in file.notes]
        self.reading: Reading = Reading(choice.name, choice.reason, notes)

    def __len__(self) -> int:
        return len(self._texts_file)

    @property
    def _mask_column(self) -> str | None:
        """Column of the attention mask of token ids; None beside texts."""
        return ATTENTION_MASK if self.holds_token_ids else None

    def _check_header(self, file: RowFile, samples: dict[str, ColumnSample] | None) -> None:
        """Raise `DataError` if `file` has a header or schema without the text column."""
        if file.format in ("csv", "tsv", "parquet"):
            columns = read_sample(file) if samples is None else samples
            if columns:  # else a file of no rows
                check_column_exists(columns, self._column, file.label)

    def _add_document(self, row: dict[str, Any], data: str, location: str) -> None:
        """Store the document of `row`; raises `DataError` if the column does not hold it."""
        value = row.get(self._column)
        self._is_missing.append(value is None)
        if value is None:
            self._texts_file.append(b"")
            return
        if self.holds_token_ids:
            mask = row.get(ATTENTION_MASK)
            ids = unmasked_ids(value, mask, f"{data}, {location}", self._column)
            self._texts_file.append(ids.tobytes())
            return
        if self.is_rendered:
            assert self._render is not None
            text = self._render(value, f"{data}, {location}")
        else:
            text = decode_text(value, data, location)
        if not isinstance(text, str):
            raise DataError(
                f"{data}, {location}: the text column {self._column!r} holds "
                f"{kind_in_words(text)}, expected text; write it in quotes, or choose another "
                "--text-column"
            )
        # JSON can hold half a surrogate pair; reason_to_drop reports such a text when it is used.
        self._texts_file.append(text.encode("utf-8", "surrogatepass"))

    def _add_record(self, records: DocumentSpool, row: dict[str, Any]) -> None:
        """Count the kinds of the values beside the text, and store labels and position columns."""
        kind_of = kind_of_cell if self._is_csv else kind_of_value
        beside = (self._column, self._mask_column)
        record = {column: value for column, value in row.items() if column not in beside}
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

    def token_ids(self, numbers: list[int]) -> list[np.ndarray | None]:
        return [
            None
            if self._is_missing[number]
            else np.frombuffer(self._texts_file[number], "<i4").astype(np.int32)
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

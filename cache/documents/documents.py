"""Documents: texts read by number, with the columns beside them and a report on reading.

How a data source becomes documents:

    load_documents      chooses the kind of source (`load_documents.py`)
      .txt              -> TextFile                      -> Documents
      rows of a file    -> read_rows (`row_files.py`) -> json_rows, csv_rows, tsv_rows, parquet_rows
                        -> RowTable (`row_table.py`), a Documents
      saved or hub set  -> `datasets` library            -> DatasetDocuments

Texts lie on the disk: in a temporary copy, or in the files that `datasets` maps. A read takes at
most `READ_ROWS` documents and about `READ_BYTES` of text, and a long document of a text file or of
rows is read in slices (`long_text.py`), so memory does not grow with the data.
`tokenize` (`tokens/tokenization.py`) reads documents in batches, in random order, maybe twice.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .labels import Labels, kind_of_value, label_arrays
from .long_text import LongText

if TYPE_CHECKING:
    from .text_file import TextFile

READ_ROWS = 256
"""Largest number of documents of one read."""
READ_BYTES = 1 << 20
"""Bytes of text of one read; a longer document is read alone."""
Text = str | LongText
"""Text of a document; a long one stays on the disk."""
BLANK, HALF_PAIR = "only whitespace", "half a surrogate pair"
"""Reasons to leave out a document."""
FIRST_ROWS = 5
"""Reported document numbers per reason to drop documents."""


@dataclass
class Dropped:
    """Number of documents dropped for the same reason, and the first document numbers."""

    documents: int = 0
    rows: list[int] = field(default_factory=list)
    """The `FIRST_ROWS` lowest document numbers (from 0), ascending."""

    def add(self, row: int) -> None:
        """Count the document `row`."""
        self.documents += 1
        self.rows = sorted([*self.rows, row])[:FIRST_ROWS]


@dataclass
class Reading:
    """Report on reading texts: the text column, decisions in words, documents left out."""

    text_column: str | None = None
    """Column of the texts; None for a text file."""
    column_reason: str | None = None
    """Why this column was chosen, such as `by its name`; None if the user named it."""
    notes: list[str] = field(default_factory=list)
    """Other decisions, as sentences for the user."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """Reason -> documents left out, among the documents read so far."""

    def drop(self, reason: str, row: int) -> None:
        """Count the document `row` as left out for `reason`."""
        self.dropped.setdefault(reason, Dropped()).add(row)

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object."""
        dropped = {reason: vars(entry) for reason, entry in sorted(self.dropped.items())}
        return {
            "text_column": self.text_column,
            "found": self.column_reason,
            "notes": list(dict.fromkeys(self.notes)),
            "dropped": dropped,
        }


def reason_to_drop(text: Text | None) -> str | None:
    """Why a document with this text is left out (None: missing); None for a usable text."""
    if text is None:
        return "missing"
    if isinstance(text, LongText):
        reasons = {reason_to_drop(block) for block in text.blocks()} - {"empty"}
        if HALF_PAIR in reasons:
            return HALF_PAIR
        return None if None in reasons else BLANK
    if not text:
        return "empty"
    if text.isspace():
        return BLANK
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return HALF_PAIR
    return None


class Documents:
    """Texts of a data source, read by number (from 0), and the columns beside them.

    This class serves plain texts, which have no columns; subclasses read tables.
    """

    def __init__(self, texts: "Sequence[str] | TextFile") -> None:
        self._texts = texts
        self.reading = Reading()

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[str | None]:
        for numbers in self.batches(np.arange(len(self))):
            yield from (None if text is None else str(text) for text in self.texts(numbers))

    def batches(self, numbers: np.ndarray) -> Iterator[list[int]]:
        """Yield `numbers` in lists of at most `READ_ROWS` documents, about `READ_BYTES` of text."""
        sizes = self.sizes(numbers)
        start = 0
        while start < len(numbers):
            stop = min(start + READ_ROWS, len(numbers))
            if sizes is not None:
                ends = np.cumsum(sizes[start:stop])
                stop = start + max(1, int(np.searchsorted(ends, READ_BYTES, side="right")))
            yield numbers[start:stop].tolist()
            start = stop

    def sizes(self, numbers: np.ndarray) -> np.ndarray | None:
        """Bytes of each of the documents `numbers`; None if the sizes are unknown."""
        sizes = getattr(self._texts, "sizes", None)
        return None if sizes is None else sizes(numbers)

    def texts(self, numbers: list[int]) -> Sequence[Text | None]:
        """Texts of the documents `numbers`, long ones as `LongText`; None for a missing text."""
        return [self._texts[number] for number in numbers]

    def has_column(self, column: str) -> bool:
        """Return whether the documents have the column `column`."""
        return False

    def column_values(self, numbers: list[int], column: str) -> list[Any]:
        """Values of `column` for the documents `numbers`; `DataError` if the column is absent."""
        raise DataError(f"the data have no column {column!r}, which this choice of positions reads")

    def labels(self, numbers: np.ndarray) -> Labels:
        """Label columns (see `labels.py`) of the documents `numbers`."""
        return Labels()


class DatasetDocuments(Documents):
    """Documents of a data set of the `datasets` library: `name` is the text column.

    The other columns of numbers, truth values and words are labels. `rows` is mapped from its
    files, so only the rows being read are in memory. `data` names the data in messages.
    """

    def __init__(self, rows: Any, name: str, data: str) -> None:
        self._rows = rows.with_format(None)
        self._name = name
        self._data = data
        self.reading = Reading(name)

    def __len__(self) -> int:
        return len(self._rows)

    def _read_columns(self, numbers: list[int], columns: list[str]) -> dict[str, list[Any]]:
        """Column -> values of the rows `numbers`."""
        try:
            return self._rows.select_columns(columns)[numbers]
        except UnicodeDecodeError:
            raise DataError(f"{self._data} is not UTF-8 text; convert it first") from None

    def sizes(self, numbers: np.ndarray) -> np.ndarray | None:
        if self._rows._indices is not None or not len(self._rows):
            return None  # a reordered view: rows of the table have other numbers
        import pyarrow.compute

        texts = self._rows.data.column(self._name)
        lengths = [
            pyarrow.compute.call_function("binary_length", [chunk]).fill_null(0)
            for chunk in texts.chunks
        ]
        arrays = [chunk.to_numpy(zero_copy_only=False).astype(np.int64) for chunk in lengths]
        return np.concatenate(arrays)[numbers]

    def texts(self, numbers: list[int]) -> Sequence[Text | None]:
        texts = self._read_columns(numbers, [self._name])[self._name]
        return [
            decode_text(text, self._data, f"row {number}")
            for number, text in zip(numbers, texts, strict=True)
        ]

    def has_column(self, column: str) -> bool:
        return column in self._rows.features

    def column_values(self, numbers: list[int], column: str) -> list[Any]:
        if not self.has_column(column):
            return super().column_values(numbers, column)
        return self._read_columns(numbers, [column])[column]

    def labels(self, numbers: np.ndarray) -> Labels:
        columns = [
            column
            for column, feature in self._rows.features.items()
            if column != self._name and is_label_feature(feature)
        ]
        kinds: dict[str, Counter[str]] = {column: Counter() for column in columns}
        if not columns:
            return Labels()

        def records() -> Iterator[dict[str, Any]]:
            for batch in self.batches(numbers):
                values = self._read_columns(batch, columns)
                for row in zip(*(values[column] for column in columns), strict=True):
                    yield dict(zip(columns, row, strict=True))

        # First pass: kinds of values, which decide the dtypes; label_arrays makes the second.
        for record in records():
            for column, value in record.items():
                kinds[column][kind_of_value(value)] += 1
        return label_arrays(records, kinds)


def is_label_feature(feature: Any) -> bool:
    """Return whether a column of `datasets` holds numbers, truth values or words."""
    kind = str(getattr(feature, "dtype", ""))
    return kind in ("bool", "string", "large_string") or kind.startswith(("int", "uint", "float"))


def decode_text(text: Any, data: str, location: str) -> str | None:
    """`text`, decoded if stored as bytes; raises `DataError` for bytes not in UTF-8.

    `location` in `data`, such as `row 3`, is named in the message.
    """
    if not isinstance(text, bytes):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{data}, {location}: the text is not UTF-8 (byte {error.start}); convert it first"
        ) from None

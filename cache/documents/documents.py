"""Documents by number, the labels that stand beside them, and what was left out of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .labels import Labels, kind_of_value, label_arrays

if TYPE_CHECKING:
    from .text_file import TextFile

READ_ROWS = 256
"""Most documents of one read."""
READ_BYTES = 1 << 20
"""Bytes of text after which a read takes no further document."""
FIRST_ROWS = 5
"""Left out documents whose numbers are told, of each kind."""


@dataclass
class Dropped:
    """Documents that were left out for one reason."""

    documents: int = 0
    rows: list[int] = field(default_factory=list)
    """The lowest `FIRST_ROWS` numbers of them, ascending from 0."""

    def add(self, row: int) -> None:
        self.documents += 1
        self.rows = sorted([*self.rows, row])[:FIRST_ROWS]


@dataclass
class Reading:
    """How texts were read: what was guessed, and which documents were left out, and why."""

    text_column: str | None = None
    """Column of the texts; None where there are no columns."""
    column_reason: str | None = None
    """How the column was found, None if it was asked for."""
    notes: list[str] = field(default_factory=list)
    """Other decisions, in words."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """Reason -> the documents, of those that were read."""

    def drop(self, reason: str, row: int) -> None:
        """Count the document `row` as left out."""
        self.dropped.setdefault(reason, Dropped()).add(row)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        dropped = {name: vars(found) for name, found in sorted(self.dropped.items())}
        return {
            "text_column": self.text_column,
            "found": self.column_reason,
            "notes": list(dict.fromkeys(self.notes)),
            "dropped": dropped,
        }


def reason_to_drop(text: str | None) -> str | None:
    """Why a document is left out, None if it is not."""
    if text is None:
        return "missing"
    if not text:
        return "empty"
    if text.isspace():
        return "only whitespace"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "half a surrogate pair"
    return None


class Documents:
    """Texts of a source by number, with the labels that stand beside them."""

    def __init__(self, texts: "Sequence[str] | TextFile") -> None:
        self._texts = texts
        self.reading = Reading()

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[str | None]:
        for numbers in self.batches(np.arange(len(self))):
            yield from self.texts(numbers)

    def batches(self, numbers: np.ndarray) -> Iterator[list[int]]:
        """`numbers` in lists of at most `READ_ROWS`, and of about `READ_BYTES` of text."""
        sizes = self.sizes(numbers)
        start = 0
        while start < len(numbers):
            stop = min(start + READ_ROWS, len(numbers))
            if sizes is not None:
                total = np.cumsum(sizes[start:stop])
                stop = start + max(1, int(np.searchsorted(total, READ_BYTES, side="right")))
            yield numbers[start:stop].tolist()
            start = stop

    def sizes(self, numbers: np.ndarray) -> np.ndarray | None:
        """Bytes of the documents `numbers`; None if they are not known."""
        sizes = getattr(self._texts, "sizes", None)
        return None if sizes is None else sizes(numbers)

    def texts(self, numbers: list[int]) -> list[str | None]:
        """The documents `numbers`; None for one that is missing."""
        return [self._texts[number] for number in numbers]

    def has_column(self, column: str) -> bool:
        """Whether there is such a column."""
        return False

    def column_values(self, numbers: list[int], column: str) -> list[Any]:
        """Values of a column beside the documents `numbers`; raises `DataError` without it."""
        raise DataError(f"the data have no column {column!r}, which this choice of positions reads")

    def labels(self, numbers: np.ndarray) -> Labels:
        """Label columns of the documents `numbers`."""
        return Labels()


class DatasetDocuments(Documents):
    """A data set of `datasets` with one text column; its other columns of plain values are labels.

    `rows` is mapped from its files: only what is read is in memory.
    """

    def __init__(self, rows: Any, name: str, data: str) -> None:
        self._rows = rows.with_format(None)
        self._name = name
        self._data = data
        self.reading = Reading(name)

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, numbers: list[int], columns: list[str]) -> dict[str, list[Any]]:
        try:
            return self._rows.select_columns(columns)[numbers]
        except UnicodeDecodeError:
            raise DataError(f"{self._data} is not UTF-8 text; convert it first") from None

    def sizes(self, numbers: np.ndarray) -> np.ndarray | None:
        if self._rows._indices is not None or not len(self._rows):
            return None  # the rows have another order than the table has
        import pyarrow.compute

        texts = self._rows.data.column(self._name)
        return np.concatenate(
            [
                _filled_lengths(pyarrow.compute.call_function("binary_length", [chunk]))
                for chunk in texts.chunks
            ]
        )[numbers]

    def texts(self, numbers: list[int]) -> list[str | None]:
        return [
            decode_text(text, self._data, f"row {number}")
            for number, text in zip(
                numbers, self._read(numbers, [self._name])[self._name], strict=True
            )
        ]

    def has_column(self, column: str) -> bool:
        return column in self._rows.features

    def column_values(self, numbers: list[int], column: str) -> list[Any]:
        if not self.has_column(column):
            return super().column_values(numbers, column)
        return self._read(numbers, [column])[column]

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
            for some in self.batches(numbers):
                values = self._read(some, columns)
                for row in zip(*(values[column] for column in columns), strict=True):
                    yield dict(zip(columns, row, strict=True))

        for record in records():
            for column, value in record.items():
                kinds[column][kind_of_value(value)] += 1
        return label_arrays(records, kinds)


def is_label_feature(feature: Any) -> bool:
    """Whether a column of `datasets` holds numbers, truth values or words."""
    kind = str(getattr(feature, "dtype", ""))
    return kind in ("bool", "string", "large_string") or kind.startswith(("int", "uint", "float"))


def decode_text(text: Any, data: str, place: str) -> str | None:
    """A text that may be stored as bytes; raises `DataError` if they are not UTF-8."""
    if not isinstance(text, bytes):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{data}, {place}: the text is not UTF-8 (byte {error.start}); convert it first"
        ) from None


def _filled_lengths(lengths: Any) -> np.ndarray:
    return lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)

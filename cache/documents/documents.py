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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .labels import Labels, kind_of_value, label_arrays
from .long_text import LongText
from .text_column import ATTENTION_MASK, ColumnChoice

if TYPE_CHECKING:
    from .text_file import TextFile

READ_ROWS = 256
"""Largest number of documents of one read."""
READ_BYTES = 1 << 20
"""Bytes of text of one read; a longer document is read alone."""
Text = str | LongText
"""Text of a document; a long one stays on the disk."""
RenderConversation = Callable[[Any, str], str]
"""Function of a list of turns and its place in the data, which gives the conversation's text."""
BYTES_PER_ID = 32
"""Bytes of memory of a token id while it is read, as a number of Python."""
MAX_TOKEN_ID = 2**31 - 1
"""Largest token id of a row."""
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

    holds_token_ids = False
    """Whether documents are rows of token ids (`token_ids`), and have no texts."""
    is_rendered = False
    """Whether texts are conversations, with the special tokens of a chat template in them."""

    def __init__(self, texts: "Sequence[str] | TextFile") -> None:
        self._texts = texts
        self.reading: Reading = Reading()

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

    def token_ids(self, numbers: list[int]) -> list[np.ndarray | None]:
        """Token ids of the documents `numbers`, `(tokens,)` int32 each; None for a missing row.

        Only if `holds_token_ids`.
        """
        raise NotImplementedError

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
    """Documents of a data set of the `datasets` library: `choice` is their column.

    The other columns of numbers, truth values and words are labels. `rows` is mapped from its
    files, so only the rows being read are in memory. `data` names the data in messages.
    """

    def __init__(
        self, rows: Any, choice: ColumnChoice, data: str, render: RenderConversation | None = None
    ) -> None:
        self._rows = rows.with_format(None)
        self._name = choice.name
        self._data = data
        self._render = render
        self.holds_token_ids: bool = choice.holds == "token ids"
        self.is_rendered: bool = choice.holds == "conversations"
        self.reading: Reading = Reading(choice.name, choice.reason)

    def __len__(self) -> int:
        return len(self._rows)

    def _read_columns(self, numbers: list[int], columns: list[str]) -> dict[str, list[Any]]:
        """Column -> values of the rows `numbers`."""
        try:
            return self._rows.select_columns(columns)[numbers]
        except UnicodeDecodeError:
            raise DataError(f"{self._data} is not UTF-8 text; convert it first") from None

    def sizes(self, numbers: np.ndarray) -> np.ndarray | None:
        if self._rows._indices is not None or not len(self._rows) or self.is_rendered:
            return None  # of a reordered view, rows of the table have other numbers
        import pyarrow.compute

        function, item_bytes = "binary_length", 1
        if self.holds_token_ids:
            function, item_bytes = "list_value_length", BYTES_PER_ID
        lengths = [
            pyarrow.compute.call_function(function, [chunk]).fill_null(0)
            for chunk in self._rows.data.column(self._name).chunks
        ]
        arrays = [chunk.to_numpy(zero_copy_only=False).astype(np.int64) for chunk in lengths]
        return item_bytes * np.concatenate(arrays)[numbers]

    def texts(self, numbers: list[int]) -> Sequence[Text | None]:
        values = self._read_columns(numbers, [self._name])[self._name]
        places = zip(numbers, values, strict=True)
        if self.is_rendered:
            assert (render := self._render) is not None
            return [
                None if turns is None else render(turns, f"{self._data}, row {number}")
                for number, turns in places
            ]
        return [decode_text(text, self._data, f"row {number}") for number, text in places]

    def token_ids(self, numbers: list[int]) -> list[np.ndarray | None]:
        has_mask = self.has_column(ATTENTION_MASK)
        columns = [self._name, ATTENTION_MASK] if has_mask else [self._name]
        values = self._read_columns(numbers, columns)
        masks = values[ATTENTION_MASK] if has_mask else [None] * len(numbers)
        return [
            None
            if ids is None
            else unmasked_ids(ids, mask, f"{self._data}, row {number}", self._name)
            for number, ids, mask in zip(numbers, values[self._name], masks, strict=True)
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


def unmasked_ids(ids: Any, mask: Any, place: str, column: str) -> np.ndarray:
    """The token ids of one row whose attention mask is 1, `(tokens,)` int32.

    `mask` is None, or as long as `ids`: zeros for padding at either end, ones between. Raises
    `DataError`, which names the row by `place` and the column by `column`.
    """
    if not isinstance(ids, list) or not all(type(item) is int for item in ids):
        raise DataError(f"{place}: the column {column!r} must hold lists of whole numbers")
    if ids and not 0 <= min(ids) <= max(ids) <= MAX_TOKEN_ID:
        raise DataError(
            f"{place}: the column {column!r} holds {min(ids) if min(ids) < 0 else max(ids)}, which "
            "is no token id; expected whole numbers from 0 on"
        )
    values = np.array(ids, np.int32)
    if mask is None:
        return values
    is_list = isinstance(mask, list) and len(mask) == len(ids)
    if not is_list or not all(item in (0, 1) for item in mask):
        raise DataError(
            f"{place}: the column {ATTENTION_MASK!r} must hold a list of {len(ids)} zeros and "
            f"ones, one for each of {column!r}"
        )
    kept = np.flatnonzero(mask)
    if len(kept) and kept[-1] - kept[0] != len(kept) - 1:
        raise DataError(
            f"{place}: the column {ATTENTION_MASK!r} has zeros between ones; only padding at the "
            "ends is left out"
        )
    return values[kept]


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

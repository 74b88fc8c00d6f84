"""Documents by number, and the labels that stand beside them in a data set."""

import re
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError

if TYPE_CHECKING:
    from .textfile import TextFile

LABEL_KINDS = re.compile(r"(u?int\d+|float\d+|bool|string|large_string)$")
"""Types of columns that are kept as labels."""
READ_ROWS = 256
"""Documents of one read."""


class Documents:
    """Texts of a source by number, with the labels that stand beside them."""

    def __init__(self, texts: "Sequence[str] | TextFile") -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[str]:
        for numbers in batches(np.arange(len(self))):
            yield from self.texts(numbers)

    def texts(self, numbers: list[int]) -> list[str]:
        """The documents `numbers`."""
        return [self._texts[number] for number in numbers]

    def has(self, column: str) -> bool:
        """Whether there is such a column."""
        return False

    def column(self, numbers: list[int], column: str) -> list[Any]:
        """Values of a column beside the documents `numbers`; raises `DataError` without it."""
        raise DataError(f"the data have no column {column!r}, which this choice of positions reads")

    def labels(
        self, numbers: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
        """Label columns of the documents `numbers`, and the words that coded ones stand for."""
        return {}, {}


class Table(Documents):
    """A data set with one text column; its other columns of plain values are labels."""

    def __init__(self, rows: Any, name: str, data: str) -> None:
        self._rows = rows
        self._name = name
        self._data = data

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, numbers: list[int], column: str) -> list[Any]:
        try:
            return self._rows.select_columns([column])[numbers][column]
        except UnicodeDecodeError:
            raise DataError(f"{self._data} is not UTF-8 text; convert it first") from None

    def texts(self, numbers: list[int]) -> list[str]:
        return self._read(numbers, self._name)

    def has(self, column: str) -> bool:
        return column in self._rows.features

    def column(self, numbers: list[int], column: str) -> list[Any]:
        if not self.has(column):
            return super().column(numbers, column)
        return self._read(numbers, column)

    def labels(
        self, numbers: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
        """Numbers as int64 or float64, truth as uint8, words as int32 codes (-1: missing)."""
        values, categories = {}, {}
        for column, feature in self._rows.features.items():
            kind = str(getattr(feature, "dtype", ""))
            name = re.sub(r"\W", "_", column)
            if column == self._name or not LABEL_KINDS.match(kind):
                continue
            found = (v for some in batches(numbers) for v in self._read(some, column))
            if "string" in kind:
                values[name], categories[name] = _codes(found)
            else:
                values[name] = _numbers(found, kind)
        return values, categories


def batches(numbers: np.ndarray) -> Iterator[list[int]]:
    """`numbers` in lists of at most `READ_ROWS`."""
    for start in range(0, len(numbers), READ_ROWS):
        yield numbers[start : start + READ_ROWS].tolist()


def _codes(found: Iterator[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes of words, -1 where one is missing, and the sorted words."""
    seen: dict[str, int] = {}
    order = array("i", (-1 if word is None else seen.setdefault(word, len(seen)) for word in found))
    words = tuple(sorted(seen))
    codes = np.full(len(words) + 1, -1, "<i4")  # the last place is that of -1
    codes[[seen[word] for word in words]] = np.arange(len(words))
    return codes[np.asarray(order)], words


def _numbers(found: Iterator[Any], kind: str) -> np.ndarray:
    """Numbers in as few bytes as they need; with one missing they are float64."""
    dtype = "d" if "float" in kind else "b" if kind == "bool" else "q"
    values = array(dtype)
    for value in found:
        if value is None and values.typecode != "d":
            values = array("d", values)
        values.append(np.nan if value is None else value)
    return np.array(values, {"d": "<f8", "b": "u1", "q": "<i8"}[values.typecode])

"""Documents by number, and the labels that stand beside them in a data set."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .errors import DataError

LABEL_KINDS = re.compile(r"(u?int\d+|float\d+|bool|string|large_string)$")
"""Types of columns that are kept as labels."""


class Documents:
    """Texts of a source by number, with the labels that stand beside them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts(list(range(len(self)))))

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
            found = self._read([int(number) for number in numbers], column)
            if "string" in kind:
                words = tuple(sorted({word for word in found if word is not None}))
                codes = {word: code for code, word in enumerate(words)}
                values[name] = np.array([codes.get(word, -1) for word in found], "<i4")
                categories[name] = words
            else:
                values[name] = _numbers(found, kind)
        return values, categories


def _numbers(found: list[Any], kind: str) -> np.ndarray:
    if "float" in kind or any(value is None for value in found):
        return np.array([np.nan if value is None else value for value in found], "<f8")
    return np.array(found, "u1" if kind == "bool" else "<i8")

"""Labels: columns of plain values beside the texts, as arrays of numbers or codes of words.

`Documents.labels` calls `label_arrays`, which chooses a dtype by the kinds of all values of a
column and fills the arrays; `join_labels` joins the labels of two streams when a cache is extended
(`tokens/token_stream.py`). No value is changed or lost: a column that no numeric dtype holds
exactly becomes words.
"""

import json
import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LABEL_PREFIX = "sequences/labels/"
"""Prefix of the names of label arrays."""
MISSING, EMPTY, TRUTH, WORD = "missing", "empty", "truth values", "words"
INTEGER, LONG, HUGE = "whole numbers", "whole numbers beyond 2^53", "whole numbers beyond 64 bits"
FLOAT, NAN = "numbers", "NaN"
NESTED, OTHER = "lists or objects", "values of other kinds"
"""Kinds of the values of a column."""
NUMBERS = frozenset((INTEGER, LONG, HUGE, FLOAT, NAN))
EXACT = 1 << 53
"""Largest n such that float64 holds all whole numbers up to n exactly."""
WORDS_BYTES = 64 << 20
"""Largest total size of the distinct words of a label, which lie in memory."""
NAME_BYTES = 100
"""Longest name of a label array, in bytes; file systems allow 255."""
_INTEGER_CELL = re.compile(r"-?[1-9]\d*|0", re.ASCII)
_FLOAT_CELL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?", re.ASCII)
_TRUTH_CELLS = ("True", "False", "true", "false", "TRUE", "FALSE")
ANSWER, ANSWER_START, EXPLICIT = "answer", "answer_start", "positions"
"""Columns that the position policies `answer` and `explicit` read (`tokens/positions.py`)."""
POSITION_COLUMNS = (ANSWER, ANSWER_START, EXPLICIT)
Kinds = Mapping[str, Counter[str]]
"""Column -> number of values of each kind."""


def kind_of_value(value: Any) -> str:
    """The kind of a value of JSON or parquet."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return WORD
    if isinstance(value, bool):
        return TRUTH
    if isinstance(value, int):
        return _kind_of_integer(value)
    if isinstance(value, float):
        return FLOAT if value == value else NAN
    return NESTED if isinstance(value, list | dict) else OTHER


def kind_of_cell(cell: str) -> str:
    """The kind of a cell of .csv or .tsv; `007` and `nan` are words."""
    if not cell:
        return EMPTY
    if _INTEGER_CELL.fullmatch(cell):
        return _kind_of_integer(int(cell)) if len(cell) < 21 else HUGE
    if _FLOAT_CELL.fullmatch(cell) and math.isfinite(float(cell)):
        return FLOAT
    return TRUTH if cell in _TRUTH_CELLS else WORD


def _kind_of_integer(value: int) -> str:
    if -EXACT <= value <= EXACT:
        return INTEGER
    return LONG if -(1 << 63) <= value < 1 << 63 else HUGE


def label_dtype(kinds: Counter[str]) -> str | None:
    """dtype of a label: `int64`, `float64`, `uint8` (truth values), `words`; None: no label."""
    all_kinds = {kind for kind, count in kinds.items() if count}
    has_missing = bool(all_kinds & {MISSING, EMPTY})
    value_kinds = all_kinds - {MISSING, EMPTY}
    if NESTED in all_kinds or OTHER in all_kinds:
        return None
    if not value_kinds and EMPTY not in all_kinds:
        return None
    if not value_kinds or WORD in value_kinds or HUGE in value_kinds:
        return "words"
    if value_kinds == {TRUTH}:
        return "float64" if has_missing else "uint8"
    if value_kinds <= {INTEGER, LONG} and not has_missing:
        return "int64"
    return "float64" if value_kinds <= {INTEGER, FLOAT, NAN} else "words"


def label_names(columns: Iterable[str]) -> dict[str, str]:
    """Array name of the label of each column, in order: letters, digits and underscores.

    Names are distinct even if upper and lower case are not distinguished.
    """
    names: dict[str, str] = {}
    used: set[str] = set()
    for column in columns:
        base = re.sub(r"\W", "_", unicodedata.normalize("NFC", column))
        base = re.sub(r"^__+", "_", base)  # zarr reserves names that begin with two underscores
        base = base.encode()[:NAME_BYTES].decode(errors="ignore")
        base = base if base.strip("_") else "column"
        name, number = base, 2
        while name.casefold() in used:
            name, number = f"{base}_{number}", number + 1
        used.add(name.casefold())
        names[column] = name
    return names


@dataclass
class Labels:
    """Label arrays of some documents, with the words of coded labels and notes for the user."""

    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> `(documents,)` int64, float64, uint8, or int32 codes of words."""
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> words, indexed by code; code -1 is a missing value."""
    notes: list[str] = field(default_factory=list)
    """Sentences on columns without a label, and on labels with changed names or types."""


def label_arrays(records: Callable[[], Iterator[Mapping[str, Any]]], kinds: Kinds) -> Labels:
    """Labels of documents, from their `records` (column -> value) and the `kinds` of all values.

    `records()` is called once. `kinds` decides the dtypes, so it must count every value.
    """
    labels = Labels()
    dtypes = {column: label_dtype(counts) for column, counts in kinds.items()}
    label_dtypes = {column: dtype for column, dtype in dtypes.items() if dtype is not None}
    names = label_names(label_dtypes)

    # Fill one builder per label.
    builders: dict[str, _CodedLabels | _NumberLabels] = {
        column: _CodedLabels() if dtype == "words" else _NumberLabels(dtype)
        for column, dtype in label_dtypes.items()
    }
    for record in records():
        for column, builder in builders.items():
            builder.append(record.get(column))

    # Turn the builders into arrays, and note changes.
    for column, builder in builders.items():
        name = names[column]
        if isinstance(builder, _NumberLabels):
            labels.values[name] = builder.array()
        elif builder.is_too_large:
            labels.notes.append(
                f"column {column!r} is no label: its distinct words take more than "
                f"{WORDS_BYTES >> 20} MiB"
            )
            continue
        else:
            labels.values[name], labels.categories[name] = builder.codes()
        labels.notes += _notes_on_label(column, name, kinds[column], label_dtypes[column])
    unusable = [
        repr(column)
        for column, dtype in dtypes.items()
        if dtype is None and set(kinds[column]) - {MISSING}
    ]
    if unusable:
        labels.notes.append(
            f"no labels, because they hold lists, objects or other values: {', '.join(unusable)}"
        )
    return labels


def _notes_on_label(column: str, name: str, kinds: Counter[str], dtype: str) -> Iterator[str]:
    """Yield sentences on how the label `name` differs from the `column` of the data."""
    if name != column:
        yield f"column {column!r} is the label {name!r}"
    value_kinds = {
        kind: count for kind, count in kinds.items() if count and kind not in (MISSING, EMPTY)
    }
    is_mixed = len(value_kinds) > 1
    has_numbers = any(kind in NUMBERS for kind in value_kinds)
    if (
        dtype == "words"
        and has_numbers
        and (is_mixed or LONG in value_kinds or HUGE in value_kinds)
    ):
        counts = ", ".join(f"{count} {kind}" for kind, count in value_kinds.items())
        yield f"column {column!r} is kept as words: no dtype holds all its values ({counts})"
    elif dtype == "words" and TRUTH in value_kinds and is_mixed:
        yield f"column {column!r} is kept as words: it has truth values and words"
    missing = kinds.get(MISSING, 0) + kinds.get(EMPTY, 0)
    if dtype == "float64" and missing and kinds.get(NAN):
        yield (
            f"column {column!r}: its {missing} missing values are NaN, beside {kinds[NAN]} that "
            "are NaN in the data"
        )


class _NumberLabels:
    """Builder of the array of a numeric label; a missing value becomes NaN."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._values = array({"int64": "q", "float64": "d", "uint8": "B"}[dtype])

    def append(self, value: Any) -> None:
        """Append a number, a truth value, or a cell of a .csv file."""
        if value is None or value == "":
            value = np.nan
        elif isinstance(value, str):  # a cell of .csv or .tsv
            if value in _TRUTH_CELLS:
                value = value.lower() == "true"
            else:
                value = int(value) if self._dtype == "int64" else float(value)
        self._values.append(value)

    def array(self) -> np.ndarray:
        """The values, `(documents,)`."""
        return np.array(
            self._values, {"int64": "<i8", "float64": "<f8", "uint8": "u1"}[self._dtype]
        )


class _CodedLabels:
    """Builder of the codes of a label of words; codes are given in the order of appearance."""

    def __init__(self) -> None:
        self._code_of: dict[str, int] = {}
        self._codes = array("i")
        self._bytes = 0
        self.is_too_large = False
        """Whether the distinct words exceed `WORDS_BYTES`; then no more values are stored."""

    def append(self, value: Any) -> None:
        """Append a word, or another value as JSON; None is a missing value."""
        if self.is_too_large:
            return
        if value is None:
            self._codes.append(-1)
            return
        word = value if isinstance(value, str) else json.dumps(value)
        code = self._code_of.get(word)
        if code is None:
            code = self._code_of[word] = len(self._code_of)
            self._bytes += len(word)
            if self._bytes > WORDS_BYTES:
                self.is_too_large = True
                self._code_of.clear()
        self._codes.append(code)

    def codes(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """Codes `(documents,)` int32, indices into the sorted words or -1 if missing; the words."""
        words = sorted(self._code_of)
        rank = np.full(len(words) + 1, -1, "<i4")  # the last entry serves code -1
        rank[[self._code_of[word] for word in words]] = np.arange(len(words))
        return rank[np.asarray(self._codes, np.int64)], tuple(map(_escape_surrogates, words))


def _escape_surrogates(word: str) -> str:
    """`word` with each half surrogate pair, which UTF-8 cannot encode, written as its escape."""
    return word.encode("utf-8", "backslashreplace").decode()


def join_labels(
    parts: Sequence[tuple[int, np.ndarray | None, tuple[str, ...] | None]],
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Concatenated values of the same label of several streams, and the words of coded values.

    A part is (number of sequences, values, words of the codes). `values` is None if the stream
    lacks the label: all its values are missing then. Words are used if no numeric dtype holds the
    values of all parts exactly.
    """
    arrays = [values for _, values, _ in parts if values is not None]
    has_missing = len(arrays) < len(parts)

    # As words: codes of all parts are mapped to the sorted union of their words.
    has_words = any(words is not None for _, _, words in parts)
    if has_words or not _have_common_dtype(arrays, has_missing):
        coded_parts = [_coded(count, values, words) for count, values, words in parts]
        union = sorted({word for _, words in coded_parts for word in words})
        code_of = {word: code for code, word in enumerate(union)}
        joined = [
            # The appended -1 serves code -1.
            np.array([*map(code_of.get, words), -1], "<i4")[codes]
            for codes, words in coded_parts
        ]
        return np.concatenate(joined), tuple(union)

    # As numbers: the common dtype, or float64 with NaN for missing values.
    is_one_dtype = len({array.dtype for array in arrays}) == 1 and not has_missing
    dtype = arrays[0].dtype if is_one_dtype else "<f8"
    numbers = [
        np.full(count, np.nan) if values is None else values.astype(dtype)
        for count, values, _ in parts
    ]
    return np.concatenate(numbers), None


def _have_common_dtype(arrays: Sequence[np.ndarray], has_missing: bool) -> bool:
    """Return whether a common dtype holds all numbers exactly, and NaN if values are missing."""
    kinds = {array.dtype.kind for array in arrays}
    if len(kinds) == 1 and not has_missing:
        return True
    is_exact = all(
        len(array) == 0 or (array.min() >= -EXACT and array.max() <= EXACT)
        for array in arrays
        if array.dtype.kind == "i"
    )
    return is_exact and (len(kinds) == 1 or kinds == {"i", "f"})


def _coded(
    count: int, values: np.ndarray | None, words: tuple[str, ...] | None
) -> tuple[np.ndarray, list[str]]:
    """A part of `join_labels` as codes of words; code -1 is a missing value."""
    if values is None:
        return np.full(count, -1), []
    if words is not None:
        return values, list(words)
    # Numbers and truth values become words in JSON; NaN, last in sorted order, is missing.
    is_truth = values.dtype.kind == "u"
    distinct, codes = np.unique(values, return_inverse=True)
    present = distinct[~np.isnan(distinct)] if distinct.dtype.kind == "f" else distinct
    number_words = [json.dumps(bool(value) if is_truth else value) for value in present.tolist()]
    return np.where(codes < len(present), codes, -1), number_words

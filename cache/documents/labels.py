"""Labels: the plain columns beside the texts, as arrays of numbers, truth values or coded words.

No value becomes another one or a missing one: a column that one dtype cannot hold exactly is kept
as words.
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
"""What the names of the arrays of labels begin with."""
MISSING, EMPTY, TRUTH, WORD = "missing", "empty", "truth values", "words"
INTEGER, LONG, HUGE = "whole numbers", "whole numbers beyond 2^53", "whole numbers beyond 64 bits"
FLOAT, NAN = "numbers", "NaN"
NESTED, OTHER = "lists or objects", "values of other kinds"
"""Kinds of values of a column of labels."""
NUMBERS = frozenset((INTEGER, LONG, HUGE, FLOAT, NAN))
EXACT = 1 << 53
"""Whole numbers up to which float64 holds every one."""
WORDS_BYTES = 64 << 20
"""Most bytes of the distinct words of a label, which are in memory."""
NAME_BYTES = 100
"""Longest name of a label; file systems allow 255."""
_INTEGER_CELL = re.compile(r"-?[1-9]\d*|0", re.ASCII)
_FLOAT_CELL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?", re.ASCII)
_TRUTH_CELLS = ("True", "False", "true", "false", "TRUE", "FALSE")
Kinds = Mapping[str, Counter[str]]
"""Column -> how many values of each kind it has."""


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
    """The kind of a cell of .csv or .tsv; `007` is a word, so is `nan`."""
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
    """`int64`, `float64`, `uint8` (truth values) or `words`; None where there can be no label."""
    found = {kind for kind, count in kinds.items() if count}
    lacks = bool(found & {MISSING, EMPTY})
    plain = found - {MISSING, EMPTY}
    if NESTED in found or OTHER in found or (not plain and EMPTY not in found):
        return None
    if not plain or WORD in plain or HUGE in plain:
        return "words"
    if plain == {TRUTH}:
        return "float64" if lacks else "uint8"
    if plain <= {INTEGER, LONG} and not lacks:
        return "int64"
    return "float64" if plain <= {INTEGER, FLOAT, NAN} else "words"


def label_names(columns: Iterable[str]) -> dict[str, str]:
    """A name for the array of each column, in order: letters, digits and underscores.

    Two columns never share one, not even where upper and lower case are the same.
    """
    names: dict[str, str] = {}
    used: set[str] = set()
    for column in columns:
        plain = re.sub(r"\W", "_", unicodedata.normalize("NFC", column))
        plain = re.sub(r"^__+", "_", plain)  # zarr reserves names that begin with two
        plain = plain.encode()[:NAME_BYTES].decode(errors="ignore")
        plain = plain if plain.strip("_") else "column"
        name, number = plain, 2
        while name.casefold() in used:
            name, number = f"{plain}_{number}", number + 1
        used.add(name.casefold())
        names[column] = name
    return names


@dataclass
class Labels:
    """The label columns of some documents."""

    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> `(documents,)` int64, float64, uint8, or int32 codes of words."""
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> the words by code; code -1 is missing."""
    notes: list[str] = field(default_factory=list)
    """What was left out or kept otherwise than it is in the data."""


def label_arrays(records: Callable[[], Iterator[Mapping[str, Any]]], kinds: Kinds) -> Labels:
    """The labels of the documents that `records` gives, as often as it is called.

    `kinds` decides the dtypes; a value of a kind that it lacks is an error of the program.
    """
    labels = Labels()
    dtypes = {column: label_dtype(found) for column, found in kinds.items()}
    kept = {column: dtype for column, dtype in dtypes.items() if dtype is not None}
    names = label_names(kept)
    builders: dict[str, _CodedLabels | _NumberLabels] = {
        column: _CodedLabels() if dtype == "words" else _NumberLabels(dtype)
        for column, dtype in kept.items()
    }
    for record in records():
        for column, builder in builders.items():
            builder.append(record.get(column))
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
        labels.notes += _notes(column, name, kinds[column], kept[column])
    left = [repr(c) for c, dtype in dtypes.items() if dtype is None and set(kinds[c]) - {MISSING}]
    if left:
        labels.notes.append(
            f"no labels, because they hold lists, objects or other values: {', '.join(left)}"
        )
    return labels


def _notes(column: str, name: str, kinds: Counter[str], dtype: str) -> Iterator[str]:
    """What people should know of a label."""
    if name != column:
        yield f"column {column!r} is the label {name!r}"
    plain = {kind: count for kind, count in kinds.items() if count and kind not in (MISSING, EMPTY)}
    numbers = sum(plain.get(kind, 0) for kind in NUMBERS)
    if dtype == "words" and numbers and (len(plain) > 1 or LONG in plain or HUGE in plain):
        told = ", ".join(f"{count} {kind}" for kind, count in plain.items())
        yield f"column {column!r} is kept as words: no dtype holds all its values ({told})"
    elif dtype == "words" and TRUTH in plain and len(plain) > 1:
        yield f"column {column!r} is kept as words: it has truth values and words"
    missing = kinds.get(MISSING, 0) + kinds.get(EMPTY, 0)
    if dtype == "float64" and missing and kinds.get(NAN):
        yield (
            f"column {column!r}: its {missing} missing values are NaN, beside {kinds[NAN]} that "
            "are NaN in the data"
        )


class _NumberLabels:
    """Values of a numeric label; a missing one is NaN."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._values = array({"int64": "q", "float64": "d", "uint8": "B"}[dtype])

    def append(self, value: Any) -> None:
        if value is None or value == "":
            value = np.nan
        elif isinstance(value, str):  # a cell
            if value in _TRUTH_CELLS:
                value = value.lower() == "true"
            else:
                value = int(value) if self._dtype == "int64" else float(value)
        self._values.append(value)

    def array(self) -> np.ndarray:
        return np.array(
            self._values, {"int64": "<i8", "float64": "<f8", "uint8": "u1"}[self._dtype]
        )


class _CodedLabels:
    """Values of a label of words, by code in the order in which they were met."""

    def __init__(self) -> None:
        self._code_of: dict[str, int] = {}
        self._codes = array("i")
        self._bytes = 0
        self.is_too_large = False

    def append(self, value: Any) -> None:
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
        """Codes in the order of the sorted words, -1 where one is missing, and those words."""
        words = sorted(self._code_of)
        rank = np.full(len(words) + 1, -1, "<i4")  # the last place is that of -1
        rank[[self._code_of[word] for word in words]] = np.arange(len(words))
        return rank[np.asarray(self._codes, np.int64)], tuple(map(_storable, words))


def _storable(word: str) -> str:
    """A word that UTF-8 can hold: half a surrogate pair is written as its escape."""
    return word.encode("utf-8", "backslashreplace").decode()


def join_labels(
    parts: Sequence[tuple[int, np.ndarray | None, tuple[str, ...] | None]],
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """The values of one label of several streams, one after the other, and the words by code.

    A part is its number of sequences, the values, and the words that its codes stand for; values
    are None, and then missing, where a stream lacks the label. Every value stays what it is.
    """
    given = [values for _, values, _ in parts if values is not None]
    lacks = len(given) < len(parts)
    if any(words is not None for _, _, words in parts) or not _have_common_dtype(given, lacks):
        coded = [_coded(count, values, words) for count, values, words in parts]
        union = sorted({word for _, words in coded for word in words})
        rank = {word: code for code, word in enumerate(union)}
        codes = [np.array([*map(rank.get, words), -1], "<i4")[codes] for codes, words in coded]
        return np.concatenate(codes), tuple(union)
    dtype = given[0].dtype if len({v.dtype for v in given}) == 1 and not lacks else "<f8"
    numbers = [
        np.full(count, np.nan) if values is None else values.astype(dtype)
        for count, values, _ in parts
    ]
    return np.concatenate(numbers), None


def _have_common_dtype(given: Sequence[np.ndarray], lacks: bool) -> bool:
    """Whether one dtype holds all numbers exactly, and NaN where values are missing."""
    kinds = {values.dtype.kind for values in given}
    if len(kinds) == 1 and not lacks:
        return True
    integers = [values for values in given if values.dtype.kind == "i"]
    exact = all(len(v) == 0 or (v.min() >= -EXACT and v.max() <= EXACT) for v in integers)
    return exact and (len(kinds) == 1 or kinds == {"i", "f"})


def _coded(
    count: int, values: np.ndarray | None, words: tuple[str, ...] | None
) -> tuple[np.ndarray, list[str]]:
    """Values as codes of words, the last code -1 being that of a missing one."""
    if values is None:
        return np.full(count, -1), []
    if words is not None:
        return values, list(words)
    is_truth = values.dtype.kind == "u"
    distinct, codes = np.unique(values, return_inverse=True)
    known = distinct[~np.isnan(distinct)] if distinct.dtype.kind == "f" else distinct
    shown = [json.dumps(bool(value) if is_truth else value) for value in known.tolist()]
    return np.where(codes < len(known), codes, -1), shown


ANSWER, ANSWER_START, EXPLICIT = "answer", "answer_start", "positions"
"""Columns of the data that `answer` and `explicit` read."""
POSITION_COLUMNS = (ANSWER, ANSWER_START, EXPLICIT)

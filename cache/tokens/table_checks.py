"""Checks of the one-dimensional arrays of a cache against each other, before a reader follows them.

Starts and lengths say which rows a sequence has, ids which row of a matrix is read. Checksums do
not protect against a stranger's tables, whose checksums are right. `ActivationCache` and
`CheckedArray` call these functions when they read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptError

TOKEN_IDS = ("tokens/ids", "context/ids")
"""Arrays of token ids."""


def check_extents(start: np.ndarray, length: np.ndarray, total: int, where: Path | str) -> None:
    """Raise `CorruptError` unless runs of `length` `(n,)` follow each other from 0 to `total`.

    `start` `(n,)` holds the first element of each run; every run has one element at least.
    """
    if len(start) != len(length):
        raise CorruptError(f"{where}: {len(start)} starts for {len(length)} lengths")
    lengths = length.astype(np.int64)
    # Few lengths of int32 cannot overflow the sum of an int64.
    ends = np.cumsum(lengths)
    is_right = len(lengths) and lengths.min() >= 1 and ends[-1] == total
    if not is_right or not np.array_equal(start, ends - lengths):
        raise CorruptError(
            f"{where}: starts and lengths do not follow each other from 0 to {total}; these tables "
            "are not those of this cache: copy it again, or extract it again"
        )


def check_numbers(values: np.ndarray, stop: int, where: Path | str, low: int = 0) -> None:
    """Raise `CorruptError` unless all integers `values` lie in `low` to `stop` - 1."""
    if values.size and not (low <= int(values.min()) and int(values.max()) < stop):
        raise CorruptError(
            f"{where} holds {int(values.min())} to {int(values.max())}; expected {low} to "
            f"{stop - 1}: copy the cache again, or extract it again"
        )


def check_contexts(
    context_of_sequence: np.ndarray, n_contexts: int, where: Path | str
) -> np.ndarray:
    """`context_of_sequence` `(sequences,)`, if it numbers `n_contexts` contexts in order."""
    check_numbers(context_of_sequence, n_contexts, where)
    if (context_of_sequence[1:] < context_of_sequence[:-1]).any():
        raise CorruptError(f"{where} decreases; the sequences of a cache are in order of contexts")
    return context_of_sequence


def words_of_codes(attributes: Mapping[str, Any], where: Path | str) -> tuple[str, ...]:
    """The words in the attribute `categories` of an array of labels; empty without it.

    Raises `CorruptError` for anything but a list of texts.
    """
    words = attributes.get("categories", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise CorruptError(f"{where}: the attribute categories is no list of words")
    return tuple(words)

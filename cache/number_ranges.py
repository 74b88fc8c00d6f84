"""Whole numbers as users write them: `0-4, 6`, one int, lists of ints, numpy arrays.

`format_ranges`, `parse_ranges` and `parse_count` are for messages and command-line options;
`as_tuple` and `as_whole_number` normalize arguments of public functions.
"""

import operator
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from .errors import InputTypeError, UsageError

MAX_NUMBERS = 1 << 20
"""Most numbers that `parse_ranges` gives."""
COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
"""Unit of a count in lower case -> number."""
LARGEST = 1 << 62
"""Largest layer or offset that `as_tuple` takes: sums with positions are numbers of int64."""


def format_ranges(numbers: Sequence[int]) -> str:
    """Format ascending `numbers` as ranges: `0-4, 6` for 0, 1, 2, 3, 4, 6; `none` for no number."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in runs) or "none"


def parse_ranges(text: str) -> tuple[int, ...]:
    """Parse `0-3`, `0,2,5` or `4` into ascending numbers.

    Raises `ValueError` for other text, `OverflowError` for more than `MAX_NUMBERS` numbers.
    """
    numbers: set[int] = set()
    for piece in text.split(","):
        first, _, last = piece.strip().partition("-")
        piece_numbers = range(int(first), int(last or first) + 1)
        if piece_numbers.stop - piece_numbers.start + len(numbers) > MAX_NUMBERS:
            raise OverflowError(text)
        numbers.update(piece_numbers)
    return tuple(sorted(numbers))


def parse_count(text: str) -> int:
    """Parse a count: `1000000`, `1_000_000`, `1e6`, `10M`, `1.5k`, `2B` (units of 1000).

    Raises `ValueError` for other text and for a count that is no whole number.
    """
    match = re.fullmatch(
        r"([+-]?[0-9][0-9_]*(?:\.[0-9]+)?(?:e[+-]?[0-9]{1,2})?) ?([kmgb]?)", text.strip().lower()
    )
    if match is None:
        raise ValueError(text)
    try:
        count = Decimal(match[1]) * COUNT_UNITS[match[2]]  # exact, as no float is
    except ArithmeticError:
        raise ValueError(text) from None
    if count != int(count):
        raise ValueError(text)
    return int(count)


def absolute_numbers(numbers: Sequence[int] | None, last: int) -> tuple[int, ...] | None:
    """`numbers` with the negative ones counted back from `last`: -1 is `last`; None stays None.

    A number before 0 stays negative, for the caller's message.
    """
    if numbers is None:
        return None
    counted = (n + last + 1 if -last - 1 <= n < 0 else n for n in numbers)
    return tuple(sorted(set(counted)))


def as_tuple(value: Any, name: str = "numbers") -> tuple[int, ...]:
    """Convert one whole number or several, of Python or numpy, to a tuple of ints.

    Raises `InputTypeError` for any other value: a fraction, a mask, a string, and `UsageError` for
    a number beyond `LARGEST`. `name` is the parameter that the error names.
    """
    numbers = _as_integers(value, name)
    if too_large := [number for number in numbers if abs(number) > LARGEST]:
        raise UsageError(f"{name} must be at most {LARGEST}, got {too_large[0]}")
    return numbers


def _as_integers(value: Any, name: str) -> tuple[int, ...]:
    """The whole numbers of `as_tuple`, of any size."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        items = list(value) if is_several(value) else [value]
        # By name: numpy has bools of its own, which some of its versions take for an index.
        if any(type(item).__name__ in ("bool", "bool_") for item in items):
            raise TypeError
        return tuple(operator.index(item) for item in items)
    except TypeError:
        raise InputTypeError(
            f"{name} must be a whole number or several, such as 3 or [0, 3], not {value!r}"
        ) from None


def as_whole_number(value: Any, name: str) -> int:
    """Convert one whole number, of Python or numpy, to an int.

    Raises `InputTypeError` for any other value; `name` is the parameter that the error names.
    """
    if is_several(value):
        raise InputTypeError(f"{name} must be one whole number, not {value!r}")
    return _as_integers(value, name)[0]


def is_several(value: Any) -> bool:
    """Whether `value` is iterable (list, tuple, array, range) rather than a single number."""
    # numpy arrays without a dimension are iterable by type.
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0

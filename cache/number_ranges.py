"""Lists of whole numbers as people give them: `0-4, 6`, Python's ints, numpy's arrays."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import InputTypeError


def format_ranges(numbers: Sequence[int]) -> str:
    """`0-4, 6` for 0, 1, 2, 3, 4, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def parse_ranges(text: str) -> tuple[int, ...]:
    """The numbers of `0-3`, `0,2,5` or `4`, sorted; raises `ValueError`."""
    numbers: set[int] = set()
    for piece in text.split(","):
        first, _, last = piece.strip().partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


def as_tuple(value: Any, name: str = "numbers") -> tuple[int, ...]:
    """A tuple of ints of one whole number or several, Python's or numpy's.

    Raises `InputTypeError` for anything else: a fraction, a mask, a string. `name` is the
    parameter's.
    """
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        given = list(value) if is_several(value) else [value]
        # numpy has bools of its own, which some of its versions take for an index.
        if any(type(item).__name__ in ("bool", "bool_") for item in given):
            raise TypeError
        return tuple(operator.index(item) for item in given)
    except TypeError:
        raise InputTypeError(
            f"{name} must be a whole number or several, such as 3 or [0, 3], not {value!r}"
        ) from None


def as_whole_number(value: Any, name: str) -> int:
    """One whole number, Python's or numpy's; raises `InputTypeError` for anything else."""
    if is_several(value):
        raise InputTypeError(f"{name} must be one whole number, not {value!r}")
    return as_tuple(value, name)[0]


def is_several(value: Any) -> bool:
    """Whether `value` is a list of numbers, of whatever type, and no single one."""
    # An array without a dimension calls itself iterable.
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0

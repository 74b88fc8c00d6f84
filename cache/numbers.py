"""Lists of whole numbers as people write them: `0-4, 6`."""

from collections.abc import Sequence


def span(numbers: Sequence[int]) -> str:
    """`0-4, 6` for 0, 1, 2, 3, 4, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def read_span(text: str) -> tuple[int, ...]:
    """The numbers of `0-3`, `0,2,5` or `4`, sorted; raises `ValueError`."""
    numbers: set[int] = set()
    for piece in text.split(","):
        first, _, last = piece.strip().partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))

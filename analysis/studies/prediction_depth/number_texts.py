"""Numbers in sentences: rounded, with their intervals."""

from ....probes.base.resampling import Interval


def number_text(value: float | None, interval: Interval = (None, None), digits: int = 3) -> str:
    """Such as `0.43 [0.41, 0.46]`; `digits` are significant ones. `undefined` without a value."""
    if value is None:
        return "undefined"
    low, high = interval
    text = f"{value:.{digits}g}"
    return text if low is None or high is None else f"{text} [{low:.{digits}g}, {high:.{digits}g}]"


def percent_text(value: float | None, interval: Interval = (None, None)) -> str:
    """Such as `43 % [41, 46]` of a share."""
    if value is None:
        return "undefined"
    low, high = interval
    text = f"{100 * value:.0f} %"
    return text if low is None or high is None else f"{text} [{100 * low:.0f}, {100 * high:.0f}]"


def holds_zero(interval: Interval) -> bool:
    """Whether an interval is unknown or holds 0: no clear difference."""
    low, high = interval
    return low is None or high is None or low <= 0 <= high


def list_names(names: "list[str] | tuple[str, ...]") -> str:
    """Such as `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

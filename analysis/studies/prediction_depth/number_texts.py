"""Numbers in sentences: rounded, with their intervals."""

from ....probes.base.resampling import Interval


def number_text(value: float | None, interval: Interval = (None, None), digits: int = 3) -> str:
    """Such as `0.43 [0.41, 0.46]`; `digits` are significant ones. `undefined` without a value."""
    if value is None:
        return "undefined"
    low, high = interval
    text = _rounded(value, digits)
    if low is None or high is None:
        return text
    return f"{text} [{_rounded(low, digits)}, {_rounded(high, digits)}]"


def _rounded(value: float, digits: int) -> str:
    """`value` with significant digits; whole from 1,000 on."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


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

"""Values of tables as text for people."""

from typing import Any


def cell_text(value: Any) -> str:
    """A cell as text: `-` for None, three digits of a float, `low to high` for an interval."""
    if value is None or (isinstance(value, tuple) and None in value):
        return "-"
    if isinstance(value, tuple):
        return " to ".join(cell_text(end) for end in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value and abs(value) < 5e-4:
            return f"{value:.1e}"
        return f"{value:.3f}" if abs(value) < 1e3 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)

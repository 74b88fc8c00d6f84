"""Colours, markers and sizes that the pictures of all studies share."""

from collections.abc import Sequence

from .study_figures import HeatPanel, Panel, StudyFigure

COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#b8860b",
    "#56b4e9",
    "#6f4e9b",
    "#5b6a78",
)
"""Okabe and Ito's colours, which colour-blind readers tell apart, the yellow one darkened."""
MARKERS = (
    ("o", "circle"),
    ("s", "square"),
    ("^", "triangle-up"),
    ("D", "diamond"),
    ("v", "triangle-down"),
    ("X", "x"),
)
"""Markers by the names of matplotlib and plotly."""
SEQUENTIAL, DIVERGING = ("viridis", "Viridis"), ("RdBu_r", "RdBu_r")
"""Colour maps by the names of matplotlib and plotly."""
CELL_LETTERS = 12
"""Most letters of a cell of a heatmap."""


def series_labels(figure: StudyFigure) -> list[str]:
    """Labels of all series of a figure, each once, in the order in which they come."""
    panels = [panel for row in figure.rows for panel in row if isinstance(panel, Panel)]
    return list(dict.fromkeys(one.label for panel in panels for one in panel.series))


def series_colors(labels: Sequence[str]) -> dict[str, tuple[str, tuple[str, str]]]:
    """Label -> its colour and its marker."""
    return {
        label: (COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)])
        for number, label in enumerate(labels)
    }


def value_range(panel: HeatPanel) -> tuple[float, float]:
    """Ends of the colours of a heatmap; 0 is the middle of a diverging one."""
    known = [x for row in panel.values for x in row if x is not None and abs(x) < float("inf")]
    known = [x for x in known if x == x] or [0.0]
    low, high = panel.color_range
    if panel.diverging and low is None and high is None:
        largest = max(abs(x) for x in known) or 1.0
        return -largest, largest
    low, high = min(known) if low is None else low, max(known) if high is None else high
    return (low, high) if high > low else (low, low + 1.0)


def is_dark(share: float, diverging: bool) -> bool:
    """Whether letters on a cell must be white; `share` of the colour's range, 0 to 1."""
    return (share < 0.18 or share > 0.82) if diverging else share < 0.55


def short_text(text: str) -> str:
    """Text of a cell that fits into it."""
    return text if len(text) <= CELL_LETTERS else text[: CELL_LETTERS - 1] + "…"

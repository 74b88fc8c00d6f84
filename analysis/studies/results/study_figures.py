"""What figures of studies show, apart from how: panels of lines, bars and points, and heatmaps.

A study names its series once; `matplotlib_figures.py` draws them for papers, `plotly_figures.py`
for pages, and the dashboard from the JSON of `plain_figures`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ....cache.files.json_files import plain_value

Numbers = Sequence[float | None]
"""Values of a series; None where there is none: a line has a gap there."""


@dataclass(frozen=True)
class Series:
    """One line, row of bars or cloud of points of a panel, all lists of one length."""

    label: str
    """Name in the legend; series of one label have one colour and one entry in all panels."""
    x: Sequence[float | str]
    y: Numbers
    low: Numbers | None = None
    """Lower ends of intervals of `y`; they are drawn where both ends are given."""
    high: Numbers | None = None
    kind: str = "line"
    """`line`, `bars` or `points`."""
    dash: str = "solid"
    """`solid`, `dash` or `dot`, of lines."""
    names: Sequence[str] | None = None
    """Text of each point, shown under the mouse."""

    def __post_init__(self) -> None:
        lists = [self.y, self.low, self.high, self.names]
        if self.kind not in ("line", "bars", "points") or self.dash not in ("solid", "dash", "dot"):
            raise ValueError(f"unknown kind or dash of a series: {self.kind}, {self.dash}")
        if any(values is not None and len(values) != len(self.x) for values in lists):
            raise ValueError(f"the lists of the series {self.label!r} differ in length")


@dataclass(frozen=True)
class Panel:
    """Series over one pair of axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    y_range: tuple[float | None, float | None] = (None, None)
    """Ends of the y axis; None follows the data."""
    log_y: bool = False
    reference: float | None = None
    """A horizontal line, such as chance."""
    reference_label: str = ""


@dataclass(frozen=True)
class HeatPanel:
    """A matrix of coloured cells, drawn with its first row at the bottom."""

    title: str
    x_label: str
    y_label: str
    x_names: Sequence[str]
    y_names: Sequence[str]
    values: Sequence[Numbers]
    """A list for each of `y_names`."""
    color_label: str
    """What the colour means, with its unit."""
    texts: Sequence[Sequence[str]] | None = None
    """Text of each cell."""
    hovers: Sequence[Sequence[str]] | None = None
    """Text of each cell under the mouse; lines are divided by newlines."""
    color_range: tuple[float | None, float | None] = (None, None)
    letters: int = 12
    """Letters of a cell in pictures for papers; pages have room for 12, and show all under the
    mouse."""
    diverging: bool = False
    """Whether 0 is the middle of two colours."""

    def __post_init__(self) -> None:
        shape = len(self.y_names), len(self.x_names)
        for matrix in (self.values, self.texts, self.hovers):
            if matrix is not None and (len(matrix), *{len(row) for row in matrix}) != shape:
                raise ValueError(f"a matrix of the heatmap {self.title!r} is not {shape}")


@dataclass(frozen=True)
class StudyFigure:
    """Panels in rows, with a name for files and a caption for pages."""

    name: str
    """Lower-case words with hyphens, such as `calibration`."""
    caption: str
    """What is to be seen, one or two plain sentences."""
    rows: Sequence[Sequence[Panel | HeatPanel]] = field(default_factory=list)


def plain_figures(figures: Sequence[StudyFigure]) -> list[dict[str, Any]]:
    """Figures as plain values for JSON; undefined and infinite numbers are None."""
    return [plain_value(asdict(figure)) for figure in figures]

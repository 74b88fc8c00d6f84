"""Figures of studies with matplotlib, for papers."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ...report.probe_style import printable, shorten
from .study_colors import (
    CELL_LETTERS,
    DIVERGING,
    SEQUENTIAL,
    is_dark,
    series_colors,
    series_labels,
    value_range,
)
from .study_figures import HeatPanel, Panel, Series, StudyFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL_WIDTH, PANEL_HEIGHT = 3.4, 3.0
"""Inches of a panel of series."""
CELL_WIDTH, CELL_HEIGHT = 0.74, 0.32
"""Inches of a cell with text; cells without text are smaller."""
SMALL_CELL = 0.2
DASHES = {"solid": "-", "dash": "--", "dot": ":"}
MOST_NAMES = 40
"""Most names along an axis of a heatmap; of more, some are left out."""


def draw_figure(figure: StudyFigure) -> "Figure":
    """Draw `figure`: its rows of panels one below the other, with one legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from ...report.shown_figure import ShownFigure

    sizes = [[_panel_size(panel) for panel in row] for row in figure.rows]
    width = max(sum(size[0] for size in row) for row in sizes)
    heights = [max(size[1] for size in row) for row in sizes]
    drawn = ShownFigure(figsize=(max(width, 5.0), sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(drawn)
    styles = series_colors(series_labels(figure))
    parts: Any = drawn.subfigures(len(figure.rows), 1, squeeze=False, height_ratios=heights)
    handles: dict[str, Any] = {}
    for part, row, row_sizes in zip(parts[:, 0], figure.rows, sizes, strict=True):
        ratios = [size[0] for size in row_sizes]
        axes = part.subplots(1, len(row), squeeze=False, width_ratios=ratios)[0]
        for panel, place in zip(row, axes, strict=True):
            if isinstance(panel, HeatPanel):
                _draw_heat(place, panel)
            else:
                handles |= _draw_series(place, panel, styles)
            place.set_title(plain(panel.title), fontsize=10, loc="left")
            place.set_xlabel(plain(panel.x_label))
            place.set_ylabel(plain(panel.y_label))
    if handles:
        drawn.legend(
            list(handles.values()),
            [plain(label, 40) for label in handles],
            loc="outside lower center",
            ncols=min(4, len(handles)),
            frameon=False,
            fontsize=8,
        )
    return drawn


def plain(text: str, most: int = 60) -> str:
    """`text` as matplotlib shows it letter by letter: no formulas, nothing hidden from legends."""
    text = printable(shorten(text, most)).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _panel_size(panel: Panel | HeatPanel) -> tuple[float, float]:
    """Width and height in inches."""
    if isinstance(panel, Panel):
        return PANEL_WIDTH, PANEL_HEIGHT
    width, height = (CELL_WIDTH, CELL_HEIGHT) if panel.texts else (SMALL_CELL, SMALL_CELL)
    if panel.texts:
        width *= max(1.0, panel.letters / CELL_LETTERS)
    names = max((len(name) for name in panel.y_names), default=0)
    return (
        min(40.0, max(PANEL_WIDTH, width * len(panel.x_names) + 1.6 + 0.06 * names)),
        min(40.0, max(2.2, height * len(panel.y_names) + 1.3)),
    )


def _draw_series(place: Any, panel: Panel, styles: dict[str, Any]) -> dict[str, Any]:
    """Draw the series of a panel; gives the handles of the legend by label."""
    handles: dict[str, Any] = {}
    words = list(dict.fromkeys(x for one in panel.series for x in one.x if isinstance(x, str)))
    bars = [one for one in panel.series if one.kind == "bars"]
    for one in panel.series:
        color, (marker, _) = styles[one.label]
        x = np.array([words.index(v) if isinstance(v, str) else v for v in one.x], np.float64)
        y = np.array([np.nan if v is None else v for v in one.y], np.float64)
        low, high = _ends(one)
        if one.kind == "bars":
            width = 0.8 * _least_step(x) / len(bars)
            x = x + width * (bars.index(one) - (len(bars) - 1) / 2)
            handle = place.bar(x, y, width, color=color)
            if low is not None and high is not None:
                ends = np.abs(np.stack([y - low, high - y]))
                place.errorbar(x, y, ends, fmt="none", ecolor="#333333", elinewidth=1)
        elif one.kind == "points":
            handle = place.scatter(x, y, s=16, color=color, marker=marker)
        else:
            (handle,) = place.plot(x, y, DASHES[one.dash], marker=marker, ms=3.5, color=color)
            if low is not None and high is not None:
                place.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        handles.setdefault(one.label, handle)
    if words:
        place.set_xticks(
            range(len(words)), list(map(plain, words)), rotation=30 if len(words) > 4 else 0
        )
    if panel.reference is not None:
        place.axhline(panel.reference, color="#888888", lw=1, ls=(0, (2, 2)))
        place.annotate(
            plain(panel.reference_label),
            (1, panel.reference),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="#666666",
        )
    if panel.log_y and any(v is not None and v > 0 for one in panel.series for v in one.y):
        place.set_yscale("log")
    bottom, top = panel.y_range
    place.set_ylim(bottom, top)
    place.grid(alpha=0.25)
    return handles


def _ends(one: Series) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Ends of the intervals of a series as float64; None for a series without."""
    if one.low is None or one.high is None:
        return None, None
    low, high = (
        np.array([np.nan if v is None else v for v in values], np.float64)
        for values in (one.low, one.high)
    )
    return low, high


def _least_step(x: np.ndarray) -> float:
    """Least distance of neighbouring bars; 1 for a single one."""
    steps = np.diff(np.unique(x))
    return float(steps.min()) if len(steps) else 1.0


def _draw_heat(place: Any, panel: HeatPanel) -> None:
    """Draw the cells of a heatmap, their texts and the colour bar."""
    values = np.array([[np.nan if x is None else x for x in row] for row in panel.values])
    values = values.astype(np.float64).reshape(len(panel.y_names), len(panel.x_names))
    low, high = value_range(panel)
    colors = DIVERGING[0] if panel.diverging else SEQUENTIAL[0]
    shown = np.ma.masked_invalid(values)
    image = place.imshow(
        shown, aspect="auto", origin="lower", cmap=colors, vmin=low, vmax=high, interpolation="none"
    )
    place.figure.colorbar(image, ax=place, label=plain(panel.color_label), pad=0.01)
    for axis, names in ((place.xaxis, panel.x_names), (place.yaxis, panel.y_names)):
        step = -(-len(names) // MOST_NAMES) or 1
        axis.set_ticks(
            range(0, len(names), step), [plain(name, 16) for name in names][::step], fontsize=8
        )
    if any(len(name) > 3 for name in panel.x_names):
        place.tick_params(axis="x", rotation=60)
    for y, row in enumerate(panel.texts or ()):
        for x, text in enumerate(row):
            share = (values[y, x] - low) / (high - low)
            place.text(
                x,
                y,
                plain(text, panel.letters),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if is_dark(share, panel.diverging) else "black",
            )

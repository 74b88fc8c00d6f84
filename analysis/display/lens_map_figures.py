"""Pictures of `LensMaps` with matplotlib: tokens by layers, a panel per lens and offset.

interactive_lens_maps.py draws the same with plotly.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..report.probe_style import printable, shorten
from .lens_map_cells import (
    LETTERS,
    bar_title,
    cell_colors,
    cell_lines,
    is_outlined,
    map_title,
    outline_color,
)
from .lens_maps import LensMap, LensMaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def lens_maps_figure(maps: LensMaps) -> "Figure":
    """A panel per map, one above the other (a matplotlib figure)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from ..report.shown_figure import ShownFigure

    tokens = max(len(entry.tokens) for entry in maps)
    heights = [(0.42 if entry.is_difference else 0.3) * len(entry.layers) + 1.9 for entry in maps]
    figure = ShownFigure(
        figsize=(max(6.0, 0.6 * tokens + 2.2), max(2.8, sum(heights))), layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(maps), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, entry in zip(grid[:, 0], maps, strict=True):
        _draw_map(figure, axes, entry, maps)
    return figure


def _draw_map(figure: "Figure", axes: "Axes", entry: LensMap, maps: LensMaps) -> None:
    """Draw one map: cells, letters, outlines, axes and colour bar."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
    from matplotlib.patches import Rectangle

    values = entry.values[maps.measure]
    colors = cell_colors(values, maps.measure, entry.is_difference)
    image = axes.imshow(
        values,
        cmap=LinearSegmentedColormap.from_list(maps.measure, list(colors.scale)),
        norm=(LogNorm if colors.is_log else Normalize)(colors.low, colors.high),
        origin="lower",
        aspect="auto",
    )
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            column,
            row,
            "\n".join(map(printable, cell_lines(entry, maps, row, column))),
            color=colors.letters_on(value),
            ha="center",
            va="center",
            fontsize=6.5,
            parse_math=False,
        )
        if is_outlined(entry, row, column):
            box = (column - 0.46, row - 0.44)
            edge = outline_color(entry, colors, value)
            axes.add_patch(Rectangle(box, 0.92, 0.88, fill=False, edgecolor=edge, linewidth=1.3))
    _label_axes(axes, entry, maps)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label(printable(bar_title(entry, maps)), fontsize=8, parse_math=False)
    bar.ax.tick_params(labelsize=7)


def _label_axes(axes: "Axes", entry: LensMap, maps: LensMaps) -> None:
    """Tokens below, the model's tokens above, layers at the left, and the title."""
    columns = range(len(entry.tokens))
    small: dict[str, Any] = {"rotation": 45, "fontsize": 7.5, "parse_math": False}
    names = [printable(shorten(token, LETTERS)) for token in entry.tokens]
    axes.set_xticks(columns, names, ha="right", **small)
    above = axes.secondary_xaxis("top")
    targets = [printable(shorten(token, LETTERS)) for token in entry.targets]
    above.set_xticks(columns, targets, ha="left", **small)
    above.set_xlabel("the model's own token (last layer)", fontsize=8)
    axes.set_yticks(range(len(entry.layers)), [str(layer) for layer in entry.layers], fontsize=8)
    axes.set_xlabel("input token (␣ is a space)", fontsize=8)
    axes.set_ylabel("layer")
    title = printable(map_title(entry, maps))
    axes.set_title(title, fontsize=9.5, loc="left", parse_math=False)

"""Pictures of `LensMaps` with matplotlib: tokens by layers, a panel per lens and offset."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report.probe_style import SCALE, format_offset, label, printable, shorten
from .lens_maps import LensMap, LensMaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXIS_TITLES = {
    "probability": "probability of the token shown",
    "entropy": "entropy, nats",
    "kl": "KL(model ‖ lens), nats",
    "rank": "rank of the model's token (1: likeliest)",
}
"""Title of the colour bar by measure."""
DIFFERENCE_SCALE = ("#8c2d04", "#f4a582", "#ffffff", "#92c5de", "#08457e")
"""Colours of a difference, from negative to positive."""
OUTLINE = "#d9480f"
"""Colour of the outline of cells that agree with the last layer."""
LETTERS = 8
"""Letters of a token in a cell."""


def lens_maps_figure(maps: LensMaps) -> "Figure":
    """A panel per map, one above the other (a matplotlib figure)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tokens = max(len(entry.tokens) for entry in maps)
    heights = [(0.42 if entry.is_difference else 0.3) * len(entry.layers) + 1.9 for entry in maps]
    figure = Figure(
        figsize=(max(6.0, 0.6 * tokens + 2.2), max(2.8, sum(heights))), layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(maps), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, entry in zip(grid[:, 0], maps, strict=True):
        _draw_map(figure, axes, entry, maps)
    return figure


def _draw_map(figure: "Figure", axes: "Axes", entry: LensMap, maps: LensMaps) -> None:
    """Draw one map: cells, letters, outlines, axes and colour bar."""
    from matplotlib.patches import Rectangle

    values = entry.values[maps.measure]
    colormap, norm = _colors(values, maps.measure, entry.is_difference)
    image = axes.imshow(values, cmap=colormap, norm=norm, origin="lower", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        face = colormap(norm(value)) if math.isfinite(value) else (1.0, 1.0, 1.0, 1.0)
        axes.text(
            column,
            row,
            "\n".join(map(printable, _cell_lines(entry, maps, row, column))),
            color=_letter_color(face),
            ha="center",
            va="center",
            fontsize=6.5,
            parse_math=False,
        )
        # Of a difference, the cells where the lenses disagree are the ones to look at.
        if bool(entry.agrees[row, column]) != entry.is_difference:
            box = (column - 0.46, row - 0.44)
            axes.add_patch(Rectangle(box, 0.92, 0.88, fill=False, edgecolor=OUTLINE, linewidth=1.3))
    _label_axes(axes, entry, maps)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label(_bar_title(entry, maps), fontsize=8)
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
    outlined = "they disagree" if entry.is_difference else "as the last layer says"
    name = " - ".join(label(part) for part in entry.lens.split(" - "))
    name = label(entry.lens) if not entry.is_difference else name
    title = (
        f"{name} at N = {entry.offset} ({format_offset(entry.offset)}); {maps.passage}; "
        f"outlined: {outlined}"
    )
    axes.set_title(printable(title), fontsize=9.5, loc="left", parse_math=False)


def _bar_title(entry: LensMap, maps: LensMaps) -> str:
    """Title of the colour bar."""
    title = AXIS_TITLES[maps.measure]
    if maps.tracked is not None and maps.measure in ("probability", "rank"):
        title = f"{maps.measure} of {printable(maps.tracked)}"
    return f"difference of {title}" if entry.is_difference else title


def _cell_lines(entry: LensMap, maps: LensMaps, row: int, column: int) -> list[str]:
    """Lines of a cell: the likeliest token, of a difference those of both lenses where they differ;
    or the number of a tracked token."""
    value = entry.values[maps.measure][row, column]
    tops = entry.top[row][column]
    if maps.tracked is not None and maps.measure in ("probability", "rank"):
        if not math.isfinite(value):
            return ["-"]
        if entry.is_difference:
            return [f"{value:+.2f}" if maps.measure == "probability" else f"{value:+,.0f}"]
        return [_number(value, maps.measure)]
    differs = entry.is_difference and not entry.agrees[row, column]
    return [shorten(top, LETTERS) for top in (tops if differs else tops[:1])]


def _number(value: float, measure: str) -> str:
    """A probability or a rank in few letters."""
    if measure == "rank":
        return f"{value:.0f}" if value < 10_000 else f"{value / 1000:.0f}k"
    return f"{value:.2f}" if value >= 0.005 else f"{value:.0e}".replace("e-0", "e-")


def _colors(values: np.ndarray, measure: str, is_difference: bool) -> tuple[Any, Any]:
    """Colour map and norm of a measure: dark is a lens that is near the model, or sure."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    finite = values[np.isfinite(values)]
    if is_difference:
        most = float(np.abs(finite).max(initial=0.0)) or 1.0
        scale = LinearSegmentedColormap.from_list("difference", list(DIFFERENCE_SCALE))
        return scale, Normalize(-most, most)
    if measure == "probability":
        return LinearSegmentedColormap.from_list("probability", list(SCALE)), Normalize(0, 1)
    # Entropy, KL and rank: small is good, and dark.
    colors = [(1 - at, name) for at, name in reversed(SCALE)]
    scale = LinearSegmentedColormap.from_list(measure, colors)
    largest = float(finite.max(initial=0.0))
    if measure == "rank":
        return scale, LogNorm(1, max(10.0, largest))
    return scale, Normalize(0, largest or 1.0)


def _letter_color(face: Any) -> str:
    """Black or white, whichever has the larger contrast on the colour `face` (WCAG 2.2)."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in face[:3]
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#ffffff"

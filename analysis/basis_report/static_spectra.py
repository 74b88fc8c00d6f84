"""A picture of causal bases with matplotlib: the spectra of all layers as small multiples.

`write_basis_png` (basis_page.py) saves it; interactive_spectra.py draws the same with plotly.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report.probe_style import printable, short_model_name
from .span_curves import axis_floor, span_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .span_curves import SpanCurve

COLUMNS = 4
"""Most panels side by side."""
LEGEND_COLUMNS = 3
"""Names side by side under the figure."""


def spectra(
    rows: Sequence[Mapping[str, Any]],
    model_influence: Mapping[int, Mapping[str, Any]],
    model_name: str | None = None,
) -> "Figure":
    """One panel per layer: held-out KL of ablating the first k directions (a matplotlib figure).

    Bands are 95 % intervals. Curves measured in the model are dashed. All panels share their axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from ..report.shown_figure import ShownFigure

    columns = min(COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    width = max(5.6, 2.9 * columns + 0.6)
    figure = ShownFigure(figsize=(width, 2.6 * lines + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    curves_of = [span_curves(row, model_influence.get(row["layer"])) for row in rows]
    floor = axis_floor([curve for curves in curves_of for curve in curves])
    for axes, row, curves in zip(grid, rows, curves_of, strict=False):
        _draw_layer(axes, curves, floor)
        model_n = model_influence.get(row["layer"], {}).get("n")
        of_model = f", model n = {model_n:,}" if model_n else ""
        axes.set_title(f"layer {row['layer']}, n = {row['n_test']:,}{of_model}", fontsize=9.5)
    for axes in grid[len(rows) :]:
        axes.set_visible(False)

    # Axes are shared: scales are set once, names stand at the edges.
    ks = sorted({k for curves in curves_of for curve in curves for k in curve.ks})
    grid[0].set_xscale("log", base=2)
    grid[0].set_xticks(ks, [str(k) for k in ks])
    grid[0].minorticks_off()
    if floor:
        grid[0].set_yscale("log")
    else:
        grid[0].set_ylim(bottom=0)
    for number, axes in enumerate(grid[: len(rows)]):
        if number % columns == 0:
            axes.set_ylabel("KL, nats")
        if number + columns >= len(rows):
            axes.set_xlabel("k, first directions ablated")
            axes.tick_params(labelbottom=True)

    # One legend for all panels, a column for each basis.
    line_of = {line.get_label(): line for axes in grid for line in axes.get_lines()}
    bases: dict[str, list[str]] = {}
    for curve in (curve for curves in curves_of for curve in curves):
        labels = bases.setdefault(curve.basis, [])
        if curve.label not in labels:
            labels.append(curve.label)
    names = [label for labels in bases.values() for label in labels]
    legend = figure.legend(
        [line_of[name] for name in names],
        [printable(name) for name in names],
        loc="outside lower center",
        ncols=max(1, min(len(bases), LEGEND_COLUMNS)),
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    beginning = f"{short_model_name(model_name)}: " if model_name else ""
    title = f"{beginning}held-out KL after ablation, with 95 % intervals"
    figure.suptitle(printable(title), parse_math=False)
    return figure


def _draw_layer(axes: "Axes", curves: "Sequence[SpanCurve]", floor: float) -> None:
    """Draw the curves of one layer, with bands for their intervals."""
    for curve in curves:
        axes.plot(
            curve.ks,
            curve.values("kl", floor),
            color=curve.color,
            label=curve.label,
            linestyle="--" if curve.in_model else "-",
            linewidth=1.6,
            marker=curve.marker[0],
            markersize=4,
            markerfacecolor="white" if curve.in_model else curve.color,
        )
        if curve.has_intervals:
            low, high = (np.array(curve.values(name, floor)) for name in ("low", "high"))
            alpha = 0.1 if curve.in_model else 0.18
            axes.fill_between(curve.ks, low, high, color=curve.color, alpha=alpha, linewidth=0)
    axes.grid(alpha=0.25)

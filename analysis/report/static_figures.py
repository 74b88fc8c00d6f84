"""Pictures of an evaluation with matplotlib: curves by layer, lens heatmaps, confidence.

`write_pngs` (html_report.py) saves them; interactive_figures.py draws the same with plotly.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from ...cache.errors import UsageError
from ..evaluation.confidence_buckets import BUCKETS, BucketRow, bucket_name
from ..evaluation.lens_heatmap import Heatmap
from ..evaluation.metrics import EvaluationRow
from ..evaluation.result import Evaluation
from .probe_style import (
    BUCKET_COLORS,
    BUCKET_MARKERS,
    CONFIDENCE_MEASURE,
    MEASURES,
    SCALE,
    color,
    format_offset,
    heatmap_title,
    interval_of,
    label,
    letter_color,
    log_floor,
    marker,
    measure_title,
    panel_title,
    plotted_value,
    printable,
    short_model_name,
    shorten,
    stroke,
    telling_confidence,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LEGEND_COLUMNS = 5
"""Names side by side under a figure."""


def curves(evaluation: Evaluation, measure: str) -> "Figure":
    """One panel per offset with one line per probe: `measure` by layer (a matplotlib figure)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from .shown_figure import ShownFigure

    # Panels, two side by side.
    panels = len(evaluation.offsets)
    columns = min(2, panels)
    lines = math.ceil(panels / columns)
    figure = ShownFigure(figsize=(4.9 * columns, 3.4 * lines + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axes, offset in zip(grid, evaluation.offsets, strict=False):
        _draw_panel(axes, evaluation, measure, offset)
    for axes in grid[panels:]:
        axes.set_visible(False)

    # One legend for all panels; matplotlib's own labels begin with an underscore.
    lines_by_label = {
        str(line.get_label()): line
        for axes in grid
        for line in axes.get_lines()
        if axes.get_visible()
    }
    labels = [name for name in lines_by_label if not name.startswith("_")]
    figure.legend(
        [lines_by_label[name] for name in labels],
        labels,
        loc="outside lower center",
        ncols=max(1, min(len(labels), LEGEND_COLUMNS)),
        frameon=False,
    )
    model = short_model_name(evaluation.model_name)
    title = f"{model}: {measure_title(measure)}, {evaluation.split} split"
    figure.suptitle(printable(title), parse_math=False)
    return figure


def _draw_panel(axes: "Axes", evaluation: Evaluation, measure: str, offset: int) -> None:
    """Draw all probes at one offset: lenses as lines, baselines as horizontal lines."""
    from matplotlib.ticker import MaxNLocator

    offset_rows = [row for row in evaluation.rows if row.offset == offset]
    floor = log_floor(offset_rows) if measure == "kl" else 0.0
    for probe in evaluation.probes:
        rows = evaluation.select(probe, offset)
        if rows and rows[0].layer is None:
            axes.axhline(
                plotted_value(rows[0], measure),
                color=color(probe),
                linestyle=stroke(probe, ("--", "dash"))[0],
                label=label(probe),
            )
        elif rows:
            _draw_lens(axes, rows, measure, floor)
    axes.set_title(panel_title(evaluation, offset), fontsize=10)
    axes.set_xlabel("layer")
    axes.set_ylabel(MEASURES[measure])
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if floor:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.9 * floor)
    else:
        axes.set_ylim(bottom=0)


def _draw_lens(axes: "Axes", rows: list[EvaluationRow], measure: str, floor: float) -> None:
    """Draw the `rows` of one probe at one offset by layer, with a band for the intervals."""
    probe = rows[0].probe
    layers = [row.layer or 0 for row in rows]
    axes.plot(
        layers,
        [plotted_value(row, measure, floor) for row in rows],
        color=color(probe),
        label=label(probe),
        linestyle=stroke(probe)[0],
        linewidth=1.6,
        marker=marker(probe)[0],
        markersize=4,
    )
    intervals = [interval_of(row, measure) for row in rows]
    if all(intervals):
        low, high = np.maximum(np.array(intervals), floor).T
        axes.fill_between(layers, low, high, color=color(probe), alpha=0.18, linewidth=0)


def heatmap_figure(heatmap: Heatmap) -> "Figure":
    """Tokens by layers with the likeliest token in each cell (a matplotlib figure)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap

    from .shown_figure import ShownFigure

    layers, tokens = len(heatmap.layers), len(heatmap.tokens)
    size = (max(5.0, 0.56 * tokens + 1.8), max(2.6, 0.3 * layers + 1.9))
    figure = ShownFigure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()

    # Cells, coloured by the probability of their likeliest token.
    colormap = LinearSegmentedColormap.from_list("probability", list(SCALE))
    probability = heatmap.probability[:, :, 0]
    image = axes.imshow(probability, cmap=colormap, vmin=0, vmax=1, origin="lower", aspect="auto")
    for (row, column), value in np.ndenumerate(probability):
        axes.text(
            column,
            row,
            printable(shorten(heatmap.top[row][column][0])),
            color=letter_color(float(value)),
            ha="center",
            va="center",
            fontsize=6.5,
            parse_math=False,
        )

    # Axes, title and colour bar.
    names = [printable(shorten(token)) for token in heatmap.tokens]
    axes.set_xticks(range(tokens), names, rotation=45, ha="right", fontsize=8, parse_math=False)
    axes.set_yticks(range(layers), [str(layer) for layer in heatmap.layers], fontsize=8)
    axes.set_xlabel("input token (␣ is a space)")
    axes.set_ylabel("layer")
    axes.set_title(heatmap_title(heatmap), fontsize=10)
    figure.colorbar(image, ax=axes, label="probability of the token shown", pad=0.01)
    return figure


def confidence_figure(evaluation: Evaluation) -> "Figure":
    """Precision@1 by layer, a line per confidence bucket (a matplotlib figure).

    A row of panels per probe, a column per offset; without those in which the buckets do not
    differ. Raises `UsageError` if they differ nowhere (`telling_confidence`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from .shown_figure import ShownFigure

    telling = telling_confidence(evaluation)
    if not telling:
        raise UsageError("precision@1 does not depend on the model's confidence: nothing to draw")
    probes = [name for name in evaluation.probes if any(name == probe for probe, _ in telling)]
    offsets = [n for n in evaluation.offsets if any(n == offset for _, offset in telling)]
    lines, columns = len(probes), len(offsets)
    figure = ShownFigure(
        figsize=(max(5.6, 2.7 * columns + 0.6), 2.1 * lines + 1.7), layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for (row, column), axes in np.ndenumerate(grid):
        probe, offset = probes[row], offsets[column]
        if (probe, offset) in telling:
            _draw_confidence_panel(axes, evaluation.select_buckets(probe, offset))
        else:
            middle = {"ha": "center", "va": "center", "transform": axes.transAxes}
            axes.text(0.5, 0.5, "no difference", color="#5b6a78", **middle)
        if row == 0:
            axes.set_title(_confidence_title(evaluation, offset), fontsize=9)
        if column == 0:
            axes.set_ylabel(f"{printable(label(probe))}\nprecision@1", fontsize=9, parse_math=False)
        if row == lines - 1:
            axes.set_xlabel("layer")

    # One legend for all panels.
    line_of = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    names = [name for bucket in BUCKETS if (name := bucket_name(*bucket)) in line_of]
    figure.legend(
        [line_of[name] for name in names],
        names,
        loc="outside lower center",
        ncols=len(BUCKETS),
        title="model's largest probability at t+N",
        frameon=False,
    )
    title = f"{short_model_name(evaluation.model_name)}: precision@1 by the model's confidence"
    figure.suptitle(printable(f"{title}, {evaluation.split} split"), parse_math=False)
    return figure


def _draw_confidence_panel(axes: "Axes", rows: list[BucketRow]) -> None:
    """Draw the bucket rows of one probe at one offset: a line per bucket, with intervals."""
    from matplotlib.ticker import MaxNLocator

    for number, bucket in enumerate(BUCKETS):
        bucket_rows = [row for row in rows if (row.confidence_from, row.confidence_to) == bucket]
        if not bucket_rows:
            continue
        layers = [row.layer or 0 for row in bucket_rows]
        axes.plot(
            layers,
            [plotted_value(row, CONFIDENCE_MEASURE) for row in bucket_rows],
            color=BUCKET_COLORS[number],
            label=bucket_name(*bucket),
            linewidth=1.5,
            marker=BUCKET_MARKERS[number][0],
            markersize=3.5,
        )
        intervals = [interval_of(row, CONFIDENCE_MEASURE) for row in bucket_rows]
        if all(intervals):
            low, high = np.array(intervals).T
            shade = BUCKET_COLORS[number]
            axes.fill_between(layers, low, high, color=shade, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _confidence_title(evaluation: Evaluation, offset: int) -> str:
    """Title of a column: N, n, and the share of the pairs in each bucket.

    All probes share the model's confidence, so the first row of the offset speaks for all.
    """
    first = next(row for row in evaluation.rows if row.offset == offset)
    share_of = {
        (row.confidence_from, row.confidence_to): row.share
        for row in evaluation.select_buckets(first.probe, offset)
        if row.layer == first.layer
    }
    shares = " / ".join(f"{100 * share_of.get(bucket, 0.0):.0f}" for bucket in BUCKETS)
    return f"N = {offset} ({format_offset(offset)}), n = {first.n:,}\n{shares} % of the pairs"

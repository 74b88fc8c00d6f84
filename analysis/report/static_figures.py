"""Pictures of an evaluation with matplotlib: curves by layer, lens heatmaps."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.confidence_buckets import BUCKETS, BucketRow, bucket_name
from ..evaluation.heatmap import Heatmap
from ..evaluation.metrics import EvaluationRow
from ..evaluation.result import Evaluation
from .probe_style import (
    KL_FLOOR,
    MEASURES,
    SCALE,
    ahead,
    band_of,
    caption,
    color,
    drawn,
    heatmap_title,
    label,
    marker,
    measure_title,
    needs_log,
    printable,
    short,
    short_name,
    stroke,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LEGEND_COLUMNS = 5
"""Names side by side under a figure."""


def curves(evaluation: Evaluation, measure: str) -> "Figure":
    """One panel per offset with one line per probe, `measure` by layer (a matplotlib figure)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = len(evaluation.offsets)
    columns = min(2, panels)
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(4.9 * columns, 3.4 * lines + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axes, offset in zip(grid, evaluation.offsets, strict=False):
        _panel(axes, evaluation, measure, offset)
    for axes in grid[panels:]:
        axes.set_visible(False)
    handles = {h.get_label(): h for axes in grid for h in axes.get_lines() if axes.get_visible()}
    named = [(h, str(name)) for name, h in handles.items() if not str(name).startswith("_")]
    keys, names = [h for h, _ in named], [name for _, name in named]
    columns = max(1, min(len(names), LEGEND_COLUMNS))
    figure.legend(keys, names, loc="outside lower center", ncols=columns, frameon=False)
    name = short_name(evaluation.model_name)
    title = f"{name}: {measure_title(measure)}, {evaluation.split} split"
    figure.suptitle(printable(title), parse_math=False)
    return figure


def _panel(axes: "Axes", evaluation: Evaluation, measure: str, offset: int) -> None:
    from matplotlib.ticker import MaxNLocator

    shown = [row for row in evaluation.rows if row.offset == offset]
    log = measure == "kl" and needs_log(shown)
    for probe in evaluation.probes:
        rows = evaluation.select(probe, offset)
        if rows and rows[0].layer is None:
            level = drawn(rows[0], measure)
            style = stroke(probe, ("--", "dash"))[0]
            axes.axhline(level, color=color(probe), linestyle=style, label=label(probe))
        elif rows:
            _line(axes, rows, measure, KL_FLOOR if log else 0.0)
    axes.set_title(caption(evaluation, offset), fontsize=10)
    axes.set_xlabel("layer")
    axes.set_ylabel(MEASURES[measure])
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def _line(axes: "Axes", rows: list[EvaluationRow], measure: str, floor: float) -> None:
    probe = rows[0].probe
    layers = [row.layer or 0 for row in rows]
    style: dict[str, Any] = {
        "color": color(probe),
        "label": label(probe),
        "linestyle": stroke(probe)[0],
    }
    values = [drawn(row, measure, floor) for row in rows]
    axes.plot(layers, values, marker=marker(probe)[0], markersize=4, linewidth=1.6, **style)
    bands = [band_of(row, measure) for row in rows]
    if all(bands):
        low, high = np.maximum(np.array(bands), floor).T
        axes.fill_between(layers, low, high, color=color(probe), alpha=0.18, linewidth=0)


def heatmap_figure(heatmap: Heatmap) -> "Figure":
    """Tokens by layers with the likeliest token in each cell (a matplotlib figure)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    layers, tokens = len(heatmap.layers), len(heatmap.tokens)
    size = (max(5.0, 0.56 * tokens + 1.8), max(2.6, 0.3 * layers + 1.9))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shade = LinearSegmentedColormap.from_list("probability", list(SCALE))
    first = heatmap.probability[:, :, 0]
    image = axes.imshow(first, cmap=shade, vmin=0, vmax=1, origin="lower", aspect="auto")
    for (row, column), value in np.ndenumerate(first):
        text = printable(short(heatmap.top[row][column][0]))
        ink = "white" if value > 0.75 else "#222222"
        place = {"ha": "center", "va": "center", "fontsize": 6.5, "parse_math": False}
        axes.text(column, row, text, color=ink, **place)
    names = [printable(short(token)) for token in heatmap.tokens]
    axes.set_xticks(range(tokens), names, rotation=45, ha="right", fontsize=8, parse_math=False)
    axes.set_yticks(range(layers), [str(layer) for layer in heatmap.layers], fontsize=8)
    axes.set_xlabel("input token (␣ is a space)")
    axes.set_ylabel("layer")
    axes.set_title(heatmap_title(heatmap), fontsize=10)
    figure.colorbar(image, ax=axes, label="probability of the token shown", pad=0.01)
    return figure


MEASURE = "precision_at_1"
SHADES = ("#8fc1e3", "#3f93cf", "#1a5fa5", "#08264d")
"""Colours of the buckets, darker where the model is surer; lightness falls evenly."""
MARKS = ("v", "s", "o", "^")


def confidence_figure(evaluation: Evaluation) -> "Figure":
    """A row per probe that reads layers, a column per offset, a line per bucket by layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layered = {row.probe for row in evaluation.buckets if row.layer is not None}
    probes = [name for name in evaluation.probes if name in layered]
    shape = (len(probes), len(evaluation.offsets))
    size = (max(5.6, 2.7 * shape[1] + 0.6), 2.1 * shape[0] + 1.7)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True)
    for (row, column), axes in np.ndenumerate(grid):
        probe, offset = probes[row], evaluation.offsets[column]
        rows = evaluation.select_buckets(probe, offset)
        _confidence_panel(axes, rows)
        if row == 0:
            axes.set_title(_heading(evaluation, offset), fontsize=9)
        if column == 0:
            axes.set_ylabel(f"{printable(label(probe))}\nprecision@1", fontsize=9, parse_math=False)
        if row == len(probes) - 1:
            axes.set_xlabel("layer")
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    names = [name for name in map(_name, BUCKETS) if name in lines]
    figure.legend(
        [lines[name] for name in names], names, loc="outside lower center", ncols=len(BUCKETS),
        title="model's largest probability at t+N", frameon=False,
    )  # fmt: skip
    title = f"{short_name(evaluation.model_name)}: precision@1 by the model's confidence"
    figure.suptitle(printable(f"{title}, {evaluation.split} split"), parse_math=False)
    return figure


def _confidence_panel(axes: "Axes", rows: list[BucketRow]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, bucket in enumerate(BUCKETS):
        inside = [row for row in rows if (row.confidence_from, row.confidence_to) == bucket]
        if not inside:
            continue
        layers = [row.layer or 0 for row in inside]
        style = {"color": SHADES[number], "marker": MARKS[number], "markersize": 3.5}
        values = [drawn(row, MEASURE) for row in inside]
        axes.plot(layers, values, linewidth=1.5, label=_name(bucket), **style)
        bands = [band_of(row, MEASURE) for row in inside]
        if all(bands):
            low, high = np.array(bands).T
            axes.fill_between(layers, low, high, color=SHADES[number], alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _heading(evaluation: Evaluation, offset: int) -> str:
    """N, n and what part of the pairs each bucket holds."""
    first = next(row for row in evaluation.rows if row.offset == offset)
    parts = [
        row for row in evaluation.select_buckets(first.probe, offset) if row.layer == first.layer
    ]
    share = {(row.confidence_from, row.confidence_to): row.share for row in parts}
    shares = " / ".join(f"{100 * share.get(bucket, 0.0):.0f}" for bucket in BUCKETS)
    return f"N = {offset} ({ahead(offset)}), n = {first.n:,}\n{shares} % of the pairs"


def _name(bucket: tuple[float, float]) -> str:
    return bucket_name(*bucket)

"""Picture of precision@1 by the model's confidence with matplotlib: small multiples."""

from typing import TYPE_CHECKING

import numpy as np

from .buckets import BUCKETS, BucketRow, bucket_name
from .evaluate import Evaluation
from .plots import ahead, band_of, drawn, label, printable, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
        _panel(axes, rows)
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


def _panel(axes: "Axes", rows: list[BucketRow]) -> None:
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

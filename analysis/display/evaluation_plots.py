"""Plots of an evaluation on axes of matplotlib, or as a figure of plotly: a measure by layer or N.

`Evaluation.plot` calls `plot_evaluation`; `Evaluation.to_png` writes the figures of the report, and
for several offsets the `future_lens_figure`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.errors import NotFoundError, UsageError
from ...cache.number_ranges import as_tuple, format_ranges
from ..evaluation.lens_heatmap import Heatmap
from ..evaluation.metrics import EvaluationRow
from ..evaluation.result import Evaluation
from ..report.html_report import write_pngs
from ..report.picture_files import write_figure
from ..report.probe_style import (
    MEASURES,
    color,
    interval_of,
    label,
    marker,
    plotted_value,
    printable,
    short_model_name,
    stroke,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from plotly.graph_objects import Figure as PlotlyFigure

AXES = ("layer", "offset")
"""What a plot may have on its x axis."""
BACKENDS = ("matplotlib", "plotly")
LOG_DECADES = 1.5
"""Decades that KL must span to be drawn on a logarithmic axis."""
SMALLEST_KL = 1e-3
"""Smaller KL, in nats, is that of the model itself, and does not stretch a logarithmic axis."""
FAINTEST = 0.35
"""Opacity of the last of several lines of one probe."""
TITLES = {
    **MEASURES,
    "kl_reverse": "KL(probe ‖ model), nats",
    "nll": "NLL of the model's top token, nats",
    "surprisal": "surprisal of the probe's top token, nats",
    "nll_text": "NLL of the text's next token, nats",
    **{f"precision_at_{k}_text": f"precision@{k} of the text (share)" for k in (1, 5, 10)},
}
"""Measures with the title of their axis."""


@dataclass(frozen=True)
class PlotLine:
    """One line of a plot: a probe, at one offset if x is the layer, at one layer if x is N."""

    probe: str
    name: str
    """Text of the legend."""
    x: list[int]
    rows: list[EvaluationRow]
    opacity: float
    is_baseline: bool
    """Whether the probe reads no layer: it is drawn dashed."""


def plot_evaluation(
    evaluation: Evaluation,
    measure: str = "kl",
    x: str = "layer",
    *,
    layer: int | Iterable[int] | None = None,
    offset: int | Iterable[int] | None = None,
    probes: str | Iterable[str] | None = None,
    ax: "Axes | None" = None,
    backend: str = "matplotlib",
) -> "Axes | PlotlyFigure":
    """See `Evaluation.plot`."""
    measure = measure_name(measure)
    if x not in AXES:
        raise UsageError(f'x must be "layer" or "offset", not {x!r}')
    if backend not in BACKENDS:
        raise UsageError(f'backend must be "matplotlib" or "plotly", not {backend!r}')
    if backend == "plotly" and ax is not None:
        raise UsageError("ax is an axes of matplotlib; leave it out for a figure of plotly")
    names = _chosen_probes(evaluation, probes)
    if x == "layer":
        if layer is not None:
            raise UsageError("layer is for a plot against the offset; leave it out, or x='offset'")
        offsets = _chosen(offset, evaluation.offsets, evaluation.offsets[:1], "offset")
        lines = [
            line
            for name in names
            for number, n in enumerate(offsets)
            if (line := _line_by_layer(evaluation, name, n, number, len(offsets))) is not None
        ]
        fixed = f"N = {format_ranges(offsets)}"
    else:
        if offset is not None:
            raise UsageError("offset is for a plot against the layer; leave it out, or x='layer'")
        middle = evaluation.layers[len(evaluation.layers) // 2]
        layers = _chosen(layer, evaluation.layers, (middle,), "layer")
        lines = [
            line
            for name in names
            for number, la in enumerate(layers)
            if (line := _line_by_offset(evaluation, name, la, number, len(layers))) is not None
        ]
        fixed = f"layer {format_ranges(layers)}"
    if not lines:
        raise NotFoundError(f"no probe of {', '.join(names)} has a row at {fixed}")
    title = f"{short_model_name(evaluation.model_name)}, {evaluation.split} split, {fixed}"
    if backend == "plotly":
        return _plotly_figure(lines, measure, x, title)
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    _draw(ax, lines, measure, x, title)
    return ax


def measure_name(measure: str) -> str:
    """The field of `EvaluationRow` that `measure` names: `precision@1` is `precision_at_1`."""
    name = measure.replace("@", "_at_").replace(" ", "_")
    if name not in TITLES or name not in {field.name for field in fields(EvaluationRow)}:
        raise UsageError(f"there is no measure {measure!r}; choose one of {', '.join(TITLES)}")
    return name


def _chosen(
    requested: int | Iterable[int] | None,
    measured: Sequence[int],
    default: Sequence[int],
    name: str,
) -> tuple[int, ...]:
    """The layers or offsets to draw; raises `NotFoundError` for one that was not measured."""
    if requested is None:
        return tuple(default)
    numbers = as_tuple(requested, name)
    if missing := [number for number in numbers if number not in measured]:
        raise NotFoundError(
            f"{name} {format_ranges(missing)} was not measured; the evaluation has "
            f"{format_ranges(measured)}"
        )
    return numbers


def _chosen_probes(evaluation: Evaluation, probes: str | Iterable[str] | None) -> list[str]:
    """Names of the probes to draw, in the order of the evaluation."""
    if probes is None:
        return list(evaluation.probes)
    wanted = [probes] if isinstance(probes, str) else list(probes)
    if missing := [name for name in wanted if name not in evaluation.probes]:
        raise NotFoundError(
            f"there is no probe {missing[0]!r} in the evaluation; it has "
            f"{', '.join(evaluation.probes)}"
        )
    return [name for name in evaluation.probes if name in wanted]


def _opacity(number: int, count: int) -> float:
    return 1.0 if count == 1 else 1.0 - (1.0 - FAINTEST) * number / (count - 1)


def _line_by_layer(
    evaluation: Evaluation, probe: str, offset: int, number: int, count: int
) -> PlotLine | None:
    """The line of a probe at one offset; a baseline is a horizontal one."""
    rows = evaluation.select(probe, offset)
    if not rows:
        return None
    is_baseline = rows[0].layer is None
    layers = [row.layer or 0 for row in rows]
    if is_baseline:
        layers, rows = list(evaluation.layers), rows * len(evaluation.layers)
    name = label(probe) + (f", N = {offset}" if count > 1 else "")
    return PlotLine(probe, name, layers, rows, _opacity(number, count), is_baseline)


def _line_by_offset(
    evaluation: Evaluation, probe: str, layer: int, number: int, count: int
) -> PlotLine | None:
    """The line of a probe at one layer; that of a baseline is the same for all layers."""
    rows = [row for row in evaluation.rows if row.probe == probe and row.layer in (layer, None)]
    is_baseline = bool(rows) and rows[0].layer is None
    if not rows or (is_baseline and number):
        return None
    name = label(probe) + (f", layer {layer}" if count > 1 and not is_baseline else "")
    opacity = 1.0 if is_baseline else _opacity(number, count)
    return PlotLine(probe, name, [row.offset for row in rows], rows, opacity, is_baseline)


def _log_floor(lines: Sequence[PlotLine], measure: str) -> float:
    """Lower end of a logarithmic axis of KL, in nats; 0.0 for a linear one."""
    if not measure.startswith("kl"):
        return 0.0
    values = [plotted_value(row, measure) for line in lines for row in line.rows]
    values = [value for value in values if math.isfinite(value) and value >= SMALLEST_KL]
    if not values or max(values) / min(values) < 10**LOG_DECADES:
        return 0.0
    return 0.8 * min(values)


def _draw(axes: "Axes", lines: Sequence[PlotLine], measure: str, x: str, title: str) -> None:
    """Draw `lines` with their intervals on axes of matplotlib."""
    from matplotlib.ticker import MaxNLocator

    floor = _log_floor(lines, measure)
    for line in lines:
        values = [plotted_value(row, measure, floor) for row in line.rows]
        style = stroke(line.probe, ("--", "dash") if line.is_baseline else ("-", "solid"))[0]
        axes.plot(
            line.x,
            values,
            color=color(line.probe),
            alpha=line.opacity,
            linestyle=style,
            linewidth=1.6,
            marker="" if line.is_baseline and x == "layer" else marker(line.probe)[0],
            markersize=4.5,
            label=printable(line.name),
        )
        intervals = [interval_of(row, measure) for row in line.rows]
        bounds = [interval for interval in intervals if interval is not None]
        if len(bounds) == len(line.rows) and not (line.is_baseline and x == "layer"):
            low, high = ([max(bound[end], floor) for bound in bounds] for end in (0, 1))
            axes.fill_between(line.x, low, high, color=color(line.probe), alpha=0.15, linewidth=0)
    axes.set_xlabel("layer" if x == "layer" else "N (tokens further ahead)")
    axes.set_ylabel(TITLES[measure])
    axes.set_title(printable(title), fontsize=10, parse_math=False)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if floor:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.9 * floor)
    else:
        axes.set_ylim(bottom=0)
    legend = axes.legend(frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _plotly_figure(lines: Sequence[PlotLine], measure: str, x: str, title: str) -> "PlotlyFigure":
    """The same as a figure of plotly."""
    from plotly.graph_objects import Figure, Scatter

    from ..report.interactive_figures import escape_markup, lay_out

    floor = _log_floor(lines, measure)
    figure = Figure()
    for line in lines:
        style = stroke(line.probe, ("--", "dash") if line.is_baseline else ("-", "solid"))[1]
        values = [plotted_value(row, measure, floor) for row in line.rows]
        figure.add_trace(
            Scatter(
                x=line.x,
                y=[None if math.isnan(value) else value for value in values],
                mode="lines" if line.is_baseline and x == "layer" else "lines+markers",
                name=escape_markup(line.name),
                opacity=line.opacity,
                line={"color": color(line.probe), "dash": style, "width": 2},
                marker={"symbol": marker(line.probe)[1], "size": 7},
            )
        )
    lay_out(figure, 430)
    figure.update_layout(title={"text": escape_markup(title), "font": {"size": 15}})
    figure.update_xaxes(title_text="layer" if x == "layer" else "N (tokens further ahead)")
    figure.update_yaxes(title_text=TITLES[measure], type="log" if floor else "linear")
    return figure


def future_lens_figure(
    evaluation: Evaluation,
    measure: str = "precision_at_1",
    *,
    layer: int | None = None,
    offset: int | None = None,
) -> "Figure":
    """A measure against N at one layer, and against the layer at one N (Pal et al., 2311.04897).

    Default: the middle layer, and the smallest offset of 1 or more. Raises `UsageError` for an
    evaluation of one offset.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from ..report.shown_figure import ShownFigure

    if len(evaluation.offsets) < 2:
        raise UsageError(
            f"the evaluation has the offset {format_ranges(evaluation.offsets)} alone; a future "
            "lens is drawn for several: evaluate(cache, probes, offsets=[0, 1, 2, 3])"
        )
    if offset is None:
        offset = next(n for n in evaluation.offsets if n > 0)
    figure = ShownFigure(figsize=(10.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    plot_evaluation(evaluation, measure, "offset", layer=layer, ax=left)
    plot_evaluation(evaluation, measure, "layer", offset=offset, ax=right)
    right.set_ylabel("")
    # One legend for both panels.
    handles: dict[str, Any] = {}
    for axes in (left, right):
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
        if (legend := axes.get_legend()) is not None:
            legend.remove()
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(5, len(handles)),
        frameon=False,
    )
    return figure


def write_evaluation_pngs(
    evaluation: Evaluation, folder: str | Path, heatmaps: Sequence[Heatmap] | None = None
) -> list[Path]:
    """See `Evaluation.to_png`; `heatmaps` are drawn in place of those of one passage."""
    heatmaps = evaluation.heatmaps() if heatmaps is None else heatmaps
    paths = write_pngs(folder, evaluation, heatmaps)
    if len(evaluation.offsets) > 1:
        paths.append(Path(folder) / "future_lens.png")
        write_figure(future_lens_figure(evaluation), paths[-1])
    return paths

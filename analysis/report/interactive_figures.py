"""Interactive pictures of an evaluation with plotly, for the HTML report (html_report.py).

The same pictures as in static_figures.py: curves by layer and lens heatmaps.
"""

import math
from collections.abc import Sequence
from html import escape as escape_html
from typing import TYPE_CHECKING, Any

from ...cache.files.json_files import plain_value
from ..evaluation.lens_heatmap import Heatmap
from ..evaluation.metrics import EvaluationRow
from ..evaluation.result import Evaluation
from .probe_style import (
    KL_FLOOR,
    MEASURES,
    SCALE,
    color,
    heatmap_title,
    interval_of,
    label,
    marker,
    measure_title,
    needs_log,
    panel_title,
    plotted_value,
    shorten,
    stroke,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

LOG_AXIS: dict[str, Any] = {
    "type": "log",
    "dtick": 1,
    "exponentformat": "power",
}
LINEAR_AXIS: dict[str, Any] = {"rangemode": "tozero"}
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def escape_markup(text: str) -> str:
    """`text` with `&`, `<` and `>` escaped for plotly, which shows `&quot;` literally."""
    return escape_html(text, quote=False)


def panel_figure(evaluation: Evaluation, measure: str, offset: int) -> "Figure":
    """One line per probe at one offset: a measure by layer (a plotly figure without a legend).

    Values too small for a logarithmic axis are drawn at its lower end.
    """
    from plotly.graph_objects import Figure

    rows = [row for row in evaluation.rows if row.offset == offset]
    floor = log_floor(rows) if measure == "kl" else 0.0
    figure = Figure(_probe_traces(evaluation, measure, offset, floor))
    figure.update_yaxes(LOG_AXIS if floor else LINEAR_AXIS, title_text=MEASURES[measure])
    if floor:
        largest = max(value for row in rows if (value := plotted_value(row, measure)) > 0)
        figure.update_yaxes(range=[math.log10(floor) - 0.05, math.log10(largest) + 0.08])
    figure.update_xaxes(title_text="layer", dtick=math.ceil(len(evaluation.layers) / 14))
    lay_out(figure, 300)
    figure.update_layout(showlegend=False, margin={"l": 62, "r": 8, "t": 12, "b": 46})
    return figure


def lay_out(figure: "Figure", height: int) -> None:
    """Set the height in pixels, fonts, margins and legend that all figures share."""
    figure.update_layout(
        height=height,
        template="plotly_white",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13},
        margin={"l": 70, "r": 20, "t": 70, "b": 90},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        hoverlabel={"align": "left"},
    )


def _probe_traces(
    evaluation: Evaluation, measure: str, offset: int, floor: float
) -> "list[Scatter]":
    """Lines and bands of all probes at one offset; values below `floor` are drawn at `floor`."""
    traces = []
    for probe in evaluation.probes:
        rows = evaluation.select(probe, offset)
        if rows and rows[0].layer is None:
            traces.append(_baseline_trace(rows[0], measure, evaluation.layers))
        elif rows:
            traces += _lens_traces(rows, measure, floor)
    # Bands come first, below all lines, so that no line is hidden.
    return sorted(traces, key=lambda trace: trace.fill is None)


def _baseline_trace(row: EvaluationRow, measure: str, layers: Sequence[int]) -> "Scatter":
    """A dashed horizontal line for a probe that reads no layer."""
    from plotly.graph_objects import Scatter

    value = plain_value(getattr(row, measure))
    return Scatter(
        x=list(layers),
        y=[value] * len(layers),
        mode="lines",
        line={
            "color": color(row.probe),
            "dash": stroke(row.probe, ("--", "dash"))[1],
            "width": 2,
        },
        name=escape_markup(label(row.probe)),
        legendgroup=row.probe,
        hovertext=[_hover_text(row, measure)] * len(layers),
        hoverinfo="text",
    )


def _lens_traces(rows: list[EvaluationRow], measure: str, floor: float) -> "list[Scatter]":
    """Line and interval band of the `rows` of one probe at one offset; the band first."""
    from plotly.graph_objects import Scatter

    probe = rows[0].probe
    layers = [row.layer or 0 for row in rows]
    common = {"name": escape_markup(label(probe)), "legendgroup": probe}
    line = Scatter(
        x=layers,
        y=plain_value([plotted_value(row, measure, floor) for row in rows]),
        mode="lines+markers",
        line={"color": color(probe), "dash": stroke(probe)[1], "width": 2},
        marker={"symbol": marker(probe)[1], "size": 7},
        hovertext=[_hover_text(row, measure) for row in rows],
        hoverinfo="text",
        **common,
    )
    intervals = [bounds for row in rows if (bounds := interval_of(row, measure)) is not None]
    if len(intervals) < len(rows):
        return [line]
    low, high = ([max(bounds[end], floor) for bounds in intervals] for end in (0, 1))
    band = Scatter(
        x=layers + layers[::-1],
        y=high + low[::-1],
        fill="toself",
        fillcolor=color(probe),
        opacity=0.2,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        **common,
    )
    return [band, line]


def _hover_text(row: EvaluationRow, measure: str) -> str:
    """Text of a point of a curve: probe, layer, value, interval, n."""
    number = getattr(row, measure)
    if number is None:
        value = f"undefined at {row.n_undefined:,} pairs"
    else:
        value = f"{number:.4g}" + (" nats" if measure == "kl" else "")
    bounds = interval_of(row, measure)
    interval = f"<br>95 % interval {bounds[0]:.4g} to {bounds[1]:.4g}" if bounds else ""
    layer = "any layer" if row.layer is None else f"layer {row.layer}"
    name = f"{escape_markup(label(row.probe))}, {layer}, N = {row.offset}"
    return f"<b>{name}</b><br>{measure_title(measure)} {value}{interval}<br>n = {row.n:,}"


def heatmap_figure(heatmap: Heatmap) -> "Figure":
    """Tokens by layers with the likeliest token in each cell (a plotly figure).

    Hovering over a cell shows its likeliest tokens, entropy and KL.
    """
    from plotly.graph_objects import Figure
    from plotly.graph_objects import Heatmap as Cells

    tokens, layers = range(len(heatmap.tokens)), range(len(heatmap.layers))
    figure = Figure(
        Cells(
            z=plain_value(heatmap.probability[:, :, 0]),
            text=[
                [escape_markup(shorten(heatmap.top[la][t][0], 7)) for t in tokens] for la in layers
            ],
            texttemplate="%{text}",
            textfont={"size": 9.5},
            hovertext=[[_cell_text(heatmap, la, t) for t in tokens] for la in layers],
            hoverinfo="text",
            zmin=0,
            zmax=1,
            colorscale=[list(stop) for stop in SCALE],
            colorbar={"title": {"text": "probability", "side": "right"}, "thickness": 14},
            xgap=1,
            ygap=1,
        )
    )
    names = [escape_markup(shorten(token)) for token in heatmap.tokens]
    figure.update_xaxes(
        title_text="input token (␣ is a space)",
        tickvals=list(tokens),
        ticktext=names,
        tickangle=-45,
    )
    numbers = [str(layer) for layer in heatmap.layers]
    figure.update_yaxes(title_text="layer", tickvals=list(layers), ticktext=numbers)
    lay_out(figure, 24 * len(heatmap.layers) + 200)
    figure.update_layout(
        title={"text": escape_markup(heatmap_title(heatmap)), "font": {"size": 15}}
    )
    return figure


def _cell_text(heatmap: Heatmap, layer: int, token: int) -> str:
    """Hover text of a cell: the model\'s token, the likeliest tokens, entropy and KL."""
    lines = [
        f"<b>layer {heatmap.layers[layer]}, after {escape_markup(heatmap.tokens[token])}</b>",
        f"model: {escape_markup(heatmap.targets[token])}",
    ]
    likeliest = zip(heatmap.top[layer][token], heatmap.probability[layer, token], strict=True)
    lines += [
        f"{number}. {escape_markup(name)}  {p:.3f}" for number, (name, p) in enumerate(likeliest, 1)
    ]
    lines.append(f"entropy {heatmap.entropy[layer, token]:.3f} nats")
    lines.append(f"KL to the model {heatmap.kl[layer, token]:.3f} nats")
    return "<br>".join(lines)

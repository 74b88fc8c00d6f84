"""Interactive pictures of an evaluation with plotly, for the HTML report (html_report.py).

The same pictures as in static_figures.py: curves by layer and lens heatmaps.
"""

import math
from collections.abc import Sequence
from html import escape as escape_html
from typing import TYPE_CHECKING, Any

from ...cache.files.json_files import plain_value
from ..evaluation.confidence_buckets import BUCKETS
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
    interval_of,
    label,
    letter_color,
    log_floor,
    marker,
    measure_title,
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
CELL_WIDTH, CELL_HEIGHT = 52, 26
"""Size of a cell of a heatmap in pixels: seven letters of 11 pixels are readable."""
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


def confidence_panel(evaluation: Evaluation, probe: str, offset: int) -> "Figure":
    """Precision@1 by layer, a line per confidence bucket of one probe (a plotly figure)."""
    from plotly.graph_objects import Figure, Scatter

    traces = []
    for number, bucket in enumerate(BUCKETS):
        rows = [
            row
            for row in evaluation.select_buckets(probe, offset)
            if (row.confidence_from, row.confidence_to) == bucket
        ]
        if not rows:
            continue
        shade = BUCKET_COLORS[number]
        line = Scatter(
            x=[row.layer or 0 for row in rows],
            y=plain_value([plotted_value(row, CONFIDENCE_MEASURE) for row in rows]),
            mode="lines+markers",
            line={"color": shade, "width": 2},
            marker={"symbol": BUCKET_MARKERS[number][1], "size": 7, "color": shade},
            name=f"{rows[0].bucket} ({100 * rows[0].share:.0f} % of the pairs)",
            hovertext=[_hover_text(row, CONFIDENCE_MEASURE) for row in rows],
            hoverinfo="text",
        )
        traces.append(line)
    figure = Figure(traces)
    figure.update_yaxes(title_text=MEASURES[CONFIDENCE_MEASURE], range=[0, 1.02])
    figure.update_xaxes(title_text="layer", dtick=math.ceil(len(evaluation.layers) / 14))
    lay_out(figure, 370)
    figure.update_layout(margin={"l": 62, "r": 8, "t": 12, "b": 120})
    return figure


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

    Hovering over a cell shows its likeliest tokens, entropy and KL. The width grows with the
    tokens, so that letters stay readable; the page scrolls.
    """
    from plotly.graph_objects import Figure, Scatter
    from plotly.graph_objects import Heatmap as Cells

    tokens, layers = range(len(heatmap.tokens)), range(len(heatmap.layers))
    figure = Figure(
        Cells(
            z=plain_value(heatmap.probability[:, :, 0]),
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
    cells = [(layer, token) for layer in layers for token in tokens]
    figure.add_trace(
        Scatter(
            x=[token for _, token in cells],
            y=[layer for layer, _ in cells],
            text=[escape_markup(shorten(heatmap.top[la][t][0], 7)) for la, t in cells],
            mode="text",
            textfont={
                "size": 11,
                "color": [letter_color(float(heatmap.probability[la, t, 0])) for la, t in cells],
            },
            hoverinfo="skip",
            showlegend=False,
        )
    )
    names = [escape_markup(shorten(token)) for token in heatmap.tokens]
    figure.update_xaxes(
        showgrid=False,
        zeroline=False,
        range=[-0.5, len(heatmap.tokens) - 0.5],
        title_text="input token (␣ is a space)",
        tickvals=list(tokens),
        ticktext=names,
        tickangle=-45,
    )
    numbers = [str(layer) for layer in heatmap.layers]
    figure.update_yaxes(
        title_text="layer",
        tickvals=list(layers),
        ticktext=numbers,
        showgrid=False,
        zeroline=False,
        range=[-0.5, len(heatmap.layers) - 0.5],
    )
    lay_out(figure, CELL_HEIGHT * len(heatmap.layers) + 110)
    figure.update_layout(
        autosize=False,
        width=CELL_WIDTH * len(heatmap.tokens) + 150,
        margin={"l": 50, "r": 10, "t": 10, "b": 90},
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

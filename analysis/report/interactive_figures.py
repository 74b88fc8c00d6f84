"""The pictures of `plots` as interactive plotly figures, for the report."""

import math
from collections.abc import Sequence
from html import escape as escape_html
from typing import TYPE_CHECKING, Any

from ...cache.files.json_files import plain_value
from ..evaluation.heatmap import Heatmap
from ..evaluation.metrics import EvaluationRow
from ..evaluation.result import Evaluation
from .probe_style import (
    KL_FLOOR,
    MEASURES,
    SCALE,
    band_of,
    caption,
    color,
    drawn,
    heatmap_title,
    label,
    marker,
    measure_title,
    needs_log,
    short,
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


def escape(text: str) -> str:
    """`text` for plotly, which reads `&`, `<` and `>` as HTML but shows `&quot;` as it stands."""
    return escape_html(text, quote=False)


def curves(evaluation: Evaluation, measures: Sequence[str]) -> "Figure":
    """One panel per offset, one line per probe; buttons choose where there are more `measures`."""
    from plotly.subplots import make_subplots

    columns = min(2, len(evaluation.offsets))
    lines = math.ceil(len(evaluation.offsets) / columns)
    figure = make_subplots(
        lines,
        columns,
        subplot_titles=[caption(evaluation, offset) for offset in evaluation.offsets],
        horizontal_spacing=0.09,
        vertical_spacing=0.3 / lines,
    )
    drawn: list[str] = []
    for place, offset in enumerate(evaluation.offsets):
        row, column = divmod(place, columns)
        shown = [r for r in evaluation.rows if r.offset == offset]
        log = measures[0] == "kl" and needs_log(shown)
        for measure in measures:
            traces = _traces(evaluation, measure, offset, KL_FLOOR if log else 0.0)
            figure.add_traces(traces, rows=row + 1, cols=column + 1)
            drawn += [measure] * len(traces)
        kind = LOG_AXIS if log else LINEAR_AXIS
        figure.update_yaxes(kind, row=row + 1, col=column + 1)
    figure.update_yaxes(title_text=MEASURES[measures[0]])
    figure.update_xaxes(title_text="layer", dtick=math.ceil(len(evaluation.layers) / 14))
    _lay_out(figure, 340 * lines + 110)
    _name_once(figure, drawn, measures[0])
    if len(measures) > 1:
        figure.update_layout(updatemenus=[_buttons(figure, drawn, measures)])
    return figure


def _lay_out(figure: "Figure", height: int) -> None:
    figure.update_layout(
        height=height,
        template="plotly_white",
        font={"family": FONT, "size": 13},
        margin={"l": 70, "r": 20, "t": 70, "b": 90},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        hoverlabel={"align": "left"},
    )


def _name_once(figure: "Figure", drawn: Sequence[str], first: str) -> None:
    """Show the first measure's traces, and each probe once in the legend for every measure."""
    named: set[tuple[str, str]] = set()
    traces: Any = figure.data
    for trace, measure in zip(traces, drawn, strict=True):
        key = (measure, trace.name)
        trace.visible = measure == first
        trace.showlegend = trace.fill is None and key not in named
        if trace.fill is None:
            named.add(key)


def _buttons(figure: "Figure", drawn: Sequence[str], measures: Sequence[str]) -> dict[str, Any]:
    axes = [name for name in figure.layout.to_plotly_json() if name.startswith("yaxis")]
    choices = [
        {
            "label": measure_title(measure),
            "method": "update",
            "args": [
                {"visible": [other == measure for other in drawn]},
                {f"{axis}.title.text": MEASURES[measure] for axis in axes},
            ],
        }
        for measure in measures
    ]
    place = {"x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "pad": {"b": 26}}
    return {"type": "buttons", "direction": "right", "buttons": choices, **place}


def _traces(evaluation: Evaluation, measure: str, offset: int, floor: float) -> "list[Scatter]":
    traces = []
    for probe in evaluation.probes:
        rows = evaluation.select(probe, offset)
        if rows and rows[0].layer is None:
            traces.append(_level(rows[0], measure, evaluation.layers))
        elif rows:
            traces += _line(rows, measure, floor)
    # Bands below all lines, so that they hide none.
    return sorted(traces, key=lambda trace: trace.fill is None)


def _level(row: EvaluationRow, measure: str, layers: Sequence[int]) -> "Scatter":
    """A dashed line for a probe that reads no layer."""
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
        name=escape(label(row.probe)),
        legendgroup=row.probe,
        hovertext=[_hover(row, measure)] * len(layers),
        hoverinfo="text",
    )


def _line(rows: list[EvaluationRow], measure: str, floor: float) -> "list[Scatter]":
    from plotly.graph_objects import Scatter

    probe = rows[0].probe
    layers = [row.layer or 0 for row in rows]
    common = {"name": escape(label(probe)), "legendgroup": probe}
    line = Scatter(
        x=layers,
        y=plain_value([drawn(row, measure, floor) for row in rows]),
        mode="lines+markers",
        line={"color": color(probe), "dash": stroke(probe)[1], "width": 2},
        marker={"symbol": marker(probe)[1], "size": 7},
        hovertext=[_hover(row, measure) for row in rows],
        hoverinfo="text",
        **common,
    )
    bands = [band for row in rows if (band := band_of(row, measure)) is not None]
    if len(bands) < len(rows):
        return [line]
    low, high = ([max(band[end], floor) for band in bands] for end in (0, 1))
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


def _hover(row: EvaluationRow, measure: str) -> str:
    number = getattr(row, measure)
    if number is None:
        value = f"undefined at {row.n_undefined:,} pairs"
    else:
        value = f"{number:.4g}" + (" nats" if measure == "kl" else "")
    band = band_of(row, measure)
    interval = f"<br>95 % interval {band[0]:.4g} to {band[1]:.4g}" if band else ""
    layer = "any layer" if row.layer is None else f"layer {row.layer}"
    name = f"{escape(label(row.probe))}, {layer}, N = {row.offset}"
    return f"<b>{name}</b><br>{measure_title(measure)} {value}{interval}<br>n = {row.n:,}"


def heatmap_figure(heatmap: Heatmap) -> "Figure":
    """Tokens by layers; hover shows the likeliest tokens, entropy and KL of a cell."""
    from plotly.graph_objects import Figure
    from plotly.graph_objects import Heatmap as Cells

    tokens, layers = range(len(heatmap.tokens)), range(len(heatmap.layers))
    figure = Figure(
        Cells(
            z=plain_value(heatmap.probability[:, :, 0]),
            text=[[escape(short(heatmap.top[la][t][0], 7)) for t in tokens] for la in layers],
            texttemplate="%{text}",
            textfont={"size": 9.5},
            hovertext=[[_cell(heatmap, la, t) for t in tokens] for la in layers],
            hoverinfo="text",
            zmin=0,
            zmax=1,
            colorscale=[list(stop) for stop in SCALE],
            colorbar={"title": {"text": "probability", "side": "right"}, "thickness": 14},
            xgap=1,
            ygap=1,
        )
    )
    names = [escape(short(token)) for token in heatmap.tokens]
    figure.update_xaxes(
        title_text="input token (␣ is a space)",
        tickvals=list(tokens),
        ticktext=names,
        tickangle=-45,
    )
    numbers = [str(layer) for layer in heatmap.layers]
    figure.update_yaxes(title_text="layer", tickvals=list(layers), ticktext=numbers)
    _lay_out(figure, 24 * len(heatmap.layers) + 200)
    figure.update_layout(title={"text": escape(heatmap_title(heatmap)), "font": {"size": 15}})
    return figure


def _cell(heatmap: Heatmap, layer: int, token: int) -> str:
    lines = [
        f"<b>layer {heatmap.layers[layer]}, after {escape(heatmap.tokens[token])}</b>",
        f"model: {escape(heatmap.targets[token])}",
    ]
    likely = zip(heatmap.top[layer][token], heatmap.probability[layer, token], strict=True)
    lines += [f"{number}. {escape(name)}  {p:.3f}" for number, (name, p) in enumerate(likely, 1)]
    lines.append(f"entropy {heatmap.entropy[layer, token]:.3f} nats")
    lines.append(f"KL to the model {heatmap.kl[layer, token]:.3f} nats")
    return "<br>".join(lines)

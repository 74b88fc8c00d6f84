"""Interactive pictures of a causal basis with plotly, for its HTML page (basis_page.py)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...cache.files.json_files import plain_value
from ..report.interactive_figures import LINEAR_AXIS, LOG_AXIS, escape_markup, lay_out
from .span_curves import (
    BASIS_COLORS,
    SpanCurve,
    axis_floor,
    finite_number,
    format_estimate,
    format_number,
    span_curves,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Bar, Figure, Scatter

HEIGHT = 430
"""Height of a figure in pixels."""


def layer_figure(row: Mapping[str, Any], influence: Mapping[str, Any] | None = None) -> "Figure":
    """Spectrum and influences of one layer, side by side (a plotly figure).

    Left: held-out KL of ablating the first k directions, by k, with 95 % intervals as bands. Right:
    influence of each direction, in the lens and, with `influence`, in the model.
    """
    from plotly.subplots import make_subplots

    curves = span_curves(row, influence)
    floor = axis_floor(curves)
    lens_n, model_n = row["n_test"], (influence or {}).get("n")
    of_spans = f"n = {lens_n:,}" if influence is None else f"lens n = {lens_n:,}"
    of_directions = of_spans
    if influence is not None and model_n:
        of_spans, of_directions = f"{of_spans}, model n = {model_n:,}", f"n = {model_n:,}"
    figure = make_subplots(
        1,
        2,
        subplot_titles=[
            f"first k directions ablated, {of_spans}",
            f"one direction ablated, {of_directions}",
        ],
        column_widths=[0.55, 0.45],
        horizontal_spacing=0.1,
    )
    # Bands come first, below all lines, so that no line is hidden.
    bands = [_band_trace(curve, floor) for curve in curves if curve.has_intervals]
    figure.add_traces([*bands, *(_line_trace(curve, floor) for curve in curves)], rows=1, cols=1)
    figure.add_traces(_influence_bars(row, influence), rows=1, cols=2)

    ks = sorted({k for curve in curves for k in curve.ks})
    figure.update_xaxes(
        type="log", tickvals=ks, ticktext=[str(k) for k in ks], title_text="k", row=1, col=1
    )
    figure.update_yaxes(LOG_AXIS if floor else LINEAR_AXIS, title_text="KL, nats", row=1, col=1)
    figure.update_xaxes(title_text="direction", dtick=-(-row["k"] // 16), row=1, col=2)
    figure.update_yaxes(title_text="influence (KL, nats)", rangemode="tozero", row=1, col=2)
    lay_out(figure, HEIGHT)
    figure.update_layout(barmode="group")
    return figure


def _line_trace(curve: SpanCurve, floor: float) -> "Scatter":
    """The line of a curve: solid in the lens, dashed in the model."""
    from plotly.graph_objects import Scatter

    hover = [
        f"<b>{escape_markup(curve.label)}, k = {k}</b><br>KL "
        f"{format_estimate(estimate['kl'], estimate['low'], estimate['high'])} nats"
        for k, estimate in curve.estimates.items()
    ]
    return Scatter(
        x=curve.ks,
        y=plain_value(curve.values("kl", floor)),
        mode="lines+markers",
        line={"color": curve.color, "dash": "dash" if curve.in_model else "solid", "width": 2},
        marker={
            "symbol": curve.marker[1] + ("-open" if curve.in_model else ""),
            "size": 7,
        },
        name=escape_markup(curve.label),
        legendgroup=escape_markup(curve.label),
        hovertext=hover,
        hoverinfo="text",
    )


def _band_trace(curve: SpanCurve, floor: float) -> "Scatter":
    """The band of a curve's intervals."""
    from plotly.graph_objects import Scatter

    low, high = curve.values("low", floor), curve.values("high", floor)
    return Scatter(
        x=curve.ks + curve.ks[::-1],
        y=high + low[::-1],
        fill="toself",
        fillcolor=curve.color,
        opacity=0.1 if curve.in_model else 0.2,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        name=escape_markup(curve.label),
        legendgroup=escape_markup(curve.label),
        showlegend=False,
    )


def _influence_bars(row: Mapping[str, Any], influence: Mapping[str, Any] | None) -> "list[Bar]":
    """Bars of each direction's influence in the lens and, at the same positions, in the model."""
    from plotly.graph_objects import Bar

    series = {"lens": row["influences"]}
    if influence is not None:
        series = {"lens": influence["lens_influences"], "model": influence["model_influences"]}
    color = BASIS_COLORS["causal"]
    style_of = {
        "lens": {"color": color},
        "model": {
            "color": "#ffffff",
            "line": {"color": color, "width": 1.2},
            "pattern": {"shape": "/", "fgcolor": color},
        },
    }
    return [
        Bar(
            x=list(range(row["k"])),
            y=[finite_number(value) for value in values],
            marker=style_of[name],
            name=f"one direction, {name}",
            hovertext=[
                f"<b>direction {number}, {name}</b><br>influence {format_number(value)} nats"
                for number, value in enumerate(values)
            ],
            hoverinfo="text",
        )
        for name, values in series.items()
    ]

"""Interactive figures of studies with plotly, for pages."""

from typing import TYPE_CHECKING, Any

from ...report.interactive_figures import escape_markup, lay_out
from .study_colors import (
    DIVERGING,
    SEQUENTIAL,
    is_dark,
    series_colors,
    series_labels,
    short_text,
    value_range,
)
from .study_figures import HeatPanel, Panel, Series, StudyFigure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PANEL_HEIGHT = 300
"""Pixels of a panel of series."""
CELL_WIDTH, CELL_HEIGHT, SMALL_CELL = 62, 26, 14
"""Pixels of a cell with text, and of one without."""
DASHES = {"solid": "solid", "dash": "dash", "dot": "dot"}


def draw_interactive(figure: StudyFigure) -> "Figure":
    """All panels of `figure` in one figure of plotly, in rows, with one legend."""
    from plotly.graph_objects import Layout
    from plotly.subplots import make_subplots

    columns = max(len(row) for row in figure.rows)
    panels = [[*row, *[None] * (columns - len(row))] for row in figure.rows]
    heights = [max(_height(panel) for panel in row) for row in figure.rows]
    drawn = make_subplots(
        rows=len(panels),
        cols=columns,
        row_heights=[height / sum(heights) for height in heights],
        subplot_titles=[escape_markup(p.title) if p else "" for row in panels for p in row],
        horizontal_spacing=0.08 if columns > 1 else 0.02,
        vertical_spacing=min(0.3, 90 / (sum(heights) + 1)) if len(panels) > 1 else 0.1,
        figure=None,
    )
    shown: set[str] = set()
    for number, row in enumerate(panels, 1):
        for column, panel in enumerate(row, 1):
            if panel is not None:
                place: dict[str, Any] = {"row": number, "col": column}
                draw_panel(drawn, panel, place, series_colors(series_labels(figure)), shown)
    lay_out(drawn, sum(heights) + 70 * len(heights) + 40)
    layout: Any = Layout(margin={"l": 62, "r": 20, "t": 40, "b": 60})
    drawn.update_layout(layout)
    return drawn


def draw_single_panel(figure: StudyFigure, panel: Panel | HeatPanel) -> "Figure":
    """One panel of `figure` without a title or legend; pages lay panels out by themselves."""
    from plotly.graph_objects import Figure

    drawn = Figure()
    draw_panel(drawn, panel, {}, series_colors(series_labels(figure)), set())
    lay_out(drawn, _height(panel))
    drawn.update_layout(showlegend=False, margin={"l": 62, "r": 8, "t": 12, "b": 46})
    if isinstance(panel, HeatPanel):
        drawn.update_layout(margin={"l": 90, "r": 90, "t": 12, "b": 80}, plot_bgcolor="#ffffff")
        if panel.texts:
            width = max(640, CELL_WIDTH * len(panel.x_names) + 190)
            drawn.update_layout(autosize=False, width=width)
    return drawn


def _height(panel: "Panel | HeatPanel | None") -> int:
    """Height of a panel in pixels."""
    if not isinstance(panel, HeatPanel):
        return PANEL_HEIGHT
    cell = CELL_HEIGHT if panel.texts else SMALL_CELL
    return min(2400, max(240, cell * len(panel.y_names) + 130))


def draw_panel(
    drawn: "Figure",
    panel: Panel | HeatPanel,
    place: dict[str, Any],
    styles: dict[str, Any],
    shown: set[str],
) -> None:
    """Add a panel at `place` (row and col of a grid, or nothing); `shown` are labels of legends."""
    if isinstance(panel, HeatPanel):
        _add_heat(drawn, panel, place)
    else:
        for one in panel.series:
            for trace in _series_traces(one, styles[one.label], one.label not in shown):
                drawn.add_trace(trace, **place)
            shown.add(one.label)
        if panel.reference is not None:
            options: Any = {
                "y": panel.reference,
                "line": {"color": "#888888", "width": 1, "dash": "dot"},
                "annotation_text": escape_markup(panel.reference_label),
                **place,
            }
            drawn.add_hline(**options)
        positive = any(v is not None and v > 0 for one in panel.series for v in one.y)
        axis: dict[str, Any] = {"type": "log"} if panel.log_y and positive else {}
        if panel.y_range != (None, None) and not axis:
            axis["range"] = list(panel.y_range)
        drawn.update_yaxes(axis, **place)
    drawn.update_xaxes({"title_text": escape_markup(panel.x_label)}, **place)
    drawn.update_yaxes({"title_text": escape_markup(panel.y_label)}, **place)


def _series_traces(one: Series, style: tuple[str, tuple[str, str]], first: bool) -> list[Any]:
    """Traces of one series: its interval below it."""
    from plotly.graph_objects import Bar, Scatter

    color, (_, marker) = style
    names = [escape_markup(name) for name in one.names] if one.names is not None else None
    shared: dict[str, Any] = {
        "x": list(one.x),
        "y": list(one.y),
        "name": escape_markup(one.label),
        "legendgroup": one.label,
        "showlegend": first,
        "text": names,
        "textposition": "none" if one.kind == "bars" else None,
        "hovertemplate": "%{text}<br>" * (names is not None)
        + "%{fullData.name}<br>%{x}: %{y:.4g}<extra></extra>",
    }
    has_ends = one.low is not None and one.high is not None
    if one.kind == "bars":
        if has_ends:
            shared["error_y"] = {
                "type": "data",
                "symmetric": False,
                "array": _distances(one.y, one.high),
                "arrayminus": _distances(one.y, one.low),
            }
        return [Bar(marker={"color": color}, **shared)]
    mode = "markers" if one.kind == "points" else "lines+markers"
    line = {"color": color, "dash": DASHES[one.dash], "width": 2}
    marker_style = {"color": color, "symbol": marker, "size": 6}
    trace = Scatter(mode=mode, line=line, marker=marker_style, connectgaps=False, **shared)
    if not has_ends:
        return [trace]
    known = [
        (x, low, high)
        for x, low, high in zip(one.x, one.low or (), one.high or (), strict=True)
        if low is not None and high is not None
    ]
    band = Scatter(
        x=[x for x, _, _ in known] + [x for x, _, _ in reversed(known)],
        y=[high for _, _, high in known] + [low for _, low, _ in reversed(known)],
        fill="toself",
        fillcolor=color,
        opacity=0.15,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        legendgroup=one.label,
        showlegend=False,
    )
    return [band, trace]


def _distances(values: Any, ends: Any) -> list[float | None]:
    """Distances of `values` from the ends of their intervals."""
    return [
        None if value is None or end is None else abs(end - value)
        for value, end in zip(values, ends, strict=True)
    ]


def _add_heat(drawn: "Figure", panel: HeatPanel, place: dict[str, Any]) -> None:
    """Add the cells of a heatmap, by number: names may come twice."""
    from plotly.graph_objects import Heatmap

    low, high = value_range(panel)
    hovers = panel.hovers or panel.texts
    trace = Heatmap(
        z=[list(row) for row in panel.values],
        zmin=low,
        zmax=high,
        colorscale=DIVERGING[1] if panel.diverging else SEQUENTIAL[1],
        colorbar={"title": {"text": escape_markup(panel.color_label), "side": "right"}},
        text=[[escape_markup(text).replace("\n", "<br>") for text in row] for row in hovers]
        if hovers
        else None,
        hovertemplate=("%{text}<br>" if hovers else "") + "%{z:.4g}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    drawn.add_trace(trace, **place)
    for y, row in enumerate(panel.texts or ()):
        for x, text in enumerate(row):
            value = panel.values[y][x]
            share = 0.5 if value is None else (value - low) / (high - low)
            color = "#ffffff" if is_dark(share, panel.diverging) else "#000000"
            letters: Any = {
                "x": x,
                "y": y,
                "text": escape_markup(short_text(text)),
                "showarrow": False,
                "font": {"size": 11, "color": color},
                **place,
            }
            drawn.add_annotation(**letters)
    for update, names in ((drawn.update_xaxes, panel.x_names), (drawn.update_yaxes, panel.y_names)):
        step = -(-len(names) // 60) or 1
        update(
            {
                "tickvals": list(range(0, len(names), step)),
                "ticktext": [escape_markup(name) for name in names][::step],
                "showgrid": False,
            },
            **place,
        )

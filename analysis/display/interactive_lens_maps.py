"""Interactive pictures of `LensMaps` with plotly, and a page of them; lens_map_figures.py is alike.

The cell under the mouse shows the likeliest tokens with their probabilities, and all measures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.files.json_files import make_folder, plain_value, write_atomically
from ..report.html_page import panel_html
from ..report.interactive_figures import CELL_WIDTH, escape_markup, lay_out
from ..report.page_frame import fill_page
from ..report.probe_style import label, shorten
from .lens_map_cells import (
    LETTERS,
    CellColors,
    bar_title,
    cell_colors,
    cell_lines,
    is_outlined,
    lens_label,
    map_title,
    outline_color,
)
from .lens_maps import LensMap, LensMaps

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Heatmap, Scatter

CELL_HEIGHT, TALL_CELL_HEIGHT = 26, 36
"""Height of a cell of one line and of two lines, pixels."""
ABOVE, BELOW, TITLE = 92, 92, 34
"""Room for the model's tokens above a map, the input tokens below it, and its title, pixels."""
LEFT, RIGHT = 56, 130
"""Room for the layers and for the colour bar, pixels."""
LEAST_WIDTH = 640
"""Least width of a figure, pixels: titles are long."""
PAGE_NOTE = (
    "A cell is what the lens says at this layer after this input token. Outlined cells have the "
    "same likeliest token as the last layer; of a difference, those where the lenses disagree. "
    "Hover over a cell for the likeliest tokens, their probabilities, entropy, KL and rank."
)


@dataclass(frozen=True)
class MapPlace:
    """Where a map is drawn in a figure of several."""

    number: int
    """0 for the map on top."""
    bottom: int
    """Pixels from the lower edge of the plotting area to the cells."""
    height: int
    """Height of the cells, pixels."""

    @property
    def axes(self) -> dict[str, str]:
        """Axes of input tokens, the model's tokens and layers, by the names that traces use."""
        first = 2 * self.number + 1
        return {
            "tokens": f"x{first if first > 1 else ''}",
            "targets": f"x{first + 1}",
            "layers": f"y{self.number + 1 if self.number else ''}",
        }


def interactive_figure(maps: LensMaps, *, titles: bool = True) -> "Figure":
    """A panel per map, one above the other (a plotly figure), with `titles` or without."""
    from plotly.graph_objects import Figure

    # Places, from the top down; a figure without titles has no room for them.
    title = TITLE if titles else 0
    heights = [
        len(entry.layers) * (TALL_CELL_HEIGHT if entry.is_difference else CELL_HEIGHT)
        for entry in maps
    ]
    blocks = [height + ABOVE + BELOW + title for height in heights]
    total = sum(blocks)
    places = [
        MapPlace(number, total - sum(blocks[: number + 1]) + BELOW, height)
        for number, height in enumerate(heights)
    ]
    figure = Figure()
    for entry, place in zip(maps, places, strict=True):
        colors = cell_colors(entry.values[maps.measure], maps.measure, entry.is_difference)
        figure.add_trace(_cells_trace(entry, maps, colors, place, total))
        figure.add_trace(_letters_trace(entry, maps, colors, place))
        figure.add_traces(_outline_traces(entry, maps, colors, place))
        _add_axes(figure, entry, place, total)
        if titles:
            figure.add_annotation(
                text=f"<b>{escape_markup(map_title(entry, maps))}</b>",
                x=0,
                y=(place.bottom + place.height + ABOVE) / total,
                xref="paper",
                yref="paper",
                xanchor="left",
                yanchor="bottom",
                align="left",
                showarrow=False,
            )
    lay_out(figure, total)
    tokens = max(len(entry.tokens) for entry in maps)
    figure.update_layout(
        autosize=False,
        width=max(LEAST_WIDTH, CELL_WIDTH * tokens + LEFT + RIGHT),
        margin={"l": LEFT, "r": RIGHT, "t": 0, "b": 0},
        # Cells without a value are white, and their letters black, on a dark page too.
        plot_bgcolor="#ffffff",
        showlegend=False,
    )
    return figure


def _cells_trace(
    entry: LensMap, maps: LensMaps, colors: CellColors, place: MapPlace, total: int
) -> "Heatmap":
    """The coloured cells with their hover texts, and the colour bar."""
    from plotly.graph_objects import Heatmap

    values, low, high = entry.values[maps.measure], colors.low, colors.high
    ticks: dict[str, Any] = {}
    if colors.is_log:
        values, low, high = np.log10(values), math.log10(low), math.log10(high)
        powers = list(range(math.ceil(low), math.floor(high) + 1))
        ticks = {"tickvals": powers, "ticktext": [f"{10**power:,}" for power in powers]}
    rows, columns = range(len(entry.layers)), range(len(entry.tokens))
    return Heatmap(
        z=plain_value(values),
        zmin=low,
        zmax=high,
        colorscale=[list(stop) for stop in colors.scale],
        hovertext=[[_hover_text(entry, maps, row, column) for column in columns] for row in rows],
        hoverinfo="text",
        xgap=1,
        ygap=1,
        xaxis=place.axes["tokens"],
        yaxis=place.axes["layers"],
        colorbar={
            "title": {
                "text": escape_markup(bar_title(entry, maps)),
                "side": "right",
                "font": {"size": 12},
            },
            "thickness": 14,
            "lenmode": "pixels",
            "len": max(place.height, 150),
            "y": (place.bottom + place.height / 2) / total,
            "yanchor": "middle",
            **ticks,
        },
    )


def _letters_trace(
    entry: LensMap, maps: LensMaps, colors: CellColors, place: MapPlace
) -> "Scatter":
    """The texts of the cells; the axis of the model's tokens stands above them."""
    from plotly.graph_objects import Scatter

    values = entry.values[maps.measure]
    cells = list(np.ndindex(values.shape))
    return Scatter(
        x=[column for _, column in cells],
        y=[row for row, _ in cells],
        text=["<br>".join(map(escape_markup, cell_lines(entry, maps, *cell))) for cell in cells],
        mode="text",
        textfont={"size": 11, "color": [colors.letters_on(float(values[cell])) for cell in cells]},
        hoverinfo="skip",
        xaxis=place.axes["targets"],
        yaxis=place.axes["layers"],
    )


def _outline_traces(
    entry: LensMap, maps: LensMaps, colors: CellColors, place: MapPlace
) -> "list[Scatter]":
    """Outlines of cells, a line with gaps for each colour."""
    from plotly.graph_objects import Scatter

    corners: dict[str, tuple[list[float | None], list[float | None]]] = {}
    for (row, column), value in np.ndenumerate(entry.values[maps.measure]):
        if is_outlined(entry, row, column):
            x, y = corners.setdefault(outline_color(entry, colors, float(value)), ([], []))
            x += [*(column + side for side in (-0.46, 0.46, 0.46, -0.46, -0.46)), None]
            y += [*(row + side for side in (-0.44, -0.44, 0.44, 0.44, -0.44)), None]
    return [
        Scatter(
            x=x,
            y=y,
            mode="lines",
            line={"color": _fixed_color(color), "width": 1.6},
            hoverinfo="skip",
            xaxis=place.axes["tokens"],
            yaxis=place.axes["layers"],
        )
        for color, (x, y) in corners.items()
    ]


def _fixed_color(color: str) -> str:
    """`#rrggbb` in the form that a page leaves alone in the dark, where cells stay light."""
    return f"rgb({', '.join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5))})"


def _add_axes(figure: "Figure", entry: LensMap, place: MapPlace, total: int) -> None:
    """Input tokens below, the model's tokens above, layers at the left."""
    axes = place.axes
    columns, rows = list(range(len(entry.tokens))), list(range(len(entry.layers)))
    common: dict[str, Any] = {"showgrid": False, "zeroline": False}
    tokens: dict[str, Any] = {
        **common,
        "range": [-0.5, len(columns) - 0.5],
        "tickvals": columns,
        "tickangle": -45,
        "anchor": axes["layers"],
    }
    figure.update_layout(
        {
            _layout_name(axes["tokens"]): {
                **tokens,
                "ticktext": _tick_texts(entry.tokens),
                "title": {"text": "input token (␣ is a space)"},
            },
            _layout_name(axes["targets"]): {
                **tokens,
                "ticktext": _tick_texts(entry.targets),
                "title": {"text": "the model's own token (last layer)"},
                "side": "top",
                "overlaying": axes["tokens"],
                "matches": axes["tokens"],
            },
            _layout_name(axes["layers"]): {
                **common,
                "range": [-0.5, len(rows) - 0.5],
                "tickvals": rows,
                "ticktext": [str(layer) for layer in entry.layers],
                "title": {"text": "layer"},
                "domain": [place.bottom / total, (place.bottom + place.height) / total],
                "anchor": axes["tokens"],
            },
        }
    )


def _layout_name(axis: str) -> str:
    """Name of an axis in the layout: `xaxis2` of `x2`."""
    return f"{axis[0]}axis{axis[1:]}"


def _tick_texts(tokens: Sequence[str]) -> list[str]:
    return [escape_markup(shorten(token, LETTERS)) for token in tokens]


def _hover_text(entry: LensMap, maps: LensMaps, row: int, column: int) -> str:
    """Texts of a cell: layer and token, the model's token, the likeliest tokens, all measures."""
    lines = [
        f"<b>layer {entry.layers[row]}, after {escape_markup(entry.tokens[column])}</b>",
        f"model (last layer): {escape_markup(entry.targets[column])}",
    ]
    tops, shares = entry.top[row][column], entry.top_probability[row, column]
    heads = entry.lens.split(" - ") if entry.is_difference else []
    names = [label(head) for head in heads] if len(heads) == 2 else ["first lens", "second lens"]
    for number, (top, share) in enumerate(zip(tops, shares, strict=True)):
        head = f"{names[number]}:" if entry.is_difference else f"{number + 1}."
        lines.append(f"{escape_markup(head)} {escape_markup(top)}  {_measure(share, '.3f')}")
    if entry.is_difference:
        lines.append("the lenses " + ("agree" if entry.agrees[row, column] else "disagree"))
    else:
        agrees = "agrees" if entry.agrees[row, column] else "does not agree"
        lines.append(f"{agrees} with the last layer")
    values = {name: float(numbers[row, column]) for name, numbers in entry.values.items()}
    of_rank = "the model's token" if maps.tracked is None else escape_markup(maps.tracked)
    of_probability = "the likeliest token" if maps.tracked is None else of_rank
    sign, rank = ("+", "+,.0f") if entry.is_difference else ("", ",.0f")
    before = "difference of " if entry.is_difference else ""
    lines += [
        f"{before}probability of {of_probability} {_measure(values['probability'], f'{sign}.3f')}",
        f"{before}rank of {of_rank} {_measure(values['rank'], rank)}",
        f"{before}entropy {_measure(values['entropy'], f'{sign}.3f')} nats",
        f"{before}KL to the model {_measure(values['kl'], f'{sign}.3f')} nats",
    ]
    return "<br>".join(lines)


def _measure(value: float, form: str) -> str:
    """A number as text; `undefined` where logits are no distribution."""
    return format(float(value), form) if math.isfinite(value) else "undefined"


def write_lens_maps_page(maps: LensMaps, path: str | Path, title: str | None = None) -> Path:
    """See `LensMaps.to_html`."""
    from plotly.offline import get_plotlyjs

    lenses = ", ".join(dict.fromkeys(lens_label(entry) for entry in maps))
    title = title or f"What {lenses} reads, layer by layer"
    # A panel per map, each with a scroll bar of its own; captions wrap, titles in figures do not.
    panels = [
        panel_html(
            interactive_figure(replace(maps, maps=(entry,)), titles=False),
            f"map-{number}",
            map_title(entry, maps),
            wide=True,
        )
        for number, entry in enumerate(maps)
    ]
    passage = "".join(max((entry.tokens for entry in maps), key=len)).replace("␣", " ")
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(maps.passage)}: <q>{escape(passage)}</q></p>",
        f"<p>{PAGE_NOTE}</p>",
        *panels,
    ]
    path = Path(path)
    make_folder(path.parent)
    write_atomically(path, fill_page(title, "\n".join(body), get_plotlyjs()).encode())
    return path

"""Pictures of an evaluation with matplotlib: curves by layer, lens heatmaps."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from .evaluate import Evaluation
from .heatmap import Heatmap
from .metrics import KS, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "logit": "logit lens",
    "ridge": "ridge lens",
    "lens": "tuned lens",
    "future": "future lens",
    "vocab": "vocabulary probe",
    "bigram": "bigram",
    "chain": "bigram chain",
    "lagged": "lagged bigram",
    "marginal": "marginalised bigram",
    "trigram": "trigram",
    "unigram": "unigram",
    "shuffled": "shuffled states",
    "permuted": "permuted labels",
    "next-token": "with the next token",
}
# Okabe and Ito (2008): told apart with every common colour blindness.
COLORS = {
    "logit": "#D55E00",
    "ridge": "#0072B2",
    "lens": "#009E73",
    "future": "#CC79A7",
    "vocab": "#E69F00",
    "bigram": "#555555",
    "chain": "#B5A36A",
    "lagged": "#8C6D31",
    "marginal": "#8856A7",
    "trigram": "#000000",
    "unigram": "#999999",
}
OTHER_COLOR = "#56B4E9"
MARKERS = {
    "logit": ("o", "circle"),
    "ridge": ("s", "square"),
    "lens": ("^", "triangle-up"),
    "future": ("D", "diamond"),
    "vocab": ("v", "triangle-down"),
}
"""Markers of kinds of probes, for matplotlib and plotly."""
STROKES = {"shuffled": (":", "dot"), "permuted": ("-.", "dashdot"), "next-token": ("--", "dash")}
"""Strokes of controls, for matplotlib and plotly."""
MORE_STROKES = (
    ((0, (8, 2)), "longdash"),
    ((0, (8, 2, 1, 2)), "longdashdot"),
    ((0, (4, 1)), "8px,2px"),
)
"""Strokes of the second probe of a kind and further ones, for matplotlib and plotly."""
MORE_MARKERS = (("X", "x"), ("P", "cross"), ("*", "star"), ("p", "pentagon"), ("h", "hexagon"))
"""Markers of the second probe of a kind and further ones, for matplotlib and plotly."""
MEASURES = {
    "kl": "KL(model ‖ probe), nats",
    **{f"precision_at_{k}": f"precision@{k} (share of positions)" for k in KS},
}
"""Measures that are drawn by layer, with the name of their axis."""
LEGEND_COLUMNS = 5
"""Names side by side under a figure."""
KL_FLOOR = 1e-3
"""Smaller KL, in nats, is drawn at this value on a logarithmic axis."""
SCALE = ((0.0, "#ffffff"), (0.35, "#c6e5f5"), (0.7, "#4aa3d0"), (1.0, "#08457e"))
"""Colour of a cell by probability; lightness falls evenly, so that it also prints grey."""
CELL_LETTERS = 8
"""Letters of a token shown in a cell."""


def label(probe: str) -> str:
    """`ridge 2` is drawn as `ridge lens 2`, `ridge/shuffled` as `ridge lens, shuffled states`."""
    kind, _, number = probe.partition(" ")
    names = ", ".join(LABELS.get(part, part) for part in kind.split("/"))
    return f"{names} {number}".strip()


def color(probe: str) -> str:
    """The fixed colour of a kind of probe."""
    return COLORS.get(base(probe), OTHER_COLOR)


def base(probe: str) -> str:
    """The kind of probe, without its number and its control."""
    return probe.partition(" ")[0].partition("/")[0]


def stroke(probe: str, first: Any = ("-", "solid")) -> tuple[Any, str]:
    """The line of a probe for matplotlib and plotly: broken for a control.

    `first` is that of the first probe of a kind; `ridge 2` and `ridge 3` have others.
    """
    control = probe.partition(" ")[0].partition("/")[2]
    more = MORE_STROKES[(series(probe) - 2) % len(MORE_STROKES)] if series(probe) > 1 else first
    return STROKES.get(control, more)


def marker(probe: str) -> tuple[str, str]:
    """The marker of a probe for matplotlib and plotly; that of `ridge 2` is not that of `ridge`."""
    if (number := series(probe)) > 1:
        return MORE_MARKERS[(number - 2) % len(MORE_MARKERS)]
    return MARKERS.get(base(probe), ("P", "cross"))


def series(probe: str) -> int:
    """Number of a probe among those of its kind: 2 for `ridge 2`, 1 for `ridge`."""
    number = probe.partition(" ")[2]
    return int(number) if number.isdecimal() else 1


def short_name(model: str) -> str:
    """A model's name for a title: the folder of a path, a hub id as it is."""
    return PurePath(model).name if PurePath(model).is_absolute() else model


def caption(evaluation: Evaluation, offset: int) -> str:
    """`N = 1 (two tokens ahead), n = 4000` for the title of a panel."""
    n = max((row.n for row in evaluation.rows if row.offset == offset), default=0)
    return f"N = {offset} ({ahead(offset)}), n = {n:,}"


def ahead(offset: int) -> str:
    return "next token" if offset == 0 else f"{offset + 1} tokens ahead"


def short(token: str, letters: int = CELL_LETTERS) -> str:
    return token if len(token) <= letters else token[: letters - 1] + "…"


def needs_log(rows: Sequence[Row]) -> bool:
    """True if the KL of `rows` spans more than 1.5 decades above the floor."""
    values = [max(row.kl, KL_FLOOR) for row in rows if row.kl is not None and row.kl < math.inf]
    return bool(values) and max(values) / min(values) > 10**1.5


def drawn(row: Row, measure: str, floor: float = 0.0) -> float:
    """Value of a measure in a picture; NaN, which leaves a gap, if undefined or infinite."""
    value: float | None = getattr(row, measure)
    return math.nan if value is None or not math.isfinite(value) else max(value, floor)


def band_of(row: Row, measure: str) -> tuple[float, float] | None:
    """The 95 % interval of a measure, where it has one."""
    low, high = getattr(row, f"{measure}_low", None), getattr(row, f"{measure}_high", None)
    return None if low is None or high is None else (low, high)


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


def measure_title(measure: str) -> str:
    return "KL to the model" if measure == "kl" else measure.replace("_at_", "@")


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


def _line(axes: "Axes", rows: list[Row], measure: str, floor: float) -> None:
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


def heatmap_title(heatmap: Heatmap) -> str:
    what = f"{label(heatmap.probe)}, likeliest token at N = {heatmap.offset}"
    where = f"sequence {heatmap.sequence} of the {heatmap.split} split"
    return f"{what} ({ahead(heatmap.offset)}); {where}, n = {len(heatmap.tokens)} tokens"


def printable(text: str) -> str:
    """`text` with a box for every letter that matplotlib's own font cannot draw."""
    known = _letters()
    return "".join(letter if ord(letter) in known else "▯" for letter in text)


@cache
def _letters() -> frozenset[int]:
    """Code points of matplotlib's default font."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())

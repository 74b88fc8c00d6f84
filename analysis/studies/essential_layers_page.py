"""The study of essential layers as a picture and as a page that reads from top to bottom."""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.format.manifest import SHORT_ID
from ..report.page_frame import PAGE, STYLE
from .essential_layers import CurveRow, DepthRow, EssentialLayers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, which colour-blind readers tell apart."""
QUESTION = (
    "How many layers lie between the first one at which the model's answer is on top, and the one "
    "from which it stays there? And does that gap depend on where the answer's document stands?"
)
METHOD = (
    "For every answer, the head or a lens reads the residual stream of each layer at the position "
    "that predicts the answer's first token. The first-correct layer F is the lowest with the "
    "answer on top, the final layer S the lowest from which it stays on top, and the gap is S - F; "
    "only answers that the model gets right have an S. Intervals resample {units}s (95 %, "
    "bootstrap)."
)
NOT_SAID = (
    "What it does not say: a lens that reads the answer at a layer does not prove that the model "
    "uses it there, and accuracy of the first token is not that of the whole answer."
)


def draw_essential_layers(result: EssentialLayers, subset: str = "final") -> "Figure":
    """Gap, F and S over the answer's position, and where F and S lie; a row for each lens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lenses = list(dict.fromkeys(row.lens for row in result.rows))
    figure = Figure(figsize=(12.6, 3.3 * len(lenses)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(lenses), 4, squeeze=False)
    for line, lens in zip(axes, lenses, strict=True):
        rows = [row for row in result.rows if row.lens == lens and row.subset == subset]
        numbers = sorted({row.documents for row in rows})
        for number, color in zip(numbers, _colors(len(numbers)), strict=True):
            of_number = [row for row in rows if row.documents == number]
            label = f"K = {number:g}"
            _draw_means(line[0], of_number, "gap", label, color)
            _draw_means(line[1], of_number, "first", label, color)
            _draw_means(line[1], of_number, "final", None, color, dashed=True)
        _draw_histogram(line[2], result, lens)
        _draw_accuracy(line[3], result, lens, numbers)
        line[0].set_ylabel(f"{lens}\nlayers")
        line[0].set_title("gap S - F")
        line[1].set_title("F (solid) and S (dashed)")
        line[1].set_ylim(0.5, result.n_blocks + 0.5)
        line[2].set_title("share of answers with F, S at a layer")
        line[3].set_title("answer on top, by layer")
        for panel in line[:2]:
            panel.set_xlabel("position of the answer's document")
        for panel in line[2:]:
            panel.set_xlabel("layer")
            panel.set_ylabel("share")
        line[3].legend(fontsize=8, frameon=False)
        bottom, top = line[0].get_ylim()
        line[0].set_ylim(min(bottom, -0.05), max(top, 1.0))
    return figure


def _colors(count: int) -> list[str]:
    return [COLORS[number % len(COLORS)] for number in range(count)]


def _draw_means(
    panel: Any,
    rows: Sequence[DepthRow],
    name: str,
    label: str | None,
    color: str,
    dashed: bool = False,
) -> None:
    """Means over the position, with their intervals."""
    known = [row for row in rows if getattr(row, name) is not None]
    x = [row.gold for row in known]
    y = [getattr(row, name) for row in known]
    panel.plot(x, y, "--" if dashed else "-", marker="o", ms=4, color=color, label=label)
    bands = [(row.gold, *getattr(row, f"{name}_interval")) for row in known]
    bands = [band for band in bands if band[1] is not None]
    if bands:
        gold, low, high = np.array(bands, np.float64).T
        panel.fill_between(gold, low, high, color=color, alpha=0.15, lw=0)


def _draw_histogram(panel: Any, result: EssentialLayers, lens: str) -> None:
    """Shares of F and S by layer, over all answers."""
    rows = [row for row in result.layers if row.lens == lens]
    layers = sorted({row.layer for row in rows})
    for shift, name, label in ((-0.2, "first_share", "F"), (0.2, "final_share", "S")):
        shares = []
        for layer in layers:
            of_layer = [row for row in rows if row.layer == layer]
            total = sum(row.n for row in of_layer)
            shares.append(sum(getattr(row, name) * row.n for row in of_layer) / total)
        panel.bar(np.array(layers) + shift, shares, 0.4, label=label)
    panel.legend(fontsize=8, frameon=False)


def _draw_accuracy(
    panel: Any, result: EssentialLayers, lens: str, numbers: Sequence[float]
) -> None:
    """Accuracy by layer for each number of documents, all positions together."""
    for number, color in zip(numbers, _colors(len(numbers)), strict=True):
        rows = [row for row in result.layers if row.lens == lens and row.documents == number]
        layers = sorted({row.layer for row in rows})
        count = sum(row.n for row in rows if row.layer == layers[-1])
        label = f"K = {number:g}, n = {count:,}"
        shares = [
            sum(row.accuracy * row.n for row in rows if row.layer == layer)
            / sum(row.n for row in rows if row.layer == layer)
            for layer in layers
        ]
        panel.plot(layers, shares, "-o", ms=4, color=color, label=label)
    panel.set_ylim(-0.03, 1.03)


def describe_curve(curve: CurveRow) -> str:
    """A sentence on the quadratic term of one lens, subset and K."""
    where = f"{curve.lens}, K = {curve.documents:g}, {curve.subset} ({curve.n} answers)"
    if curve.quadratic is None:
        return f"{where}: the gap does not vary enough over positions for a curve."
    low, high = curve.interval
    if low is None or high is None:
        return f"{where}: quadratic term {curve.quadratic:.2f}, without an interval."
    if low == high == 0:
        within = "of every question, " if curve.paired else ""
        return f"{where}: {within}the gap is the same at every position."
    shape = "no clear curve" if low <= 0 <= high else "an inverted U" if high < 0 else "a U"
    return f"{where}: quadratic term {curve.quadratic:.2f} [{low:.2f}, {high:.2f}], {shape}."


def write_essential_layers_page(
    result: EssentialLayers, path: Path, command: str | None = None
) -> Path:
    """Write the page to `path`: question, method, picture, what it says, and the table."""
    picture = BytesIO()
    draw_essential_layers(result).savefig(picture, format="png", dpi=130)
    image = base64.b64encode(picture.getvalue()).decode()
    model, cache = escape(result.model_name), result.cache_id[:SHORT_ID]
    says = "".join(f"<li>{escape(describe_curve(curve))}</li>" for curve in result.curves)
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    ran = f"<p>Made by <code>{escape(command)}</code></p>" if command else ""
    body = f"""
<h1>Essential layers of {model}</h1>
<p>Cache <code>{cache}</code>, {escape(result.data_name)}, split {escape(result.split)};
{result.n_units:,} {result.units}s.</p>
<h2>Question</h2><p>{QUESTION}</p>
<h2>Method</h2><p>{METHOD.format(units=result.units)}</p>
<div class="wide"><img alt="Gap, first-correct and final layer over the position of the answer's
document; the table below has the numbers" style="max-width:100%"
src="data:image/png;base64,{image}"></div>
<h2>What it says</h2><ul class="headlines">{says}</ul>
<ul class="notes">{notes}<li>{NOT_SAID}</li></ul>
<h2>Numbers</h2><div class="scroll">{_table(result.rows)}</div>
{ran}"""
    title = f"Essential layers of {model}"
    page = PAGE.format(title=title, style=STYLE, plotly="", script="", body=body)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    return path


TABLE = {
    "lens": "lens",
    "subset": "subset",
    "documents": "K",
    "gold": "position",
    "n": "n",
    "accuracy": "accuracy",
    "kept": "kept",
    "first": "F",
    "final": "S",
    "gap": "gap",
    "gap_interval": "95 %",
    "flips": "flips",
    "stay": "stays",
    "halfway": "p > 1/2 at",
}
"""Field -> heading."""
COUNTED = ("documents", "gold")
"""Fields that are whole numbers in most data."""


def table_cells(row: DepthRow) -> list[str]:
    """The cells of one row of the table, as text."""
    return [
        f"{getattr(row, name):g}" if name in COUNTED else _cell(getattr(row, name))
        for name in TABLE
    ]


def _cell(value: Any) -> str:
    if value is None or value == (None, None):
        return "-"
    if isinstance(value, tuple):
        return f"{value[0]:.2f} to {value[1]:.2f}"
    if isinstance(value, float):
        return f"{value:.2f}"
    return str(value)


def _table(rows: Sequence[DepthRow]) -> str:
    head = "".join(f"<th>{name}</th>" for name in TABLE.values())
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in table_cells(row)) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'

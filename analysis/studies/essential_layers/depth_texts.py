"""Sentences, tables and the picture of the study of essential layers."""

from collections.abc import Sequence

from ..results.study_figures import Panel, Series, StudyFigure
from ..results.study_result import StudyTable
from .depth_rows import CurveRow, DepthRow, LayerRow

QUESTION = (
    "How many layers lie between the first one at which the model's answer is on top, and the one "
    "from which it stays there? And does that gap depend on where the answer's document stands?"
)
METHOD = (
    "For every answer, the head or a lens reads the residual stream of each layer at the position "
    "that predicts the answer's first token. The first-correct layer F is the lowest with the "
    "answer on top, the final layer S the lowest from which it stays on top, and the gap is S - F "
    "(Kongmanee, 2501.15054); only answers that the model gets right have an S. An inverted U has "
    "a negative quadratic term of the gap over g / (K - 1)."
)
NOT_SAID = (
    "A lens that reads the answer at a layer does not prove that the model uses it there, and "
    "accuracy of the first token is not that of the whole answer."
)
DEPTH_HEADINGS = {
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
LAYER_HEADINGS = {
    "lens": "lens",
    "documents": "K",
    "gold": "position",
    "layer": "layer",
    "n": "n",
    "accuracy": "accuracy",
    "log_probability": "log p",
    "rank_median": "median rank",
    "first_share": "share of F",
    "final_share": "share of S",
}
CURVE_HEADINGS = {
    "lens": "lens",
    "subset": "subset",
    "documents": "K",
    "quadratic": "quadratic term",
    "interval": "95 %",
    "n": "n",
    "paired": "within questions",
}


def depth_tables(
    rows: Sequence[DepthRow], layers: Sequence[LayerRow], curves: Sequence[CurveRow]
) -> list[StudyTable]:
    """Depths by cell, readings by layer, and curves over positions."""
    return [
        StudyTable("depths", "Depths of right answers by K and position", DEPTH_HEADINGS, rows),
        StudyTable("curves", "The gap over positions", CURVE_HEADINGS, curves),
        StudyTable("layers", "All answers by layer", LAYER_HEADINGS, layers, most_shown=0),
    ]


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


def depth_figure(
    rows: Sequence[DepthRow], layers: Sequence[LayerRow], n_blocks: int, subset: str = "final"
) -> StudyFigure:
    """Gap, F and S over the answer's position, and where F and S lie; a row for each lens."""
    panels = []
    for lens in dict.fromkeys(row.lens for row in rows):
        own = [row for row in rows if row.lens == lens and row.subset == subset]
        of_layers = [row for row in layers if row.lens == lens]
        numbers = sorted({row.documents for row in own})
        cells = {k: [row for row in own if row.documents == k] for k in numbers}
        top = max([row.gap for row in own if row.gap is not None], default=0.0)
        position = "position of the answer's document"
        panels.append(
            [
                Panel(
                    f"{lens}: gap S - F",
                    position,
                    "layers",
                    [_means(cells[k], "gap", f"K = {k:g}") for k in numbers],
                    y_range=(-0.05, max(1.0, 1.05 * top)),
                ),
                Panel(
                    f"{lens}: F (solid) and S (dashed)",
                    position,
                    "layer",
                    [
                        series
                        for k in numbers
                        for series in (
                            _means(cells[k], "first", f"K = {k:g}"),
                            _means(cells[k], "final", f"K = {k:g}", dash="dash"),
                        )
                    ],
                    y_range=(0.5, n_blocks + 0.5),
                ),
                Panel(
                    f"{lens}: where F and S lie",
                    "layer",
                    "share of answers",
                    _shares(of_layers),
                    y_range=(0.0, None),
                ),
                Panel(
                    f"{lens}: answer on top",
                    "layer",
                    "share of answers",
                    [_accuracy(of_layers, k) for k in numbers],
                    y_range=(-0.03, 1.03),
                ),
            ]
        )
    caption = "Answers that the model gets right; bands are 95 % intervals."
    return StudyFigure("essential-layers", caption, panels)


def _means(rows: Sequence[DepthRow], name: str, label: str, dash: str = "solid") -> Series:
    """Means over the position, with their intervals."""
    intervals = [getattr(row, f"{name}_interval") for row in rows]
    return Series(
        label,
        [row.gold for row in rows],
        [getattr(row, name) for row in rows],
        [interval[0] for interval in intervals],
        [interval[1] for interval in intervals],
        dash=dash,
    )


def _shares(rows: Sequence[LayerRow]) -> list[Series]:
    """Shares of F and S by layer, over all answers."""
    layers = sorted({row.layer for row in rows})
    return [
        Series(label, layers, [_weighted(rows, layer, name) for layer in layers], kind="bars")
        for name, label in (
            ("first_share", "first-correct layer F"),
            ("final_share", "final layer S"),
        )
    ]


def _accuracy(rows: Sequence[LayerRow], documents: float) -> Series:
    """Accuracy by layer for one K, all positions together."""
    of_number = [row for row in rows if row.documents == documents]
    layers = sorted({row.layer for row in of_number})
    values = [_weighted(of_number, layer, "accuracy") for layer in layers]
    return Series(f"K = {documents:g}", layers, values)


def _weighted(rows: Sequence[LayerRow], layer: int, name: str) -> float:
    """Mean of a field over the answers at one layer."""
    chosen = [row for row in rows if row.layer == layer]
    return sum(getattr(row, name) * row.n for row in chosen) / sum(row.n for row in chosen)

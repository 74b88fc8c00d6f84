"""Figures and sentences about how two models differ."""

import itertools
from collections.abc import Sequence

import numpy as np

from ....probes.base.resampling import Interval
from ..results.study_figures import HeatPanel, Panel, Series, StudyFigure
from .divergence_rows import (
    FEWEST,
    DepthDivergenceRow,
    DivergenceRow,
    PartingRow,
    known_value,
)


def draw_depths(
    rows: Sequence[DepthDivergenceRow], groups: Sequence[DivergenceRow], names: tuple[str, ...]
) -> StudyFigure:
    """JS by depth for each lens, and by the class and frequency of the next token."""
    lines = []
    for lens in dict.fromkeys(row.lens for row in rows):
        of_lens = [row for row in rows if row.lens == lens]
        lines.append(
            Series(
                lens,
                [row.depth for row in of_lens],
                [row.js for row in of_lens],
                [row.js_interval[0] for row in of_lens],
                [row.js_interval[1] for row in of_lens],
                names=[f"layers {row.first_layer} and {row.other_layer}" for row in of_lens],
            )
        )
    bars = [row for row in groups if row.kind != "all"]
    n = f"n = {groups[0].n:,}"
    return StudyFigure(
        "divergence",
        f"Jensen-Shannon divergence of {names[0]} and {names[1]} under a lens of each by relative "
        "depth (at 1 the models themselves), and by the next token of the text.",
        [
            [
                Panel(f"By depth, {n}", "relative depth l / L", "mean JS, nats", lines, (0, None)),
                Panel(
                    f"By next token, {n}",
                    "class, frequency",
                    "mean JS, nats",
                    [
                        Series(
                            kind,
                            [row.group for row in bars if row.kind == kind],
                            [row.js for row in bars if row.kind == kind],
                            [row.js_interval[0] for row in bars if row.kind == kind],
                            [row.js_interval[1] for row in bars if row.kind == kind],
                            "bars",
                        )
                        for kind in dict.fromkeys(row.kind for row in bars)
                    ],
                    (0, None),
                    reference=groups[0].js,
                    reference_label="all tokens",
                ),
            ]
        ],
    )


def draw_similarity(
    cka: np.ndarray,
    layers: tuple[Sequence[int], Sequence[int]],
    names: tuple[str, ...],
    n: int,
) -> StudyFigure:
    """Heatmap of CKA over pairs of layers."""
    cells = [[known_value(value) for value in row] for row in cka]
    return StudyFigure(
        "similarity",
        f"Linear CKA of the residual streams of {names[0]} (rows) and {names[1]} (columns).",
        [
            [
                HeatPanel(
                    f"Linear CKA, n = {n:,}",
                    f"layer of {names[1]}",
                    f"layer of {names[0]}",
                    [str(layer) for layer in layers[1]],
                    [str(layer) for layer in layers[0]],
                    values=cells,
                    color_label="CKA",
                    texts=[["" if v is None else f"{v:.2f}" for v in row] for row in cells],
                    color_range=(0.0, 1.0),
                )
            ]
        ],
    )


def describe_divergence(
    groups: Sequence[DivergenceRow],
    parting: Sequence[PartingRow],
    depths: Sequence[DepthDivergenceRow],
    names: tuple[str, ...],
) -> list[str]:
    """Sentences about the numbers."""
    everything = groups[0]
    if everything.js is None or everything.disagreement is None:
        return ["No position has a distribution of both models."]
    shares = format_interval(everything.disagreement_interval, ".1%")
    nats = format_interval(everything.js_interval, ".3f")
    says = [
        f"The top tokens differ at {everything.disagreement:.1%} {shares} of {everything.n:,} "
        f"positions; the JS is {everything.js:.3f} {nats} nats of at most 0.693."
    ]
    change, (low, high) = (
        everything.cross_entropy_difference,
        everything.cross_entropy_difference_interval,
    )
    if change is not None:
        if low is None or high is None:
            says.append(
                f"They differ by {change:+.3f} nats in how well they predict this text, without an "
                "interval."
            )
        elif low <= 0 <= high:
            says.append(
                f"No clear difference in how well they predict this text ({change:+.3f} nats, "
                f"{format_interval((low, high), '+.3f')})."
            )
        else:
            better = names[0] if change > 0 else names[1]
            says.append(
                f"{better} predicts this text better, by {abs(change):.3f} nats per token "
                f"{format_interval((low, high), '+.3f')}."
            )
    for kind, title in (("class", "By class"), ("frequency", "By frequency")):
        known = [
            row for row in groups if row.kind == kind and row.js is not None and row.n >= FEWEST
        ]
        if len(known) > 1:
            most = max(known, key=lambda row: row.js or 0)
            least = min(known, key=lambda row: row.js or 0)
            apart = _apart(most.js_interval, least.js_interval)
            says.append(
                f"{title} of the next token, JS is largest for '{most.group}' ({most.js:.3f}, n = "
                f"{most.n:,}) and smallest for '{least.group}' ({least.js:.3f}, n = {least.n:,})"
                + ("." if apart else "; no clear difference: their intervals overlap.")
            )
    equal = {row.first_layer: row.equal_states for row in depths if row.equal_states is not None}
    same = list(itertools.takewhile(lambda layer: equal[layer] == 1, sorted(equal)))
    if same:
        says.append(f"The residual streams are equal bit for bit up to layer {same[-1]}.")
    for row in parting:
        if row.layer is None:
            says.append("The models say the same: there is no layer at which they part.")
            break
        says.append(
            f"Under the {row.lens} lens, the mean JS exceeds half of the final one from layer "
            f"{row.layer} on (relative depth {row.depth:.2f} "
            f"{format_interval(row.depth_interval, '.2f')})."
        )
    return says


def _apart(a: Interval, b: Interval) -> bool:
    """Whether two intervals are known and do not overlap."""
    if a[0] is None or a[1] is None or b[0] is None or b[1] is None:
        return False
    return a[0] > b[1] or b[0] > a[1]


def format_interval(interval: Interval, style: str) -> str:
    """`[low, high]`; nothing for an unknown interval."""
    low, high = interval
    return "" if low is None or high is None else f"[{low:{style}}, {high:{style}}]"

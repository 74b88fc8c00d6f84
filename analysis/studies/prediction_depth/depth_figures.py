"""Figures of the study of prediction depth."""

from collections.abc import Sequence

from ..results.study_figures import Panel, Series, StudyFigure
from .depth_rows import CLASS, FREQUENCY, LEARNED, DepthShareRow, PredictionDepthRow

DIVISIONS = {
    CLASS: ("By class of the next token", "class"),
    FREQUENCY: ("By frequency of the next token", "frequency decile (1 is rare)"),
    LEARNED: ("By iteration learned", "first checkpoint that is right to the end"),
}
"""Division -> title and x label of its panel."""


def depth_figures(
    rows: Sequence[PredictionDepthRow], shares: Sequence[DepthShareRow], depth: int
) -> list[StudyFigure]:
    """Where predictions settle, and mean depth by groups; `depth` is the number of blocks L."""
    panels = [
        Panel(
            "Prediction depth",
            "layer",
            "share of positions",
            [_share_series(shares, lens, "share") for lens in _lenses(shares)],
            y_range=(0.0, None),
        ),
        Panel(
            "Top token is the model's",
            "layer",
            "share of positions",
            [_share_series(shares, lens, "agreement") for lens in _lenses(shares)],
            y_range=(0.0, 1.0),
        ),
    ]
    figures = [
        StudyFigure(
            "prediction-depth",
            "Left, the layer from which the top token of a lens is the model's to the end; right, "
            "the share of positions that agree at a layer, settled or not. Intervals of 95 % over "
            "documents.",
            [panels],
        )
    ]
    by_group = [
        Panel(
            title,
            x_label,
            "mean depth (layers)",
            [_group_series(rows, lens, division) for lens in _lenses(rows)],
            y_range=(0.0, float(depth)),
        )
        for division, (title, x_label) in DIVISIONS.items()
        if any(row.division == division for row in rows)
    ]
    if by_group:
        figures.append(
            StudyFigure(
                "depth-by-token",
                "Mean prediction depth over groups of positions, by the token that they have to "
                "predict.",
                [[panel] for panel in by_group],
            )
        )
    return figures


def _lenses(rows: "Sequence[PredictionDepthRow] | Sequence[DepthShareRow]") -> list[str]:
    """Names of the lenses in their order."""
    return list(dict.fromkeys(row.lens for row in rows))


def _share_series(shares: Sequence[DepthShareRow], lens: str, field: str) -> Series:
    """One line over layers."""
    own = [row for row in shares if row.lens == lens]
    intervals = [getattr(row, f"{field}_interval") for row in own]
    return Series(
        lens,
        [row.layer for row in own],
        [getattr(row, field) for row in own],
        [low for low, _ in intervals],
        [high for _, high in intervals],
    )


def _group_series(rows: Sequence[PredictionDepthRow], lens: str, division: str) -> Series:
    """Mean depths of one lens by group."""
    own = [row for row in rows if row.lens == lens and row.division == division]
    return Series(
        lens,
        [_group_x(row) for row in own],
        [row.depth for row in own],
        [row.depth_interval[0] for row in own],
        [row.depth_interval[1] for row in own],
        kind="bars" if division == CLASS else "line",
        names=[f"{row.n} positions, loss {row.loss or float('nan'):.2f} nats" for row in own],
    )


def _group_x(row: PredictionDepthRow) -> float | str:
    """Where a group stands: deciles are numbers, classes and iterations words."""
    if row.division == FREQUENCY:
        return float(row.group)
    is_iteration = row.division == LEARNED and row.group != "never"
    return f"step {row.group}" if is_iteration else row.group

"""Figures of `study icl`: precision over shots, and the gain by layer and shots."""

from collections.abc import Sequence

from ..results.study_figures import HeatPanel, Panel, Series, StudyFigure
from .shot_rows import BEYOND, INSIDE, ShotRow

MOST_OFFSETS = 4
"""Most offsets in a row of panels."""


def draw_figures(rows: Sequence[ShotRow]) -> list[StudyFigure]:
    """Precision over shots, a row of panels for each kind; the gain by layer for each lens."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    offsets = sorted({row.offset for row in rows})
    shown = offsets[:MOST_OFFSETS]
    lenses = list(dict.fromkeys(row.lens for row in rows))
    figures = [
        StudyFigure(
            "shots",
            "Precision@1 of the token after t+N over the number of shots in the context, inside "
            "the part of the answer that shots determine, at the layer with the largest gain at "
            "the most shots (chosen on the same texts); 95 % intervals over documents. `beyond` is "
            "the part after it, which nobody can foresee.",
            [
                [
                    _curves(rows, kind, offset)
                    for offset in shown
                    if any((r.kind, r.offset, r.part) == (kind, offset, INSIDE) for r in rows)
                ]
                for kind in kinds
            ],
        )
    ]
    for lens in lenses:
        panels = [
            [
                _heat(rows, kind, lens, offset)
                for offset in shown
                if any(
                    (r.kind, r.lens, r.offset, r.part) == (kind, lens, offset, INSIDE) for r in rows
                )
            ]
            for kind in kinds
        ]
        figures.append(
            StudyFigure(
                "gain-" + "".join(c if c.isalnum() else "-" for c in lens.lower()),
                f"Gain of {lens} over the bigram, by layer and shots, inside the determined part.",
                [row for row in panels if row],
            )
        )
    return figures


def _curves(rows: Sequence[ShotRow], kind: str, offset: int) -> Panel:
    """Lenses at their best layers, the bigram, and the first lens beyond the determined part."""
    chosen = [row for row in rows if (row.kind, row.offset) == (kind, offset)]
    series, best_of = [], {}
    for lens in dict.fromkeys(row.lens for row in chosen):
        inside = [row for row in chosen if row.lens == lens and row.part == INSIDE]
        if not inside:
            continue
        most = max(row.shots for row in inside)
        best_of[lens] = max(
            (row for row in inside if row.shots == most),
            key=lambda row: (row.gain, row.layer or 0),
        ).layer
        curve = sorted((r for r in inside if r.layer == best_of[lens]), key=lambda r: r.shots)
        series.append(_series(lens, curve, "precision"))
    if best_of:
        lens = next(iter(best_of))
        of_lens = [r for r in chosen if r.lens == lens and r.layer == best_of[lens]]
        inside = sorted((r for r in of_lens if r.part == INSIDE), key=lambda r: r.shots)
        series.append(_series("bigram", inside, "bigram", "dash"))
        last = list(best_of)[-1]
        beyond = [r for r in chosen if r.lens == last and r.layer == best_of[last]]
        beyond = sorted((r for r in beyond if r.part == BEYOND), key=lambda r: r.shots)
        if beyond:
            series.append(_series(f"{last}, beyond", beyond, "precision", "dot"))
    return Panel(f"{kind}, N = {offset}", "shots", "precision@1", series, y_range=(0, 1))


def _series(label: str, rows: Sequence[ShotRow], field: str, dash: str = "solid") -> Series:
    """A curve over shots with its intervals."""
    intervals = [getattr(row, f"{field}_interval") for row in rows]
    return Series(
        label,
        [row.shots for row in rows],
        [getattr(row, field) for row in rows],
        [low for low, _ in intervals],
        [high for _, high in intervals],
        dash=dash,
    )


def _heat(rows: Sequence[ShotRow], kind: str, lens: str, offset: int) -> HeatPanel:
    """The gain by layer (rows) and shots (columns)."""
    chosen = {
        (row.layer, row.shots): row
        for row in rows
        if (row.kind, row.lens, row.offset, row.part) == (kind, lens, offset, INSIDE)
    }
    layers = sorted(
        {layer for layer, _ in chosen}, key=lambda layer: -1 if layer is None else layer
    )
    shots = sorted({count for _, count in chosen})
    cells = [[chosen.get((layer, count)) for count in shots] for layer in layers]
    return HeatPanel(
        title=f"{kind}, N = {offset}",
        x_label="shots",
        y_label="layer",
        x_names=[str(count) for count in shots],
        y_names=["all" if layer is None else str(layer) for layer in layers],
        values=[[None if row is None else row.gain for row in line] for line in cells],
        color_label="gain in precision@1",
        texts=[["" if row is None else f"{row.gain:+.2f}" for row in line] for line in cells],
        color_range=(-1, 1),
        diverging=True,
    )

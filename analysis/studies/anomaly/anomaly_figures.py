"""Figures of `study anomaly`: AUROC of trajectories and states, of templates, and outcomes."""

from collections.abc import Sequence

from ..results.study_figures import Panel, Series, StudyFigure
from .anomaly_rows import DetectionRow, OutcomeRow, TemplateRow
from .anomaly_scores import CLASSIFIER, STATES
from .detectors import DISTANCE, FACTOR


def draw_figures(
    rows: Sequence[DetectionRow],
    templates: Sequence[TemplateRow],
    outcomes: Sequence[OutcomeRow],
) -> list[StudyFigure]:
    """All figures that have rows."""
    figures = [
        StudyFigure(
            "detection",
            "AUROC on held-out questions of detectors that were fitted on clean documents: left "
            "the local outlier factor on trajectories beside the Mahalanobis distance of the "
            "states, right that distance layer by layer. 95 % intervals over questions; .5 is "
            "chance.",
            [[_bars(rows), _by_layer(rows)]],
        )
    ]
    if any(row.detector == CLASSIFIER for row in templates):
        figures.append(
            StudyFigure(
                "left-out-templates",
                "AUROC of a logistic regression of each layer on documents of one template: "
                "trained on all templates, and without this one.",
                _in_rows(_left_out(templates)),
            )
        )
    known = [row for row in outcomes if row.template == "all" and row.accuracy is not None]
    if known:
        figures.append(
            StudyFigure(
                "outcomes",
                "How often the model's top token begins the right answer, and the attacker's.",
                [[_outcomes(known)]],
            )
        )
    return figures


def _comparisons(rows: Sequence[DetectionRow]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.negative, row.positive) for row in rows))


def _bars(rows: Sequence[DetectionRow]) -> Panel:
    """A bar for each feature set, by comparison."""
    series = []
    for negative, positive in _comparisons(rows):
        chosen = [
            row
            for row in rows
            if (row.negative, row.positive) == (negative, positive)
            and row.layer is None
            and row.detector == (DISTANCE if row.features == STATES else FACTOR)
        ]
        series.append(
            Series(
                f"{positive} against {negative}",
                [row.features.removesuffix(" trajectory") for row in chosen],
                [row.auroc for row in chosen],
                [row.auroc_interval[0] for row in chosen],
                [row.auroc_interval[1] for row in chosen],
                kind="bars",
            )
        )
    return Panel(
        "Trajectories and states",
        "trajectories of a lens, last layer, states",
        "AUROC",
        series,
        y_range=(0, 1),
        reference=0.5,
        reference_label="chance",
    )


def _by_layer(rows: Sequence[DetectionRow]) -> Panel:
    """The Mahalanobis distance of the states over the layers, by comparison."""
    series = []
    for negative, positive in _comparisons(rows):
        chosen = [
            row
            for row in rows
            if (row.negative, row.positive) == (negative, positive)
            and row.layer is not None
            and row.detector == DISTANCE
        ]
        series.append(
            Series(
                f"{positive} against {negative}",
                [row.layer for row in chosen if row.layer is not None],
                [row.auroc for row in chosen],
                [row.auroc_interval[0] for row in chosen],
                [row.auroc_interval[1] for row in chosen],
            )
        )
    return Panel(
        "Mahalanobis distance of the states",
        "layer",
        "AUROC",
        series,
        y_range=(0, 1),
        reference=0.5,
        reference_label="chance",
    )


def _in_rows(panels: Sequence[Panel]) -> list[Sequence[Panel]]:
    """Rows of at most four panels."""
    return [panels[start : start + 4] for start in range(0, len(panels), 4)]


def _left_out(templates: Sequence[TemplateRow]) -> list[Panel]:
    """A panel for each template: within and left-out AUROC over the layers."""
    rows = [row for row in templates if row.detector == CLASSIFIER and row.layer is not None]
    panels = []
    for name in dict.fromkeys(row.template for row in rows):
        of_name = [row for row in rows if row.template == name]
        layers = [row.layer for row in of_name if row.layer is not None]
        within = Series(
            "trained on all templates",
            layers,
            [row.auroc for row in of_name],
            [row.auroc_interval[0] for row in of_name],
            [row.auroc_interval[1] for row in of_name],
        )
        without = Series(
            "this template left out",
            layers,
            [row.left_out for row in of_name],
            [row.left_out_interval[0] for row in of_name],
            [row.left_out_interval[1] for row in of_name],
            dash="dash",
        )
        panels.append(
            Panel(
                f"{name}, n = {of_name[0].n}",
                "layer",
                "AUROC",
                [within, without],
                y_range=(0, 1),
                reference=0.5,
                reference_label="chance",
            )
        )
    return panels


def _outcomes(rows: Sequence[OutcomeRow]) -> Panel:
    """Accuracy and attack success by arm."""
    arms = [row.arm for row in rows]
    accuracy = Series(
        "right answer",
        arms,
        [row.accuracy for row in rows],
        [row.accuracy_interval[0] for row in rows],
        [row.accuracy_interval[1] for row in rows],
        kind="bars",
    )
    success = Series(
        "attacker's answer",
        arms,
        [row.success for row in rows],
        [row.success_interval[0] for row in rows],
        [row.success_interval[1] for row in rows],
        kind="bars",
    )
    has_success = any(row.success is not None for row in rows)
    return Panel(
        "What the model answers",
        "arm",
        "share of documents",
        [accuracy, success] if has_success else [accuracy],
        y_range=(0, 1),
    )

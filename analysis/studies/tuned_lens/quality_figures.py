"""Figures of the study of lens quality: curves over layers, heatmaps of a passage, layer pairs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..results.study_figures import HeatPanel, Panel, Series, StudyFigure
from .early_guesses import BUCKETS, EarlyGuessRow
from .entropy_profiles import EntropyProfileRow
from .layer_similarity import LayerPairRow
from .layer_transfer import LayerTransferRow
from .lens_layers import LensLayerRow
from .passage_cells import PassageCellRow

PASSAGE_MEASURES = (
    ("kl", "Top token of the lens, and KL from the model", "KL(model || lens), nats"),
    ("entropy", "Entropy", "nats"),
    ("rank", "Rank of the model's top token", "log10 of the rank"),
    ("cross_entropy", "Cross-entropy of the text's next token", "nats"),
    ("max_probability", "Largest probability", "probability"),
    ("js", "Jensen-Shannon divergence from the model", "nats"),
    ("total_variation", "Total variation from the model", "half L1"),
    ("tracked_rank", "Rank of the tracked token", "log10 of the rank"),
)
"""Field of `PassageCellRow`, title and colour of the heatmaps of a passage."""


@dataclass(frozen=True)
class _Curve:
    """A panel of one field over layers."""

    field: str
    title: str
    y_label: str
    log_y: bool = False
    y_range: tuple[float | None, float | None] = (0.0, None)


def quality_figure(rows: Sequence[LensLayerRow]) -> StudyFigure:
    """Perplexity, KL, marginal bias and echo of every lens over layers."""
    return StudyFigure(
        "lens-quality",
        "Every lens over layers; the last layer is the model itself. Intervals of 95 % over "
        "documents, none for the marginal bias.",
        [
            [
                _curve_panel(rows, _Curve("cross_entropy", "Cross-entropy", "nats per token")),
                _curve_panel(rows, _Curve("kl", "KL(model || lens)", "nats per token")),
            ],
            [
                _curve_panel(
                    rows, _Curve("marginal_bias_bits", "Bias of the mean distribution", "bits")
                ),
                _curve_panel(
                    rows, _Curve("echo", "Top token is the input token", "share of positions")
                ),
            ],
        ],
    )


def mean_trajectory_figure(rows: Sequence[LensLayerRow]) -> StudyFigure:
    """Means of the other measures over layers."""
    curves = [
        _Curve("entropy", "Entropy", "nats"),
        _Curve("max_probability", "Largest probability", "probability", False, (0.0, 1.0)),
        _Curve("rank", "Rank of the model's top token", "median rank", True, (None, None)),
        _Curve("js", "Jensen-Shannon divergence", "nats", False, (0.0, float(np.log(2)))),
        _Curve("total_variation", "Total variation", "half L1", False, (0.0, 1.0)),
        _Curve("agreement", "Top token is the model's", "share of positions", False, (0.0, 1.0)),
    ]
    panels = [_curve_panel(rows, curve) for curve in curves]
    return StudyFigure(
        "mean-trajectories",
        "Means of the measures of a prediction trajectory over the sampled positions.",
        [panels[:3], panels[3:]],
    )


def _curve_panel(rows: Sequence[LensLayerRow], curve: _Curve) -> Panel:
    """One field of all lenses over layers, with its intervals where it has them."""
    series = []
    for lens in dict.fromkeys(row.lens for row in rows):
        own = [row for row in rows if row.lens == lens]
        intervals = [getattr(row, f"{curve.field}_interval", None) for row in own]
        has_intervals = all(interval is not None for interval in intervals)
        series.append(
            Series(
                lens,
                [row.layer for row in own],
                [getattr(row, curve.field) for row in own],
                [interval[0] for interval in intervals if interval] if has_intervals else None,
                [interval[1] for interval in intervals if interval] if has_intervals else None,
            )
        )
    return Panel(
        curve.title, "layer", curve.y_label, series, y_range=curve.y_range, log_y=curve.log_y
    )


def passage_figures(rows: Sequence[PassageCellRow], tracked: str | None) -> list[StudyFigure]:
    """Heatmaps of one passage, a figure for each lens; `tracked` is the label of that token."""
    figures = []
    for lens in dict.fromkeys(row.lens for row in rows):
        own = [row for row in rows if row.lens == lens]
        panels: list[list[Panel | HeatPanel]] = []
        for field, title, color in PASSAGE_MEASURES:
            if field != "tracked_rank":
                panels.append([_passage_panel(own, field, title, color)])
            elif tracked is not None:
                panels.append([_passage_panel(own, field, f"Rank of {tracked}", color)])
        figures.append(
            StudyFigure(
                f"passage-{slug(lens)}",
                f"Prediction trajectories under {lens}, layer by token of one passage. The token "
                "that was read stands below; the top row is the model itself.",
                panels,
            )
        )
    return figures


def slug(name: str) -> str:
    """`name` in lower-case letters, digits and hyphens."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "lens"


def _passage_panel(rows: Sequence[PassageCellRow], field: str, title: str, color: str) -> HeatPanel:
    """One measure of one lens, layers by tokens."""
    layers = sorted({row.layer for row in rows})
    tokens = {row.index: row.token for row in rows}
    cell = {(row.layer, row.index): row for row in rows}
    is_rank = field.endswith("rank")

    def value(row: PassageCellRow) -> float | None:
        number = getattr(row, field)
        return None if number is None else float(np.log10(number)) if is_rank else number

    return HeatPanel(
        title,
        "token that was read",
        "layer",
        x_names=list(tokens.values()),
        y_names=[str(layer) for layer in layers],
        values=[[value(cell[layer, index]) for index in tokens] for layer in layers],
        color_label=color,
        texts=[[cell[layer, index].top for index in tokens] for layer in layers]
        if field == "kl"
        else None,
        hovers=[[_hover(cell[layer, index]) for index in tokens] for layer in layers],
        color_range=(0.0, None),
    )


def _hover(row: PassageCellRow) -> str:
    """What the mouse shows of a cell."""
    numbers = [
        f"{name}: {'undefined' if value is None else f'{value:.3g}'}"
        for name, value in (
            ("KL", row.kl),
            ("entropy", row.entropy),
            ("p of the top token", row.max_probability),
            ("rank of the model's token", row.rank),
        )
    ]
    lines = [f"layer {row.layer} after {row.token}", f"says {row.top}, the model {row.target}"]
    return "\n".join([*lines, *numbers])


def transfer_figure(
    lens: str, transfer: Sequence[LayerTransferRow], pairs: Sequence[LayerPairRow]
) -> StudyFigure:
    """Penalty by translator and layer, similarity of the layers, and one over the other."""
    own = [row for row in transfer if row.lens == lens]
    layers = sorted({row.layer for row in own})
    penalty = {(row.translator, row.layer): row.penalty for row in own}
    names = [str(layer) for layer in layers]
    similarity = similarity_of_pairs(pairs, "similarity")
    points = [(i, j) for i in layers for j in layers if i != j and (i, j) in similarity]
    return StudyFigure(
        f"transfer-{slug(lens)}",
        f"What the translator of one layer of {lens} costs on the states of another (KL more than "
        "the native translator's), beside the Frobenius cosine of the covariances of both layers.",
        [
            [
                HeatPanel(
                    "Transfer penalty",
                    "layer of the states",
                    "layer of the translator",
                    x_names=names,
                    y_names=names,
                    values=[[penalty.get((i, j)) for j in layers] for i in layers],
                    color_label="penalty, nats",
                ),
                Panel(
                    "Penalty over similarity",
                    "covariance similarity",
                    "penalty (nats)",
                    [
                        Series(
                            lens,
                            [similarity[pair] or 0.0 for pair in points],
                            [penalty.get(pair) for pair in points],
                            kind="points",
                            names=[f"translator {i} on layer {j}" for i, j in points],
                        )
                    ],
                ),
            ]
        ],
    )


def similarity_figure(pairs: Sequence[LayerPairRow]) -> StudyFigure:
    """Similarity of covariances and overlap of directions, layers by layers."""
    layers = sorted({layer for row in pairs for layer in (row.layer, row.other)})
    names = [str(layer) for layer in layers]

    def panel(field: str, title: str, color: str) -> HeatPanel:
        values = similarity_of_pairs(pairs, field) | {(layer, layer): 1.0 for layer in layers}
        return HeatPanel(
            title,
            "layer",
            "layer",
            x_names=names,
            y_names=names,
            values=[[values.get((i, j)) for j in layers] for i in layers],
            color_label=color,
            color_range=(0.0, 1.0),
        )

    return StudyFigure(
        "layer-similarity",
        "How alike layers are: covariances, the same without the coordinates of largest variance, "
        "and how far the directions of largest variance persist.",
        [
            [
                panel("similarity", "Covariances", "Frobenius cosine"),
                panel("similarity_without_largest", "Without largest coordinates", "cosine"),
            ],
            [
                panel("cosine_overlap", "Spans of largest directions", "mean squared cosine"),
                panel("coordinate_overlap", "Coordinates on them", "mean squared canonical corr."),
            ],
        ],
    )


def similarity_of_pairs(
    pairs: Sequence[LayerPairRow], field: str
) -> dict[tuple[int, int], float | None]:
    """A field of the pairs, in both orders."""
    return {
        pair: getattr(row, field)
        for row in pairs
        for pair in ((row.layer, row.other), (row.other, row.layer))
    }


def early_guess_figure(rows: Sequence[EarlyGuessRow]) -> StudyFigure:
    """Share of frequent guesses by layer, and share of the guesses that are revised."""
    first = next(iter(BUCKETS))
    panels = []
    for field, bucket, title, y_label in (
        ("share", first, "Guess is one of the 10 most frequent tokens", "share of guesses"),
        ("revised", "all", "Guess is revised", "share of guesses"),
        ("revised", first, "Frequent guess is revised", "share of these guesses"),
    ):
        series = []
        for lens in dict.fromkeys(row.lens for row in rows):
            own = [row for row in rows if row.lens == lens and row.bucket == bucket]
            intervals = [getattr(row, f"{field}_interval") for row in own]
            series.append(
                Series(
                    lens,
                    [row.layer for row in own],
                    [getattr(row, field) for row in own],
                    [low for low, _ in intervals],
                    [high for _, high in intervals],
                )
            )
        text = next((row.text_share for row in rows if row.bucket == first), None)
        has_reference = field == "share" and text is not None
        panels.append(
            Panel(
                title,
                "layer",
                y_label,
                series,
                y_range=(0.0, 1.0),
                reference=text if has_reference else None,
                reference_label="next tokens of the text" if has_reference else "",
            )
        )
    return StudyFigure(
        "early-guesses",
        "How many of the top tokens at a layer are among the 10 most frequent tokens, and how many "
        "of them the model does not keep.",
        [panels],
    )


def profile_figure(rows: Sequence[EntropyProfileRow]) -> StudyFigure:
    """Entropy over layers by class of text, a panel for each lens."""
    panels: list[Panel | HeatPanel] = []
    for lens in dict.fromkeys(row.lens for row in rows):
        series = []
        for label in dict.fromkeys(row.label for row in rows):
            own = [row for row in rows if row.lens == lens and row.label == label]
            series.append(
                Series(
                    label,
                    [row.layer for row in own],
                    [row.entropy for row in own],
                    [row.entropy_interval[0] for row in own],
                    [row.entropy_interval[1] for row in own],
                )
            )
        panels.append(Panel(lens, "layer", "entropy (nats)", series, y_range=(0.0, None)))
    return StudyFigure(
        "entropy-profiles",
        "Mean entropy at each layer by class of text, for every lens.",
        [panels[start : start + 3] for start in range(0, len(panels), 3)],
    )

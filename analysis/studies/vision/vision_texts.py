"""Texts, tables and pictures of the study of vision."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ....probes.base.resampling import Interval
from ..results.study_figures import HeatPanel, Panel, Series, StudyFigure
from ..results.study_result import StudyTable
from .vision_rows import PatchLayerRow, PatchMaps, VisionLayerRow

QUESTION = (
    "At which layer does an image classifier's class token say the class, and which patches of an "
    "image say it?"
)
METHOD = (
    "The head, or a lens, reads the residual stream of the class token at each layer; its "
    "distribution over the classes is compared with the model's own and with the label of the "
    "image (logit lens: nostalgebraist 2020; tuned lens: Belrose et al., 2303.08112). Of one "
    "image, the same lens reads every patch (as Neo et al., 2410.07149, do with the image tokens "
    "of a language model). Intervals are 95 % bootstrap over images."
)
NOT_SAID = (
    "The model reads its logits at the class token alone: what the head says of a patch is a "
    "reading of that patch's stream, which the model itself never makes.",
    "A patch that says the class is not thereby one that the model's decision depends on: "
    "attention mixes patches, and the maps change nothing in the model.",
    "That a class can be read at a layer does not prove that the model uses it there.",
)
LAYER_HEADINGS = {
    "lens": "lens",
    "layer": "layer",
    "n": "n",
    "labelled": "labelled",
    "accuracy": "accuracy",
    "accuracy_interval": "95 %",
    "agreement": "agreement with the model",
    "agreement_interval": "95 %",
    "kl": "KL (nats)",
    "kl_interval": "95 %",
    "perplexity": "perplexity (classes)",
    "perplexity_interval": "95 %",
    "confidence": "confidence",
    "confidence_interval": "95 %",
}
PATCH_HEADINGS = {
    "lens": "lens",
    "layer": "layer",
    "class_token": "p at class token",
    "patch_mean": "mean p of patches",
    "patch_max": "largest p",
    "row": "row",
    "column": "column",
    "top_share": "share on top",
    "patch_entropy": "entropy (nats)",
}
MOST_MAPS = 6
"""Most layers whose maps are drawn, evenly spaced."""
SETTLED = 0.9
"""Agreement with the model from which a layer says what the model says."""


@dataclass(frozen=True)
class StudiedImage:
    """The image whose patches are read, and the class that is looked for."""

    sequence: int
    """Number in the cache."""
    name: str
    """Its file, or its number."""
    label: str
    """Name of the label's class; empty without one."""
    class_id: int
    class_name: str
    """The model's class."""


def vision_tables(
    rows: Sequence[VisionLayerRow],
    patches: Sequence[PatchLayerRow] = (),
    image: StudiedImage | None = None,
) -> list[StudyTable]:
    """The table of the class tokens, and that of one image."""
    tables = [StudyTable("layers", "Each lens at the class token, by layer.", LAYER_HEADINGS, rows)]
    if image is not None:
        title = f"The class {image.class_name!r} over the patches of {image.name}, by layer."
        tables.append(StudyTable("patches", title, PATCH_HEADINGS, patches))
    return tables


def layer_figure(rows: Sequence[VisionLayerRow], n_classes: int, labelled: bool) -> StudyFigure:
    """Accuracy, agreement, KL, perplexity and confidence of every lens, by layer."""

    def panel(field: str, title: str, y_label: str, **options: object) -> Panel:
        series = [
            Series(
                lens,
                [row.layer for row in of_lens],
                [getattr(row, field) for row in of_lens],
                low=[getattr(row, f"{field}_interval")[0] for row in of_lens],
                high=[getattr(row, f"{field}_interval")[1] for row in of_lens],
            )
            for lens, of_lens in _by_lens(rows).items()
        ]
        return Panel(title, "layer", y_label, series, **options)  # type: ignore[arg-type]

    chance = {"reference": 1 / n_classes, "reference_label": "chance", "y_range": (0.0, 1.0)}
    top = [panel("agreement", "Top class is the model's", "share of images", y_range=(0.0, 1.0))]
    if labelled:
        top.insert(0, panel("accuracy", "Top class is the label", "share of images", **chance))
    else:
        top.append(panel("kl", "KL(model || lens)", "nats"))
    below = [
        panel("perplexity", "Perplexity over the classes", "classes", y_range=(0.0, None)),
        panel("confidence", "Largest probability", "probability", **chance),
    ]
    if labelled:
        below.insert(0, panel("kl", "KL(model || lens)", "nats"))
    caption = (
        f"What each lens says at the class token, with 95 % intervals over images; layer "
        f"{max(row.layer for row in rows)} is the model itself."
    )
    return StudyFigure("layers", caption, [top, below])


def patch_figure(maps: PatchMaps, image: StudiedImage, class_names: Sequence[str]) -> StudyFigure:
    """Probability of the class and entropy of one lens over the image, at some layers."""
    last = len(maps.layers) - 1
    chosen = np.unique(np.linspace(0, last, min(MOST_MAPS, last + 1)).round().astype(int)).tolist()
    most = math.log(max(len(class_names), 2))
    classes = [
        _map_panel(
            f"layer {maps.layers[n]}: p({image.class_name})",
            maps.probability[n],
            maps.top[n],
            class_names,
            "probability of the class",
            (0.0, 1.0),
        )
        for n in chosen
    ]
    entropies = [
        _map_panel(
            f"layer {maps.layers[n]}: entropy",
            maps.entropy[n],
            maps.top[n],
            class_names,
            "entropy (nats)",
            (0.0, most),
        )
        for n in chosen
    ]
    columns = min(3, len(chosen))
    rows = [
        panels[start : start + columns]
        for panels in (classes, entropies)
        for start in range(0, len(panels), columns)
    ]
    label = f", label {image.label}" if image.label else ""
    caption = (
        f"{image.name}{label}, as {maps.lens} reads its patches: the probability of the model's "
        f"class {image.class_name!r}, and the entropy of the distribution. Cells lie as the "
        "patches in the image."
    )
    return StudyFigure("patches", caption, rows)


def _map_panel(
    title: str,
    values: np.ndarray,
    top: np.ndarray,
    class_names: Sequence[str],
    color_label: str,
    color_range: tuple[float, float],
) -> HeatPanel:
    """One map; the first row of a panel is drawn at the bottom, that of an image at the top."""
    rows, columns = values.shape
    order = range(rows - 1, -1, -1)

    def hover(row: int, column: int) -> str:
        name = class_names[top[row, column]] if top[row, column] >= 0 else "undefined"
        value = values[row, column]
        number = f"{value:.3f}" if np.isfinite(value) else "undefined"
        return f"row {row}, column {column}\n{color_label} {number}\ntop class {name}"

    return HeatPanel(
        title,
        x_label="column of patches",
        y_label="row of patches",
        x_names=[str(column) for column in range(columns)],
        y_names=[str(row) for row in order],
        values=[
            [float(value) if np.isfinite(value) else None for value in values[row]] for row in order
        ],
        color_label=color_label,
        hovers=[[hover(row, column) for column in range(columns)] for row in order],
        color_range=color_range,
    )


def vision_sentences(
    rows: Sequence[VisionLayerRow],
    differences: Mapping[str, tuple[int, float | None, Interval]],
    image: StudiedImage | None,
    patches: Sequence[PatchLayerRow],
) -> list[str]:
    """What the numbers say, a sentence each.

    `differences` is, by lens, a layer and the mean difference of its KL to the logit lens's there.
    """
    says = []
    model = next(row for row in rows if row.layer == max(row.layer for row in rows))
    if model.accuracy is not None:
        says.append(
            "The model itself gives the label to "
            f"{_share(model.accuracy, model.accuracy_interval)} of {model.labelled:,} labelled "
            "images."
        )
    for lens, of_lens in _by_lens(rows).items():
        below = [row for row in of_lens if row.layer != model.layer]
        settled = _settled_layer(of_lens)
        if settled is None:
            says.append(f"{lens}: agreement with the model is undefined in the last layer.")
        elif settled.layer == model.layer:
            best = max(below, key=lambda row: row.agreement or 0.0)
            says.append(
                f"{lens}: below the last layer, agreement with the model does not stay at "
                f"{SETTLED:.0%} of {model.n:,} images; it is highest in layer {best.layer}, "
                f"{_share(best.agreement, best.agreement_interval)}."
            )
        else:
            says.append(
                f"{lens}: from layer {settled.layer} of {model.layer} on, the class token says the "
                f"model's class for at least {SETTLED:.0%} of {model.n:,} images (there "
                f"{_share(settled.agreement, settled.agreement_interval)})."
            )
    for lens, (layer, mean, (low, high)) in differences.items():
        if mean is None or low is None or high is None:
            continue
        if low <= 0 <= high:
            says.append(
                f"{lens}: no clear difference in KL to the logit lens at layer {layer} "
                f"({mean:+.3f} nats, 95 % {low:+.3f} to {high:+.3f}, n = {model.n:,})."
            )
        else:
            says.append(
                f"{lens} is {'nearer to' if mean < 0 else 'farther from'} the model than the logit "
                f"lens at layer {layer}: KL {mean:+.3f} nats (95 % {low:+.3f} to {high:+.3f}, "
                f"n = {model.n:,})."
            )
    if image is not None and patches:
        lens = patches[-1].lens
        of_lens = [row for row in patches if row.lens == lens]
        best = max(of_lens, key=lambda row: row.patch_mean or 0.0)
        says.append(
            f"{image.name}, one image: {lens} gives {image.class_name!r} most at its patches in "
            f"layer {best.layer} (mean {best.patch_mean or 0.0:.2f}, on top at "
            f"{best.top_share:.0%} of the patches)."
        )
    return says


def _by_lens(rows: Sequence[VisionLayerRow]) -> dict[str, list[VisionLayerRow]]:
    """The rows of each lens, by layer."""
    found: dict[str, list[VisionLayerRow]] = {}
    for row in rows:
        found.setdefault(row.lens, []).append(row)
    return found


def _settled_layer(rows: Sequence[VisionLayerRow]) -> VisionLayerRow | None:
    """The row of the lowest layer from which on agreement never falls below `SETTLED`."""
    settled = None
    for row in reversed(rows):
        if row.agreement is None or row.agreement < SETTLED:
            break
        settled = row
    return settled


def _share(mean: float | None, interval: Interval) -> str:
    """A share with its interval, in per cent."""
    if mean is None:
        return "an undefined share"
    low, high = interval
    if low is None or high is None:
        return f"{mean:.0%}"
    return f"{mean:.0%} (95 % {low:.0%} to {high:.0%})"

"""Rows of the study of vision: a lens at the class token, by layer, and at patches of an image."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ....cache.format.manifest import ImageGrid
from ....probes.base.resampling import Interval
from ..trajectories.position_sample import PositionSample
from ..trajectories.readings import Trajectories

Mean = tuple[float | None, Interval]


@dataclass(frozen=True)
class VisionLayerRow:
    """One lens at the class token of `n` images, at one layer; nats, shares."""

    lens: str
    layer: int
    n: int
    """Images whose distributions are defined."""
    labelled: int
    """Of these, images whose label is a class of the model."""
    accuracy: float | None
    """Share of the labelled images whose label is on top."""
    accuracy_interval: Interval
    agreement: float | None
    """Share of images whose top class is the model's."""
    agreement_interval: Interval
    kl: float | None
    """KL(model || lens), mean."""
    kl_interval: Interval
    entropy: float | None
    """Mean entropy of the lens's distribution."""
    perplexity: float | None
    """Mean of exp(entropy): the number of classes that share the probability."""
    perplexity_interval: Interval
    confidence: float | None
    """Mean of the largest probability."""
    confidence_interval: Interval


@dataclass(frozen=True)
class PatchLayerRow:
    """One lens on one image at one layer: the class at the class token, and over the patches."""

    lens: str
    layer: int
    class_token: float | None
    """Probability of the class at the class token."""
    patch_mean: float | None
    """Mean probability of the class over the patches."""
    patch_max: float | None
    """Largest probability of the class at a patch."""
    row: int | None
    """Row of this patch, 0 at the top."""
    column: int | None
    """Column of this patch, 0 at the left."""
    top_share: float
    """Share of the patches with the class on top."""
    patch_entropy: float | None
    """Mean entropy over the patches, nats."""


@dataclass(frozen=True, eq=False)
class PatchMaps:
    """What one lens says at every patch of one image."""

    lens: str
    layers: tuple[int, ...]
    probability: np.ndarray
    """Probability of the class, `(layers, rows, columns)` float64; NaN where undefined."""
    entropy: np.ndarray
    """Nats, `(layers, rows, columns)` float64."""
    top: np.ndarray
    """Top class, `(layers, rows, columns)` int64; -1 where undefined."""
    class_token: np.ndarray
    """Probability of the class at the class token, `(layers,)` float64."""


def vision_rows(
    sample: PositionSample, readings: Mapping[str, Trajectories], classes: np.ndarray
) -> list[VisionLayerRow]:
    """A row for each lens and layer. `classes` `(n,)` is the class of each label, -1 for none."""
    rows = []
    for name, found in readings.items():
        model_top = found.top[:, -1]
        for column, layer in enumerate(found.layers):
            top = found.top[:, column]
            defined = top >= 0
            of_label = np.where(defined & (classes >= 0), top == classes, np.nan)
            of_model = np.where(defined & (model_top >= 0), top == model_top, np.nan)
            entropy = found.values["entropy"][:, column].astype(np.float64)
            accuracy, agreement = sample.mean(of_label), sample.mean(of_model)
            kl = sample.mean(found.values["kl"][:, column].astype(np.float64))
            perplexity = sample.mean(np.exp(entropy))
            confidence = sample.mean(found.values["max_probability"][:, column].astype(np.float64))
            rows.append(
                VisionLayerRow(
                    lens=name,
                    layer=layer,
                    n=int(defined.sum()),
                    labelled=int((defined & (classes >= 0)).sum()),
                    accuracy=accuracy[0],
                    accuracy_interval=accuracy[1],
                    agreement=agreement[0],
                    agreement_interval=agreement[1],
                    kl=kl[0],
                    kl_interval=kl[1],
                    entropy=sample.mean(entropy)[0],
                    perplexity=perplexity[0],
                    perplexity_interval=perplexity[1],
                    confidence=confidence[0],
                    confidence_interval=confidence[1],
                )
            )
    return rows


def patch_maps(found: Trajectories, grid: ImageGrid) -> PatchMaps:
    """Maps of the readings of one image, whose positions are all in `found`, in their order.

    The tracked token of the readings is the class.
    """

    def on_grid(values: np.ndarray) -> np.ndarray:
        return values[grid.first_patch :].T.reshape(-1, grid.rows, grid.columns)

    probability = np.exp(found.values["tracked_log_p"].astype(np.float64))
    return PatchMaps(
        lens=found.lens,
        layers=found.layers,
        probability=on_grid(probability),
        entropy=on_grid(found.values["entropy"].astype(np.float64)),
        top=on_grid(found.top),
        class_token=probability[0],
    )


def patch_rows(maps: PatchMaps, class_id: int) -> list[PatchLayerRow]:
    """A row for each layer of one image."""
    rows = []
    for number, layer in enumerate(maps.layers):
        probability, entropy = maps.probability[number], maps.entropy[number]
        best: tuple[int, int] | None = None
        if np.isfinite(probability).any():
            where = np.unravel_index(int(np.nanargmax(probability)), probability.shape)
            best = int(where[0]), int(where[1])
        rows.append(
            PatchLayerRow(
                lens=maps.lens,
                layer=layer,
                class_token=_number(maps.class_token[number]),
                patch_mean=_mean(probability),
                patch_max=None if best is None else float(probability[best]),
                row=None if best is None else best[0],
                column=None if best is None else best[1],
                top_share=float((maps.top[number] == class_id).mean()),
                patch_entropy=_mean(entropy),
            )
        )
    return rows


def _mean(values: np.ndarray) -> float | None:
    """Mean of the defined values; None without any."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

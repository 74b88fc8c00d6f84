"""Rows of the study of prediction depth: depths by layer and class, and their correlations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ....probes.base.resampling import Interval
from ..trajectories.position_sample import PositionSample
from .depths import agreement
from .rank_correlations import correlate_ranks
from .token_classes import DECILES, TOKEN_CLASSES

ALL, CLASS, FREQUENCY, LEARNED = "all", "class", "frequency", "learned"
"""What positions are divided by: nothing, the class of the next token, the decile of its frequency,
the iteration at which it was learned."""


@dataclass(frozen=True)
class PredictionDepthRow:
    """Prediction depth of one lens over a group of positions."""

    lens: str
    division: str
    """`all`, `class`, `frequency` or `learned`."""
    group: str
    """Class of the text's next token, its frequency decile (1 is rare), or its iteration."""
    n: int
    """Positions of the group with a depth."""
    depth: float | None
    """Mean prediction depth, in layers."""
    depth_interval: Interval
    depth_median: float | None
    loss: float | None
    """Mean -log p of the text's next token under the model, in nats."""
    accuracy: float | None
    """Share of positions whose next token the model has on top."""


@dataclass(frozen=True)
class DepthShareRow:
    """Where the positions of one lens settle, layer by layer."""

    lens: str
    layer: int
    n: int
    share: float | None
    """Share of positions whose prediction depth this layer is."""
    share_interval: Interval
    settled: float | None
    """Share of positions with this depth or a smaller one."""
    agreement: float | None
    """Share of positions where the lens's top token is the model's, settled or not."""
    agreement_interval: Interval


@dataclass(frozen=True)
class DepthCorrelationRow:
    """Spearman correlation of prediction depth with another number of the position."""

    lens: str
    variable: str
    """`loss`, `frequency`, `iteration learned` or the name of a label."""
    given: str
    """`loss` for the partial correlation given the loss, else empty."""
    positions: str
    """`all`; `learned`: those that the last checkpoint predicts; `all, never last`: with the others
    learned after the last checkpoint; `right`: those that the model of the cache predicts."""
    n: int
    correlation: float | None
    correlation_interval: Interval


def depth_row(
    sample: PositionSample,
    values: tuple[np.ndarray, np.ndarray, np.ndarray],
    mask: np.ndarray,
    names: tuple[str, str, str],
) -> PredictionDepthRow:
    """The row of the positions of `mask`; `values` are depth, loss and correctness, `(n,)`.

    `names` are those of the lens, the division and the group.
    """
    depth, loss, correct = (np.where(mask, column, np.nan) for column in values)
    known = depth[~np.isnan(depth)]
    mean, interval = sample.mean(depth)
    lens, division, group = names
    return PredictionDepthRow(
        lens=lens,
        division=division,
        group=group,
        n=len(known),
        depth=mean,
        depth_interval=interval,
        depth_median=float(np.median(known)) if len(known) else None,
        loss=sample.mean(loss)[0],
        accuracy=sample.mean(correct)[0],
    )


def depth_rows(
    sample: PositionSample,
    lens: str,
    values: tuple[np.ndarray, np.ndarray, np.ndarray],
    groups: Mapping[str, np.ndarray],
) -> list[PredictionDepthRow]:
    """One lens over all positions, and over each group of the divisions in `groups`.

    `groups` maps `class`, `frequency` and `learned` to the group of each position `(n,)`; empty
    words, the decile 0 and NaN belong to none.
    """
    everywhere = np.ones(sample.count, bool)
    rows = [depth_row(sample, values, everywhere, (lens, ALL, ALL))]
    for division, group in groups.items():
        if division == CLASS:
            numbers: Sequence[float | str] = TOKEN_CLASSES
        elif division == FREQUENCY:
            numbers = range(1, DECILES + 1)
        else:
            numbers = np.unique(group[~np.isnan(group)]).tolist()
        for number in numbers:
            mask = group == number
            if mask.any():
                name = _iteration_name(number) if division == LEARNED else str(number)
                rows.append(depth_row(sample, values, mask, (lens, division, name)))
    return rows


def _iteration_name(iteration: "float | str") -> str:
    """Name of a group of positions by the checkpoint that learned them."""
    return "never" if iteration == np.inf else f"{float(iteration):.10g}"


def share_rows(
    sample: PositionSample, lens: str, layers: Sequence[int], top: np.ndarray, depth: np.ndarray
) -> list[DepthShareRow]:
    """Where one lens settles; `top` `(n, layers)` and `depth` `(n,)` as in depths.py."""
    agrees = agreement(top)
    rows = []
    for column, layer in enumerate(layers):
        is_here = np.where(np.isnan(depth), np.nan, depth == layer)
        share, share_interval = sample.mean(is_here)
        agreed, agreed_interval = sample.mean(agrees[:, column])
        rows.append(
            DepthShareRow(
                lens=lens,
                layer=layer,
                n=int((~np.isnan(depth)).sum()),
                share=share,
                share_interval=share_interval,
                settled=sample.mean(np.where(np.isnan(depth), np.nan, depth <= layer))[0],
                agreement=agreed,
                agreement_interval=agreed_interval,
            )
        )
    return rows


def correlation_rows(
    sample: PositionSample,
    lens: str,
    depth: np.ndarray,
    variables: Mapping[tuple[str, str], np.ndarray],
    loss: np.ndarray,
) -> list[DepthCorrelationRow]:
    """Correlations of `depth` with `variables` and, but for the loss, the partial ones given it.

    `variables` maps (name, positions) to numbers `(n,)`, NaN where there is none.
    """
    rows = []
    for (name, positions), numbers in variables.items():
        for given in ("",) if name == "loss" else ("", "loss"):
            found = correlate_ranks(
                depth, numbers, sample.unit_numbers, sample.weights, loss if given else None
            )
            rows.append(
                DepthCorrelationRow(
                    lens=lens,
                    variable=name,
                    given=given,
                    positions=positions,
                    n=found.n,
                    correlation=found.value,
                    correlation_interval=found.interval,
                )
            )
    return rows

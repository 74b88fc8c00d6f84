"""Quality of lenses layer by layer: perplexity, KL, bias of the marginal, echo of the input token.

All numbers are means over the sampled positions where they are defined, with 95 % intervals over
documents. Layer L is the model itself for every lens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ....probes.base.resampling import Interval
from ..trajectories.position_sample import PositionSample
from ..trajectories.readings import Trajectories

BITS = 1 / float(np.log(2.0))
"""Bits of a nat."""


@dataclass(frozen=True)
class LensLayerRow:
    """What one lens says at one layer, over all sampled positions; nats unless said."""

    lens: str
    layer: int
    n: int
    """Positions at which the lens and the model give distributions."""
    kl: float | None
    """Mean KL(model || lens)."""
    kl_interval: Interval
    cross_entropy: float | None
    """Mean -log q of the text's next token."""
    cross_entropy_interval: Interval
    bits: float | None
    """`cross_entropy` in bits per token."""
    perplexity: float | None
    """exp(`cross_entropy`)."""
    perplexity_interval: Interval
    marginal_bias: float | None
    """KL of the mean distributions, model || lens: what the lens gets wrong whatever it reads."""
    marginal_bias_bits: float | None
    echo: float | None
    """Share of positions where the top token is the token that was just read."""
    echo_interval: Interval
    echo_excess: float | None
    """`echo` less that of the model at the same positions."""
    echo_excess_interval: Interval
    agreement: float | None
    """Share of positions where the top token is the model's."""
    agreement_interval: Interval
    entropy: float | None
    entropy_interval: Interval
    js: float | None
    """Mean Jensen-Shannon divergence from the model, at most ln 2."""
    js_interval: Interval
    total_variation: float | None
    """Mean of half the sum of |p - q|."""
    total_variation_interval: Interval
    max_probability: float | None
    max_probability_interval: Interval
    rank: float | None
    """Median rank of the model's top token, 1 for the top."""
    text_rank: float | None
    """Median rank of the text's next token."""


def lens_layer_rows(
    sample: PositionSample, readings: Mapping[str, Trajectories]
) -> list[LensLayerRow]:
    """One row for each lens and layer; measures that `readings` lack are None."""
    return [
        _layer_row(sample, lens, column, layer)
        for lens in readings.values()
        for column, layer in enumerate(lens.layers)
    ]


def _layer_row(sample: PositionSample, lens: Trajectories, column: int, layer: int) -> LensLayerRow:
    """The row of one column of the readings."""

    def values(name: str) -> np.ndarray:
        if name not in lens.values:
            return np.full(sample.count, np.nan)
        return lens.values[name][:, column].astype(np.float64)

    kl, kl_interval = sample.mean(values("kl"))
    loss, loss_interval = sample.mean(values("cross_entropy"))
    echo, echo_interval = sample.mean(echoes(lens.top[:, column], sample.tokens))
    own_echoes = echoes(lens.top[:, -1], sample.tokens)
    excess, excess_interval = sample.mean(echoes(lens.top[:, column], sample.tokens) - own_echoes)
    agreement, agreement_interval = sample.mean(agrees(lens.top, column))
    entropy, entropy_interval = sample.mean(values("entropy"))
    js, js_interval = sample.mean(values("js"))
    variation, variation_interval = sample.mean(values("total_variation"))
    largest, largest_interval = sample.mean(values("max_probability"))
    bias = None
    if lens.marginal is not None:
        bias = marginal_kl(lens.marginal[-1], lens.marginal[column])
    return LensLayerRow(
        lens=str(lens.lens),
        layer=layer,
        n=int(((lens.top[:, column] >= 0) & (lens.top[:, -1] >= 0)).sum()),
        kl=kl,
        kl_interval=kl_interval,
        cross_entropy=loss,
        cross_entropy_interval=loss_interval,
        bits=None if loss is None else loss * BITS,
        perplexity=_exponential(loss),
        perplexity_interval=(_exponential(loss_interval[0]), _exponential(loss_interval[1])),
        marginal_bias=bias,
        marginal_bias_bits=None if bias is None else bias * BITS,
        echo=echo,
        echo_interval=echo_interval,
        echo_excess=excess,
        echo_excess_interval=excess_interval,
        agreement=agreement,
        agreement_interval=agreement_interval,
        entropy=entropy,
        entropy_interval=entropy_interval,
        js=js,
        js_interval=js_interval,
        total_variation=variation,
        total_variation_interval=variation_interval,
        max_probability=largest,
        max_probability_interval=largest_interval,
        rank=_median(values("rank")),
        text_rank=_median(values("text_rank")),
    )


def echoes(top: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """1 where the top token `(n,)` is the token that was read, else 0; NaN where undefined."""
    return np.where(top < 0, np.nan, top == tokens)


def agrees(top: np.ndarray, column: int) -> np.ndarray:
    """1 where a column of `top` `(n, layers)` is the last one; NaN where either is undefined."""
    here, model = top[:, column], top[:, -1]
    return np.where((here < 0) | (model < 0), np.nan, here == model)


def marginal_kl(model: np.ndarray, lens: np.ndarray) -> float | None:
    """KL(model || lens) of two mean distributions `(vocab,)` in nats; None if one is undefined.

    Infinity where the lens never gives mass to a token that the model does.
    """
    if not (np.isfinite(model).all() and np.isfinite(lens).all()):
        return None
    p, q = model[model > 0], lens[model > 0]
    with np.errstate(divide="ignore"):
        return max(0.0, float((p * (np.log(p) - np.log(q))).sum()))


def _exponential(value: float | None) -> float | None:
    """exp of a number of nats, infinity beyond float64; None stays."""
    with np.errstate(over="ignore"):
        return None if value is None else float(np.exp(value))


def _median(values: np.ndarray) -> float | None:
    """Median of the values that are not NaN; None without any."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None

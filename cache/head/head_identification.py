"""Identification of a model's final norm, unembedding, scale and softcap as plain tensors.

`identify_head` measures the model's tail (from the last block's output to the logits) on chosen
residuals and gives a `Head`:

1. large residuals, beside which eps vanishes: kind, gain and bias of the norm by least squares;
2. small residuals, in which eps dominates: eps;
3. residuals of the model's own size: scale and softcap after the unembedding.

A measured value is replaced by the parameter or configuration constant of the model next to it
(within a tolerance), so that the head is exact. `verify_head` then compares the head with the
model's logits on other tokens. Called by `cache/checks/model_checks.py`; a model whose tail has
another form gets a recorded program instead (`record_head.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import HeadMismatchError, ModelError
from ..model.blocks import DecoderBlocks
from ..model.model_devices import loaded_parameters, loaded_tensor
from .head import Head

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest |head - model| / max |model| over the reference rows' logits, per compute dtype."""
FIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative error of a fitted norm, scale or softcap, per dtype of the unembedding."""
LARGE_STD = 100.0
"""Standard deviation of residuals beside which no norm's eps matters."""
SMALL_STD = 1e-3
"""Standard deviation of residuals beside which every norm's eps matters."""
COMMON_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 0.0)
"""Candidates for eps beside the constants of the model's configuration."""


@dataclass(frozen=True)
class TailObservation:
    """One run of the tail: `hidden`, `normed` `(n, d_model)`; `raw`, `logits` `(n, vocab)`."""

    hidden: np.ndarray
    """Residuals that entered the tail."""
    normed: np.ndarray
    """Input of the unembedding."""
    raw: np.ndarray
    """Output of the unembedding; may have padding columns beyond the vocabulary."""
    logits: np.ndarray
    """Output of the model."""


@dataclass(frozen=True)
class NormFit:
    """A norm with its gain and bias, `(d_model,)` each, fitted to one observation."""

    kind: str
    """One of `head.NORMS`."""
    weight: np.ndarray
    bias: np.ndarray
    error: float
    """Largest |fit - normed| / max |normed|."""


def identify_head(blocks: DecoderBlocks, ids: torch.Tensor) -> tuple[Head, dict[str, torch.Tensor]]:
    """Identify the head of the model around `blocks` from the tokens `ids`, `(batch, length)`.

    Returns the head, and its tensors in the model's own dtype for the disk. Raises `ModelError`
    if the tail is not norm, linear, scale, softcap.
    """
    unembed = _unembedding(blocks.model)
    # The dtype of the unembedding decides: the stream may be float32 around bfloat16 weights
    # (mamba).
    tolerance = FIT_TOLERANCE.get(unembed.weight.dtype, 1e-4)
    constants = sorted(set(_model_constants(blocks.model)))
    residuals = _with_noise(blocks.residuals(ids)[-1])

    # Kind, gain and bias, where eps does not matter.
    large = observe_tail(blocks, unembed, ids, scale_to_std(residuals, LARGE_STD))
    norm = _identify_norm(blocks.model, large, tolerance)

    # eps, where it dominates.
    eps = 0.0
    if norm.kind != "none":
        small = observe_tail(blocks, unembed, ids, scale_to_std(residuals, SMALL_STD))
        eps = _identify_eps(norm, small, [*constants, *COMMON_EPS])

    # Scale and softcap, at the size of the model's own residuals.
    natural = observe_tail(blocks, unembed, ids, residuals)
    scale, softcap = _identify_output(natural, constants, tolerance)

    # The unembedding is a parameter of the model; its padding rows are cut off.
    vocab = natural.logits.shape[-1]
    bias = torch.zeros(vocab)
    if unembed.bias is not None:
        bias = loaded_tensor(unembed, "bias").detach().float().cpu()
    tensors = {
        "norm_weight": torch.from_numpy(norm.weight.astype(np.float32)),
        "norm_bias": torch.from_numpy(norm.bias.astype(np.float32)),
        "unembedding": loaded_tensor(unembed, "weight").detach().cpu()[:vocab],
        "bias": bias[:vocab],
    }
    # Copies: the model may be changed or freed while the head lives.
    arrays = {name: tensor.float().clone().numpy() for name, tensor in tensors.items()}
    return Head(norm.kind, eps, **arrays, scale=scale, softcap=softcap), tensors


def verify_head(
    head: Head, hidden: torch.Tensor, logits: torch.Tensor, dtype: torch.dtype
) -> float:
    """Compare `head(hidden)` with the model's `logits`: largest |difference| / largest |logit|.

    Raises `HeadMismatchError` if the error is above `TOLERANCE` of the compute dtype. The head
    reads the rows shuffled, and one row alone: a row's logits must not depend on its neighbours.
    """
    expected = logits.float().cpu().numpy().reshape(-1, logits.shape[-1])
    rows = hidden.float().cpu().numpy().reshape(len(expected), -1)
    order = np.random.default_rng(0).permutation(len(rows))
    largest_logit = max(float(np.abs(expected).max()), 1e-30)
    error = max(
        float(np.abs(head.logits(rows[index]) - expected[index]).max()) / largest_logit
        for index in (order, order[:1])
    )
    limit = TOLERANCE.get(dtype, 1e-5)
    if not error <= limit:
        raise HeadMismatchError(
            f"the head read from this model does not reproduce its logits: relative error "
            f"{error:.1e}, allowed {limit:.0e} for {dtype}; nothing was written"
        )
    return error


def scale_to_std(hidden: torch.Tensor, std: float) -> torch.Tensor:
    """`hidden`, any shape, multiplied so that the standard deviation of all values is `std`."""
    return hidden * (std / hidden.float().std()).to(hidden)


def observe_tail(
    blocks: DecoderBlocks, unembed: nn.Linear, ids: torch.Tensor, hidden: torch.Tensor
) -> TailObservation:
    """Run the tail on `hidden`, `(batch, length, d_model)`, and record the unembedding's ends.

    Raises `ModelError` unless the unembedding runs exactly once.
    """
    calls: list[tuple[Any, Any]] = []
    handle = unembed.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    try:
        logits = blocks.run_tail(hidden, ids)
    finally:
        handle.remove()
    if len(calls) != 1:
        raise ModelError(f"the unembedding ran {len(calls)} times in one forward pass, expected 1")
    normed, raw = calls[0]
    return TailObservation(*(_float64_rows(tensor) for tensor in (hidden, normed, raw, logits)))


def _float64_rows(tensor: torch.Tensor) -> np.ndarray:
    """`(..., width)` as float64 `(n, width)`."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).cpu().double().numpy()


def _unembedding(model: Any) -> nn.Linear:
    """The model's output embeddings; raises `ModelError` unless they are one linear map."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(module, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear unembedding (found {type(module).__name__}); "
            "a causal language model with one unembedding matrix is needed"
        )
    return module


def _model_constants(model: nn.Module) -> Iterator[float]:
    """Positive numbers of the configuration, and attributes of modules with `eps` in the name."""

    def positive_numbers(value: Any) -> Iterator[float]:
        if isinstance(value, dict):
            for item in value.values():
                yield from positive_numbers(item)
        elif isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6:
            yield float(value)

    config: Any = getattr(model, "config", None)
    if config is not None:
        yield from positive_numbers(config.to_dict())
    for module in model.modules():
        yield from positive_numbers({k: v for k, v in vars(module).items() if "eps" in k})


def _with_noise(hidden: torch.Tensor) -> torch.Tensor:
    """The residual stream plus noise of the same size, so that every direction varies."""
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    return hidden + noise * hidden.float().std().to(hidden)


def _identify_norm(model: nn.Module, large: TailObservation, tolerance: float) -> NormFit:
    """Fit the norm to large residuals, with gain and bias snapped to the model's parameters."""
    fit = _fit_norm(large, tolerance)
    if fit.error > tolerance:
        raise ModelError(
            f"{type(model).__name__}: what enters the unembedding is not a layer norm or RMS "
            f"norm of the last block's output (relative error {fit.error:.1e})"
        )
    # Some models (gemma) multiply by 1 + weight.
    vectors = [
        parameter.detach().float().cpu().numpy()
        for parameter in loaded_parameters(model)
        if parameter.shape == fit.weight.shape
    ]
    gains = [*vectors, *(1 + vector for vector in vectors), np.ones_like(fit.weight)]
    weight = _snap_to_parameter(fit.weight, gains, tolerance)
    bias = _snap_to_parameter(fit.bias, [np.zeros_like(fit.bias), *vectors], tolerance)
    return NormFit(fit.kind, weight, bias, fit.error)


def _fit_norm(large: TailObservation, tolerance: float) -> NormFit:
    """Kind, gain and bias by least squares per column; the first kind that fits well, or the best.

    The error is infinite if the unembedding's input has another width than the residuals.
    """
    if large.normed.shape != large.hidden.shape:
        return NormFit("none", np.ones(1), np.zeros(1), np.inf)
    normed = large.normed
    fits = []
    for kind in ("none", "rmsnorm", "layernorm"):
        # normed = x * weight + bias, a regression with one slope and intercept per column.
        x = _standardize(large.hidden, kind, 0.0)
        x_centred, y_centred = x - x.mean(0), normed - normed.mean(0)
        weight = (x_centred * y_centred).sum(0) / np.maximum((x_centred**2).sum(0), 1e-300)
        bias = normed.mean(0) - weight * x.mean(0)
        error = float(np.abs(x * weight + bias - normed).max() / np.abs(normed).max())
        fits.append(NormFit(kind, weight, bias, error))
        # The simplest kind wins: a layer norm also fits where means are zero.
        if error <= tolerance / 10:
            break
    return min(fits, key=lambda fit: fit.error)


def _standardize(hidden: np.ndarray, kind: str, eps: float) -> np.ndarray:
    """Rows `(n, d_model)` after the norm `kind`, without gain and bias."""
    if kind == "none":
        return hidden
    if kind == "layernorm":
        hidden = hidden - hidden.mean(-1, keepdims=True)
    return hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + eps)


def _snap_to_parameter(
    measured: np.ndarray, candidates: list[np.ndarray], tolerance: float
) -> np.ndarray:
    """The candidate next to `measured`, else the next multiple of one, else `measured` itself."""
    limit = 3 * tolerance * max(1.0, float(np.abs(measured).max()))

    def distance(candidate: np.ndarray) -> float:
        return float(np.abs(measured - candidate).max())

    nearest = min(candidates, key=distance)
    if distance(nearest) <= limit:
        return nearest
    # Some models divide by a constant between norm and unembedding.
    slopes = [float(measured @ c) / max(float(c @ c), 1e-300) for c in candidates]
    multiples = [c * slope for c, slope in zip(candidates, slopes, strict=True)]
    nearest = min(multiples, key=distance)
    return nearest if distance(nearest) <= limit else measured


def _identify_eps(norm: NormFit, small: TailObservation, candidates: list[float]) -> float:
    """The candidate that best explains the norm of small residuals, else the measured eps."""

    def rms_error(eps: float) -> float:
        # A mean, not a maximum: rounding in half precision drowns the largest difference.
        predicted = _standardize(small.hidden, norm.kind, eps) * norm.weight + norm.bias
        return float(np.sqrt(((predicted - small.normed) ** 2).mean()))

    # Measure how far eps shrinks each row: normed = bias + weight * shrink * standardized, with
    # shrink = sqrt(v / (v + eps)) for the row's variance (RMS norm: mean square) v.
    standardized = _standardize(small.hidden, norm.kind, 0.0)
    signal = (small.normed - norm.bias) / np.where(norm.weight == 0, np.inf, norm.weight)
    shrink = (signal * standardized).sum(-1) / np.maximum((standardized**2).sum(-1), 1e-300)

    # Solve for eps = v (1 / shrink² - 1), and take the median over rows.
    mean = small.hidden.mean(-1, keepdims=True) if norm.kind == "layernorm" else 0.0
    variance = ((small.hidden - mean) ** 2).mean(-1)
    solved = float(np.median(variance * (1 / np.maximum(shrink, 1e-12) ** 2 - 1)))
    measured = max(solved, 0.0)

    # A constant of the model wins unless the measured value explains the rows twice as well.
    nearest = min((c for c in candidates if 0 <= c <= 1e-2), key=rms_error)
    return nearest if rms_error(nearest) <= 2 * rms_error(measured) + 1e-6 else measured


def _identify_output(
    natural: TailObservation, constants: list[float], tolerance: float
) -> tuple[float, float | None]:
    """Scale and softcap (None without) between the unembedding's output and the logits."""
    raw, logits = natural.raw[:, : natural.logits.shape[-1]], natural.logits
    largest_logit = np.abs(logits).max()
    limit = tolerance / 5

    # A scale alone: the least-squares slope, snapped to 1, a constant or a constant's inverse.
    slope = float((raw * logits).sum() / max((raw**2).sum(), 1e-300))
    scales = [1.0, *constants, *(1 / constant for constant in constants if constant)]
    scale = min(scales, key=lambda candidate: abs(candidate - slope))
    scale = scale if abs(scale - slope) <= 1e-4 * abs(slope) else slope
    if np.abs(raw * scale - logits).max() <= limit * largest_logit:
        return scale, None

    # A softcap c tanh(s x / c): only constants c that no logit exceeds.
    caps = [constant for constant in constants if constant >= largest_logit * (1 - 1e-3)]
    fits = [
        (np.abs(c * np.tanh(s * raw / c) - logits).max() / largest_logit, s, c)
        for c in caps
        for s in sorted({1.0, *scales})
    ]
    error, scale, softcap = min(fits, default=(np.inf, 1.0, 1.0))
    if error > limit:
        raise ModelError("the step from the unembedding to the logits is not a scale or a softcap")
    return scale, softcap

"""Identifies a model's head by probing its own tail, so that it can be kept as plain tensors.

The tail is run on chosen residuals; what enters and leaves the unembedding shows the norm (kind,
gain, bias, eps), the scale and the softcap. Values are snapped to parameters and configuration
constants of the model, which makes them exact. The result is believed only where it reproduces
the model's logits on other tokens (`verify_head`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import HeadMismatchError, ModelError
from ..model.blocks import DecoderBlocks
from .head import Head

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest |head - model| / max |model| over the canary's logits, per compute dtype."""
FIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
LARGE = 100.0
"""Standard deviation of residuals beside which no norm's eps matters."""
SMALL = 1e-3
"""Standard deviation of residuals beside which every norm's eps matters."""
COMMON_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 0.0)


@dataclass(frozen=True)
class Observation:
    """One run of the tail: `hidden`, `normed` `(n, d_model)`; `raw`, `logits` `(n, vocab)`."""

    hidden: np.ndarray
    normed: np.ndarray
    raw: np.ndarray
    logits: np.ndarray


def identify_head(stack: DecoderBlocks, ids: torch.Tensor) -> tuple[Head, dict[str, torch.Tensor]]:
    """The head of the stack's model, and its tensors in the model's own dtype for the disk.

    Raises `ModelError` where the tail is not norm, linear, scale, softcap.
    """
    unembed = _unembedding(stack.model)
    # The stream may be float32 where norm and unembedding are not (mamba).
    tolerance = FIT_TOLERANCE.get(unembed.weight.dtype, 1e-4)
    constants = sorted(set(_constants(stack.model)))
    noisy = _noisy(stack.residuals(ids)[-1])
    kind, eps, weight, bias = _probe_norm(stack, unembed, ids, noisy, constants, tolerance)
    seen = observe(stack, unembed, ids, noisy)
    scale, softcap = _output(seen, constants, tolerance)
    vocab = seen.logits.shape[-1]
    native = unembed.weight.detach().cpu()[:vocab]
    shift = unembed.bias.detach().float().cpu() if unembed.bias is not None else torch.zeros(vocab)
    tensors = {
        "norm_weight": torch.from_numpy(weight),
        "norm_bias": torch.from_numpy(bias),
        "unembedding": native,
        "bias": shift[:vocab],
    }
    # Copies: the model may be changed or freed while the head lives.
    arrays = {name: tensor.float().clone().numpy() for name, tensor in tensors.items()}
    return Head(kind, eps, **arrays, scale=scale, softcap=softcap), tensors


def _noisy(hidden: torch.Tensor) -> torch.Tensor:
    """The residual stream with noise of its own size: every direction moves."""
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    return hidden + noise * hidden.float().std().to(hidden)


def with_scaled_tail(hidden: torch.Tensor, size: float) -> torch.Tensor:
    """`hidden` with a standard deviation of `size`."""
    return hidden * (size / hidden.float().std()).to(hidden)


def _probe_norm(
    stack: DecoderBlocks,
    unembed: nn.Linear,
    ids: torch.Tensor,
    noisy: torch.Tensor,
    constants: list[float],
    tolerance: float,
) -> tuple[str, float, np.ndarray, np.ndarray]:
    """Kind, eps, gain and bias of what happens before the unembedding."""
    # So large that eps is nothing beside the variance, then so small that it matters.
    large = observe(stack, unembed, ids, with_scaled_tail(noisy, LARGE))
    kind, weight, bias, error = _norm(large, tolerance)
    if error > tolerance:
        raise ModelError(
            f"{type(stack.model).__name__}: what enters the unembedding is not a layer norm or RMS "
            f"norm of the last block's output (relative error {error:.1e})"
        )
    vectors = [
        p.detach().float().cpu().numpy()
        for p in stack.model.parameters()
        if p.shape == weight.shape
    ]
    weight = _snap(weight, [*vectors, *(1 + v for v in vectors), np.ones_like(weight)], tolerance)
    bias = _snap(bias, [np.zeros_like(bias), *vectors], tolerance)
    eps = 0.0
    if kind != "none":
        tiny = observe(stack, unembed, ids, with_scaled_tail(noisy, SMALL))
        eps = _eps(kind, weight, bias, tiny, [*constants, *COMMON_EPS])
    return kind, eps, weight.astype(np.float32), bias.astype(np.float32)


def verify_head(
    head: Head, hidden: torch.Tensor, logits: torch.Tensor, dtype: torch.dtype
) -> float:
    """Largest |head(hidden) - logits| over the largest |logit|; raises if too large for `dtype`.

    Rows go to the head in another order, and one alone: each must decode by itself.
    """
    want = logits.float().cpu().numpy().reshape(-1, logits.shape[-1])
    rows = hidden.float().cpu().numpy().reshape(len(want), -1)
    order = np.random.default_rng(0).permutation(len(rows))
    size = max(float(np.abs(want).max()), 1e-30)
    error = max(
        float(np.abs(head.logits(rows[place]) - want[place]).max()) / size
        for place in (order, order[:1])
    )
    limit = TOLERANCE.get(dtype, 1e-5)
    if not error <= limit:
        raise HeadMismatchError(
            f"the head read from this model does not reproduce its logits: relative error "
            f"{error:.1e}, allowed {limit:.0e} for {dtype}; nothing was written"
        )
    return error


def _unembedding(model: Any) -> nn.Linear:
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(module, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear unembedding (found {type(module).__name__}); "
            "a causal language model with one unembedding matrix is needed"
        )
    return module


def observe(
    stack: DecoderBlocks, unembed: nn.Linear, ids: torch.Tensor, hidden: torch.Tensor
) -> Observation:
    """Run the tail on `hidden` and note what enters and leaves the unembedding."""
    seen: list[tuple[Any, Any]] = []
    handle = unembed.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        logits = stack.run_tail(hidden, ids)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ModelError(f"the unembedding ran {len(seen)} times in one forward pass, expected 1")
    return Observation(*(_flat(t) for t in (hidden, *seen[0], logits)))


def _flat(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1, tensor.shape[-1]).double().cpu().numpy()


def _standardize(hidden: np.ndarray, kind: str, eps: float) -> np.ndarray:
    if kind == "none":
        return hidden
    if kind == "layernorm":
        hidden = hidden - hidden.mean(-1, keepdims=True)
    return hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + eps)


def _norm(seen: Observation, tolerance: float) -> tuple[str, np.ndarray, np.ndarray, float]:
    """Kind, gain and bias of the norm, by least squares per column; the first kind that fits."""
    if seen.normed.shape != seen.hidden.shape:
        return "none", np.ones(1), np.zeros(1), np.inf
    fits = []
    for kind in ("none", "rmsnorm", "layernorm"):
        x = _standardize(seen.hidden, kind, 0.0)
        centred, y = x - x.mean(0), seen.normed - seen.normed.mean(0)
        weight = (centred * y).sum(0) / np.maximum((centred**2).sum(0), 1e-300)
        bias = seen.normed.mean(0) - weight * x.mean(0)
        error = float(np.abs(x * weight + bias - seen.normed).max() / np.abs(seen.normed).max())
        fits.append((error, kind, weight, bias))
        if error <= tolerance / 10:
            break
    error, kind, weight, bias = min(fits, key=lambda fit: fit[0])
    return kind, weight, bias, error


def _snap(value: np.ndarray, candidates: list[np.ndarray], tolerance: float) -> np.ndarray:
    """The candidate that `value` measures, or a multiple of it, or `value` if there is none."""
    limit = 3 * tolerance * max(1.0, float(np.abs(value).max()))
    best = min(candidates, key=lambda c: float(np.abs(value - c).max()))
    if float(np.abs(value - best).max()) <= limit:
        return best
    # Some models divide by a constant of their own between norm and unembedding.
    slopes = [float(value @ c) / max(float(c @ c), 1e-300) for c in candidates]
    multiples = [c * slope for c, slope in zip(candidates, slopes, strict=True)]
    best = min(multiples, key=lambda c: float(np.abs(value - c).max()))
    return best if float(np.abs(value - best).max()) <= limit else value


def _eps(
    kind: str, weight: np.ndarray, bias: np.ndarray, tiny: Observation, candidates: list[float]
) -> float:
    """The constant that explains the norm of residuals so small that eps matters."""

    def error(eps: float) -> float:
        # A root of a mean: rounding in half precision drowns the largest difference.
        difference = _standardize(tiny.hidden, kind, eps) * weight + bias - tiny.normed
        return float(np.sqrt((difference**2).mean()))

    variance = _standardize(tiny.hidden, kind, 0.0)
    # |normed| = |standardized| sqrt(v / (v + eps)) gives eps directly; constants then win over it.
    signal = (tiny.normed - bias) / np.where(weight == 0, np.inf, weight)
    shrink = (signal * variance).sum(-1) / np.maximum((variance**2).sum(-1), 1e-300)
    centred = tiny.hidden - (tiny.hidden.mean(-1, keepdims=True) if kind == "layernorm" else 0.0)
    power = (centred**2).mean(-1)
    solved = float(np.median(power * (1 / np.maximum(shrink, 1e-12) ** 2 - 1)))
    best = min((c for c in candidates if 0 <= c <= 1e-2), key=error)
    return best if error(best) <= 2 * error(max(solved, 0.0)) + 1e-6 else max(solved, 0.0)


def _output(
    seen: Observation, constants: list[float], tolerance: float
) -> tuple[float, float | None]:
    """Scale and softcap between the unembedding's output and the logits."""
    raw, logits = seen.raw[:, : seen.logits.shape[-1]], seen.logits
    size = np.abs(logits).max()
    limit = tolerance / 5
    slope = float((raw * logits).sum() / max((raw**2).sum(), 1e-300))
    scales = [1.0, *constants, *(1 / c for c in constants if c)]
    scale = min(scales, key=lambda s: abs(s - slope))
    scale = scale if abs(scale - slope) <= 1e-4 * abs(slope) else slope
    if np.abs(raw * scale - logits).max() <= limit * size:
        return scale, None
    options = [(s, c) for c in constants if c >= size * (1 - 1e-3) for s in sorted({1.0, *scales})]
    fits = [(np.abs(c * np.tanh(s * raw / c) - logits).max() / size, s, c) for s, c in options]
    error, scale, softcap = min(fits, default=(np.inf, 1.0, 1.0))
    if error > limit:
        raise ModelError("the step from the unembedding to the logits is not a scale or a softcap")
    return scale, softcap


def _constants(model: nn.Module) -> Iterator[float]:
    """Positive numbers of the configuration and numeric attributes of modules."""

    def walk(value: Any) -> Iterator[float]:
        if isinstance(value, dict):
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6:
            yield float(value)

    config: Any = getattr(model, "config", None)
    if config is not None:
        yield from walk(config.to_dict())
    for module in model.modules():
        yield from walk({k: v for k, v in vars(module).items() if "eps" in k})

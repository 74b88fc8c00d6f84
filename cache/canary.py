"""Checks before anything is written: does the head reproduce the model, do rows stand alone?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .create import choose_dtype
from .decode import decode, encode
from .errors import ModelError
from .head import Head
from .headprobe import probe_head, verify_head
from .stack import Stack, find_stack, run
from .store import ActivationCache
from .tokens import TokenStream

ROWS = 4
LENGTH = 48
PADDING_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative change of a residual by right padding, per dtype of the model; beyond it,
only sequences of equal length share a batch."""


@dataclass(frozen=True)
class Canary:
    """What a few sequences showed of the model."""

    stack: Stack
    head: Head
    tensors: dict[str, torch.Tensor]
    """The head's tensors in the model's own dtype."""
    head_error: float
    """Largest |head(layer L) - logits| over the largest |logit|, on other tokens."""
    stored_kl: float
    """KL in nats per position from the model to the head on layer L as stored."""
    padding_error: float
    """Largest relative change of a residual when its row is padded on the right."""
    causal: bool
    """False if a later token changes an earlier residual."""
    dtypes: dict[int, str]
    """Stored dtype of each layer, from the calibrated absmax."""

    @property
    def pad(self) -> bool:
        """Whether a row is independent of padding, up to rounding."""
        limit = PADDING_TOLERANCE.get(_dtype(self.stack.model), 1e-4)
        return self.padding_error <= limit

    def report(self) -> dict[str, object]:
        """The measured numbers, for `provenance.json` and people."""
        skip = {"stack", "head", "tensors", "dtypes"}
        shown = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in skip}
        return {**shown, "dtypes": {str(k): v for k, v in self.dtypes.items()}}


def examine(model: torch.nn.Module, stream: TokenStream, compute_dtype: str, policy: str) -> Canary:
    """Find stack and head of `model` and measure them on the first sequences of `stream`."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        ids, other, fresh = _batches(stream, _vocabulary(model), device)
        stack = find_stack(model, ids, other)
        head, tensors = probe_head(stack, other)
        hidden, logits = stack.residuals(fresh)[-1], run(model, fresh).logits
        error = verify_head(head, hidden, logits, _dtype(model))
        absmax = calibrate(stack, stream, device)
        dtypes = {n: choose_dtype(a, compute_dtype, policy) for n, a in enumerate(absmax)}
        return Canary(
            stack,
            head,
            tensors,
            error,
            _stored_kl(head, hidden, logits, dtypes[stack.depth]),
            _padding_error(stack, fresh),
            _is_causal(stack, fresh),
            dtypes,
        )


def reexamine(model: torch.nn.Module, cache: ActivationCache) -> Stack:
    """The stack of `model`, once the head kept in `cache` has reproduced the model's logits."""
    device = next(model.parameters()).device
    rows = int(min(cache.positions, ROWS * LENGTH))
    stream = TokenStream(cache.tokens[:rows], np.array([rows]), np.array([0]))
    with torch.inference_mode():
        ids, other, fresh = _batches(stream, cache.vocab, device)
        stack = find_stack(model, ids, other)
        hidden, logits = stack.residuals(fresh)[-1], run(model, fresh).logits
        verify_head(cache.head, hidden, logits, _dtype(model))
    return stack


def _batches(stream: TokenStream, vocab: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Two batches of one shape and one of another; real tokens first, random ones after them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (3, ROWS, LENGTH))
    real = stream.ids[: ROWS * LENGTH].astype(np.int64)
    ids[0].reshape(-1)[: len(real)] = real
    fresh = ids[2, :3, : LENGTH - 11].copy()
    fresh[0, :] = ids[0, 1, : LENGTH - 11]
    return tuple(torch.from_numpy(a).to(device) for a in (ids[0], ids[1], fresh))


def _dtype(model: torch.nn.Module) -> torch.dtype:
    """The lowest precision among the weights of the model."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def _vocabulary(model: torch.nn.Module) -> int:
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if not hasattr(embedding, "weight"):
        raise ModelError(
            f"{type(model).__name__} has no token embedding; a language model is needed"
        )
    return int(embedding.weight.shape[0])


def calibrate(stack: Stack, stream: TokenStream, device: torch.device) -> list[float]:
    """Largest |value| of each layer on the first sequences, first tokens included."""
    absmax = [0.0] * (stack.depth + 1)
    for number in range(min(ROWS, len(stream.lengths))):
        ids = torch.from_numpy(stream.sequence(number).astype(np.int64))[None].to(device)
        for layer, hidden in enumerate(stack.residuals(ids)):
            absmax[layer] = max(absmax[layer], float(hidden.abs().max()))
    return absmax


def _stored_kl(head: Head, hidden: torch.Tensor, logits: torch.Tensor, dtype: str) -> float:
    stored = decode(encode(hidden.float().cpu().numpy(), dtype), dtype)
    p = torch.log_softmax(logits.double().cpu(), -1)
    q = torch.log_softmax(torch.from_numpy(head.logits(stored)).double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0))


def _padding_error(stack: Stack, ids: torch.Tensor) -> float:
    """Relative change of a short row's residuals when it is padded beside a longer one."""
    short = ids.shape[1] // 2
    mask = torch.ones_like(ids)
    mask[0, short:] = 0
    padded = ids.clone()
    padded[0, short:] = 0
    worst = 0.0
    alone = stack.residuals(ids[:1, :short])
    for one, many in zip(alone, stack.residuals(padded, mask), strict=True):
        change = (many[0, :short].float() - one[0].float()).abs().max()
        worst = max(worst, float(change / one.float().abs().max().clamp_min(1e-30)))
    return worst


def _is_causal(stack: Stack, ids: torch.Tensor) -> bool:
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % int(ids.max().clamp_min(2))
    before, after = stack.residuals(ids)[-1][:, :-1], stack.residuals(changed)[-1][:, :-1]
    return bool((before - after).abs().max() <= 1e-3 * before.abs().max())

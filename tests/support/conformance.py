"""Does a model extract, and is what comes out the model's? One verdict per architecture."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from residua.cache.checks.model_checks import ModelReport, check_model
from residua.cache.errors import ResiduaError
from residua.cache.head.load_head import load_head
from residua.cache.model.blocks import run_model
from residua.cache.tokens.token_stream import TokenStream, from_sequences

from .architectures import VOCAB, build_architecture

TOLERANCE = 1e-5
"""Largest |offline - model| over the largest |logit|, float32."""


@dataclass(frozen=True)
class Verdict:
    """What happened to one architecture."""

    kind: str
    model: str
    """Name of its class, empty if it could not be built."""
    status: str
    """`extracted`, `refused`, `wrong` or `not built`."""
    reason: str = ""
    blocks: str = ""
    depth: int = 0
    d_model: int = 0
    layout: str = ""
    """How the stream lies in the model if not as `(batch, length, d_model)`."""
    head: str = ""
    embedding: bool = True
    causal: bool = True
    pad: bool = True
    states: str = ""
    """Against transformers' own hidden states, layers 0..L-1: `same`, `other` or nothing."""
    error: float = 0.0
    """The largest of all measured against `TOLERANCE`."""


@cache
def random_stream() -> TokenStream:
    """A few sequences of random tokens."""
    rng = np.random.default_rng(3)
    return from_sequences([rng.integers(3, VOCAB - 1, 50) for _ in range(6)])


def check_architecture(kind: str, folder: Path, **fields: Any) -> Verdict:
    """Build, extract, poison and reload one architecture; its head stays in `folder`."""
    try:
        model = build_architecture(kind, **fields)
    except Exception as error:
        return Verdict(kind, "", "not built", _line(error))
    name = type(model).__name__
    try:
        canary = check_model(model, random_stream(), "float32", "auto")
    except ResiduaError as error:
        return Verdict(kind, name, "refused", _line(error))
    ids = torch.from_numpy(np.random.default_rng(11).integers(3, VOCAB - 1, (2, 29)))
    with torch.inference_mode():
        want = run_model(model, ids).logits.clone()
        layers = [layer.clone() for layer in canary.stack.residuals(ids)]
        states = _states(model, ids, layers)
        padding = _padding(canary, ids, layers) if canary.pad else 0.0
    error = max(padding, canary.head_error, _offline(model, canary, layers[-1], want, folder))
    stack, axes = canary.stack, canary.stack.axes
    plain = axes.is_plain and len(stack.stream_indices) == 1
    layout = "" if plain else str(axes.shape(2, 29)) + f" x {len(stack.stream_indices)}"
    status = "extracted" if error <= TOLERANCE and len(layers) == stack.depth + 1 else "wrong"
    return Verdict(
        kind, name, status, "", stack.name, stack.depth, stack.d_model, layout.removesuffix(" x 1"),
        canary.head.kind, canary.embedding, canary.causal, canary.pad, states, error,
    )  # fmt: skip


def _offline(
    model: torch.nn.Module,
    canary: ModelReport,
    hidden: torch.Tensor,
    want: torch.Tensor,
    folder: Path,
) -> float:
    """Error of the head after the model was filled with NaN: numpy, torch, and from the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    canary.head.save(folder, canary.tensors)
    rows, logits = hidden.float().numpy(), want.float().numpy()
    np.savez(folder / "rows.npz", hidden=rows, logits=logits)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    loaded = load_head(folder)
    assert loaded.digest == canary.head.digest
    found = (
        canary.head.logits(rows),
        loaded.logits(rows),
        canary.head.torch()(torch.from_numpy(rows)).numpy(),
    )
    return max(float(np.abs(one - logits).max() / np.abs(logits).max()) for one in found)


def _padding(canary: ModelReport, ids: torch.Tensor, layers: list[torch.Tensor]) -> float:
    """Change of a short row by padding; scaled so that the padding tolerance is `TOLERANCE`."""
    mask, padded = torch.ones_like(ids), ids.clone()
    mask[1, 17:], padded[1, 17:] = 0, 0
    many = canary.stack.residuals(padded, mask)
    alone = canary.stack.residuals(ids[1:, :17])
    pairs = zip(alone, many, strict=True)
    return max(float((m[1, :17] - a[0]).abs().max() / a.abs().max()) for a, m in pairs) / 10


def _states(model: Any, ids: torch.Tensor, layers: list[torch.Tensor]) -> str:
    """Whether transformers reports the same streams before its last one, which is normed."""
    try:
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    except Exception:
        return ""
    if states is None or len(states) != len(layers):
        return ""
    pairs = list(zip(layers[:-1], states[:-1], strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return ""
    return "same" if all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs) else "other"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."

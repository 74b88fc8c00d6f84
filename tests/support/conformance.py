"""Conformance of one architecture: are its blocks found, and does the saved head give its logits?

`check_architecture` builds a tiny model (`architectures.py`), runs `check_model`, fills the model
with NaN and compares the logits of the saved head with those before. The result is a `Verdict`.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from residua.cache.checks.model_checks import ModelReport, check_model
from residua.cache.errors import ModelError, ResiduaError
from residua.cache.head.saved_head import load_head
from residua.cache.model.blocks import DecoderBlocks, run_model
from residua.cache.resuming.resumable_model import ResumableModel
from residua.cache.tokens.token_stream import TokenStream, from_sequences

from .architectures import VOCAB, build_architecture

TOLERANCE = 1e-5
"""Largest allowed difference between logits of head and model, relative to the largest logit."""


@dataclass(frozen=True)
class Verdict:
    """Result of the check of one architecture."""

    kind: str
    model: str
    """Name of the model class; empty if the model could not be built."""
    status: str
    """`extracted`, `refused`, `wrong` or `not built`."""
    reason: str = ""
    blocks: str = ""
    depth: int = 0
    d_model: int = 0
    layout: str = ""
    """Shape of the stream in the model, if not `(batch, length, d_model)`."""
    head: str = ""
    embedding: bool = True
    causal: bool = True
    pad: bool = True
    states: str = ""
    """Layers 0..L-1 compared with transformers' hidden states: `same`, `other`; empty if absent."""
    not_resumed: tuple[int, ...] = ()
    """Layers from which the model is refused to be resumed."""
    resume_error: float = 0.0
    """Largest error of the other layers, on a changed stream, with padding."""
    error: float = 0.0
    """Largest error of all other comparisons."""


@cache
def random_stream() -> TokenStream:
    """Six sequences of 50 random tokens."""
    rng = np.random.default_rng(3)
    return from_sequences([rng.integers(3, VOCAB - 1, 50) for _ in range(6)])


def check_architecture(kind: str, folder: Path, **fields: Any) -> Verdict:
    """Build and check one architecture; its head and reference logits are written to `folder`."""
    try:
        model = build_architecture(kind, **fields)
    except Exception as error:
        return Verdict(kind, "", "not built", _short_message(error))
    name = type(model).__name__
    try:
        report = check_model(model, random_stream(), "float32", "auto")
    except ResiduaError as error:
        return Verdict(kind, name, "refused", _short_message(error))
    ids = torch.from_numpy(np.random.default_rng(11).integers(3, VOCAB - 1, (2, 29)))
    with torch.inference_mode():
        logits = run_model(model, ids).logits.clone()
        layers = [layer.clone() for layer in report.stack.residuals(ids)]
        states = _compare_hidden_states(model, ids, layers)
        padding = _padding_error(report, ids, layers) if report.pad else 0.0
    not_resumed, resume_error = measure_resuming(report.stack)
    error = max(padding, report.head_error, _head_error(model, report, layers[-1], logits, folder))
    stack, axes = report.stack, report.stack.axes
    plain = axes.is_plain and len(stack.stream_indices) == 1
    layout = "" if plain else str(axes.shape(2, 29)) + f" x {len(stack.stream_indices)}"
    status = "extracted" if error <= TOLERANCE and len(layers) == stack.depth + 1 else "wrong"
    return Verdict(
        kind=kind,
        model=name,
        status=status,
        blocks=stack.name,
        depth=stack.depth,
        d_model=stack.d_model,
        layout=layout.removesuffix(" x 1"),
        head=report.head.kind,
        embedding=report.embedding,
        causal=report.causal,
        pad=report.pad,
        states=states,
        not_resumed=not_resumed,
        resume_error=resume_error,
        error=error,
    )


def measure_resuming(blocks: DecoderBlocks) -> tuple[tuple[int, ...], float]:
    """Layers that `ResumableModel` refuses, and the largest error of resuming from the others.

    A changed stream is compared with a full run in which a hook overwrites the layer, on tokens and
    a shape that the model's own proof does not have.
    """
    try:
        model = ResumableModel(blocks)
    except ModelError:
        return tuple(range(blocks.depth + 1)), 0.0
    refused: list[int] = []
    largest = 0.0
    ids = torch.from_numpy(np.random.default_rng(5).integers(3, VOCAB - 1, (3, 26)))
    mask = torch.ones_like(ids)
    mask[2, 19:] = 0
    with torch.inference_mode():
        for layer in range(blocks.depth + 1):
            if not model.can_resume(layer):
                refused.append(layer)
                continue
            stream = blocks.residuals(ids, mask)[layer]
            generator = torch.Generator().manual_seed(layer)
            hidden = 0.7 * stream + 0.4 * stream.float().std() * torch.randn(
                stream.shape, generator=generator
            ).to(stream.dtype)
            full = model.overwrite(layer, hidden, ids, mask)[mask > 0]
            resumed = model.resume(layer, hidden, ids, mask)[mask > 0]
            largest = max(largest, float((full - resumed).abs().max() / full.abs().max()))
    return tuple(refused), largest


def _head_error(
    model: torch.nn.Module,
    report: ModelReport,
    hidden: torch.Tensor,
    model_logits: torch.Tensor,
    folder: Path,
) -> float:
    """Largest error of the head (numpy, torch, reloaded) after the model is filled with NaN."""
    folder.mkdir(parents=True, exist_ok=True)
    report.head.save(folder, report.tensors)
    rows, logits = hidden.float().numpy(), model_logits.float().numpy()
    np.savez(folder / "rows.npz", hidden=rows, logits=logits)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    loaded = load_head(folder)
    assert loaded.digest == report.head.digest
    logits_of_heads = (
        report.head.logits(rows),
        loaded.logits(rows),
        report.head.torch()(torch.from_numpy(rows)).numpy(),
    )
    scale = np.abs(logits).max()
    return max(float(np.abs(values - logits).max() / scale) for values in logits_of_heads)


def _padding_error(report: ModelReport, ids: torch.Tensor, layers: list[torch.Tensor]) -> float:
    """Change of a short sequence by padding, divided by 10: padding may change 10 `TOLERANCE`."""
    mask, padded = torch.ones_like(ids), ids.clone()
    mask[1, 17:], padded[1, 17:] = 0, 0
    padded_layers = report.stack.residuals(padded, mask)
    single_layers = report.stack.residuals(ids[1:, :17])
    pairs = zip(single_layers, padded_layers, strict=True)
    errors = [
        float((padded_layer[1, :17] - single[0]).abs().max() / single.abs().max())
        for single, padded_layer in pairs
    ]
    return max(errors) / 10


def _compare_hidden_states(model: Any, ids: torch.Tensor, layers: list[torch.Tensor]) -> str:
    """`same` if transformers' hidden states equal layers 0..L-1 (L is normed), else `other`."""
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


def _short_message(error: Exception) -> str:
    """An error's message in one line of at most 240 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."

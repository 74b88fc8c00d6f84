"""A model and cache in which layer 1 alone carries the step to the token after the next one.

Texts count by a step of their own: x[t+1] = x[t] + step, modulo `NUMBERS`. Block 1 finds the step
from the last two tokens, block 2 takes it from the position before and adds it to the token. So the
state of layer 1 at t, put in before x[t+1], determines x[t+2]; layer 0 has no step, and layer 2 is
read by no block.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from residua.cache.head.head import Head
from residua.cache.model.blocks import DecoderBlocks
from residua.cache.model.residual_axes import ResidualAxes
from residua.cache.resuming.resumable_model import ResumableModel
from residua.cache.store.activation_cache import ActivationCache

from .synthetic import make_cache

NUMBERS = 11
"""Tokens, and steps from 1 on."""
LENGTH = 12
SHARPNESS = 9.0
"""Logit of the token that the model says."""


class StepFinder(torch.nn.Module):
    """Block 1: the circular correlation of each token with the one before, `(.., NUMBERS)`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        token = hidden[..., :NUMBERS]
        before = torch.nn.functional.pad(token, (0, 0, 1, 0))[:, :-1]
        steps = [(token.roll(-step, -1) * before).sum(-1) for step in range(NUMBERS)]
        parts = [token, torch.stack(steps, -1), hidden[..., 2 * NUMBERS :]]
        return torch.cat(parts, -1)


class StepTaker(torch.nn.Module):
    """Block 2: each token moved by the step of the position before."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        token, step = hidden[..., :NUMBERS], hidden[..., NUMBERS : 2 * NUMBERS]
        before = torch.nn.functional.pad(step, (0, 0, 1, 0))[:, :-1]
        moved = sum(token.roll(number, -1) * before[..., number, None] for number in range(NUMBERS))
        return torch.cat([hidden[..., : 2 * NUMBERS], moved], -1)  # pyright: ignore


class CountingModel(torch.nn.Module):
    """Says the next number of a text that counts by a fixed step, from the third token on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(NUMBERS, 3 * NUMBERS)
        self.embed.weight.data = torch.eye(NUMBERS, 3 * NUMBERS)
        self.blocks = torch.nn.ModuleList([StepFinder(), StepTaker()])
        self.requires_grad_(False)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **_: Any) -> Any:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(logits=hidden[..., 2 * NUMBERS :] * SHARPNESS)


def counting_model() -> ResumableModel:
    """The model, ready to be resumed."""
    model, axes = CountingModel(), ResidualAxes(0, 1, (3 * NUMBERS,))
    return ResumableModel(DecoderBlocks(model, "blocks", list(model.blocks), axes, (0,)))


def counting_cache(
    root: Path, model: ResumableModel, texts: int = 60, spoilt: int | None = None
) -> ActivationCache:
    """A cache of texts that count by random steps, one document each.

    The state of layer 1 at the position `spoilt` is not finite.
    """
    rng = np.random.default_rng(0)
    steps, starts = rng.integers(1, NUMBERS, texts), rng.integers(0, NUMBERS, texts)
    ids = (starts[:, None] + steps[:, None] * np.arange(LENGTH)) % NUMBERS
    with torch.inference_mode():
        streams = model.blocks.residuals(torch.from_numpy(ids))
    layers = [stream.flatten(0, 1).numpy().copy() for stream in streams]
    if spoilt is not None:
        layers[1][spoilt] = np.nan
    unembedding = np.zeros((NUMBERS, 3 * NUMBERS), np.float32)
    unembedding[:, 2 * NUMBERS :] = SHARPNESS * np.eye(NUMBERS)
    width = 3 * NUMBERS
    zeros = np.zeros(NUMBERS, np.float32)
    ones = np.ones(width, np.float32)
    head = Head("none", 1e-5, ones, np.zeros(width, np.float32), unembedding, zeros)
    return make_cache(
        root,
        layers,
        [LENGTH] * texts,
        head,
        ids=ids.ravel(),
        documents=np.repeat(np.arange(texts), LENGTH),
    )

"""`TwoStepsLater`: a model in which what a state tells of later tokens is known, and its cache."""

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

FACTOR = 4
"""A token is a pair (a, b) of numbers below it."""
VOCAB = FACTOR * FACTOR
WIDTH = 4 * FACTOR
"""Slots of the stream: a, b, what came from two positions before, and noise."""
LATER = 2
"""Steps after which b is read."""


class NoiseBlock(torch.nn.Module):
    """Writes a random code of the token before into the fourth slot; the head does not read it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.code = torch.nn.Parameter(torch.randn(2 * FACTOR, FACTOR, generator=generator))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        before = torch.nn.functional.pad(hidden[:, :-1, : 2 * FACTOR], (0, 0, 1, 0))
        new = hidden.clone()
        new[..., 3 * FACTOR :] = before @ self.code
        return new


class LaterBlock(torch.nn.Module):
    """Adds b of the position `LATER` steps before into the third slot."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = torch.nn.Parameter(torch.ones(1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        later = slice(2 * FACTOR, 3 * FACTOR)
        moved = hidden[:, :-LATER, FACTOR : 2 * FACTOR] * self.strength
        new = hidden.clone()
        new[..., later] = new[..., later] + torch.nn.functional.pad(moved, (0, 0, LATER, 0))
        return new


class TwoStepsLater(torch.nn.Module):
    """The next token's first factor follows a at t, its second factor b at t - 2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.blocks = torch.nn.ModuleList([NoiseBlock(), LaterBlock()])
        self.unembed = torch.nn.Linear(WIDTH, VOCAB, bias=False)
        rng = np.random.default_rng(0)
        preference = torch.from_numpy(rng.normal(0, 2, (2, FACTOR, FACTOR))).float()
        with torch.no_grad():
            self.embed.weight.zero_()
            self.unembed.weight.zero_()
            for token in range(VOCAB):
                a, b = divmod(token, FACTOR)
                self.embed.weight[token, [a, FACTOR + b]] = 1.0
                self.unembed.weight[token, :FACTOR] = preference[0][:, a]
                self.unembed.weight[token, 2 * FACTOR : 3 * FACTOR] = preference[1][:, b]
        self.requires_grad_(False)
        self.eval()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **_: Any) -> Any:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(logits=self.unembed(hidden))


def planted_model() -> ResumableModel:
    """The model, ready to be resumed from layers 0 to 2."""
    model = TwoStepsLater()
    axes = ResidualAxes(0, 1, (WIDTH,))
    return ResumableModel(DecoderBlocks(model, "blocks", list(model.blocks), axes, (0,)))


def planted_cache(root: Path, model: ResumableModel, sequences: int = 60) -> ActivationCache:
    """A cache of the model's rows on uniformly random tokens, 48 in a sequence."""
    tokens = np.random.default_rng(7).integers(0, VOCAB, (sequences, 48))
    with torch.inference_mode():
        layers = [model.run_residual(layer, tokens).flatten(0, 1).numpy() for layer in range(3)]
    unembedding = model.blocks.model.get_parameter("unembed.weight").numpy()
    head = Head(
        norm="none",
        eps=0.0,
        norm_weight=np.ones(WIDTH, np.float32),
        norm_bias=np.zeros(WIDTH, np.float32),
        unembedding=unembedding,
        bias=np.zeros(VOCAB, np.float32),
    )
    return make_cache(root, layers, [48] * sequences, head, ids=tokens.ravel())

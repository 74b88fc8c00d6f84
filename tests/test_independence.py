"""Every row of a cache is what the model gives for its sequence alone, whatever it ran with."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residua.cache.canary import Canary, examine
from residua.cache.create import create_cache
from residua.cache.errors import ResiduaError
from residua.cache.fill import fill
from residua.cache.layout import Layout
from residua.cache.manifest import (
    ALONE,
    BATCH,
    CaptureIdentity,
    Manifest,
    ModelIdentity,
    TokenIdentity,
)
from residua.cache.stack import Stack
from residua.cache.store import ActivationCache
from residua.cache.tokens import TokenStream, from_sequences

from .architectures import KINDS, VOCAB, build

TOLERANCE = 1e-4
"""Largest change of a row relative to its norm that is rounding, float32."""
LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 33, 48, 63, 65, 90, 129, 180)
"""Around the windows, chunks and sparse choices of 16 positions that the tiny models have."""


def mixed_stream(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, copies: int = 1) -> TokenStream:
    """`copies` sequences of each length, in random order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.repeat(lengths, copies))
    return from_sequences([rng.integers(3, VOCAB - 1, int(length)) for length in order])


def cache_of(
    model: torch.nn.Module, stream: TokenStream, root: Path, batch_tokens: int = 1024
) -> tuple[ActivationCache, Canary]:
    """A complete cache of `stream`, by the checks and the runner of an extraction."""
    canary = examine(model, stream, "float32", "float32", batch_tokens=batch_tokens)
    digest, hashes = stream.digests()
    extra: dict[str, Any] = {"pad": canary.pad, "causal": canary.causal}
    if canary.alone:
        extra[BATCH] = ALONE
    manifest = Manifest(
        ModelIdentity("0" * 64, "0" * 64, type(model).__name__),
        TokenIdentity(digest, stream.positions, stream.sequences, "0" * 64, 512, False, 0),
        CaptureIdentity("float32", "float32", "default"),
        Layout(64, 1024),
        canary.head.d_model,
        canary.head.vocab,
        canary.stack.depth,
        batch_tokens,
        "tiny",
        "random",
        extra,
    )
    path = create_cache(root, manifest, stream, hashes, canary.dtypes, canary.head.save, {})
    cache = ActivationCache(path)
    fill(cache, canary.stack)
    return ActivationCache(path), canary


def worst_row(cache: ActivationCache, stack: Stack, untouched: torch.nn.Module) -> float:
    """Largest relative change of any row from a fresh copy of the model on its sequence alone."""
    worst = 0.0
    layers = [np.asarray(cache.residual(layer)[:]) for layer in cache.layers]
    for start, length in zip(cache.sequence_start, cache.sequence_length, strict=True):
        rows = slice(int(start), int(start) + int(length))
        ids = torch.from_numpy(np.asarray(cache.tokens[rows]).astype(np.int64))[None]
        for layer, want in enumerate(rows_alone(stack, untouched, ids)):
            change = np.linalg.norm(layers[layer][rows] - want, axis=-1)
            norm = np.maximum(np.linalg.norm(want, axis=-1), 1e-30)
            worst = max(worst, float((change / norm).max()))
    return worst


def rows_alone(stack: Stack, untouched: torch.nn.Module, ids: torch.Tensor) -> list[np.ndarray]:
    """All layers of one sequence by a copy of `untouched`, which has read nothing before."""
    model = copy.deepcopy(untouched)
    names = {module: name for name, module in stack.model.named_modules()}
    blocks = [model.get_submodule(names[block]) for block in stack.blocks]
    with torch.inference_mode():
        layers = Stack(model, stack.name, blocks, stack.axes, stack.picks).residuals(ids)
    return [layer[0].float().numpy() for layer in layers]


def check(model: torch.nn.Module, stream: TokenStream, root: Path) -> Canary:
    """Extract and compare every sequence; returns what was measured of the model."""
    untouched = copy.deepcopy(model)
    cache, canary = cache_of(model, stream, root)
    assert worst_row(cache, canary.stack, untouched) <= TOLERANCE
    return canary


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_class_gives_each_sequence_its_own_rows(kind: str, tmp_path: Path) -> None:
    try:
        model = build(kind)
    except Exception as error:
        pytest.skip(f"not built: {error}")
    try:
        check(model, mixed_stream(), tmp_path)
    except ResiduaError as error:
        pytest.skip(f"refused: {error}")

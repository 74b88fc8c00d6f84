"""Caches in which the top token of the logit lens at every layer and position is planted."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from residua.cache.head.head import Head
from residua.cache.store.activation_cache import ActivationCache

from .synthetic import make_cache


def one_hot_head(vocab: int, scale: float = 2.0) -> Head:
    """A head whose logits are the layer-normed state, `scale` times: one coordinate a token."""
    return Head(
        norm="layernorm",
        eps=1e-5,
        norm_weight=np.ones(vocab, np.float32),
        norm_bias=np.zeros(vocab, np.float32),
        unembedding=(scale * np.eye(vocab)).astype(np.float32),
        bias=np.zeros(vocab, np.float32),
    )


def cache_with_tops(
    root: Path,
    tops: np.ndarray,
    lengths: Sequence[int],
    vocab: int,
    ids: np.ndarray | None = None,
    documents: np.ndarray | None = None,
    scale: float = 2.0,
) -> ActivationCache:
    """A cache whose logit lens has the tokens `tops` `(layers, positions)` on top.

    -1 spoils a row: its state is NaN.
    """
    states = np.eye(vocab, dtype=np.float32)[np.maximum(tops, 0)]
    states[tops < 0] = np.nan
    head = one_hot_head(vocab, scale)
    return make_cache(root, list(states), lengths, head, ids=ids, documents=documents)


def draw_others(rng: np.random.Generator, tokens: np.ndarray, vocab: int) -> np.ndarray:
    """A random token other than each of `tokens`."""
    return (tokens + rng.integers(1, vocab, tokens.shape)) % vocab

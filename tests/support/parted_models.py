"""Pairs of caches of toy models that are known to part at a layer."""

from pathlib import Path

import numpy as np

from residua.cache.store.activation_cache import ActivationCache

from .synthetic import make_cache, random_head

WIDTH, VOCAB, BLOCKS = 12, 40, 4
LENGTHS = [24] * 30


def parted_pair(
    root: Path, layer: int, size: float = 1.0, seed: int = 0
) -> tuple[ActivationCache, ActivationCache]:
    """Two models on the same tokens: equal below `layer`, at which one gets noise of `size`.

    Above it both add the same updates, so that the noise stays. `layer` of BLOCKS + 1 is none.
    """
    rng = np.random.default_rng(seed)
    n = sum(LENGTHS)
    ids = rng.integers(0, VOCAB, n)
    updates = [rng.normal(size=(n, WIDTH)).astype(np.float32) for _ in range(BLOCKS + 1)]
    noise = (size * rng.normal(size=(n, WIDTH))).astype(np.float32)
    caches = []
    for name, has_noise in (("one", False), ("two", True)):
        hidden, layers = np.zeros((n, WIDTH), np.float32), []
        for number, update in enumerate(updates):
            hidden = hidden + update
            if has_noise and number == layer:
                hidden = hidden + noise
            layers.append(hidden)
        head = random_head(WIDTH, VOCAB, seed)
        caches.append(make_cache(root / name, layers, LENGTHS, head, ids=ids, model=name))
    return caches[0], caches[1]

"""Caches of `make_cache` with labels, which synthetic caches lack: `LabelledCache`."""

from collections.abc import Mapping

import numpy as np

from residua.cache.store.activation_cache import ActivationCache


class LabelledCache(ActivationCache):
    """A cache whose labels are given, `(sequences,)` each."""

    def __init__(self, cache: ActivationCache, labels: Mapping[str, np.ndarray]) -> None:
        super().__init__(cache.path)
        self._labels = dict(labels)

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(sorted(self._labels))

    def label(self, name: str, missing: str | None = "") -> np.ndarray:
        return self._labels[name]

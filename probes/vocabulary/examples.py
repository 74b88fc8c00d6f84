"""What a softmax regression learns from: batches of states with their targets."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.errors import UsageError
from ...cache.store.activation_cache import ActivationCache
from ..training.minibatches import Minibatch, MinibatchStream
from ..training.shuffled_order import BUFFER_ROWS, ShuffledBatches, Slabs
from ..training.softmax_loss import ModelDistribution, Target
from ..training.top_tokens import tokens_at

Tops = Callable[[], np.ndarray]

LOSSES = ("model", "text", "kl")
"""Cross-entropy to the model's top token, to the text's token, KL to the model's distribution."""


@dataclass(frozen=True)
class ExampleBatch:
    """One batch for all layers and offsets."""

    hidden: dict[int, Tensor]
    """Layer -> states, `(n, d)` float32."""
    target: Callable[[int], tuple[Tensor | None, Target]]
    """Offset -> the rows that have a target (None: all) and their targets."""


class CacheExamples:
    """States of a cache at t, targets at t+N, which all layers share."""

    def __init__(
        self, feed: MinibatchStream, loss: str, teacher: ModelDistribution | None, tops: Tops | None
    ) -> None:
        self.feed, self.loss, self.teacher = feed, loss, teacher
        self.tops = tops
        """Gives the array of `top_tokens`, for the loss `model`."""

    @property
    def rows(self) -> int:
        return self.feed.positions

    @property
    def steps(self) -> int:
        return self.feed.steps

    def epoch(self, epoch: int = 0, step: int = 0) -> Iterator[ExampleBatch]:
        """The batches of `epoch` from number `step` on."""
        for draw in self.feed.epoch(epoch, step):
            yield ExampleBatch(draw.hidden, lambda offset, draw=draw: self._target(draw, offset))

    def _target(self, draw: Minibatch, offset: int) -> tuple[Tensor | None, Target]:
        ahead = draw.ahead[offset]
        usable = ahead.text >= 0 if self.loss == "text" else ahead.valid
        rows = None if bool(usable.all()) else usable.nonzero()[:, 0]
        chosen = slice(None) if rows is None else rows
        if self.loss == "text":
            return rows, Target(token=ahead.text[chosen])
        if self.tops is not None:
            return rows, Target(
                token=tokens_at(self.tops(), draw.positions[chosen].numpy() + offset)
            )
        assert ahead.residual is not None
        assert self.teacher is not None
        return rows, self.teacher.distribution(ahead.residual[chosen])


class ArrayExamples:
    """Rows `X` `(n, d)` with labels `y` `(n,)`, numpy or dask; read slab by slab."""

    def __init__(
        self, X: Any, y: Any, classes: np.ndarray, slabs: Slabs, batch: int, seed: int,
        shuffle: bool = True,
    ) -> None:  # fmt: skip
        self.X, self.y, self.classes = X, y, classes
        self.order = ShuffledBatches(slabs, batch, seed, shuffle, BUFFER_ROWS)

    @property
    def rows(self) -> int:
        return self.order.slabs.rows

    @property
    def steps(self) -> int:
        return self.order.steps

    def epoch(self, epoch: int = 0, step: int = 0) -> Iterator[ExampleBatch]:
        """The batches of `epoch` from number `step` on."""
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for group in self.order.groups(epoch, step):
            x, y = self._read(group.slabs)
            for number, piece in enumerate(group.pieces):
                parts.append((x[piece], y[piece]))
                if number < len(group.pieces) - 1 or group.complete:
                    rows, codes = (
                        torch.from_numpy(np.concatenate(v)) for v in zip(*parts, strict=True)
                    )
                    yield ExampleBatch(
                        {0: rows}, lambda offset, codes=codes: (None, Target(token=codes))
                    )
                    parts = []

    def _read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts, sizes = (v[numbers] for v in (self.order.slabs.starts, self.order.slabs.sizes))
        if isinstance(self.X, np.ndarray):
            rows = np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
            x, y = self.X[rows], self.y[rows]
        else:
            import dask

            stops = (starts + sizes).tolist()
            cuts = list(zip(starts.tolist(), stops, strict=True))
            found = dask.compute(*([v[a:b] for a, b in cuts] for v in (self.X, self.y)))  # pyright: ignore
            x, y = (np.concatenate(v) for v in found)
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise UsageError("the rows X hold values that are not finite in float32")
        return x, codes_of(y, self.classes)


def codes_of(y: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Number of each label among the sorted `classes`, int64; raises `UsageError` for others."""
    codes = np.searchsorted(classes, y).clip(max=len(classes) - 1)
    unknown = classes[codes] != y
    if unknown.any():
        raise UsageError(f"label {y[unknown][0]!r} is not among the classes {classes.tolist()}")
    return codes.astype(np.int64)


Examples = CacheExamples | ArrayExamples


def cache_examples(
    cache: ActivationCache,
    layers: Sequence[int],
    offsets: Sequence[int],
    loss: str,
    tops: Tops,
    **options: Any,
) -> CacheExamples:
    """Examples of a cache; `options` are those of `MinibatchStream`."""
    feed = MinibatchStream(cache, layers, offsets, residual=loss == "kl", **options)
    teacher = ModelDistribution(cache.head.torch()) if loss == "kl" else None
    return CacheExamples(feed, loss, teacher, tops if loss == "model" else None)


def array_examples(
    X: Any, y: Any, classes: np.ndarray, batch: int, seed: int, held_out: float
) -> tuple[ArrayExamples, ArrayExamples | None]:
    """Examples to fit, and a random share `held_out` of them to validate with."""
    slabs = Slabs(np.arange(len(y)), np.ones(len(y), np.int64))
    if not isinstance(X, np.ndarray):
        sizes = np.array(X.chunks[0])
        slabs = Slabs.cut(np.cumsum(sizes) - sizes, sizes, 1024)
    number = int(len(slabs.sizes) * held_out)
    drawn = np.random.default_rng(seed).permutation(len(slabs.sizes))
    parts = [np.sort(drawn[number:]), np.sort(drawn[:number])]
    fit, held = (Slabs(slabs.starts[p], slabs.sizes[p]) for p in parts)
    batch = max(1, min(batch, fit.rows))
    validation = ArrayExamples(X, y, classes, held, batch, seed, shuffle=False) if number else None
    return ArrayExamples(X, y, classes, fit, batch, seed), validation

"""Training examples of softmax regressions: batches of states with their targets.

`CacheExamples` reads them from a cache (through `MinibatchStream`), `ArrayExamples` from labelled
rows; states and targets come on the device of the fit. `VocabFit.examples` makes them; `Descent`
and `VocabProbe.score` read them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.devices import copy_to_device, iterate_on_device
from ...cache.errors import UsageError
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.slab_shuffle import Slabs
from ..training.minibatches import Minibatch, MinibatchStream, copy_minibatch
from ..training.shuffled_batches import ShuffledBatches
from ..training.softmax_loss import ModelDistribution, Target
from ..training.threads import CPU
from ..training.top_tokens import tokens_at

LOSSES = ("model", "text", "kl")
"""Cross-entropy to the model's top token, to the text's token, KL to the model's distribution."""
DASK_SLAB_ROWS = 1024
"""Most rows of a dask array that are read and shuffled as one slab."""

TopTokens = Callable[[], np.ndarray]
"""Gives the result of `find_top_tokens`, which is computed when first needed."""


@dataclass(frozen=True)
class ExampleBatch:
    """States and targets of one batch, for all layers and offsets."""

    hidden: dict[int, Tensor]
    """Layer -> states, `(n, d)` float32."""
    target: Callable[[int], tuple[Tensor | None, Target]]
    """Offset -> (rows that have a target, None for all; their targets)."""


class CacheExamples:
    """States of a cache at t, with targets at t+N that all layers share."""

    def __init__(
        self,
        stream: MinibatchStream,
        loss: str,
        model: ModelDistribution | None,
        top_tokens: TopTokens | None,
        device: torch.device = CPU,
    ) -> None:
        self.stream = stream
        self.loss = loss
        self.device = device
        self.model = model
        """The model's distribution, for the loss `kl`."""
        self.top_tokens = top_tokens
        """The model's top tokens, for the loss `model`."""

    @property
    def rows(self) -> int:
        """Number of positions of an epoch."""
        return self.stream.positions

    @property
    def steps(self) -> int:
        """Number of batches of an epoch."""
        return self.stream.steps

    def epoch(self, epoch: int = 0, step: int = 0) -> Iterator[ExampleBatch]:
        """The batches of `epoch` from number `step` on."""
        for minibatch in iterate_on_device(
            self.stream.epoch(epoch, step), self.device, copy_minibatch
        ):
            yield ExampleBatch(
                minibatch.hidden,
                lambda offset, minibatch=minibatch: self._target(minibatch, offset),
            )

    def _target(self, minibatch: Minibatch, offset: int) -> tuple[Tensor | None, Target]:
        ahead = minibatch.ahead[offset]
        # Which rows have a target is known on the host: the device is not waited for.
        has_target = ahead.text >= 0 if self.loss == "text" else ahead.valid
        rows = None if bool(has_target.all()) else has_target.nonzero()[:, 0]
        selection = slice(None) if rows is None else rows
        device_rows = None if rows is None else copy_to_device(rows, self.device)
        if self.loss == "text":
            token = ahead.text[selection]
            return device_rows, Target(token=copy_to_device(token, self.device))
        if self.top_tokens is not None:
            positions = minibatch.positions[selection].numpy() + offset
            token = tokens_at(self.top_tokens(), positions)
            return device_rows, Target(token=copy_to_device(token, self.device))
        assert ahead.residual is not None
        assert self.model is not None
        selection = slice(None) if device_rows is None else device_rows
        return device_rows, self.model.distribution(ahead.residual[selection])


def cache_examples(
    cache: ActivationCache,
    layers: Sequence[int],
    offsets: Sequence[int],
    loss: str,
    top_tokens: TopTokens,
    device: torch.device = CPU,
    **options: Any,
) -> CacheExamples:
    """Examples of a cache, on `device`; `options` are those of `MinibatchStream`."""
    stream = MinibatchStream(cache, layers, offsets, residual=loss == "kl", **options)
    model = ModelDistribution(cache.head.torch(device)) if loss == "kl" else None
    return CacheExamples(stream, loss, model, top_tokens if loss == "model" else None, device)


@dataclass(frozen=True)
class LabelledRows:
    """Rows `X` `(n, d)` with labels `y` `(n,)`, numpy or dask, and the sorted classes."""

    X: Any
    y: Any
    classes: np.ndarray

    def read(self, slabs: Slabs) -> tuple[np.ndarray, np.ndarray]:
        """Rows `(rows, d)` float32 and class numbers `(rows,)` of `slabs`, one after the other."""
        if isinstance(self.X, np.ndarray):
            shift = slabs.starts - np.cumsum(slabs.sizes) + slabs.sizes
            rows = np.repeat(shift, slabs.sizes) + np.arange(slabs.rows)
            x, y = self.X[rows], self.y[rows]
        else:
            import dask

            stops = (slabs.starts + slabs.sizes).tolist()
            bounds = list(zip(slabs.starts.tolist(), stops, strict=True))
            blocks = ([array[a:b] for a, b in bounds] for array in (self.X, self.y))
            x, y = (np.concatenate(block) for block in dask.compute(*blocks))  # pyright: ignore
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise UsageError("the rows X hold values that are not finite in float32")
        return x, codes_of(y, self.classes)


class ArrayExamples:
    """Examples of labelled rows in shuffled order, read slab by slab; they have one layer, 0."""

    def __init__(
        self, data: LabelledRows, order: ShuffledBatches, device: torch.device = CPU
    ) -> None:
        self.data = data
        self.order = order
        self.device = device

    @property
    def rows(self) -> int:
        """Number of rows of an epoch."""
        return self.order.slabs.rows

    @property
    def steps(self) -> int:
        """Number of batches of an epoch."""
        return self.order.steps

    def epoch(self, epoch: int = 0, step: int = 0) -> Iterator[ExampleBatch]:
        """The batches of `epoch` from number `step` on."""
        for states, codes in iterate_on_device(
            self._batches(epoch, step), self.device, lambda batch, copy: tuple(map(copy, batch))
        ):
            yield ExampleBatch({0: states}, lambda offset, codes=codes: (None, Target(token=codes)))

    def _batches(self, epoch: int, step: int) -> Iterator[tuple[Tensor, ...]]:
        """States `(n, d)` float32 and class numbers `(n,)` of each batch, on the host."""
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for group in self.order.groups(epoch, step):
            x, y = self.data.read(self.order.slabs.select(group.slabs))
            for number, piece in enumerate(group.pieces):
                parts.append((x[piece], y[piece]))
                if number < len(group.pieces) - 1 or group.complete:
                    yield tuple(
                        torch.from_numpy(np.concatenate(arrays))
                        for arrays in zip(*parts, strict=True)
                    )
                    parts = []


def array_examples(
    data: LabelledRows, batch: int, seed: int, held_out: float, device: torch.device = CPU
) -> tuple[ArrayExamples, ArrayExamples | None]:
    """Examples to fit, and a random share `held_out` of the rows to validate with.

    Rows of numpy are drawn one by one, rows of dask in slabs inside one chunk.
    """
    if isinstance(data.X, np.ndarray):
        slabs = Slabs(np.arange(len(data.y)), np.ones(len(data.y), np.int64))
    else:
        sizes = np.array(data.X.chunks[0])
        slabs = Slabs.cut(np.cumsum(sizes) - sizes, sizes, DASK_SLAB_ROWS)
    held_out_slabs = int(len(slabs.sizes) * held_out)
    shuffled = np.random.default_rng(seed).permutation(len(slabs.sizes))
    train = slabs.select(np.sort(shuffled[held_out_slabs:]))
    batch = max(1, min(batch, train.rows))
    train_examples = ArrayExamples(data, ShuffledBatches(train, batch, seed), device)
    if not held_out_slabs:
        return train_examples, None
    validation = slabs.select(np.sort(shuffled[:held_out_slabs]))
    order = ShuffledBatches(validation, batch, seed, shuffle=False)
    return train_examples, ArrayExamples(data, order, device)


Examples = CacheExamples | ArrayExamples


def codes_of(y: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Number of each label among the sorted `classes`, int64; raises `UsageError` for others."""
    codes = np.searchsorted(classes, y).clip(max=len(classes) - 1)
    unknown = classes[codes] != y
    if unknown.any():
        raise UsageError(f"label {y[unknown][0]!r} is not among the classes {classes.tolist()}")
    return codes.astype(np.int64)

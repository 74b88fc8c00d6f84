"""Data and parameters of one fit of a vocabulary probe, from a cache or from labelled rows.

Who calls whom in `VocabProbe.fit`:

    VocabProbe.fit          vocab_probe.py          checks parameters, makes a VocabFit
    fit_vocab_groups        fit_groups.py           divides the pairs into groups that fit memory
      LocalRunner, ClusterRunner                    run sweep and groups here or on dask workers
        Sweep               learning_rate_sweep.py  short fits that choose the learning rates
        VocabFit.descent    this file               makes the Descent of one group of pairs
          Descent.run       descent.py              all steps of the group, with checkpoints
            initial_statistics                      principal axes and token frequencies
            Trainer                                 one regression: parameters, AdamW, losses
              FullMatrix, LowRank, ThroughHead      parametrizations.py: losses and gradients

`VocabProbe.partial_fit` takes a `Descent` from here too, and steps its trainers itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ...cache.errors import UsageError
from ...cache.head.head import TorchHead
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.sequence_draw import draw_sequences
from ...cache.tokens.segments import PairScope
from ..base.pair_offsets import check_pair_offsets
from ..base.readout import LayerOffset
from ..training.minibatches import MinibatchStream
from ..training.softmax_loss import fast_products
from ..training.threads import CPU
from ..training.top_tokens import find_top_tokens
from .descent import Descent
from .examples import Examples, LabelledRows, array_examples, cache_examples
from .parametrizations import (
    THROUGH_HEAD,
    FullMatrix,
    LowRank,
    MlpThroughHead,
    Parametrization,
    ThroughHead,
    default_rank,
)

VALIDATION_POSITIONS = 8192
"""Most positions of the validation split on which a fit is measured."""
HELD_OUT_ROWS = 100
"""Fewest rows of arrays of which some are held out for validation."""
COPIES = 5
"""Copies of the weights in memory: weights, two moments, best weights, a gradient (per thread)."""
SIZE_SEQUENCES, SIZE_ROWS = 64, 4096
"""Most sequences, and most of their positions, that the size of layer L is measured on."""


@dataclass
class VocabFit:
    """A fit of several (layer, offset) pairs with the parameters of one probe."""

    pairs: list[LayerOffset]
    classes: np.ndarray
    """Labels to predict, sorted; of a cache the token ids 0..vocab-1."""
    d_in: int
    """Width of the states."""
    options: dict[str, Any]
    """Parameters of the probe."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Identity of the data; a checkpoint of a fit of other data is refused."""

    head: TorchHead | None = None
    """The model's head on the device, for the forms of `THROUGH_HEAD`."""
    device: torch.device = CPU
    """Device of parameters and batches."""
    progress: Callable[[int], None] = lambda rows: None
    """Called with numbers of rows: first of positions that are labelled, then of each step."""

    @property
    def positions(self) -> int:
        """Number of positions that are read before the first step."""
        return 0

    def examples(self, layers: list[int], offsets: list[int]) -> tuple[Examples, Examples | None]:
        """Examples to fit and to validate with; None without held-out rows."""
        raise NotImplementedError

    def size(self) -> float:
        """Root mean square of the head's input."""
        return 1.0

    @property
    def rank(self) -> int | None:
        """Rank of the matrix, the given one or that of `form="auto"`; None for a full matrix."""
        if self.options["rank"] is None and self.options["form"] == "auto":
            return default_rank(len(self.classes), self.d_in)
        return self.options["rank"]

    @cached_property
    def form(self) -> Parametrization:
        """Parametrization of every regression."""
        vocab, rank = len(self.classes), self.rank
        form = self.options["form"]
        if form in THROUGH_HEAD:
            if self.head is None:
                raise UsageError(f"form={form!r} needs a cache: labelled rows have no head")
            if form == "mlp":
                hidden, seed = self.options["hidden"], self.options["seed"]
                return MlpThroughHead(self.head, self.d_in, self.size(), hidden, seed)
            return ThroughHead(self.head, self.d_in, self.size())
        if rank is None:
            return FullMatrix(vocab, self.d_in, self.products)
        return LowRank(vocab, self.d_in, min(rank, self.d_in), self.products)

    @property
    def products(self) -> str:
        """dtype of the factors of gradients: `float32` or `bfloat16`."""
        products = self.options["products"]
        return fast_products(self.device) if products == "auto" else products

    def pairs_in_memory(self, memory: int) -> int:
        """Number of pairs that are fitted in `memory` bytes together, one at least."""
        return max(1, memory // (4 * COPIES * self.form.weights))

    def descent(
        self, pairs: list[LayerOffset], rates: dict[LayerOffset, float] | None = None
    ) -> Descent:
        """The fit of a group of the pairs, at the learning rates `rates`."""
        examples, validation = self.examples(*layers_and_offsets(pairs))
        return Descent(
            form=self.form,
            n_classes=len(self.classes),
            examples=examples,
            validation=validation,
            pairs=pairs,
            epochs=self.options["epochs"],
            rates=rates or {},
        )


def layers_and_offsets(pairs: list[LayerOffset]) -> tuple[list[int], list[int]]:
    """Layers and offsets of `pairs`, each once."""
    layers = list(dict.fromkeys(layer for layer, _ in pairs))
    return layers, list(dict.fromkeys(offset for _, offset in pairs))


@dataclass(kw_only=True)
class CacheVocabFit(VocabFit):
    """Fit on the train split of a cache; the validation split stops it."""

    cache: ActivationCache
    shared_top_tokens: np.ndarray | None = None
    """Result of `find_top_tokens` from another process; None: computed when first needed."""

    @classmethod
    def of(
        cls,
        cache: ActivationCache,
        pairs: list[LayerOffset],
        options: dict[str, Any],
        device: torch.device = CPU,
    ) -> "CacheVocabFit":
        """The fit of `pairs` on `cache`, on `device`.

        Raises `UsageError` if an offset has no pair.
        """
        scope = scope_of(options)
        check_pair_offsets(
            cache, [offset for _, offset in pairs], scope, text=options["loss"] == "text"
        )
        return cls(
            pairs=pairs,
            classes=np.arange(cache.vocab),
            d_in=cache.d_model,
            options=options,
            identity={"cache": cache.id},
            head=cache.head.torch(device) if options["form"] in THROUGH_HEAD else None,
            device=device,
            cache=cache,
        )

    def examples(self, layers: list[int], offsets: list[int]) -> tuple[Examples, Examples | None]:
        common: dict[str, Any] = {
            "loss": self.options["loss"],
            "batch": self.options["batch"],
            "seed": self.options["seed"],
            "top_tokens": self.top_tokens,
            "buffer_rows": self.buffer_rows,
            "buffer_bytes": 1 << 62,
            "device": self.device,
            **vars(scope_of(self.options)),
        }
        train = cache_examples(self.cache, layers, offsets, split="train", drop_last=True, **common)
        if not len(self.held_out):
            return train, None
        validation = cache_examples(
            self.cache, layers, offsets, sequences=self.held_out, shuffle=False, **common
        )
        return train, validation

    @cached_property
    def buffer_rows(self) -> int:
        """Rows of the shuffling buffer, computed for all pairs together.

        A group of the pairs has the same buffer, so that it draws the same batches.
        """
        stream = MinibatchStream(
            self.cache,
            *layers_and_offsets(self.pairs),
            batch=self.options["batch"],
            residual=self.options["loss"] == "kl",
            **vars(scope_of(self.options)),
        )
        return stream.order.buffer_rows

    @cached_property
    def held_out(self) -> np.ndarray:
        """Sequences of the validation split on which fits are measured."""
        sequences = self.cache.sequences("validation")
        if not len(sequences):
            return sequences
        return draw_sequences(self.cache, sequences, VALIDATION_POSITIONS, self.options["seed"])

    @cached_property
    def labelled(self) -> np.ndarray:
        """Sequences to label with top tokens: all that are read for the loss `model`, else none."""
        if self.options["loss"] != "model":
            return self.held_out[:0]
        return np.sort(np.concatenate([self.cache.sequences("train"), self.held_out]))

    @property
    def positions(self) -> int:
        return int(self.cache.sequence_length[self.labelled].sum())

    def top_tokens(self) -> np.ndarray:
        """The model's top token at every position, see `find_top_tokens`."""
        if self.shared_top_tokens is not None:
            return self.shared_top_tokens
        return self._computed_top_tokens

    @cached_property
    def _computed_top_tokens(self) -> np.ndarray:
        return find_top_tokens(self.cache, self.labelled, self.progress, self.device)

    def size(self) -> float:
        """Root mean square of layer L at the first fitted positions of the train split."""
        sequences = self.cache.sequences("train")[:SIZE_SEQUENCES]
        is_fitted = scope_of(self.options).largest_offsets(self.cache, sequences) >= 0
        positions = self.cache.positions_of(sequences)[is_fitted][:SIZE_ROWS]
        last_layer = self.cache.residual_array(self.cache.n_blocks)
        return float(np.sqrt(np.square(last_layer[positions]).mean()))


def scope_of(options: dict[str, Any]) -> PairScope:
    """Scope of the pairs (t, t+N) that a probe with the parameters `options` is fitted to."""
    return PairScope(options.get("across_documents", False), options.get("drop_first", 0)).check()


@dataclass(kw_only=True)
class ArrayVocabFit(VocabFit):
    """Fit on rows `X` `(n, d)` with labels `y` `(n,)`, numpy or dask."""

    X: Any
    y: Any

    def examples(self, layers: list[int], offsets: list[int]) -> tuple[Examples, Examples | None]:
        return array_examples(
            LabelledRows(self.X, self.y, self.classes),
            batch=self.options["batch"],
            seed=self.options["seed"],
            held_out=self.options["validation"] if len(self.y) >= HELD_OUT_ROWS else 0.0,
            device=self.device,
        )

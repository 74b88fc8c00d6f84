"""What a vocabulary probe is fitted on: a cache or labelled rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.head.head import TorchHead
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import PairScope
from ..base.readout import LayerOffset
from ..training.minibatches import MinibatchStream
from ..training.shuffled_order import draw_sequences
from ..training.softmax_loss import fast_products
from ..training.top_tokens import find_top_tokens
from .descent import Descent, Trainer
from .examples import Examples, array_examples, cache_examples
from .initial_statistics import initial_statistics
from .parametrizations import FullMatrix, LowRank, Parametrization, ThroughHead

VALIDATION_POSITIONS = 8192
"""Most positions of the validation split on which a fit is measured."""
HELD_OUT_ROWS = 100
"""Fewest rows of arrays of which some are held out."""
COPIES = 5
"""Of the weights: themselves, two moments, the best so far, a gradient (one per thread)."""


@dataclass
class VocabFit:
    """A fit of several (layer, offset) pairs with the parameters of one probe."""

    pairs: list[LayerOffset]
    classes: np.ndarray
    d_in: int
    options: dict[str, Any]
    """Parameters of the probe."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What the data are, for a checkpoint."""

    head: TorchHead | None = None
    progress: Callable[[int], None] = lambda rows: None
    """Told the positions that are read before the fits begin, and those of their steps."""

    @property
    def positions(self) -> int:
        """Positions that are read before the fits begin."""
        return 0

    def examples(self, layers: list[int], offsets: list[int]) -> tuple[Examples, Examples | None]:
        """Examples to fit and to validate with."""
        raise NotImplementedError

    def size(self) -> float:
        """Root mean square of what the head reads."""
        return 1.0

    @cached_property
    def form(self) -> Parametrization:
        """The form of every regression."""
        vocab, rank, products = len(self.classes), self.options["rank"], self.products
        if self.options["form"] == "head":
            if self.head is None:
                raise UsageError("form='head' needs a cache: labelled rows have no head")
            return ThroughHead(self.head, self.d_in, self.size())
        if rank is None:
            return FullMatrix(vocab, self.d_in, products)
        return LowRank(vocab, self.d_in, min(rank, self.d_in), products)

    @property
    def products(self) -> str:
        """dtype of the factors of gradients."""
        found = self.options["products"]
        return fast_products() if found == "auto" else found

    def room(self, memory: int) -> int:
        """Pairs whose weights fit `memory` bytes together, one at least."""
        return max(1, memory // (4 * COPIES * self.form.weights))

    def descent(
        self, pairs: list[LayerOffset], rates: dict[LayerOffset, float] | None = None
    ) -> Descent:
        """The fit of some of the pairs, at the learning rates `rates`."""
        layers, offsets = parts_of(pairs)
        examples, validation = self.examples(layers, offsets)
        start = DescentStarter(self, examples, layers, offsets)
        return Descent(examples, validation, start, pairs, self.options["epochs"], rates or {})


def parts_of(pairs: list[LayerOffset]) -> tuple[list[int], list[int]]:
    """Layers and offsets of `pairs`, each once."""
    return list(dict.fromkeys(la for la, _ in pairs)), list(dict.fromkeys(n for _, n in pairs))


@dataclass
class DescentStarter:
    """Makes new regressions; looks at the examples once, when the first is wanted."""

    job: VocabFit
    examples: Examples
    layers: list[int]
    offsets: list[int]

    @cached_property
    def _seen(self) -> Any:
        return initial_statistics(self.examples, self.layers, self.offsets, len(self.job.classes))

    def __call__(self, pair: LayerOffset, fitted: Any = None) -> Trainer:
        """The regression of `pair`, from nothing or from `fitted` parameters."""
        axes, priors = self._seen
        form, mine = self.job.form, axes[pair[0]]
        if fitted is None:
            return Trainer(form, mine, form.start(mine, priors[pair[1]]))
        return Trainer(form, mine, form.unfolded(fitted, mine))


@dataclass
class CacheVocabFit(VocabFit):
    """The train split of a cache."""

    cache: ActivationCache | None = None
    given: np.ndarray | None = None
    """What `tops` gives, where that is known already."""

    @classmethod
    def of(
        cls, cache: ActivationCache, pairs: list[LayerOffset], options: dict[str, Any]
    ) -> "CacheVocabFit":
        scope = scope_of(options)
        check_pairs(cache, [offset for _, offset in pairs], scope, options["loss"] == "text")
        head = cache.head.torch() if options["form"] == "head" else None
        identity = {"cache": cache.id}
        classes = np.arange(cache.vocab)
        return cls(pairs, classes, cache.d_model, options, identity, head, cache=cache)

    def examples(self, layers: list[int], offsets: list[int]) -> tuple[Examples, Examples | None]:
        assert self.cache is not None
        options = {name: self.options[name] for name in ("loss", "batch", "seed")}
        options |= vars(scope_of(self.options))
        make = partial(
            cache_examples, self.cache, layers, offsets, tops=self.tops,
            buffer_rows=self.buffer_rows, buffer_bytes=1 << 62, **options,
        )  # fmt: skip
        held = self.held_out
        validation = make(sequences=held, shuffle=False) if len(held) else None
        return make(split="train", drop_last=True), validation

    @cached_property
    def buffer_rows(self) -> int:
        """Rows of the buffer if all pairs are fitted together; any few draw the same batches so."""
        assert self.cache is not None
        residual = self.options["loss"] == "kl"
        feed = MinibatchStream(
            self.cache, *parts_of(self.pairs), batch=self.options["batch"], residual=residual,
            **vars(scope_of(self.options)),
        )  # fmt: skip
        return feed.order.buffer_rows

    @cached_property
    def held_out(self) -> np.ndarray:
        """Sequences of the validation split on which fits are measured."""
        assert self.cache is not None
        found = self.cache.sequences("validation")
        if not len(found):
            return found
        return draw_sequences(self.cache, found, VALIDATION_POSITIONS, self.options["seed"])

    @cached_property
    def labelled(self) -> np.ndarray:
        """Sequences of which the model's top tokens are needed; none for other losses."""
        assert self.cache is not None
        if self.options["loss"] != "model":
            return self.held_out[:0]
        return np.sort(np.concatenate([self.cache.sequences("train"), self.held_out]))

    @property
    def positions(self) -> int:
        assert self.cache is not None
        return int(self.cache.sequence_length[self.labelled].sum())

    def tops(self) -> np.ndarray:
        """The model's top token at every position, see `top_tokens`."""
        return self._tops if self.given is None else self.given

    @cached_property
    def _tops(self) -> np.ndarray:
        assert self.cache is not None
        return find_top_tokens(self.cache, self.labelled, self.progress)

    def size(self) -> float:
        assert self.cache is not None
        sequences = self.cache.sequences("train")[:64]
        rows = self.cache.positions_of(sequences)
        rows = rows[scope_of(self.options).largest_offsets(self.cache, sequences) >= 0][:4096]
        return float(
            np.sqrt(np.square(self.cache.residual_array(self.cache.n_blocks)[rows]).mean())
        )


def scope_of(options: dict[str, Any]) -> PairScope:
    """Which pairs a probe with the parameters `options` is fitted to."""
    return PairScope(options.get("across_documents", False), options.get("drop_first", 0)).check()


def check_pairs(cache: ActivationCache, offsets: list[int], scope: PairScope, text: bool) -> None:
    """Raise a `UsageError` unless the train split has a pair at each of `offsets`.

    With `text`, a token of the text must follow it.
    """
    longest, wanted = -1, max(offsets, default=0)
    for some in cache.blocks(cache.sequences("train")):
        left = scope.largest_offsets(cache, some)
        if text:
            rows = cache.positions_of(some)
            for offset in sorted({offset for offset in offsets if offset > longest}):
                here = rows[left >= offset] + offset
                if len(here) and (cache.following_tokens(here, scope.across_documents) >= 0).any():
                    longest = offset
        else:
            longest = max(longest, int(left.max(initial=-1)))
        if longest >= wanted:
            return
    missing = min(offset for offset in offsets if offset > longest)
    what = " with a token of the text after it" if text else ""
    where = "sequence" if scope.across_documents else "document of one sequence"
    most = f"the largest offset is {longest}" if longest >= 0 else "none is long enough"
    raise UsageError(
        f"the train split has no pair at offset {missing}{what}: t and t+N must lie in one "
        f"{where}; {most}; use smaller offsets or longer sequences"
    )


@dataclass
class ArrayVocabFit(VocabFit):
    """Rows `(n, d)` with labels `(n,)`, numpy or dask."""

    X: Any = None
    y: Any = None

    def examples(self, layers: list[int], offsets: list[int]) -> tuple[Examples, Examples | None]:
        batch, seed, share = (self.options[name] for name in ("batch", "seed", "validation"))
        held_out = share if len(self.y) >= HELD_OUT_ROWS else 0.0
        return array_examples(self.X, self.y, self.classes, batch, seed, held_out)

"""The trigram baseline: the next token from the last two, counted in the train split."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache.errors import UsageError
from ..cache.segments import context_blocks
from .bigram import after
from .counts import (
    BLOCK_TOKENS,
    Counted,
    column_sums,
    count_pairs,
    empty,
    over_train,
    pack,
    table,
    tokens_of,
    total,
    unigram,
    unpack,
    witten_bell,
)
from .readout import Batch

if TYPE_CHECKING:
    import torch
    from scipy.sparse import csr_matrix

    from ..cache.store import ActivationCache

CONTEXTS = 1 << 20
"""Default of the pairs of tokens that are contexts."""


class Trigram(Counted):
    """P(next token | tokens at t+N-1 and t+N), interpolated with `Bigram` after Witten and Bell.

        P(c | a, b) = (c(a, b, c) + T(a, b) P(c | b)) / (c(a, b) + T(a, b))

    The `contexts` most frequent pairs (a, b) have counts of their own, the others leave P(c | b)
    alone. Memory: 12 bytes for each distinct triple of these, 20 for each of their pairs, 12 for
    each distinct pair; all twice while they are added up. Two passes over the tokens.

    A baseline for offsets N >= 1. At N >= 2 it reads two tokens that a probe of the residual
    stream at t does not see, at N = 1 one.
    """

    kind = "trigram"
    least_offset = 1

    counts_: "csr_matrix"
    """Triples seen, `(contexts, vocab)` int64."""
    contexts_: np.ndarray
    """a * vocab + b of each context, ascending, `(contexts,)` int64."""
    pairs_: "csr_matrix"
    """Pairs seen, `(vocab, vocab)` int64."""

    def __init__(
        self,
        offsets: int | Iterable[int] = (1, 2, 3),
        contexts: int = CONTEXTS,
        across_documents: bool = False,
    ) -> None:
        self.offsets = offsets
        self.contexts = contexts
        self.across_documents = across_documents

    def fit(self, cache: "ActivationCache", *, client: Any = None) -> "Trigram":
        """Count the train split: pairs in the first pass, triples in the second.

        The workers of `client` (of `dask.distributed`), if given, share the sequences.
        """
        self._start(cache)
        if self.contexts < 1:
            raise UsageError(f"contexts must be at least 1, not {self.contexts}")
        self.pairs_ = count_pairs(cache, 1, client, self.across_documents)
        self.unigram_ = unigram(column_sums(self.pairs_))
        self.contexts_ = most_frequent(self.pairs_, self.contexts)
        counts = over_train(_triples_of, cache, client, self.contexts_, self.across_documents)
        self.counts_ = total(counts, empty(len(self.contexts_), cache.vocab))
        return self

    def log_probabilities(self, previous: np.ndarray, last: np.ndarray) -> np.ndarray:
        """log P(. | previous, last) of tokens `(n,)`, `(n, vocab)` float32; previous may be -1."""
        self.check_fitted()
        out = after(last, self.pairs_, self.unigram_)
        row, known = find(self.contexts_, len(self.unigram_), previous, last)
        out[known] = witten_bell(self.counts_[row[known]], out[known])
        return out

    def logits(self, batch: Batch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token after `batch.last_token`, `(n, vocab)` float32."""
        import torch

        out = self.log_probabilities(tokens_of(batch.previous_token), tokens_of(batch.last_token))
        return torch.from_numpy(out).to(batch.last_token.device)

    def _size(self, offset: int) -> dict[str, int]:
        return {"n": int(self.counts_.sum()), "distinct": self.counts_.nnz}

    def _tensors(self) -> dict[str, np.ndarray]:
        contexts = {"contexts": self.contexts_}
        return {**contexts, **pack("triples", self.counts_), **pack("pairs", self.pairs_)}

    def _read(self, tensors: dict[str, np.ndarray]) -> None:
        vocab = len(self.unigram_)
        self.contexts_ = tensors["contexts"]
        self.counts_ = unpack("triples", tensors, vocab)
        self.pairs_ = unpack("pairs", tensors, vocab)


def most_frequent(pairs: "csr_matrix", number: int) -> np.ndarray:
    """Keys a * vocab + b of the `number` most frequent pairs, ascending; ties by the lower key."""
    followers = np.diff(pairs.indptr)
    keys = np.repeat(np.arange(len(followers)), followers) * len(followers) + pairs.indices
    rank = np.lexsort((keys, np.negative(pairs.data)))
    return np.sort(keys[rank[:number]])


def find(contexts: np.ndarray, vocab: int, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, ...]:
    """Number of the context (a, b) of each pair, `(n,)`, and whether it is one."""
    keys = a * vocab + b
    row = np.searchsorted(contexts, keys)
    row[row == len(contexts)] = 0
    return row, (contexts[row] == keys) & (a >= 0)


def _triples_of(
    cache: "ActivationCache", numbers: np.ndarray, contexts: np.ndarray, across_documents: bool
) -> "csr_matrix":
    """How often each token followed each of the pairs `contexts`, `(contexts, vocab)`.

    In the sequences `numbers` that the model read.
    """

    def blocks() -> "Iterator[csr_matrix]":
        for ids, left, _ in context_blocks(cache, numbers, across_documents, BLOCK_TOKENS):
            first = np.flatnonzero(left >= 2)
            row, known = find(contexts, cache.vocab, ids[first], ids[first + 1])
            keys = row[known] * cache.vocab + ids[first + 2][known]
            yield table(keys, (len(contexts), cache.vocab))

    return total(blocks(), empty(len(contexts), cache.vocab))

"""The bigram baselines: the next token from one token alone, counted in the train split."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache.segments import context_blocks, contexts_of, document_of
from .counts import (
    Counted,
    column_sums,
    count_followers,
    count_pairs,
    empty,
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


FOLDS = 5
"""Folds of documents of a `CrossFittedBigram`."""


class Bigram(Counted):
    """P(next token | token at t+N), interpolated with the unigram after Witten and Bell.

        P(b | a) = (c(a, b) + T(a) P(b)) / (c(a) + T(a))
        P(b)     = (c(b) + T / vocab) / (n + T)

    `c` counts pairs inside one document of the train split, `T(a)` the distinct tokens seen after
    `a`, `T` the distinct tokens seen at all (Witten and Bell, 1991; Chen and Goodman, 1999,
    section 2.4). Every probability is positive. Counts in int64, logarithms in float64.

    A baseline for offsets N >= 1. It reads x[t+N], a token of the text that a probe of the residual
    stream at t does not see: to beat it, that probe must have foreseen the token as well.
    """

    kind = "bigram"
    least_offset = 1

    counts_: "csr_matrix"
    """Pairs seen, `(vocab, vocab)` int64; memory grows with the distinct pairs only."""

    def __init__(
        self, offsets: int | Iterable[int] = (1, 2, 3), across_documents: bool = False
    ) -> None:
        self.offsets = offsets
        self.across_documents = across_documents

    def fit(self, cache: "ActivationCache", *, client: Any = None) -> "Bigram":
        """Count the tokens of the train split in one pass, without a residual stream.

        The workers of `client` (of `dask.distributed`), if given, share the sequences.
        """
        self._start(cache)
        self.counts_ = count_pairs(cache, 1, client, self.across_documents)
        self.unigram_ = unigram(column_sums(self.counts_))
        return self

    def log_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """log P(. | token) of `tokens`, `(n, vocab)` float32; only these rows are made dense."""
        self.check_fitted()
        return after(tokens, self.counts_, self.unigram_)

    def logits(self, batch: Batch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token after `batch.last_token`, `(n, vocab)` float32."""
        import torch

        out = self.log_probabilities(tokens_of(batch.last_token))
        return torch.from_numpy(out).to(batch.last_token.device)

    def _size(self, offset: int) -> dict[str, int]:
        return {"n": int(self.counts_.sum()), "distinct": self.counts_.nnz}

    def _tensors(self) -> dict[str, np.ndarray]:
        return pack("pairs", self.counts_)

    def _read(self, tensors: dict[str, np.ndarray]) -> None:
        self.counts_ = unpack("pairs", tensors, len(self.unigram_))


class CrossFittedBigram(Bigram):
    """A `Bigram` for positions of the train split: counted on the train documents of other folds.

    Documents are dealt into `FOLDS` by their number; what it says at a position comes from all
    train documents but those of the position's own fold, so that no text is predicted from
    itself. Copies of one text under two numbers may meet. Five tables of counts.
    """

    def fit(self, cache: "ActivationCache", *, client: Any = None) -> "CrossFittedBigram":
        """Count the tokens of the train split, fold by fold, in one pass."""
        self._start(cache)
        of_fold = [empty(cache.vocab, cache.vocab) for _ in range(FOLDS)]
        contexts = contexts_of(cache, cache.split("train"))
        for ids, left, document in context_blocks(cache, contexts):
            first = np.flatnonzero(left >= 1)
            keys, fold = ids[first] * cache.vocab + ids[first + 1], document[first] % FOLDS
            for number in np.unique(fold).tolist():
                found = table(keys[fold == number], (cache.vocab, cache.vocab))
                of_fold[number] = of_fold[number] + found
        self.counts_ = total(of_fold, empty(cache.vocab, cache.vocab))
        self.unigram_ = unigram(column_sums(self.counts_))
        # Tables of the other folds, and not the total less one: what was never seen has no entry.
        none = empty(cache.vocab, cache.vocab)
        self._others = [
            total((own for other, own in enumerate(of_fold) if other != number), none)
            for number in range(FOLDS)
        ]
        self._cache = cache
        return self

    def logits(self, batch: Batch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token after `batch.last_token`, `(n, vocab)` float32."""
        import torch

        self.check_fitted()
        tokens, positions = tokens_of(batch.last_token), tokens_of(batch.position)
        fold = document_of(self._cache, positions) % FOLDS
        out = np.empty((len(tokens), len(self.unigram_)), np.float32)
        for number in np.unique(fold).tolist():
            here, others = fold == number, self._others[number]
            seen = column_sums(others)
            # Without another document, nothing is known of the text: every token is as likely.
            prior = unigram(seen) if seen.any() else np.full(len(seen), 1 / len(seen))
            out[here] = after(tokens[here], others, prior)
        return torch.from_numpy(out).to(batch.last_token.device)


class LaggedBigram(Counted):
    """P(x[t+N+1] | x[t]): what the token at t alone says of the one that follows t+N.

    Counted at distance N+1 for each offset, and interpolated with the same unigram as `Bigram`.
    It sees the last token that the state at t has seen and nothing after it: the fair bigram for
    a probe at offset N, which beats it only by what the state holds beyond its own token.
    """

    kind = "lagged"

    counts_: "dict[int, csr_matrix]"
    """Offset -> pairs (x[t], x[t+N+1]) seen, `(vocab, vocab)` int64."""

    def __init__(
        self, offsets: int | Iterable[int] = (0, 1, 2, 3), across_documents: bool = False
    ) -> None:
        self.offsets = offsets
        self.across_documents = across_documents

    def fit(self, cache: "ActivationCache", *, client: Any = None) -> "LaggedBigram":
        """Count the tokens of the train split, in one pass for each offset and one for all.

        The workers of `client` (of `dask.distributed`), if given, share the sequences.
        """
        self._start(cache)
        self.unigram_ = unigram(count_followers(cache, client, self.across_documents))
        self.counts_ = {
            n: count_pairs(cache, n + 1, client, self.across_documents) for n in self._offsets()
        }
        return self

    def logits(self, batch: Batch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token N+1 after `batch.token`, `(n, vocab)` float32."""
        import torch

        self.check_fitted()
        self._check_offset(offset)
        out = after(tokens_of(batch.token), self.counts_[offset], self.unigram_)
        return torch.from_numpy(out).to(batch.last_token.device)

    def _size(self, offset: int) -> dict[str, int]:
        return {"n": int(self.counts_[offset].sum()), "distinct": self.counts_[offset].nnz}

    def _tensors(self) -> dict[str, np.ndarray]:
        return {k: v for n, c in self.counts_.items() for k, v in pack(str(n), c).items()}

    def _read(self, tensors: dict[str, np.ndarray]) -> None:
        vocab = len(self.unigram_)
        self.counts_ = {n: unpack(str(n), tensors, vocab) for n in self._offsets()}


def after(tokens: np.ndarray, counts: "csr_matrix", unigram: np.ndarray) -> np.ndarray:
    """log P(. | token) of `tokens`, `(n, vocab)` float32."""
    prior = np.tile(np.log(unigram).astype(np.float32), (len(tokens), 1))
    return witten_bell(counts[tokens], prior)

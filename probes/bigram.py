"""The bigram baseline: the next token from the last token alone, counted in the train split."""

from typing import TYPE_CHECKING

import numpy as np

from ..cache.errors import UsageError
from .readout import Batch

if TYPE_CHECKING:
    import torch
    from scipy.sparse import csr_matrix

    from ..cache.store import ActivationCache

BLOCK_TOKENS = 1 << 20
"""Tokens counted at a time."""


class Bigram:
    """P(next token | token at t+N), interpolated with the unigram after Witten and Bell.

        P(b | a) = (c(a, b) + T(a) P(b)) / (c(a) + T(a))
        P(b)     = (c(b) + T / vocab) / (n + T)

    `c` counts pairs inside one sequence of the train split, `T(a)` the distinct tokens seen after
    `a`, `T` the distinct tokens seen at all (Witten and Bell, 1991; Chen and Goodman, 1999,
    section 2.4). Every probability is positive. Counts in int64, logarithms in float64.

    A baseline for offsets N >= 1. It reads x[t+N], a token of the text that a probe of the residual
    stream at t does not see: to beat it, that probe must have foreseen the token as well.
    """

    kind = "bigram"

    counts_: "csr_matrix"
    """Pairs seen, `(vocab, vocab)` int64; memory grows with the distinct pairs only."""
    context_: np.ndarray
    """c(a), `(vocab,)` int64."""
    followers_: np.ndarray
    """T(a), `(vocab,)` int64."""
    unigram_: np.ndarray
    """P(b), `(vocab,)` float64."""

    def __init__(self, offsets: tuple[int, ...] = (1, 2, 3)) -> None:
        self.offsets = offsets

    def pairs(self) -> list[tuple[int | None, int]]:
        """Layer None with every offset."""
        return [(None, offset) for offset in self.offsets]

    def fit(self, cache: "ActivationCache") -> "Bigram":
        """Count the tokens of the train split in one pass, without a residual stream."""
        from scipy.sparse import csr_matrix

        if any(offset < 1 for offset in self.offsets):
            raise UsageError(f"offsets of a bigram must be 1 or more, not {self.offsets}")
        counts = csr_matrix((cache.vocab, cache.vocab), dtype=np.int64)
        for sequences in cache.blocks(cache.split("train"), BLOCK_TOKENS):
            counts = csr_matrix(counts + _count(cache, sequences))
        if counts.nnz == 0:
            raise UsageError("the train split holds no pair of tokens to count")
        self.counts_ = counts
        self.context_ = np.asarray(counts.sum(1)).ravel()
        self.followers_ = np.diff(counts.indptr).astype(np.int64)
        seen = np.asarray(counts.sum(0)).ravel()
        types = np.count_nonzero(seen)
        self.unigram_ = (seen + types / cache.vocab) / (seen.sum() + types)
        return self

    def log_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """log P(. | token) of `tokens`, `(n, vocab)` float32; only these rows are made dense."""
        self._check_fitted()
        context, followers = self.context_[tokens], self.followers_[tokens]
        # A token never followed by anything leaves the unigram alone.
        share = np.where(context > 0, followers / np.maximum(context + followers, 1), 1.0)
        log_share, log_unigram = np.log(share), np.log(self.unigram_)
        out = np.add.outer(log_share.astype(np.float32), log_unigram.astype(np.float32))
        rows = self.counts_[tokens]
        line = np.repeat(np.arange(len(tokens)), np.diff(rows.indptr))
        prior = followers[line] * self.unigram_[rows.indices]
        out[line, rows.indices] = np.log((rows.data + prior) / (context + followers)[line])
        return out

    def logits(self, batch: Batch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token after `batch.last_token`, `(n, vocab)` float32."""
        import torch

        out = self.log_probabilities(batch.last_token.cpu().numpy())
        return torch.from_numpy(out).to(batch.last_token.device)

    def _check_fitted(self) -> None:
        if not hasattr(self, "counts_"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError("this Bigram is not fitted; call fit(cache) first")


def _count(cache: "ActivationCache", sequences: np.ndarray) -> "csr_matrix":
    """Pairs of neighbours inside each of `sequences`, `(vocab, vocab)`."""
    from scipy.sparse import csr_matrix

    ids = cache.tokens[cache.rows(sequences)].astype(np.int64)
    inside = np.ones(len(ids), bool)
    inside[np.cumsum(cache.sequence_length[sequences]) - 1] = False
    first = np.flatnonzero(inside)
    keys, number = np.unique(ids[first] * cache.vocab + ids[first + 1], return_counts=True)
    shape = (cache.vocab, cache.vocab)
    return csr_matrix((number.astype(np.int64), np.divmod(keys, cache.vocab)), shape=shape)

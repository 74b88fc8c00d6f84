"""The bigram baselines: the next token from one token alone, counted in the train split."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.tokens.segments import context_blocks, context_numbers, document_of
from ..base.readout import ReadoutBatch
from .token_counts import (
    BLOCK_TOKENS,
    CountBaseline,
    column_sums,
    count_followers,
    count_pairs,
    count_table,
    empty_counts,
    over_train,
    pack_counts,
    tokens_of,
    total_count,
    unigram,
    unpack_counts,
    witten_bell,
)

if TYPE_CHECKING:
    import torch
    from scipy.sparse import csr_matrix

    from ...cache.store.activation_cache import ActivationCache


FOLDS = 5
"""Folds of documents of a `CrossFittedBigram`."""


class Bigram(CountBaseline):
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
        return bigram_log_probabilities(tokens, self.counts_, self.unigram_)

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token after `batch.last_token`, `(n, vocab)` float32."""
        import torch

        out = self.log_probabilities(tokens_of(batch.last_token))
        return torch.from_numpy(out).to(batch.last_token.device)

    def _size(self, offset: int) -> dict[str, int]:
        return {"n": int(self.counts_.sum()), "distinct": self.counts_.nnz}

    def _tensors(self) -> dict[str, np.ndarray]:
        return pack_counts("pairs", self.counts_)

    def _read(self, tensors: dict[str, np.ndarray]) -> None:
        self.counts_ = unpack_counts("pairs", tensors, len(self.unigram_))


class CrossFittedBigram(Bigram):
    """A `Bigram` for positions of the train split: counted on the train documents of other folds.

    Documents are dealt into `FOLDS` by their number; what it says at a position comes from all
    train documents but those of the position's own fold, so that no text is predicted from
    itself. Copies of one text under two numbers may meet. Five tables of counts.
    """

    def fit(self, cache: "ActivationCache", *, client: Any = None) -> "CrossFittedBigram":
        """Count the tokens of the train split, fold by fold, in one pass."""
        self._start(cache)
        of_fold = [empty_counts(cache.vocab, cache.vocab) for _ in range(FOLDS)]
        contexts = context_numbers(cache, cache.sequences("train"))
        for ids, left, document in context_blocks(cache, contexts):
            first = np.flatnonzero(left >= 1)
            keys, fold = ids[first] * cache.vocab + ids[first + 1], document[first] % FOLDS
            for number in np.unique(fold).tolist():
                found = count_table(keys[fold == number], (cache.vocab, cache.vocab))
                of_fold[number] = of_fold[number] + found
        self.counts_ = total_count(of_fold, empty_counts(cache.vocab, cache.vocab))
        self.unigram_ = unigram(column_sums(self.counts_))
        # Tables of the other folds, and not the total less one: what was never seen has no entry.
        none = empty_counts(cache.vocab, cache.vocab)
        self._others = [
            total_count((own for other, own in enumerate(of_fold) if other != number), none)
            for number in range(FOLDS)
        ]
        self._cache = cache
        return self

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
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
            out[here] = bigram_log_probabilities(tokens[here], others, prior)
        return torch.from_numpy(out).to(batch.last_token.device)


class LaggedBigram(CountBaseline):
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

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token N+1 after `batch.token`, `(n, vocab)` float32."""
        import torch

        self.check_fitted()
        self._check_offset(offset)
        out = bigram_log_probabilities(tokens_of(batch.token), self.counts_[offset], self.unigram_)
        return torch.from_numpy(out).to(batch.last_token.device)

    def _size(self, offset: int) -> dict[str, int]:
        return {"n": int(self.counts_[offset].sum()), "distinct": self.counts_[offset].nnz}

    def _tensors(self) -> dict[str, np.ndarray]:
        return {k: v for n, c in self.counts_.items() for k, v in pack_counts(str(n), c).items()}

    def _read(self, tensors: dict[str, np.ndarray]) -> None:
        vocab = len(self.unigram_)
        self.counts_ = {n: unpack_counts(str(n), tensors, vocab) for n in self._offsets()}


def bigram_log_probabilities(
    tokens: np.ndarray, counts: "csr_matrix", unigram: np.ndarray
) -> np.ndarray:
    """log P(. | token) of `tokens`, `(n, vocab)` float32."""
    prior = np.tile(np.log(unigram).astype(np.float32), (len(tokens), 1))
    return witten_bell(counts[tokens], prior)


class Unigram(CountBaseline):
    """P(b) = (c(b) + T / vocab) / (n + T): the marginal of the train split, for every offset.

    `c` counts the tokens that follow another one in their document, which are those that a model
    predicts; `T` of them are distinct. What a probe says that has learnt nothing of its input.
    """

    kind = "unigram"

    counts_: np.ndarray
    """c(b), `(vocab,)` int64."""

    def __init__(
        self, offsets: int | Iterable[int] = (0, 1, 2, 3), across_documents: bool = False
    ) -> None:
        self.offsets = offsets
        self.across_documents = across_documents

    def fit(self, cache: "ActivationCache", *, client: Any = None) -> "Unigram":
        """Count the tokens of the train split in one pass, on the workers of `client` if given."""
        self._start(cache)
        self.counts_ = count_followers(cache, client, self.across_documents)
        self.unigram_ = unigram(self.counts_)
        return self

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """The same log-probabilities for every row, `(n, vocab)` float32."""
        import torch

        self.check_fitted()
        row = torch.from_numpy(np.log(self.unigram_).astype(np.float32))
        return row.to(batch.last_token.device).expand(len(batch.last_token), -1)

    def _size(self, offset: int) -> dict[str, int]:
        return {"n": int(self.counts_.sum()), "distinct": int(np.count_nonzero(self.counts_))}

    def _tensors(self) -> dict[str, np.ndarray]:
        return {"count": self.counts_}

    def _read(self, tensors: dict[str, np.ndarray]) -> None:
        self.counts_ = tensors["count"]


CONTEXTS = 1 << 20
"""Default of the pairs of tokens that are contexts."""


class Trigram(CountBaseline):
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
        self.counts_ = total_count(counts, empty_counts(len(self.contexts_), cache.vocab))
        return self

    def log_probabilities(self, previous: np.ndarray, last: np.ndarray) -> np.ndarray:
        """log P(. | previous, last) of tokens `(n,)`, `(n, vocab)` float32; previous may be -1."""
        self.check_fitted()
        out = bigram_log_probabilities(last, self.pairs_, self.unigram_)
        row, known = find_pairs(self.contexts_, len(self.unigram_), previous, last)
        out[known] = witten_bell(self.counts_[row[known]], out[known])
        return out

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token after `batch.last_token`, `(n, vocab)` float32."""
        import torch

        out = self.log_probabilities(tokens_of(batch.previous_token), tokens_of(batch.last_token))
        return torch.from_numpy(out).to(batch.last_token.device)

    def _size(self, offset: int) -> dict[str, int]:
        return {"n": int(self.counts_.sum()), "distinct": self.counts_.nnz}

    def _tensors(self) -> dict[str, np.ndarray]:
        contexts = {"contexts": self.contexts_}
        return {
            **contexts,
            **pack_counts("triples", self.counts_),
            **pack_counts("pairs", self.pairs_),
        }

    def _read(self, tensors: dict[str, np.ndarray]) -> None:
        vocab = len(self.unigram_)
        self.contexts_ = tensors["contexts"]
        self.counts_ = unpack_counts("triples", tensors, vocab)
        self.pairs_ = unpack_counts("pairs", tensors, vocab)


def most_frequent(pairs: "csr_matrix", number: int) -> np.ndarray:
    """Keys a * vocab + b of the `number` most frequent pairs, ascending; ties by the lower key."""
    followers = np.diff(pairs.indptr)
    keys = np.repeat(np.arange(len(followers)), followers) * len(followers) + pairs.indices
    rank = np.lexsort((keys, np.negative(pairs.data)))
    return np.sort(keys[rank[:number]])


def find_pairs(
    contexts: np.ndarray, vocab: int, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, ...]:
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
            row, known = find_pairs(contexts, cache.vocab, ids[first], ids[first + 1])
            keys = row[known] * cache.vocab + ids[first + 2][known]
            yield count_table(keys, (len(contexts), cache.vocab))

    return total_count(blocks(), empty_counts(len(contexts), cache.vocab))

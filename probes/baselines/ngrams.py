"""n-gram baselines: the next token from no, one or two tokens, counted in the train split.

    Unigram             P(next)                             reads nothing
    LaggedBigram        P(x[t+N+1] | x[t])                  reads the token at t
    Bigram              P(x[t+N+1] | x[t+N])                reads the token at t+N
    CrossFittedBigram   the same for texts of the train split, each counted without itself
    Trigram             P(x[t+N+1] | x[t+N-1], x[t+N])      reads the two tokens before

Counting, smoothing (Witten and Bell) and saving lie in `token_counts.py`.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.progress import Auto, Progress, show_stage
from ...cache.tokens.segments import context_blocks, document_of
from ..base.readout import ReadoutBatch
from ..base.saved_tensors import SavedTensors
from .token_counts import (
    BLOCK_TOKENS,
    STAGE,
    CountBaseline,
    TrainSplitPasses,
    column_sums,
    count_followers,
    count_pairs,
    empty_table,
    pack_table,
    sum_tables,
    table_of_keys,
    token_array,
    unigram_probabilities,
    unpack_table,
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
    reads_target_alone = True

    counts_: "csr_matrix"
    """Pairs seen, `(vocab, vocab)` int64; memory grows with the distinct pairs only."""

    def __init__(
        self, offsets: int | Iterable[int] = (1, 2, 3), across_documents: bool = False
    ) -> None:
        self.offsets = offsets
        self.across_documents = across_documents

    def fit(
        self,
        cache: "ActivationCache",
        *,
        client: Any = None,
        progress: Progress | Auto | None = "auto",
    ) -> "Bigram":
        """Count the tokens of the train split in one pass, without a residual stream.

        The workers of `client` (of `dask.distributed`), if given, share the sequences. `progress`
        is "auto" (bars in a terminal or notebook, elsewhere lines of the logger `residua`), None
        (nothing), or a function that is called with (tokens read, tokens to read).
        """
        self._begin_fit(cache)
        with show_stage(progress, STAGE) as report:
            passes = TrainSplitPasses(cache, 1, client, report)
            self.counts_ = count_pairs(passes, 1, self.across_documents)
        self.unigram_: np.ndarray = unigram_probabilities(column_sums(self.counts_))
        return self

    def log_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """log P(. | token) of `tokens`, `(n, vocab)` float32; only these rows are made dense."""
        self.check_fitted()
        return bigram_log_probabilities(tokens, self.counts_, self.unigram_)

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token after `batch.last_token`, `(n, vocab)` float32."""
        import torch

        out = self.log_probabilities(token_array(batch.last_token))
        return torch.from_numpy(out).to(batch.last_token.device)

    def _table_size(self, offset: int) -> dict[str, int]:
        return {"n": int(self.counts_.sum()), "distinct": self.counts_.nnz}

    def _saved_tensors(self) -> dict[str, np.ndarray]:
        return pack_table("pairs", self.counts_)

    def _restore_tensors(self, tensors: SavedTensors) -> None:
        self.counts_ = unpack_table("pairs", tensors, len(self.unigram_), len(self.unigram_))


class CrossFittedBigram(Bigram):
    """A `Bigram` for positions of the train split: counted on the train documents of other folds.

    Documents are cut into `FOLDS` by their number. A position is predicted from the counts of all
    train documents outside its own fold, so that no text is predicted from itself; copies of one
    text under two numbers may lie in two folds. Memory: five tables of counts.
    """

    def fit(
        self,
        cache: "ActivationCache",
        *,
        client: Any = None,
        progress: Progress | Auto | None = "auto",
    ) -> "CrossFittedBigram":
        """Count the tokens of the train split, fold by fold, in one pass.

        It takes place in this process. `progress` is that of `Bigram.fit`.
        """
        self._begin_fit(cache)
        # Count the pairs of each fold of documents.
        zero = empty_table(cache.vocab, cache.vocab)
        fold_tables = [zero] * FOLDS
        with show_stage(progress, STAGE) as report:
            passes = TrainSplitPasses(cache, progress=report)
            for ids, following, document in context_blocks(cache, passes.contexts):
                first = np.flatnonzero(following >= 1)
                keys, folds = ids[first] * cache.vocab + ids[first + 1], document[first] % FOLDS
                for fold in np.unique(folds).tolist():
                    table = table_of_keys(keys[folds == fold], (cache.vocab, cache.vocab))
                    fold_tables[fold] = fold_tables[fold] + table
                passes.report(len(ids))
        self.counts_: csr_matrix = sum_tables(fold_tables, zero)
        self.unigram_: np.ndarray = unigram_probabilities(column_sums(self.counts_))
        # For each fold, the sum of the other tables. The total less its own table would have
        # entries of zero, which smoothing would count as pairs seen.
        self._other_folds = [
            sum_tables((table for other, table in enumerate(fold_tables) if other != fold), zero)
            for fold in range(FOLDS)
        ]
        self._cache = cache
        return self

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token after `batch.last_token`, `(n, vocab)` float32."""
        import torch

        self.check_fitted()
        tokens, positions = token_array(batch.last_token), token_array(batch.position)
        folds = document_of(self._cache, positions) % FOLDS
        logits = np.empty((len(tokens), len(self.unigram_)), np.float32)
        for fold in np.unique(folds).tolist():
            in_fold, table = folds == fold, self._other_folds[fold]
            counts = column_sums(table)
            # Without a document in another fold, every token is equally likely.
            uniform = np.full(len(counts), 1 / len(counts))
            prior = unigram_probabilities(counts) if counts.any() else uniform
            logits[in_fold] = bigram_log_probabilities(tokens[in_fold], table, prior)
        return torch.from_numpy(logits).to(batch.last_token.device)


class LaggedBigram(CountBaseline):
    """P(x[t+N+1] | x[t]): the token after t+N, from the token at t alone.

    Pairs are counted at distance N+1 for each offset, and interpolated with the same unigram as
    `Bigram`. The baseline reads the last token that the state at t has seen and nothing after t:
    the fair bigram for a probe at offset N, which beats this baseline only by what the state holds
    beyond its own token.
    """

    kind = "lagged"

    counts_: "dict[int, csr_matrix]"
    """Offset -> pairs (x[t], x[t+N+1]) seen, `(vocab, vocab)` int64."""

    def __init__(
        self, offsets: int | Iterable[int] = (0, 1, 2, 3), across_documents: bool = False
    ) -> None:
        self.offsets = offsets
        self.across_documents = across_documents

    def fit(
        self,
        cache: "ActivationCache",
        *,
        client: Any = None,
        progress: Progress | Auto | None = "auto",
    ) -> "LaggedBigram":
        """Count the tokens of the train split, in one pass for each offset and one for all.

        The workers of `client` (of `dask.distributed`), if given, share the sequences. `progress`
        is "auto" (bars in a terminal or notebook, elsewhere lines of the logger `residua`), None
        (nothing), or a function that is called with (tokens read, tokens to read).
        """
        self._begin_fit(cache)
        offsets, across = self._offsets(), self.across_documents
        with show_stage(progress, STAGE) as report:
            passes = TrainSplitPasses(cache, 1 + len(offsets), client, report)
            self.unigram_: np.ndarray = unigram_probabilities(count_followers(passes, across))
            self.counts_ = {n: count_pairs(passes, n + 1, across) for n in offsets}
        return self

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token N+1 after `batch.token`, `(n, vocab)` float32."""
        import torch

        self.check_fitted()
        self._check_offset(offset)
        out = bigram_log_probabilities(
            token_array(batch.token), self.counts_[offset], self.unigram_
        )
        return torch.from_numpy(out).to(batch.last_token.device)

    def _table_size(self, offset: int) -> dict[str, int]:
        return {"n": int(self.counts_[offset].sum()), "distinct": self.counts_[offset].nnz}

    def _saved_tensors(self) -> dict[str, np.ndarray]:
        tensors = {}
        for offset, table in self.counts_.items():
            tensors |= pack_table(str(offset), table)
        return tensors

    def _restore_tensors(self, tensors: SavedTensors) -> None:
        vocab = len(self.unigram_)
        self.counts_ = {n: unpack_table(str(n), tensors, vocab, vocab) for n in self._offsets()}


def bigram_log_probabilities(
    tokens: np.ndarray, counts: "csr_matrix", unigram: np.ndarray
) -> np.ndarray:
    """log P(. | token) of `tokens` `(n,)`, `(n, vocab)` float32; the formula is in `Bigram`."""
    prior = np.tile(np.log(unigram).astype(np.float32), (len(tokens), 1))
    return witten_bell(counts[tokens], prior)


class Unigram(CountBaseline):
    """P(b) = (c(b) + T / vocab) / (n + T): the marginal of the train split, for every offset.

    `c` counts the tokens that follow another one in their document, which are those that a model
    predicts; `T` of them are distinct, `n` is their number. The prediction of a probe that has
    learnt nothing from its input.
    """

    kind = "unigram"
    reads_target_alone = True

    counts_: np.ndarray
    """c(b), `(vocab,)` int64."""

    def __init__(
        self, offsets: int | Iterable[int] = (0, 1, 2, 3), across_documents: bool = False
    ) -> None:
        self.offsets = offsets
        self.across_documents = across_documents

    def fit(
        self,
        cache: "ActivationCache",
        *,
        client: Any = None,
        progress: Progress | Auto | None = "auto",
    ) -> "Unigram":
        """Count the tokens of the train split in one pass, without a residual stream.

        The workers of `client` (of `dask.distributed`), if given, share the sequences. `progress`
        is "auto" (bars in a terminal or notebook, elsewhere lines of the logger `residua`), None
        (nothing), or a function that is called with (tokens read, tokens to read).
        """
        self._begin_fit(cache)
        with show_stage(progress, STAGE) as report:
            passes = TrainSplitPasses(cache, 1, client, report)
            self.counts_ = count_followers(passes, self.across_documents)
        self.unigram_: np.ndarray = unigram_probabilities(self.counts_)
        return self

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """The same log-probabilities for every row, `(n, vocab)` float32."""
        import torch

        self.check_fitted()
        row = torch.from_numpy(np.log(self.unigram_).astype(np.float32))
        return row.to(batch.last_token.device).expand(len(batch.last_token), -1)

    def _table_size(self, offset: int) -> dict[str, int]:
        return {"n": int(self.counts_.sum()), "distinct": int(np.count_nonzero(self.counts_))}

    def _saved_tensors(self) -> dict[str, np.ndarray]:
        return {"count": self.counts_}

    def _restore_tensors(self, tensors: SavedTensors) -> None:
        self.counts_ = tensors.array("count", self.unigram_.shape, "iu")


CONTEXTS = 1 << 20
"""Default number of pairs of tokens that have counts of their own in a `Trigram`."""


class Trigram(CountBaseline):
    """P(next token | tokens at t+N-1 and t+N), interpolated with `Bigram` after Witten and Bell.

        P(c | a, b) = (c(a, b, c) + T(a, b) P(c | b)) / (c(a, b) + T(a, b))

    The `contexts` most frequent pairs (a, b) have counts of their own; for all others P(c | a, b)
    is P(c | b). Memory: 12 bytes for each distinct triple of these contexts, 20 for each context,
    12 for each distinct pair; all twice while tables are added up. Two passes over the tokens.

    A baseline for offsets N >= 1. At N >= 2 it reads two tokens that a probe of the residual
    stream at t does not see, at N = 1 one.
    """

    kind = "trigram"
    least_offset = 1
    reads_target_alone = True

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

    def fit(
        self,
        cache: "ActivationCache",
        *,
        client: Any = None,
        progress: Progress | Auto | None = "auto",
    ) -> "Trigram":
        """Count the train split: pairs in the first pass, triples in the second.

        The workers of `client` (of `dask.distributed`), if given, share the sequences. `progress`
        is "auto" (bars in a terminal or notebook, elsewhere lines of the logger `residua`), None
        (nothing), or a function that is called with (tokens read, tokens to read).
        """
        self._begin_fit(cache)
        if self.contexts < 1:
            raise UsageError(f"contexts must be at least 1, not {self.contexts}")
        with show_stage(progress, STAGE) as report:
            passes = TrainSplitPasses(cache, 2, client, report)
            self.pairs_ = count_pairs(passes, 1, self.across_documents)
            self.unigram_: np.ndarray = unigram_probabilities(column_sums(self.pairs_))
            self.contexts_ = most_frequent_pairs(self.pairs_, self.contexts)
            tables = passes.count(_count_triples_in, self.contexts_, self.across_documents)
            self.counts_ = sum_tables(tables, empty_table(len(self.contexts_), cache.vocab))
        return self

    def log_probabilities(self, previous: np.ndarray, last: np.ndarray) -> np.ndarray:
        """log P(. | previous, last) of tokens `(n,)`, `(n, vocab)` float32; previous may be -1."""
        self.check_fitted()
        logits = bigram_log_probabilities(last, self.pairs_, self.unigram_)
        row, is_context = context_rows(self.contexts_, len(self.unigram_), previous, last)
        logits[is_context] = witten_bell(self.counts_[row[is_context]], logits[is_context])
        return logits

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token after `batch.last_token`, `(n, vocab)` float32."""
        import torch

        out = self.log_probabilities(
            token_array(batch.previous_token), token_array(batch.last_token)
        )
        return torch.from_numpy(out).to(batch.last_token.device)

    def _table_size(self, offset: int) -> dict[str, int]:
        return {"n": int(self.counts_.sum()), "distinct": self.counts_.nnz}

    def _saved_tensors(self) -> dict[str, np.ndarray]:
        return {
            "contexts": self.contexts_,
            **pack_table("triples", self.counts_),
            **pack_table("pairs", self.pairs_),
        }

    def _restore_tensors(self, tensors: SavedTensors) -> None:
        vocab = len(self.unigram_)
        self.contexts_ = tensors.array("contexts", (None,), "iu")
        self.counts_ = unpack_table("triples", tensors, vocab, len(self.contexts_))
        self.pairs_ = unpack_table("pairs", tensors, vocab, vocab)


def most_frequent_pairs(pairs: "csr_matrix", number: int) -> np.ndarray:
    """Keys a * vocab + b of the `number` most frequent pairs, ascending; ties by the lower key."""
    followers = np.diff(pairs.indptr)
    keys = np.repeat(np.arange(len(followers)), followers) * len(followers) + pairs.indices
    order = np.lexsort((keys, np.negative(pairs.data)))
    return np.sort(keys[order[:number]])


def context_rows(
    contexts: np.ndarray, vocab: int, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Index in `contexts` of the pairs (a, b), `(n,)`, and whether each pair is a context.

    The index of a pair that is none has no meaning; a is -1 at the start of a text.
    """
    keys = a * vocab + b
    row = np.searchsorted(contexts, keys)
    row[row == len(contexts)] = 0
    return row, (contexts[row] == keys) & (a >= 0)


def _count_triples_in(
    cache: "ActivationCache", numbers: np.ndarray, contexts: np.ndarray, across_documents: bool
) -> "csr_matrix":
    """How often each token followed each of the pairs `contexts`, `(contexts, vocab)`.

    Counted in the sequences `numbers` that the model read.
    """

    def block_tables() -> "Iterator[csr_matrix]":
        for ids, following, _ in context_blocks(cache, numbers, across_documents, BLOCK_TOKENS):
            first = np.flatnonzero(following >= 2)
            row, is_context = context_rows(contexts, cache.vocab, ids[first], ids[first + 1])
            keys = row[is_context] * cache.vocab + ids[first + 2][is_context]
            yield table_of_keys(keys, (len(contexts), cache.vocab))

    return sum_tables(block_tables(), empty_table(len(contexts), cache.vocab))

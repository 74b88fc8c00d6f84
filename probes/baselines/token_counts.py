"""Counts of tokens that follow others in the train split, and probabilities made of them.

The text of the split is counted, that is all tokens of the sequences that the model read, also
where only some of their positions are rows of the cache. Tokens of two documents are no pair,
unless `across_documents`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ...cache.cluster import results, threads_of
from ...cache.errors import NotFoundError, UsageError
from ...cache.number_ranges import as_tuple
from ...cache.tokens.segments import PairScope, context_blocks, context_numbers
from ..base.params import Params

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from ...cache.store.activation_cache import ActivationCache

BLOCK_TOKENS = 1 << 20
"""Tokens counted at a time."""


class CountBaseline(Params):
    """A baseline of token counts: what `Bigram` and the others have in common.

    They read no residual stream, so their layer is None. Fitted in one pass or two over the tokens
    of the train split; the model and the residual streams are not read. Tokens of two documents are
    no pair, unless `across_documents`.
    """

    kind: str
    offsets: int | Iterable[int]
    across_documents: bool
    least_offset = 0
    """The smallest offset at which the baseline says something."""

    unigram_: np.ndarray
    """P(b), `(vocab,)` float64."""

    def pairs(self) -> list[tuple[int | None, int]]:
        """Layer None with every offset."""
        return [(None, offset) for offset in self._offsets()]

    def _offsets(self) -> tuple[int, ...]:
        """`offsets` as plain ints, whether one or several were given."""
        return as_tuple(self.offsets, "offsets")

    def _check_offset(self, offset: int) -> None:
        """Raise `NotFoundError` for an offset that was not asked for in the fit."""
        if offset not in self._offsets():
            raise NotFoundError(
                f"{type(self).__name__} has no counts for offset {offset}; it has the offsets "
                f"{', '.join(map(str, self._offsets()))}"
            )

    def _start(self, cache: "ActivationCache") -> None:
        """Check the parameters, and note which cache is counted."""
        offsets = self._offsets()
        if not offsets or min(offsets) < self.least_offset:
            raise UsageError(
                f"offsets of {type(self).__name__} must be {self.least_offset} or more, "
                f"not {self.offsets}"
            )
        PairScope(self.across_documents).check()
        self.cache_id_, self.geometry_, self.split_ = cache.id, cache.head.digest, "train"
        self.n_features_in_ = cache.d_model

    def check_fitted(self) -> None:
        """Raise scikit-learn's `NotFittedError` before `fit`."""
        if not hasattr(self, "unigram_"):
            from ..base.estimator import NotFittedError

            raise NotFittedError(f"this {type(self).__name__} is not fitted; call fit(cache) first")

    def metrics(self) -> list[dict[str, Any]]:
        """One row per offset: pairs counted, and distinct ones."""
        self.check_fitted()
        return [
            {"layer": layer, "offset": offset, **self._size(offset)}
            for layer, offset in self.pairs()
        ]

    def _size(self, offset: int) -> dict[str, int]:
        """`n` and `distinct` at an offset."""
        raise NotImplementedError

    def _tensors(self) -> dict[str, np.ndarray]:
        """What is counted."""
        raise NotImplementedError

    def _read(self, tensors: dict[str, np.ndarray]) -> None:
        """Take `_tensors` back."""
        raise NotImplementedError

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What `save_probe` writes: a JSON object and tensors."""
        rows = self.metrics()
        about = {"cache": self.cache_id_, "geometry": self.geometry_, "split": self.split_}
        tensors = {**self._tensors(), "unigram": self.unigram_}
        return {**about, "d_model": self.n_features_in_, "pairs": rows}, tensors

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: dict[str, np.ndarray]
    ) -> Self:
        """The baseline that `state` described."""
        given = params["offsets"]
        if "param_types" not in config and isinstance(given, list):  # as the first version wrote
            params = {**params, "offsets": tuple(given)}
        probe = cls(**params)
        probe.cache_id_, probe.geometry_ = config["cache"], config["geometry"]
        probe.split_, probe.n_features_in_ = config["split"], config["d_model"]
        probe.unigram_ = tensors["unigram"]
        probe._read(tensors)
        return probe


def count_pairs(
    cache: "ActivationCache", lag: int = 1, client: Any = None, across_documents: bool = False
) -> "csr_matrix":
    """How often each token came `lag` tokens after each other one, `(vocab, vocab)` int64.

    Both in one document, in one sequence of the train split. Memory: 12 bytes for each distinct
    pair, twice while they are added up.
    """
    counts = over_train(_pairs_of, cache, client, lag, across_documents)
    return total_count(counts, empty_counts(cache.vocab, cache.vocab))


def _pairs_of(
    cache: "ActivationCache", contexts: np.ndarray, lag: int, across_documents: bool
) -> "csr_matrix":
    """`count_pairs` in some contexts."""

    def blocks() -> "Iterator[csr_matrix]":
        for ids, left, _ in context_blocks(cache, contexts, across_documents, BLOCK_TOKENS):
            first = np.flatnonzero(left >= lag)
            keys = ids[first] * cache.vocab + ids[first + lag]
            yield count_table(keys, (cache.vocab, cache.vocab))

    return total_count(blocks(), empty_counts(cache.vocab, cache.vocab))


def count_followers(
    cache: "ActivationCache", client: Any = None, across_documents: bool = False
) -> np.ndarray:
    """How often each token follows another one of its document in the train split, int64."""
    counts = over_train(_followers_of, cache, client, across_documents)
    return sum(counts, np.zeros(cache.vocab, np.int64))


def _followers_of(
    cache: "ActivationCache", contexts: np.ndarray, across_documents: bool
) -> np.ndarray:
    """`count_followers` in some contexts."""
    found = np.zeros(cache.vocab, np.int64)
    for ids, left, _ in context_blocks(cache, contexts, across_documents, BLOCK_TOKENS):
        found += np.bincount(ids[np.flatnonzero(left >= 1) + 1], minlength=cache.vocab)
    return found


def over_train(
    count: Callable[..., Any], cache: "ActivationCache", client: Any, *args: Any
) -> Iterator[Any]:
    """`count(cache, contexts, *args)` of the train split: here, or shared by a cluster's threads.

    Counts are whole numbers: their sum does not depend on who counted what.
    """
    contexts = context_numbers(cache, cache.sequences("train"))
    if client is None:
        return iter((count(cache, contexts, *args),))
    shares = np.array_split(contexts, sum(threads_of(client).values()))
    return results(client, count, [(cache, share, *args) for share in shares])


def empty_counts(rows: int, columns: int) -> "csr_matrix":
    """A table without a count."""
    from scipy.sparse import csr_matrix

    return csr_matrix((rows, columns), dtype=np.int64)


def count_table(keys: np.ndarray, shape: tuple[int, int]) -> "csr_matrix":
    """How often each `row * columns + column` occurs in `keys`, int64."""
    from scipy.sparse import csr_matrix

    distinct, number = np.unique(keys, return_counts=True)
    return csr_matrix((number.astype(np.int64), np.divmod(distinct, shape[1])), shape=shape)


def total_count(tables: "Iterable[csr_matrix]", none: "csr_matrix") -> "csr_matrix":
    """The sum of all `tables`, and of `none`.

    Those of like size are added first: the work is n log n in the entries, not n squared.
    """
    waiting = [none]
    for one in tables:
        waiting.append(one)
        while len(waiting) > 1 and waiting[-2].nnz <= 2 * waiting[-1].nnz:
            waiting[-2:] = [waiting[-2] + waiting[-1]]
    while len(waiting) > 1:
        waiting[-2:] = [waiting[-2] + waiting[-1]]
    return waiting[0]


def unigram(seen: np.ndarray) -> np.ndarray:
    """P(b) = (c(b) + T / vocab) / (n + T) of counts `(vocab,)`, float64; T tokens were seen."""
    types = np.count_nonzero(seen)
    if not types:
        raise UsageError("the train split holds no pair of tokens to count")
    return (seen + types / len(seen)) / (seen.sum() + types)


def witten_bell(rows: "csr_matrix", log_prior: np.ndarray) -> np.ndarray:
    """log((c(b) + T prior(b)) / (c + T)) of the counts `rows`, written over `log_prior`.

    Both `(n, vocab)`; c is the sum and T the number of entries of a row. A row without a count
    leaves its prior alone. Witten and Bell (1991); Chen and Goodman (1999), section 2.4.
    """
    types = np.diff(rows.indptr)
    count = row_sums(rows)
    share = np.where(count > 0, types / np.maximum(count + types, 1), 1.0)
    line = np.repeat(np.arange(len(types)), types)
    prior = np.exp(log_prior[line, rows.indices].astype(np.float64))
    seen = (rows.data + types[line] * prior) / (count + types)[line]
    log_prior += np.log(share).astype(np.float32)[:, None]
    log_prior[line, rows.indices] = np.log(seen)
    return log_prior


def row_sums(rows: "csr_matrix") -> np.ndarray:
    """`(n,)` sums of the rows, in the dtype of the counts."""
    return np.asarray(rows.sum(1)).ravel()


def column_sums(rows: "csr_matrix") -> np.ndarray:
    """`(vocab,)` sums of the columns, in the dtype of the counts."""
    return np.asarray(rows.sum(0)).ravel()


def pack_counts(name: str, counts: "csr_matrix") -> dict[str, np.ndarray]:
    """A sparse table as three tensors."""
    parts = {"row": counts.indptr.astype(np.int64), "column": counts.indices.astype(np.int32)}
    return {f"{name}.{part}": v for part, v in {**parts, "count": counts.data}.items()}


def unpack_counts(name: str, tensors: dict[str, np.ndarray], columns: int) -> "csr_matrix":
    """The sparse table that `pack` wrote."""
    from scipy.sparse import csr_matrix

    row, column, count = (tensors[f"{name}.{part}"] for part in ("row", "column", "count"))
    return csr_matrix((count, column, row), shape=(len(row) - 1, columns))


def tokens_of(values: Any) -> np.ndarray:
    """Token ids of a batch, a tensor `(n,)`, as an int64 array."""
    if values is None:
        raise UsageError("this batch lacks tokens that the baseline reads; see `Batch`")
    return values.cpu().numpy()


def unfitted_baselines(
    kinds: Iterable[str], offsets: Iterable[int], across_documents: bool = False
) -> "list[Any]":
    """Unfitted baselines of `kinds`, each at those of `offsets` at which it says something."""
    from ..saved.kinds import probe_class

    found = []
    for kind in kinds:
        baseline = probe_class(kind)
        chosen = tuple(offset for offset in offsets if offset >= baseline.least_offset)
        if chosen:
            found.append(baseline(offsets=chosen, across_documents=across_documents))
    if not found:
        raise UsageError(
            f"at offset 0 there is nothing for {', '.join(kinds)} to say; give offsets of 1 or more"
        )
    return found

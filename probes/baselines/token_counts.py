"""Base and tables of the baselines that count tokens: `CountBaseline`, sparse counts, smoothing.

`ngrams.py` and `marginal_bigram.py` hold the baselines themselves. The text of the train split is
counted, that is all tokens of the sequences that the model read, also where only some of their
positions are rows of the cache. Tokens of two documents are no pair, unless `across_documents`.
Tables are sparse, `(contexts, vocab)` int64: row a counts the tokens that follow a.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ...cache.cluster import results, threads_of
from ...cache.errors import NotFoundError, UsageError
from ...cache.number_ranges import as_tuple
from ...cache.progress import Progress
from ...cache.tokens.segments import PairScope, context_blocks, context_numbers
from ..base.fitted_probe import FittedProbe
from ..base.params import Params
from ..base.saved_tensors import SavedTensors
from ..saved.probe_methods import ProbeFiles

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from ...cache.store.activation_cache import ActivationCache

BLOCK_TOKENS = 1 << 20
"""Tokens counted at a time."""
STAGE = "count"
"""Stage of the progress of a fit."""


class CountBaseline(FittedProbe, ProbeFiles, Params):
    """Base of the baselines that count tokens: parameters, metrics, saving.

    Count baselines read no residual stream, so their layer is None. A fit takes a pass or two over
    the tokens of the train split; the model and the residual streams are not read. Tokens of two
    documents are no pair, unless `across_documents`.
    """

    kind: str
    offsets: int | Iterable[int]
    across_documents: bool
    fitted_attribute = "unigram_"
    least_offset = 0
    """The smallest offset at which the baseline predicts."""
    reads_target_alone = False
    """Whether the baseline reads t+N and tokens before it alone, and says the same at every N."""

    unigram_: np.ndarray
    """P(b), `(vocab,)` float64."""

    def pairs(self) -> list[tuple[int | None, int]]:
        """Layer None with every offset."""
        return [(None, offset) for offset in self._offsets()]

    def _offsets(self) -> tuple[int, ...]:
        """`offsets` as a tuple of ints, also if a single number was given."""
        return as_tuple(self.offsets, "offsets")

    def _check_offset(self, offset: int) -> None:
        """Raise `NotFoundError` for an offset that was not counted in the fit."""
        if offset not in self._offsets():
            raise NotFoundError(
                f"{type(self).__name__} has no counts for offset {offset}; it has the offsets "
                f"{', '.join(map(str, self._offsets()))}"
            )

    def _begin_fit(self, cache: "ActivationCache") -> None:
        """Check the parameters, and note which cache is counted."""
        cache.check_texts("its positions are patches, no tokens of a text that can be counted")
        self._forget_folder()
        offsets = self._offsets()
        if not offsets or min(offsets) < self.least_offset:
            raise UsageError(
                f"offsets of {type(self).__name__} must be {self.least_offset} or more, "
                f"not {self.offsets}"
            )
        PairScope(self.across_documents).check()
        self.cache_id_: str | None = cache.id
        self.geometry_: str | None = cache.head.digest
        self.split_: str | None = "train"
        self.n_features_in_: int = cache.d_model

    def metrics(self) -> list[dict[str, Any]]:
        """One row per offset: pairs counted (`n`), and distinct pairs (`distinct`)."""
        self.check_fitted()
        return [
            {"layer": layer, "offset": offset, **self._table_size(offset)}
            for layer, offset in self.pairs()
        ]

    def _table_size(self, offset: int) -> dict[str, int]:
        """`n` and `distinct` of the counts at an offset."""
        raise NotImplementedError

    def _saved_tensors(self) -> dict[str, np.ndarray]:
        """The counts as named tensors."""
        raise NotImplementedError

    def _restore_tensors(self, tensors: SavedTensors) -> None:
        """Set the counts from the tensors of `_saved_tensors`; `unigram_` is set already."""
        raise NotImplementedError

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON object and tensors for `save_probe`; `restore` is the inverse."""
        config = {"pairs": self.metrics(), **self._origin()}
        return config, {**self._saved_tensors(), "unigram": self.unigram_}

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> Self:
        """The fitted baseline that `state` described."""
        tensors = SavedTensors.of(tensors)
        offsets = params["offsets"]
        # The first version wrote every tuple as a list, and no types of parameters.
        if "param_types" not in config and isinstance(offsets, list):
            params = {**params, "offsets": tuple(offsets)}
        baseline = cls(**params)
        baseline._restore_origin(config)
        baseline.unigram_ = tensors.array("unigram", (None,))
        baseline._restore_tensors(tensors)
        return baseline


def unfitted_baselines(
    kinds: Iterable[str], offsets: Iterable[int], across_documents: bool = False
) -> "list[Any]":
    """Unfitted baselines of `kinds`, each at the `offsets` where the kind predicts something."""
    from ..saved.kinds import probe_class

    baselines = []
    for kind in kinds:
        baseline = probe_class(kind)
        possible = tuple(offset for offset in offsets if offset >= baseline.least_offset)
        if possible:
            baselines.append(baseline(offsets=possible, across_documents=across_documents))
    if not baselines:
        raise UsageError(
            f"at offset 0 there is nothing for {', '.join(kinds)} to say; give offsets of 1 or more"
        )
    return baselines


class TrainSplitPasses:
    """Passes over the text of the train split in shares, and the progress through all of them.

    Shares have about `BLOCK_TOKENS` tokens. They are counted in this process, or on the workers of
    `client`. Counts are whole numbers: their sum does not depend on the shares. `progress` is
    called with (tokens read, tokens of all `passes`).
    """

    def __init__(
        self,
        cache: "ActivationCache",
        passes: int = 1,
        client: Any = None,
        progress: Progress | None = None,
    ) -> None:
        self.cache, self.client, self._progress = cache, client, progress
        self.contexts = context_numbers(cache, cache.sequences("train"))
        self._lengths = cache.contexts.length[self.contexts]
        self._done, self._total = 0, passes * int(self._lengths.sum())
        self.report(0)

    def report(self, tokens: int) -> None:
        """Report that `tokens` more were read."""
        self._done += tokens
        if self._progress is not None:
            self._progress(self._done, self._total)

    def count(self, function: Callable[..., Any], *args: Any) -> Iterator[Any]:
        """`function(cache, contexts, *args)` of each share, in one pass."""
        share_of = (np.cumsum(self._lengths) - self._lengths) // BLOCK_TOKENS
        shares = np.split(np.arange(len(self.contexts)), np.flatnonzero(np.diff(share_of)) + 1)
        if self.client is not None and len(shares) < sum(threads_of(self.client).values()):
            shares = np.array_split(
                np.arange(len(self.contexts)), sum(threads_of(self.client).values())
            )
        calls = [(self.cache, self.contexts[share], *args) for share in shares]
        if self.client is None:
            counts = (function(*call) for call in calls)
        else:
            counts = results(self.client, function, calls)
        for share, value in zip(shares, counts, strict=True):
            self.report(int(self._lengths[share].sum()))
            yield value


def count_pairs(
    passes: TrainSplitPasses, lag: int = 1, across_documents: bool = False
) -> "csr_matrix":
    """How often each token came `lag` tokens after each other one, `(vocab, vocab)` int64.

    Both lie in one document, in one sequence of the train split. Memory: 12 bytes for each
    distinct pair, twice while tables are added up.
    """
    vocab = passes.cache.vocab
    tables = passes.count(_count_pairs_in, lag, across_documents)
    return sum_tables(tables, empty_table(vocab, vocab))


def _count_pairs_in(
    cache: "ActivationCache", contexts: np.ndarray, lag: int, across_documents: bool
) -> "csr_matrix":
    """`count_pairs` of some contexts."""

    def block_tables() -> "Iterator[csr_matrix]":
        for ids, following, _ in context_blocks(cache, contexts, across_documents, BLOCK_TOKENS):
            first = np.flatnonzero(following >= lag)
            keys = ids[first] * cache.vocab + ids[first + lag]
            yield table_of_keys(keys, (cache.vocab, cache.vocab))

    return sum_tables(block_tables(), empty_table(cache.vocab, cache.vocab))


def count_followers(passes: TrainSplitPasses, across_documents: bool = False) -> np.ndarray:
    """How often each token follows another one of its document in the train split, int64."""
    counts = passes.count(_count_followers_in, across_documents)
    return sum(counts, np.zeros(passes.cache.vocab, np.int64))


def _count_followers_in(
    cache: "ActivationCache", contexts: np.ndarray, across_documents: bool
) -> np.ndarray:
    """`count_followers` of some contexts."""
    counts = np.zeros(cache.vocab, np.int64)
    for ids, following, _ in context_blocks(cache, contexts, across_documents, BLOCK_TOKENS):
        counts += np.bincount(ids[np.flatnonzero(following >= 1) + 1], minlength=cache.vocab)
    return counts


def empty_table(rows: int, columns: int) -> "csr_matrix":
    """A table of zeros."""
    from scipy.sparse import csr_matrix

    return csr_matrix((rows, columns), dtype=np.int64)


def table_of_keys(keys: np.ndarray, shape: tuple[int, int]) -> "csr_matrix":
    """How often each `row * columns + column` occurs in `keys`, int64."""
    from scipy.sparse import csr_matrix

    distinct, counts = np.unique(keys, return_counts=True)
    return csr_matrix((counts.astype(np.int64), np.divmod(distinct, shape[1])), shape=shape)


def sum_tables(tables: "Iterable[csr_matrix]", start: "csr_matrix") -> "csr_matrix":
    """The sum of all `tables` and of `start`.

    Tables of like size are added first: the work is n log n in the entries, not n squared.
    """
    # Partial sums, each more than twice as large as the next.
    partial_sums = [start]
    for table in tables:
        partial_sums.append(table)
        while len(partial_sums) > 1 and partial_sums[-2].nnz <= 2 * partial_sums[-1].nnz:
            partial_sums[-2:] = [partial_sums[-2] + partial_sums[-1]]
    while len(partial_sums) > 1:
        partial_sums[-2:] = [partial_sums[-2] + partial_sums[-1]]
    return partial_sums[0]


def row_sums(table: "csr_matrix") -> np.ndarray:
    """`(rows,)` sums over the columns, in the dtype of the counts."""
    return np.asarray(table.sum(1)).ravel()


def column_sums(table: "csr_matrix") -> np.ndarray:
    """`(vocab,)` sums over the rows, in the dtype of the counts."""
    return np.asarray(table.sum(0)).ravel()


def unigram_probabilities(counts: np.ndarray) -> np.ndarray:
    """P(b) = (c(b) + T / vocab) / (n + T) of counts c `(vocab,)`, float64.

    n is the sum of the counts, T the number of distinct tokens that were counted.
    """
    types = np.count_nonzero(counts)
    if not types:
        raise UsageError("the train split holds no pair of tokens to count")
    return (counts + types / len(counts)) / (counts.sum() + types)


def witten_bell(rows: "csr_matrix", log_prior: np.ndarray) -> np.ndarray:
    """log((c(b) + T prior(b)) / (c + T)) of the counts `rows`, written over `log_prior`.

    Both `(n, vocab)`; c is the sum and T the number of entries of a row. A row without a count
    leaves its prior unchanged. Witten and Bell (1991); Chen and Goodman (1999), section 2.4.
    """
    types = np.diff(rows.indptr)
    count = row_sums(rows)
    # Tokens that were counted: (c(b) + T prior(b)) / (c + T), in float64.
    row = np.repeat(np.arange(len(types)), types)
    prior = np.exp(log_prior[row, rows.indices].astype(np.float64))
    counted = (rows.data + types[row] * prior) / (count + types)[row]
    # All others: the share T / (c + T) of their prior.
    share = np.where(count > 0, types / np.maximum(count + types, 1), 1.0)
    log_prior += np.log(share).astype(np.float32)[:, None]
    log_prior[row, rows.indices] = np.log(counted)
    return log_prior


def pack_table(name: str, table: "csr_matrix") -> dict[str, np.ndarray]:
    """A sparse table as three tensors: `<name>.row`, `<name>.column` and `<name>.count`."""
    return {
        f"{name}.row": table.indptr.astype(np.int64),
        f"{name}.column": table.indices.astype(np.int32),
        f"{name}.count": table.data,
    }


def unpack_table(
    name: str, tensors: SavedTensors, columns: int, rows: int | None = None
) -> "csr_matrix":
    """The sparse table that `pack_table` turned into tensors, of `rows` rows (None: any number).

    Raises `CorruptError` for tensors that are no table of `columns` columns.
    """
    from scipy.sparse import csr_matrix

    row = tensors.array(f"{name}.row", (None if rows is None else rows + 1,), "iu")
    column = tensors.array(f"{name}.column", (None,), "iu")
    count = tensors.array(f"{name}.count", column.shape, "iu")
    if not len(row) or row[0] != 0 or row[-1] != len(column) or (row[1:] < row[:-1]).any():
        raise tensors.refuse(f"{name}.row", "does not divide the columns into rows")
    if len(column) and not (column.min() >= 0 and column.max() < columns):
        raise tensors.refuse(f"{name}.column", f"has columns beyond the {columns} of the table")
    if len(count) and count.min() < 0:
        raise tensors.refuse(f"{name}.count", "has negative counts")
    return csr_matrix((count, column, row), shape=(len(row) - 1, columns))


def token_array(values: Any) -> np.ndarray:
    """Token ids of a batch, a tensor `(n,)`, as an int64 array."""
    if values is None:
        raise UsageError("this batch lacks tokens that the baseline reads; see `ReadoutBatch`")
    return values.cpu().numpy()

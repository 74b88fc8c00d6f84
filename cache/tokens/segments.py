"""Segments: the parts of sequences that come from one document, and which pairs (t, t+N) count.

A packed sequence holds several documents. A pair (t, t+N) of two documents says how one text
follows another by chance, so that pairs stay inside one document unless `PairScope` allows more.
`tokens/row_id` says which document each position came from; a cache without it, made of token
ids, has one document per sequence.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import UsageError

BLOCK_POSITIONS = 1 << 18
"""Positions that are looked at at once."""


class SequenceIndex(Protocol):
    """Attributes of an `ActivationCache` that say where sequences and documents lie."""

    @property
    def tokens(self) -> Any:
        """Token id of each position, read on slicing."""

    @property
    def token_index(self) -> Any:
        """Index of each kept position in its context, where only some positions are kept."""

    @property
    def document_numbers(self) -> Any:
        """Number of the document of each position, or None."""

    @property
    def sequence_start(self) -> Any:
        """First position of each sequence, int64."""

    @property
    def sequence_length(self) -> Any:
        """Positions of each sequence, int64."""

    @property
    def sequence_context(self) -> Any:
        """Number of the context of each sequence, where only some positions are kept."""

    @property
    def contexts(self) -> Any:
        """Token ids of what the model read, with the start and length of each context."""

    @property
    def context_document_numbers(self) -> Any:
        """Number of the document of each token of the contexts, or None."""

    def has(self, name: str) -> bool:
        """Whether the cache has the array `name`."""
        ...

    def array(self, name: str) -> Any:
        """The array `name`, read on slicing."""

    def positions_of(self, sequences: np.ndarray) -> np.ndarray:
        """Positions of whole sequences."""
        ...

    def blocks(self, sequences: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """`sequences` in blocks of about `rows` positions."""
        ...


@dataclass(frozen=True)
class PairScope:
    """Which pairs (t, t+N) of a cache count. Both positions always lie in one sequence."""

    across_documents: bool = False
    """Whether t and t+N may lie in two documents."""
    drop_first: int = 0
    """Positions at the start of each sequence that are no sources t, and so no targets either."""

    def check(self) -> "PairScope":
        """Raise a `UsageError` for what cannot be right."""
        if not isinstance(self.across_documents, bool | np.bool_):
            raise UsageError(
                f"across_documents must be True or False, not {self.across_documents!r}"
            )
        whole = isinstance(self.drop_first, int | np.integer)
        if not whole or isinstance(self.drop_first, bool) or self.drop_first < 0:
            raise UsageError(
                f"drop_first must be a whole number, 0 or more, not {self.drop_first!r}"
            )
        return PairScope(bool(self.across_documents), int(self.drop_first))

    def largest_offsets(self, cache: SequenceIndex, sequences: np.ndarray) -> np.ndarray:
        """How many positions follow each one that it may be paired with, `(n,)` int64.

        For the rows of whole `sequences`, in their order; -1 for a position that is no source.
        """
        _, left = segment_indices(cache, sequences, self.across_documents)
        if self.drop_first:
            left[context_indices(cache, cache.positions_of(sequences)) < self.drop_first] = -1
        return left


def is_sparse(cache: SequenceIndex) -> bool:
    """Whether only some positions of the contexts are rows of the cache."""
    return cache.has("context/ids")


def segment_indices(
    cache: SequenceIndex, sequences: np.ndarray, across_documents: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Index of each position in its segment, and how many positions follow it there; int64.

    For the rows of whole `sequences`, in their order. With `across_documents` a segment is a whole
    sequence.
    """
    lengths = cache.sequence_length[sequences]
    total = int(lengths.sum())
    begins = np.zeros(total, bool)
    begins[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    if not across_documents and cache.document_numbers is not None:
        document = cache.document_numbers.take(cache.positions_of(sequences))
        begins[1:] |= document[1:] != document[:-1]
    starts = np.flatnonzero(begins)
    sizes = np.diff(np.append(starts, total))
    index = np.arange(total) - np.repeat(starts, sizes)
    return index, np.repeat(sizes, sizes) - 1 - index


def context_indices(cache: SequenceIndex, positions: np.ndarray) -> np.ndarray:
    """Index of each of `positions` in the sequence that the model read, `(n,)` int64."""
    if is_sparse(cache):
        return cache.token_index.take(positions).astype(np.int64)
    return positions - cache.sequence_start[sequence_of(cache, positions)]


def sequence_of(cache: SequenceIndex, positions: np.ndarray) -> np.ndarray:
    """Number of the sequence of each of `positions`, `(n,)` int64."""
    return np.searchsorted(cache.sequence_start, positions, "right") - 1


def document_of(cache: SequenceIndex, positions: np.ndarray) -> np.ndarray:
    """Number of the source document of each of `positions`, `(n,)` int64."""
    if cache.document_numbers is not None:
        return cache.document_numbers.take(positions)
    return cache.array("sequences/row_id")[:][sequence_of(cache, positions)]


def neighbour_tokens(
    cache: SequenceIndex, positions: np.ndarray, step: int, across_documents: bool = False
) -> np.ndarray:
    """Token `step` (1 or -1) further in the text than each of `positions`, `(n,)` int64.

    -1 where the sequence that the model read, or the document, goes on no further. Where not all
    positions are kept, the token is that of the context, whether or not it is a row of the cache.
    """
    sequence = sequence_of(cache, positions)
    sparse = is_sparse(cache)
    documents = cache.context_document_numbers
    if sparse:
        contexts, number = cache.contexts, cache.sequence_context[sequence]
        ids, first = contexts.ids, contexts.start[number]
        end, place = first + contexts.length[number], first + context_indices(cache, positions)
    else:
        ids, first, place = cache.tokens, cache.sequence_start[sequence], positions
        end = first + cache.sequence_length[sequence]
    other = place + step
    inside = (other >= first) & (other < end)
    if not across_documents:
        if documents is not None:
            own, there = (documents.take(at[inside]) for at in (place, other))
            inside[inside] = own == there
        elif sparse and cache.document_numbers is not None:
            # Caches of before know the documents of rows alone: two neighbours may be of two.
            rows = positions + step
            run = cache.sequence_start[sequence]
            known = (rows >= run) & (rows < run + cache.sequence_length[sequence]) & inside
            own, there = (document_of(cache, at[known]) for at in (positions, rows))
            inside[known] = own == there
    found = np.full(len(positions), -1, np.int64)
    found[inside] = ids.take(other[inside])
    return found


def context_blocks(
    cache: SequenceIndex,
    contexts: np.ndarray,
    across_documents: bool = False,
    block: int = BLOCK_POSITIONS,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens of whole `contexts` (numbers, ascending), about `block` of them at a time.

    Token ids, how many tokens follow each in its segment, and number of its document; int64. All
    tokens that the model read count, whether or not they are rows of the cache.
    """
    held = cache.contexts
    documents = cache.context_document_numbers
    start, length = held.start[contexts], held.length[contexts]
    ends = np.cumsum(length)
    first = 0
    while first < len(contexts):
        before = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, before + block, "right")))
        lengths = length[first:stop]
        inner = np.cumsum(lengths) - lengths
        places = np.arange(int(lengths.sum())) + np.repeat(start[first:stop] - inner, lengths)
        begins = np.zeros(len(places), bool)
        begins[inner[lengths > 0]] = True
        if documents is not None:
            document = documents.take(places)
        else:
            document = np.repeat(context_documents(cache)[contexts[first:stop]], lengths)
        if not across_documents:
            begins[1:] |= document[1:] != document[:-1]
        starts = np.flatnonzero(begins)
        sizes = np.diff(np.append(starts, len(places)))
        left = np.repeat(starts + sizes, sizes) - 1 - np.arange(len(places))
        yield held.ids.take(places).astype(np.int64), left, document
        first = stop


def context_numbers(cache: SequenceIndex, sequences: np.ndarray) -> np.ndarray:
    """Numbers of the contexts that hold `sequences`, ascending, each once."""
    return np.unique(cache.sequence_context[sequences]) if is_sparse(cache) else sequences


def context_documents(cache: SequenceIndex) -> np.ndarray:
    """Number of the document in which each context begins (its first row, if sparse), int64."""
    documents = cache.array("sequences/row_id")[:]
    if not is_sparse(cache):
        return documents
    found = np.zeros(len(cache.contexts.start), np.int64)
    found[cache.sequence_context[::-1]] = documents[::-1]
    return found


def has_document_borders(cache: SequenceIndex) -> bool:
    """Whether a sequence of `cache` holds two documents; reads `tokens/row_id` until one does."""
    if cache.document_numbers is None:
        return False
    blocks = cache.blocks(np.arange(len(cache.sequence_length)), BLOCK_POSITIONS)
    return any(
        len(np.flatnonzero(segment_indices(cache, some)[0] == 0)) > len(some) for some in blocks
    )


def pairs_in_sequences(
    cache: SequenceIndex, sequences: np.ndarray, offset: int, drop_first: int = 0
) -> int:
    """Pairs (t, t+`offset`) of `sequences`, those of two documents too: from lengths alone."""
    sources = cache.sequence_length[sequences] - dropped_rows(cache, sequences, drop_first)
    return int(np.maximum(sources - offset, 0).sum())


def dropped_rows(cache: SequenceIndex, sequences: np.ndarray, drop_first: int) -> np.ndarray:
    """Rows at the start of each of `sequences` that `drop_first` leaves out, int64."""
    begin = np.zeros(len(sequences), np.int64)
    if drop_first and is_sparse(cache):
        # A run of kept positions may begin anywhere in what the model read.
        begin = cache.token_index.take(cache.sequence_start[sequences]).astype(np.int64)
    return np.minimum(np.maximum(drop_first - begin, 0), cache.sequence_length[sequences])


def crossing_shares(
    cache: SequenceIndex,
    sequences: np.ndarray,
    offsets: Iterable[int],
    scope: PairScope,
    counted: dict[int, int] | None = None,
) -> dict[int, float]:
    """Share of the pairs of `sequences` that join two documents, by offset; 0.0 without a pair.

    `counted` are the pairs inside one document by offset, where that is known; else `tokens/row_id`
    is read once.
    """
    offsets = list(offsets)
    inside = dict.fromkeys(offsets, 0) if counted is None else counted
    if counted is None:
        within = PairScope(False, scope.drop_first)
        for some in cache.blocks(sequences, BLOCK_POSITIONS):
            left = within.largest_offsets(cache, some)
            for offset in offsets:
                inside[offset] += int(np.count_nonzero(left >= offset))
    found: dict[int, Any] = {}
    for offset in offsets:
        total = pairs_in_sequences(cache, sequences, offset, scope.drop_first)
        found[offset] = 1 - inside[offset] / total if total else 0.0
    return found

"""Segments of a cache, and the pairs of positions (t, t+N) for fits and evaluation.

Terms, as in `tokenization.py`: a *document* is one text of the data; a *sequence* is a run of token
ids that the cache holds as consecutive rows; a *context* is the token ids of one forward pass; a
*position* is a row of the cache, counted over all sequences; a *segment* is the part of a sequence
that comes from one document. Sequence and context are the same unless only some positions were
kept (`positions.py`): then a sequence is one run of kept positions inside its context.

A packed sequence holds several documents. A pair (t, t+N) across two documents says how one text
follows another by chance, so pairs stay inside one segment unless `PairScope` allows more. The
array `tokens/row_id` holds the document number of each position; a cache without this array, made
of token ids, has one document per sequence.

In a cache of images every position is a segment by itself, unless `PairScope` allows more: patch
t+N is not what follows patch t. Its token ids number the positions, and no text follows them.

Fits ask `PairScope.largest_offsets`; count baselines read `context_blocks`; evaluation reads
`neighbour_tokens` and `segment_indices`. All take the cache as a `SequenceIndex`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import CorruptError, UsageError

BLOCK_POSITIONS = 1 << 18
"""Positions per block of a pass over a whole cache."""


class SequenceIndex(Protocol):
    """Attributes of `ActivationCache` for sequences, contexts and documents of its positions."""

    @property
    def tokens(self) -> Any:
        """Token id of each position, read on slicing."""

    @property
    def token_index(self) -> Any:
        """Index of each position in its context; exists if only some positions are kept."""

    @property
    def document_numbers(self) -> Any:
        """Document number of each position; None if the cache was made of token ids."""

    @property
    def sequence_start(self) -> Any:
        """First position of each sequence, int64."""

    @property
    def sequence_length(self) -> Any:
        """Positions of each sequence, int64."""

    @property
    def sequence_context(self) -> Any:
        """Context number of each sequence; exists if only some positions are kept."""

    @property
    def contexts(self) -> Any:
        """Token ids of all contexts (`ids`), with the `start` and `length` of each context."""

    @property
    def context_document_numbers(self) -> Any:
        """Document number of each token of the contexts, or None."""

    def has(self, name: str) -> bool:
        """Whether the cache has the array `name`."""
        ...

    def array(self, name: str) -> Any:
        """The array `name`, read on slicing."""

    def positions_of(self, sequences: np.ndarray) -> np.ndarray:
        """Positions of whole sequences, in the order of `sequences`."""
        ...

    def blocks(self, sequences: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """`sequences` in blocks of about `rows` positions."""
        ...


@dataclass(frozen=True)
class PairScope:
    """Choice of the pairs (t, t+N) of a cache; t and t+N always lie in the same sequence."""

    across_documents: bool = False
    """Whether t and t+N may lie in two documents."""
    drop_first: int = 0
    """Number of positions at the start of each context to exclude as sources t."""

    def check(self) -> "PairScope":
        """Return a copy with plain Python types; raise `UsageError` for a wrong type or value."""
        if not isinstance(self.across_documents, bool | np.bool_):
            raise UsageError(
                f"across_documents must be True or False, not {self.across_documents!r}"
            )
        is_integer = isinstance(self.drop_first, int | np.integer)
        if not is_integer or isinstance(self.drop_first, bool) or self.drop_first < 0:
            raise UsageError(
                f"drop_first must be a whole number, 0 or more, not {self.drop_first!r}"
            )
        return PairScope(bool(self.across_documents), int(self.drop_first))

    def largest_offsets(self, cache: SequenceIndex, sequences: np.ndarray) -> np.ndarray:
        """Largest N for which a pair (t, t+N) exists, for each position t, `(n,)` int64.

        n counts the positions of whole `sequences`, in their order. The value is 0 for the last
        position of a segment and -1 for a position that is no source.
        """
        _, followers = segment_indices(cache, sequences, self.across_documents)
        if self.drop_first:
            indices = context_indices(cache, cache.positions_of(sequences))
            followers[indices < self.drop_first] = -1
        return followers


def is_sparse(cache: SequenceIndex) -> bool:
    """Return whether only some positions of the contexts are rows of the cache."""
    return cache.has("context/ids")


def is_of_images(cache: Any) -> bool:
    """Return whether the positions of the cache are the class tokens and patches of images."""
    manifest = getattr(cache, "manifest", None)
    return manifest is not None and manifest.image_grid is not None


def segment_indices(
    cache: SequenceIndex, sequences: np.ndarray, across_documents: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Index of each position in its segment, and number of later positions there; `(n,)` int64.

    n counts the positions of whole `sequences`, in their order. With `across_documents` a segment
    is a whole sequence.
    """
    # A segment begins at the start of each sequence that is not empty ...
    lengths = cache.sequence_length[sequences]
    total = int(lengths.sum())
    is_first = np.zeros(total, bool)
    is_first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    # ... and where the document number changes; in images, at every position.
    if not across_documents and is_of_images(cache):
        is_first[:] = True
    elif not across_documents and cache.document_numbers is not None:
        document = cache.document_numbers.take(cache.positions_of(sequences))
        is_first[1:] |= document[1:] != document[:-1]
    return _indices_between(is_first)


def _indices_between(is_first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each element in its segment, and number of later elements there; both int64.

    `is_first` `(n,)` bool marks the first element of each segment.
    """
    starts = np.flatnonzero(is_first)
    sizes = np.diff(np.append(starts, len(is_first)))
    index = np.arange(len(is_first)) - np.repeat(starts, sizes)
    return index, np.repeat(sizes, sizes) - 1 - index


def context_indices(cache: SequenceIndex, positions: np.ndarray) -> np.ndarray:
    """Index of each of `positions` in its context, `(n,)` int64."""
    if is_sparse(cache):
        index = cache.token_index.take(positions).astype(np.int64)
        context = cache.sequence_context[sequence_of(cache, positions)]
        if ((index < 0) | (index >= cache.contexts.length[context])).any():
            raise CorruptError(
                "tokens/index holds numbers beyond the contexts; copy the cache again, or extract "
                "it again"
            )
        return index
    return positions - cache.sequence_start[sequence_of(cache, positions)]


def sequence_of(cache: SequenceIndex, positions: np.ndarray) -> np.ndarray:
    """Sequence number of each of `positions`, `(n,)` int64."""
    return np.searchsorted(cache.sequence_start, positions, "right") - 1


def document_of(cache: SequenceIndex, positions: np.ndarray) -> np.ndarray:
    """Document number of each of `positions`, `(n,)` int64."""
    if cache.document_numbers is not None:
        return cache.document_numbers.take(positions)
    return cache.array("sequences/row_id")[:][sequence_of(cache, positions)]


def neighbour_tokens(
    cache: SequenceIndex, positions: np.ndarray, step: int, across_documents: bool = False
) -> np.ndarray:
    """Token id `step` (1 or -1) further in the text than each of `positions`, `(n,)` int64.

    The value is -1 where the context, or the document, ends before. If only some positions are
    kept, the token comes from the context, whether or not it is a row of the cache. In a cache of
    images there is no text: all values are -1.
    """
    if is_of_images(cache):
        return np.full(len(positions), -1, np.int64)
    sequence = sequence_of(cache, positions)
    sparse = is_sparse(cache)
    documents = cache.context_document_numbers

    # Token indices of the positions, and the bounds of their contexts.
    if sparse:
        contexts, number = cache.contexts, cache.sequence_context[sequence]
        ids, start = contexts.ids, contexts.start[number]
        stop, token = start + contexts.length[number], start + context_indices(cache, positions)
    else:
        ids, start, token = cache.tokens, cache.sequence_start[sequence], positions
        stop = start + cache.sequence_length[sequence]
    neighbour = token + step
    is_valid = (neighbour >= start) & (neighbour < stop)

    # Neighbours in another document do not count.
    if not across_documents:
        if documents is not None:
            is_valid[is_valid] = documents.take(token[is_valid]) == documents.take(
                neighbour[is_valid]
            )
        elif sparse and cache.document_numbers is not None:
            # Format 1 stores document numbers of kept positions only: a neighbour that is no row
            # of the same run is believed to lie in the same document.
            neighbour_row = positions + step
            run_start = cache.sequence_start[sequence]
            run_stop = run_start + cache.sequence_length[sequence]
            is_row = (neighbour_row >= run_start) & (neighbour_row < run_stop) & is_valid
            is_valid[is_row] = document_of(cache, positions[is_row]) == document_of(
                cache, neighbour_row[is_row]
            )

    tokens = np.full(len(positions), -1, np.int64)
    tokens[is_valid] = ids.take(neighbour[is_valid])
    return tokens


def context_blocks(
    cache: SequenceIndex,
    contexts: np.ndarray,
    across_documents: bool = False,
    block: int = BLOCK_POSITIONS,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the tokens of whole `contexts` (ascending numbers), about `block` tokens at a time.

    Each item is three int64 arrays of one value per token: token id, number of tokens after it in
    its segment, document number. All tokens of the contexts count, kept positions or not. Raises
    `UsageError` for a cache of images, which has no text to count.
    """
    if is_of_images(cache):
        raise UsageError(
            "this cache is of images: its positions are numbers of patches, no tokens of a text "
            "that can be counted"
        )
    token_table = cache.contexts
    documents = cache.context_document_numbers
    start, length = token_table.start[contexts], token_table.length[contexts]
    ends = np.cumsum(length)
    first = 0
    while first < len(contexts):
        # Contexts first..last-1 have at most `block` tokens together, or are a single one.
        tokens_before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, tokens_before + block, "right")))
        lengths = length[first:last]

        # Token indices: consecutive within each context.
        block_start = np.cumsum(lengths) - lengths
        token = np.arange(int(lengths.sum())) + np.repeat(start[first:last] - block_start, lengths)

        # Segments begin with each context and where the document changes.
        is_first = np.zeros(len(token), bool)
        is_first[block_start[lengths > 0]] = True
        if documents is not None:
            document = documents.take(token)
        else:
            document = np.repeat(context_documents(cache)[contexts[first:last]], lengths)
        if not across_documents:
            is_first[1:] |= document[1:] != document[:-1]
        _, followers = _indices_between(is_first)
        yield token_table.ids.take(token).astype(np.int64), followers, document
        first = last


def context_numbers(cache: SequenceIndex, sequences: np.ndarray) -> np.ndarray:
    """Numbers of the contexts of `sequences`, ascending and distinct."""
    return np.unique(cache.sequence_context[sequences]) if is_sparse(cache) else sequences


def context_documents(cache: SequenceIndex) -> np.ndarray:
    """Document number of the first token of each context, `(contexts,)` int64.

    If only some positions are kept, the document of the context's first kept position.
    """
    documents = cache.array("sequences/row_id")[:]
    if not is_sparse(cache):
        return documents
    # Assigned in reverse order, so that the first sequence of a context has the last word.
    first_documents = np.zeros(len(cache.contexts.start), np.int64)
    first_documents[cache.sequence_context[::-1]] = documents[::-1]
    return first_documents


def has_document_borders(cache: SequenceIndex) -> bool:
    """Return whether any sequence holds two documents; reads `tokens/row_id` until the first.

    True for a cache of images: pairs of two patches are left out as those of two documents are.
    """
    if is_of_images(cache):
        return True
    if cache.document_numbers is None:
        return False
    for sequences in cache.blocks(np.arange(len(cache.sequence_length)), BLOCK_POSITIONS):
        index, _ = segment_indices(cache, sequences)
        if np.count_nonzero(index == 0) > len(sequences):
            return True
    return False


def pairs_in_sequences(
    cache: SequenceIndex, sequences: np.ndarray, offset: int, drop_first: int = 0
) -> int:
    """Number of pairs (t, t+`offset`) in `sequences`, pairs across two documents included."""
    sources = cache.sequence_length[sequences] - dropped_rows(cache, sequences, drop_first)
    return int(np.maximum(sources - offset, 0).sum())


def dropped_rows(cache: SequenceIndex, sequences: np.ndarray, drop_first: int) -> np.ndarray:
    """Number of rows at the start of each of `sequences` excluded by `drop_first`, int64."""
    first_index = np.zeros(len(sequences), np.int64)
    if drop_first and is_sparse(cache):
        # A run of kept positions may begin anywhere in its context.
        first_index = cache.token_index.take(cache.sequence_start[sequences]).astype(np.int64)
    return np.minimum(np.maximum(drop_first - first_index, 0), cache.sequence_length[sequences])


def crossing_shares(
    cache: SequenceIndex,
    sequences: np.ndarray,
    offsets: Iterable[int],
    scope: PairScope,
    counted: dict[int, int] | None = None,
) -> dict[int, float]:
    """Share of pairs across two documents among the pairs of `sequences`, by offset.

    The share is 0.0 for an offset without pairs. `counted` maps each offset to the number of its
    pairs inside one document; if None, `tokens/row_id` is read once to count them.
    """
    offsets = list(offsets)
    if counted is None:
        counted = dict.fromkeys(offsets, 0)
        within_documents = PairScope(False, scope.drop_first)
        for block in cache.blocks(sequences, BLOCK_POSITIONS):
            largest = within_documents.largest_offsets(cache, block)
            for offset in offsets:
                counted[offset] += int(np.count_nonzero(largest >= offset))
    shares: dict[int, float] = {}
    for offset in offsets:
        total = pairs_in_sequences(cache, sequences, offset, scope.drop_first)
        shares[offset] = 1 - counted[offset] / total if total else 0.0
    return shares

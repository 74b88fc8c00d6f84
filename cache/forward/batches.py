"""Plans which sequences go through the model together; halves batches too large for the memory.

`PartExtraction` plans the batches of a part with `plan_batches` and `PartRunner` runs them through
`BatchHalving`. The plan depends on the cache alone, so that any worker computes the same bytes.

A part needs the sequences that overlap its rows. Sequences that start in the part are sorted by
length within windows and grouped. The sequence that runs on into the next part goes through the
model alone, so that the next part, made by another worker, gets the same bytes for that sequence.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..devices import is_out_of_memory
from ..errors import ModelError
from ..format.layout import Layout
from ..model.model_devices import input_device

if TYPE_CHECKING:
    import torch

    from ..model.blocks import DecoderBlocks
    from ..tokens.token_stream import TokenStream


T = TypeVar("T")
"""Result of a forward batch."""
WINDOW_CHUNKS = 4
"""Chunks per window: sorting sequences inside a window bounds the memory of begun chunks."""
BATCH_TOKENS = {"cpu": 4096, "gpu": 32768}
"""Default tokens of a batch; on a GPU an upper bound, lowered to what memory holds."""
HOST_BYTES = 2 << 30
"""Most bytes of residuals of one batch; a few batches are in pinned memory at a time."""


@dataclass(frozen=True)
class SequenceBatch:
    """Sequence numbers of one forward batch, longest first; a sequence over a part's edge alone."""

    sequences: tuple[int, ...]


def plan_batches(
    starts: np.ndarray,
    lengths: np.ndarray,
    layout: Layout,
    part: int,
    batch_tokens: int,
    pad: bool = True,
    sizes: np.ndarray | None = None,
    window_rows: int | None = None,
) -> list[SequenceBatch]:
    """Batches to compute the rows of `part`, in running order.

    `starts` and `lengths` are in rows of the cache, `(sequences,)`; `sizes` are the tokens that the
    model reads of each sequence (default: `lengths`). A batch has at most `batch_tokens` tokens,
    padding included, or a single sequence. Without `pad`, only sequences of equal size share a
    batch. `window_rows` is the size of the windows in rows (default: `WINDOW_CHUNKS` chunks).
    """
    if not len(starts):
        return []
    n_rows = int(starts[-1] + lengths[-1])
    begin, end = layout.rows(part, n_rows)
    sizes = lengths if sizes is None else sizes

    # Sequences first:stop may overlap the rows begin:end.
    first = max(0, int(np.searchsorted(starts, begin, side="right")) - 1)
    stop = int(np.searchsorted(starts, end, side="left"))
    batches: list[SequenceBatch] = []

    # A sequence that began in the part before is a batch of its own, if it reaches into this part.
    if starts[first] < begin:
        if starts[first] + lengths[first] > begin:
            batches.append(SequenceBatch((first,)))
        first += 1
    crosses_end = stop > first and starts[stop - 1] + lengths[stop - 1] > end

    # Sequences inside the part: by window, then longest first, then by number.
    inside = np.arange(first, stop - 1 if crosses_end else stop)
    window = (starts[inside] - begin) // (window_rows or WINDOW_CHUNKS * layout.chunk_rows)
    order = inside[np.lexsort((inside, -sizes[inside], window))]
    if len(order):
        batches += group_sequences(order, sizes, window[order - first], batch_tokens, pad)

    # So is a sequence that runs on into the next part.
    if crosses_end:
        batches.append(SequenceBatch((stop - 1,)))
    return batches


def group_sequences(
    order: np.ndarray, sizes: np.ndarray, window: np.ndarray, batch_tokens: int, pad: bool
) -> list[SequenceBatch]:
    """Cut the sequence numbers `order`, longest first within a window, into batches.

    `sizes[sequence]` are the tokens of a sequence, `window[i]` is the window of `order[i]`; a batch
    does not cross windows. It has at most `batch_tokens` tokens, padding included, or a single
    sequence; without `pad`, its sequences are of equal size.
    """
    groups: list[list[int]] = []
    for index, sequence in enumerate(order):
        size, group = sizes[sequence], groups[-1] if groups else None
        fits = (
            group is not None
            and window[index] == window[index - 1]
            and (len(group) + 1) * max(sizes[group[0]], size) <= batch_tokens
            and (pad or sizes[group[0]] == size)
        )
        if fits and group is not None:
            group.append(int(sequence))
        else:
            groups.append([int(sequence)])
    return [SequenceBatch(tuple(group)) for group in groups]


class BatchHalving:
    """Runs batches, in halves if memory does not hold the whole; remembers the size that failed.

    `lengths` are the tokens of every sequence. `release` waits for pending copies of earlier
    batches and frees their memory, before halves are tried.
    """

    def __init__(self, lengths: np.ndarray, release: Callable[[], None] = lambda: None) -> None:
        self._lengths = lengths
        self._release = release
        self.limit: int | None = None
        """Most tokens of a batch, padding included; None while every batch has fitted."""

    def run(
        self, batch: SequenceBatch, forward: Callable[[SequenceBatch], T]
    ) -> Iterator[tuple[SequenceBatch, T]]:
        """Yield (piece, `forward(piece)`) for `batch`, or for its pieces in order.

        Raises `ModelError` if one sequence alone does not fit into memory.
        """
        pieces = [batch]  # a stack: the next piece last
        while pieces:
            piece = pieces.pop()
            result = None if self._is_too_large(piece) else self._try_forward(piece, forward)
            if result is None:
                pieces += reversed(_halves(piece))
            else:
                yield piece, result[0]

    def _is_too_large(self, batch: SequenceBatch) -> bool:
        """Whether an earlier batch has shown that memory does not hold `batch`."""
        return (
            self.limit is not None and len(batch.sequences) > 1 and self._tokens(batch) > self.limit
        )

    def _try_forward(
        self, batch: SequenceBatch, forward: Callable[[SequenceBatch], T]
    ) -> tuple[T] | None:
        """The result in a tuple; None, and a smaller `limit`, if memory ran out."""
        try:
            return (forward(batch),)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch.sequences) == 1:
                raise ModelError(
                    f"a sequence of {self._tokens(batch)} tokens does not fit into memory beside "
                    "the model; extract with a shorter --context, or on another --device"
                ) from error
        # Not inside `except`: the error holds the frames of the forward pass, and their tensors.
        self._release()
        self.limit = self._tokens(_halves(batch)[0])
        return None

    def _tokens(self, batch: SequenceBatch) -> int:
        """Tokens of `batch`, padding included."""
        return len(batch.sequences) * max(int(self._lengths[n]) for n in batch.sequences)


def _halves(batch: SequenceBatch) -> list[SequenceBatch]:
    middle = (len(batch.sequences) + 1) // 2
    return [SequenceBatch(batch.sequences[:middle]), SequenceBatch(batch.sequences[middle:])]


def choose_batch_tokens(stack: "DecoderBlocks", stream: "TokenStream", itemsize: int) -> int:
    """Default tokens of a batch: 4096 on a CPU, on a GPU as many as memory holds.

    `itemsize` is the number of bytes of one stored value.
    """
    if input_device(stack.model).type == "cpu":
        return BATCH_TOKENS["cpu"]
    token_bytes = (stack.depth + 1) * stack.d_model * itemsize
    return find_batch_tokens(stack, stream, min(BATCH_TOKENS["gpu"], HOST_BYTES // token_bytes))


def find_batch_tokens(
    stack: "DecoderBlocks", stream: "TokenStream", cap: int, copies: int = 2
) -> int:
    """Tokens of the largest batch whose residuals fit into memory `copies` times.

    Batches of 1, 2, 4, ... sequences, as long as the longest of `stream`, are tried up to `cap`
    tokens. The result is at least one sequence, even if that does not fit.
    """
    import torch

    length = int(stream.lengths.max())
    device = input_device(stack.model)
    n_sequences, tokens = 1, length
    with torch.inference_mode():
        while n_sequences * length <= cap:
            ids = torch.from_numpy(stream.beginning(n_sequences))
            if not _fits(stack, ids.to(device), copies):
                break
            tokens, n_sequences = n_sequences * length, 2 * n_sequences
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return tokens


def _fits(stack: "DecoderBlocks", ids: "torch.Tensor", copies: int) -> bool:
    """Whether `copies` times the residuals of `ids` fit into memory at once."""
    try:
        residuals = [stack.residuals(ids) for _ in range(copies)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return len(residuals) == copies

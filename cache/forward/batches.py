"""Which sequences go through the model together: a fixed plan, the same for any worker.

A part needs the sequences that overlap its rows. Those that start in it are sorted by length
within windows and grouped; the one that runs on into the next part goes through the model
alone, so that the next part, made by another worker, gets the same bytes for it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ModelError
from ..format.layout import Layout
from ..model.memory import T, is_out_of_memory

if TYPE_CHECKING:
    import torch

    from ..model.blocks import DecoderBlocks
    from ..tokens.token_stream import TokenStream


WINDOW_CHUNKS = 4
"""Sequences are sorted by length only within this many chunks, which bounds the writer's memory."""


@dataclass(frozen=True)
class SequenceBatch:
    """Numbers of sequences, none longer than the first one by `plan_part`'s order."""

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
    """Batches for `part`, in the order in which they should run.

    `starts` and `lengths` are rows of the cache, `sizes` tokens that the model reads (default:
    the lengths). `batch_tokens` bounds sequences times longest size. Without `pad` only
    sequences of equal size share a batch. `window_rows` is where sorting ends (default:
    `WINDOW_CHUNKS` chunks).
    """
    if not len(starts):
        return []
    positions = int(starts[-1] + lengths[-1])
    begin, end = layout.rows(part, positions)
    first = max(0, int(np.searchsorted(starts, begin, side="right")) - 1)
    last = int(np.searchsorted(starts, end, side="left"))
    batches: list[SequenceBatch] = []
    if starts[first] < begin:
        if starts[first] + lengths[first] > begin:
            batches.append(SequenceBatch((first,)))
        first += 1
    alone = last > first and starts[last - 1] + lengths[last - 1] > end
    sizes = lengths if sizes is None else sizes
    inside = np.arange(first, last - 1 if alone else last)
    window = (starts[inside] - begin) // (window_rows or WINDOW_CHUNKS * layout.chunk_rows)
    order = inside[np.lexsort((inside, -sizes[inside], window))]
    batches += _group(
        order, sizes, window[order - first] if len(order) else window, batch_tokens, pad
    )
    if alone:
        batches.append(SequenceBatch((last - 1,)))
    return batches


def _group(
    order: np.ndarray, lengths: np.ndarray, window: np.ndarray, batch_tokens: int, pad: bool
) -> list[SequenceBatch]:
    """Cut `order` (longest first within a window) into batches."""
    groups: list[list[int]] = []
    for place, number in enumerate(order):
        length, group = lengths[number], groups[-1] if groups else None
        fits = (
            group is not None
            and window[place] == window[place - 1]
            and (len(group) + 1) * max(lengths[group[0]], length) <= batch_tokens
            and (pad or lengths[group[0]] == length)
        )
        if fits and group is not None:
            group.append(int(number))
        else:
            groups.append([int(number)])
    return [SequenceBatch(tuple(group)) for group in groups]


BATCH_TOKENS = {"cpu": 4096, "gpu": 32768}
"""Tokens of a batch; on a GPU at most, if so many fit."""
HOST_BYTES = 2 << 30
"""Most bytes of residuals of one batch; a few batches are in pinned memory at a time."""


class BatchHalving:
    """Runs batches, those too large for the memory in halves; remembers what was too large."""

    def __init__(self, lengths: np.ndarray, release: Callable[[], None] = lambda: None) -> None:
        self._lengths = lengths
        self._release = release
        """Waits for work on its way and frees the memory that it held."""
        self.limit: int | None = None
        """Most tokens of a batch, padding included; None while all have fitted."""

    def run(
        self, batch: SequenceBatch, forward: Callable[[SequenceBatch], T]
    ) -> Iterator[tuple[SequenceBatch, T]]:
        """`forward` of `batch`, or of its pieces in order; raises `ModelError` if one sequence
        alone does not fit."""
        waiting = [batch]
        while waiting:
            piece = waiting.pop()
            done = None if self._is_too_large(piece) else self._attempt(piece, forward)
            if done is None:
                waiting += reversed(_halves(piece))
            else:
                yield piece, done[0]

    def _is_too_large(self, batch: SequenceBatch) -> bool:
        return (
            self.limit is not None and len(batch.sequences) > 1 and self._tokens(batch) > self.limit
        )

    def _attempt(
        self, batch: SequenceBatch, forward: Callable[[SequenceBatch], T]
    ) -> tuple[T] | None:
        """The result; None, and a smaller limit, if memory ran out."""
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
        # Only here, with the error and so the frames of the forward pass gone, is there memory.
        self._release()
        self.limit = self._tokens(_halves(batch)[0])
        return None

    def _tokens(self, batch: SequenceBatch) -> int:
        return len(batch.sequences) * max(int(self._lengths[n]) for n in batch.sequences)


def _halves(batch: SequenceBatch) -> list[SequenceBatch]:
    middle = (len(batch.sequences) + 1) // 2
    return [SequenceBatch(batch.sequences[:middle]), SequenceBatch(batch.sequences[middle:])]


def find_batch_tokens(
    stack: "DecoderBlocks", stream: "TokenStream", cap: int, copies: int = 2
) -> int:
    """Tokens of the largest batch, by doubling up to `cap`, whose residuals fit `copies` times.

    Sequences are as long as the longest of `stream`. At least one sequence, fit or not.
    """
    import torch

    length = int(stream.lengths.max())
    device = next(stack.model.parameters()).device
    rows, tokens = 1, length
    with torch.inference_mode():
        while rows * length <= cap:
            ids = np.resize(stream.ids[: rows * length], (rows, length)).astype(np.int64)
            if not _fits(stack, torch.from_numpy(ids).to(device), copies):
                break
            tokens, rows = rows * length, 2 * rows
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return tokens


def _fits(stack: "DecoderBlocks", ids: "torch.Tensor", copies: int) -> bool:
    """Whether `copies` times the residuals of `ids` fit into memory at once."""
    try:
        held = [stack.residuals(ids) for _ in range(copies)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return len(held) == copies


def choose_batch_tokens(stack: "DecoderBlocks", stream: "TokenStream", itemsize: int) -> int:
    """Tokens of a batch for a request that names none: 4096 on a CPU, what fits on a GPU."""
    if next(stack.model.parameters()).device.type == "cpu":
        return BATCH_TOKENS["cpu"]
    row = (stack.depth + 1) * stack.d_model * itemsize
    return find_batch_tokens(stack, stream, min(BATCH_TOKENS["gpu"], HOST_BYTES // row))

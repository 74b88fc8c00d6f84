"""Forward batches that do not fit into memory are halved; the size that fits is found by doubling.

Rows of a halved batch may differ in their last bits from those of the whole one, as with any
other batch size; they are the same again on a machine where the same batches fit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .batches import Batch
from .errors import ModelError

if TYPE_CHECKING:
    import torch

    from .stack import Stack
    from .tokens import TokenStream

T = TypeVar("T")
BATCH_TOKENS = {"cpu": 4096, "gpu": 32768}
"""Tokens of a batch; on a GPU at most, if so many fit."""
HOST_BYTES = 2 << 30
"""Most bytes of residuals of one batch; a few batches are in pinned memory at a time."""
_SAYINGS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in _SAYINGS)


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Memory that runs out becomes a `ModelError` with `message`: what did not fit, what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{message} ({reason})") from error


class Halving:
    """Runs batches, those too large for the memory in halves; remembers what was too large."""

    def __init__(self, lengths: np.ndarray, release: Callable[[], None] = lambda: None) -> None:
        self._lengths = lengths
        self._release = release
        """Waits for work on its way and frees the memory that it held."""
        self.limit: int | None = None
        """Most tokens of a batch, padding included; None while all have fitted."""

    def run(self, batch: Batch, forward: Callable[[Batch], T]) -> Iterator[tuple[Batch, T]]:
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

    def _is_too_large(self, batch: Batch) -> bool:
        return (
            self.limit is not None and len(batch.sequences) > 1 and self._tokens(batch) > self.limit
        )

    def _attempt(self, batch: Batch, forward: Callable[[Batch], T]) -> tuple[T] | None:
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

    def _tokens(self, batch: Batch) -> int:
        return len(batch.sequences) * max(int(self._lengths[n]) for n in batch.sequences)


def _halves(batch: Batch) -> list[Batch]:
    middle = (len(batch.sequences) + 1) // 2
    return [Batch(batch.sequences[:middle]), Batch(batch.sequences[middle:])]


def find_batch_tokens(stack: "Stack", stream: "TokenStream", cap: int, copies: int = 2) -> int:
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


def _fits(stack: "Stack", ids: "torch.Tensor", copies: int) -> bool:
    """Whether `copies` times the residuals of `ids` fit into memory at once."""
    try:
        held = [stack.residuals(ids) for _ in range(copies)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return len(held) == copies


def choose_batch_tokens(stack: "Stack", stream: "TokenStream", itemsize: int) -> int:
    """Tokens of a batch for a request that names none: 4096 on a CPU, what fits on a GPU."""
    if next(stack.model.parameters()).device.type == "cpu":
        return BATCH_TOKENS["cpu"]
    row = (stack.depth + 1) * stack.d_model * itemsize
    return find_batch_tokens(stack, stream, min(BATCH_TOKENS["gpu"], HOST_BYTES // row))

"""Memory that tiles of logits use again: `(rows, vocab)` tensors are not allocated for each tile.

A tile takes megabytes, which the C library gets from the kernel and returns each time; the kernel
then fills them with zeros, page by page. That took as long as the arithmetic of a tile of a small
model.
"""

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class _ThreadMemory(threading.local):
    """Tensors of one thread, one-dimensional, by name, device and dtype."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.device, torch.dtype], torch.Tensor] = {}


_memory = _ThreadMemory()


def reused_rows(
    name: str, rows: int, width: int, like: "torch.Tensor", dtype: "torch.dtype | None" = None
) -> "torch.Tensor":
    """A tensor `(rows, width)` on the device of `like`, by default of its dtype; not initialised.

    Calls of one thread with the same `name` get the same memory: the tensor is valid until the
    next one. Memory grows to the largest tensor; `free_reused_rows` frees it, or the thread's end.
    """
    key = name, like.device, dtype or like.dtype
    flat = _memory.tensors.pop(key, None)
    if flat is not None and flat.shape[0] < rows * width:
        flat = None  # freed before the larger memory is allocated
    if flat is None:
        flat = like.new_empty(rows * width, dtype=dtype or like.dtype)
    _memory.tensors[key] = flat
    return flat[: rows * width].view(rows, width)


def free_reused_rows() -> None:
    """Free all memory that this thread uses again."""
    _memory.tensors.clear()

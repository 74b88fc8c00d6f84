"""Devices of torch: the choice of one, copies to it and back, its memory; all in this file.

Fits, evaluations and bases take `device=` and call `choose_device` once. Rows come from the cache
on the host and go to the device by `copy_to_device`, or by `iterate_on_device`, which copies the
next batch while the present one is computed. `TileRows` are halved when memory runs out. Code
elsewhere asks for no kind of device: how kinds differ is decided here, by what torch offers for
each (streams, float64, free memory), so that `cpu`, `cuda`, `mps` and `xpu` run one path.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ModelError

if TYPE_CHECKING:
    import torch

    CopyTensor = Callable[[torch.Tensor], torch.Tensor]

Batch = TypeVar("Batch")
"""What `iterate_on_device` copies: a dataclass, a tuple, a tensor."""
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")
_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/dxg")
"""Files of the drivers of GPUs on Linux: NVIDIA, AMD, Intel, and Windows' below WSL."""
FREE_SHARE = 0.9
"""Share of a device's free memory that a fit plans with; the rest is for torch's own buffers."""


# The choice


def choose_device(device: "str | torch.device" = "auto") -> "torch.device":
    """The torch device named `device`; `auto` is the first GPU, or the CPU without a GPU.

    Raises `ModelError` for a device that is unknown, absent or holds no numbers (`meta`).
    """
    import torch

    try:
        chosen = _default_device() if device == "auto" else torch.device(device)
        # A device has an index only once a tensor lies on it: `cuda` is `cuda:0`.
        number = torch.ones(1, device=chosen)
        if number.tolist() == [1.0]:
            return number.device
        reason = "it computes nothing"
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ModelError(
        f"device {str(device)!r} cannot be used ({reason}); expected auto, cpu, cuda, cuda:1, mps "
        "or another name of a device that torch finds on this machine"
    )


def _default_device() -> "torch.device":
    """The first GPU of any kind, or the CPU."""
    import torch

    # torch.accelerator came with torch 2.6.
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is not None:
        return accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    kinds = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    return torch.device(next((k for k, module in kinds.items() if module.is_available()), "cpu"))


def choose_accelerator(device: "str | torch.device" = "auto") -> "torch.device | None":
    """`choose_device`, or None where that is the CPU.

    For fits that numpy does on the CPU: torch, whose import takes seconds, is not imported for
    `cpu`, nor for `auto` on a machine that shows no GPU.
    """
    if str(device) == "cpu" or (device == "auto" and not _may_have_gpu()):
        return None
    chosen = choose_device(device)
    return None if chosen.type == "cpu" else chosen


def _may_have_gpu() -> bool:
    """False on a Linux without the device files of any GPU; torch alone knows better."""
    if "torch" in sys.modules or sys.platform != "linux":
        return True
    return any(os.path.exists(path) for path in _GPU_FILES)


def wide_dtype(device: "torch.device") -> "torch.dtype":
    """float64, or float32 on a device without float64 (Apple's GPUs)."""
    import torch

    try:
        torch.ones(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


# Copies


def copy_to_device(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """`tensor` on `device`; on a GPU of CUDA the call does not wait for earlier work.

    A plain copy would wait until the GPU has computed all that it was given. On the CPU, the tensor
    itself.
    """
    if tensor.device == device:
        return tensor
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_to_host(tensor: "torch.Tensor") -> "torch.Tensor":
    """`tensor` on the CPU, without gradients; the tensor itself if the tensor is there."""
    return tensor.detach().cpu()


def iterate_on_device(
    batches: Iterable[Batch],
    device: "torch.device",
    copy_batch: "Callable[[Batch, CopyTensor], Batch]",
) -> Iterator[Batch]:
    """Yield each of `batches` on `device`, in order.

    `copy_batch(batch, copy)` gives the batch with `copy(tensor)` for each of its tensors. On a
    device with streams, a batch is copied on a stream of its own while the batch before is
    computed: two batches lie on the device. On the CPU, batches pass as they are.
    """
    if device.type == "cpu":
        yield from batches
        return
    streams = _stream_module(device)
    if streams is None:
        for batch in batches:
            yield copy_batch(batch, lambda tensor: copy_to_device(tensor, device))
        return

    copies = streams.Stream(device)
    waiting: tuple[Batch, list[torch.Tensor], Any] | None = None
    for batch in batches:
        tensors: list[torch.Tensor] = []

        def copy(tensor: "torch.Tensor", tensors: "list[torch.Tensor]" = tensors) -> "torch.Tensor":
            tensors.append(copy_to_device(tensor, device))
            return tensors[-1]

        with streams.stream(copies):
            copied = copy_batch(batch, copy)
            arrival = copies.record_event()
        if waiting is not None:
            yield _wait_for_batch(*waiting, streams.current_stream(device))
        waiting = (copied, tensors, arrival)
    if waiting is not None:
        yield _wait_for_batch(*waiting, streams.current_stream(device))


def _stream_module(device: "torch.device") -> Any:
    """`torch.cuda`, `torch.xpu`: the module with the streams of `device`; None without streams."""
    import torch

    module = getattr(torch, device.type, None)
    names = ("Stream", "stream", "current_stream")
    return module if all(hasattr(module, name) for name in names) else None


def _wait_for_batch(
    batch: Batch, tensors: "list[torch.Tensor]", arrival: Any, stream: Any
) -> Batch:
    """Let `stream` wait until `tensors`, which `batch` holds, have arrived."""
    stream.wait_event(arrival)
    for tensor in tensors:
        # Else the memory could be given to the next copy before this stream has read it.
        tensor.record_stream(stream)
    return batch


# Memory


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is an out-of-memory error of a GPU or of the host."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        message in str(error).lower() for message in _MESSAGES
    )


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Context that turns an out-of-memory error into a `ModelError` with `message`.

    The message says what did not fit and what the user can do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{message} ({reason})") from error


def free_memory(device: "torch.device") -> int | None:
    """Bytes that torch can still allocate on `device`; None on the CPU and where torch cannot say.

    Includes what torch's allocator holds and nobody uses.
    """
    import torch

    if device.type == "cpu":
        return None
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "mem_get_info"):
        return None
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def memory_budget(device: "torch.device", memory: int) -> int:
    """Bytes that a fit with the budget `memory` may take on `device`: not more than are free."""
    free = free_memory(device)
    return memory if free is None else min(memory, int(FREE_SHARE * free))


def release_memory(device: "torch.device") -> None:
    """Give memory that torch holds and nobody uses back to the device."""
    import torch

    module: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "empty_cache"):
        module.empty_cache()


class TileRows:
    """Rows that a device computes at once; halved whenever memory runs out, never raised again."""

    def __init__(self, rows: int, device: "torch.device", fewest: int = 1) -> None:
        self.rows = max(rows, 1)
        """Most rows of a tile."""
        self.device = device
        self.fewest = fewest
        """Rows of the smallest tile: if these do not fit, the error is the caller's."""

    def run(self, total: int, compute: Callable[[slice], None]) -> None:
        """Call `compute(tile)` for tiles that cover `total` rows in order, about equal in size.

        A tile for which memory runs out is halved and computed again, so `compute` must change
        nothing that counts before its last allocation. Raises the error of the device if `fewest`
        rows do not fit.
        """
        start = 0
        while start < total:
            # Equal tiles: a small last tile would waste time.
            tiles_left = -(-(total - start) // self.rows)
            stop = start + -(-(total - start) // tiles_left)
            if self._fits(compute, slice(start, stop)):
                start = stop

    def _fits(self, compute: Callable[[slice], None], tile: slice) -> bool:
        """Compute `tile`; False if memory ran out, and tiles are halved from now on."""
        rows = tile.stop - tile.start
        try:
            compute(tile)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or rows <= self.fewest:
                raise
        else:
            return True
        # Outside of `except`: the traceback of the error holds the tensors of the tile.
        self.rows: int = max(self.fewest, rows // 2)
        release_memory(self.device)
        return False

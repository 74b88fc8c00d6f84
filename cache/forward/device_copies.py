"""Residual streams from the device to the host, in their stored dtypes.

On a GPU the copies run on a stream of their own, into pinned memory, while the next batch is
computed; who reads the rows waits for their event first.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..format.layout import ArrayKey
from .stage_times import StageTimes

if TYPE_CHECKING:
    import torch

    from .kept_logits import StoredRows

    Arrays = Mapping[ArrayKey, torch.Tensor | StoredRows]

DEPTH = 2
"""Batches whose residuals may lie on the device besides the one that is computed."""


@dataclass(frozen=True)
class HostRows:
    """Rows of one layer as they are stored, and their peaks; `wait` before either is read."""

    stored: np.ndarray
    """`(..., d_model)` in the stored dtype."""
    peaks: np.ndarray
    """Largest |value| of each row before the cast, `(...)` float32; NaN if a value is."""
    arrival: Callable[[], None] | None = None
    """Returns once the bytes are on the host; None if they are."""

    def wait(self) -> None:
        """Return once the rows may be read."""
        if self.arrival is not None:
            self.arrival()

    def part(self, place: int, length: int) -> "HostRows":
        """The first `length` rows of sequence `place`."""
        return HostRows(self.stored[place, :length], self.peaks[place], self.arrival)

    def run(self, first: int, stop: int) -> "HostRows":
        """Rows `first:stop` where the rows of all sequences follow each other."""
        return HostRows(self.stored[first:stop], self.peaks[first:stop], self.arrival)


class Pending(Protocol):
    """Something on its way that can be waited for."""

    def wait(self) -> None: ...


class PendingCopies:
    """At most `depth` things on their way: adding one more waits for the oldest."""

    def __init__(self, depth: int = DEPTH) -> None:
        self._depth = depth
        self._way: deque[Pending] = deque()

    def add(self, thing: Pending) -> None:
        """Take `thing` in, once there is room."""
        while len(self._way) >= self._depth:
            self._way.popleft().wait()
        self._way.append(thing)

    def drain(self) -> None:
        """Wait for all."""
        while self._way:
            self._way.popleft().wait()


class HostCopies:
    """Where the model runs on the CPU (or another device without streams): cast and copy."""

    def __init__(self, stages: StageTimes) -> None:
        self._stages = stages

    def take(
        self, run: "Callable[[], Arrays]", dtypes: dict[ArrayKey, str], tokens: int
    ) -> dict[ArrayKey, HostRows]:
        """The arrays of `dtypes` among those that `run` gives for `tokens` tokens."""
        began = time.perf_counter()
        hidden = run()
        computed = time.perf_counter()
        rows = {layer: copy_to_host(hidden[layer], dtype) for layer, dtype in dtypes.items()}
        count = sum(r.stored.nbytes for r in rows.values())
        self._stages.add("forward", computed - began, count, tokens)
        self._stages.add("copy", time.perf_counter() - computed, count)
        return rows

    def drain(self) -> None:
        """Nothing is ever on its way."""


def copy_to_host(hidden: "torch.Tensor | StoredRows", dtype: str) -> HostRows:
    """Cast on the device, where it is fifteen times as fast as numpy's, then one copy."""
    cast, peaks = _cast(hidden, dtype)
    return HostRows(_numpy(cast.cpu()), _numpy(peaks.cpu()))


def _cast(hidden: "torch.Tensor | StoredRows", dtype: str) -> "StoredRows":
    """`hidden` in its stored dtype, and its float32 peaks; logits come with both."""
    import torch

    if isinstance(hidden, tuple):
        return hidden
    peaks = torch.maximum(hidden.amax(-1), -hidden.amin(-1)).float()
    return hidden.to(getattr(torch, dtype)), peaks


def _numpy(tensor: "torch.Tensor") -> np.ndarray:
    """The same memory for numpy, to which bfloat16 is uint16."""
    import torch

    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class CudaCopies:
    """On a GPU: the copy of one batch runs while the next one is computed."""

    def __init__(self, stages: StageTimes, device: "torch.device") -> None:
        import torch

        self._stages = stages
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._ring = PendingCopies()

    def take(
        self, run: "Callable[[], Arrays]", dtypes: dict[ArrayKey, str], tokens: int
    ) -> dict[ArrayKey, HostRows]:
        """As `HostCopies.take`, but the rows are still to arrive."""
        import torch

        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        with torch.cuda.device(self._device):
            computing = torch.cuda.current_stream()
            marks[0].record(computing)
            hidden = run()
            marks[1].record(computing)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(marks[1])
                marks[2].record(self._stream)
                kept = {la: self._copy(hidden[la], dtype) for la, dtype in dtypes.items()}
                marks[3].record(self._stream)
        count = sum(cast.nbytes for cast, _ in kept.values())
        arrival = PendingCopy(marks, self._stages, count, tokens)
        rows = {la: HostRows(_numpy(c), _numpy(p), arrival.wait) for la, (c, p) in kept.items()}
        self._ring.add(arrival)
        return rows

    def _copy(self, hidden: "torch.Tensor | StoredRows", dtype: str) -> "StoredRows":
        """Start the copies of one array; the host memory is theirs until the rows are dropped.

        torch keeps pinned memory for reuse, and hands it out again only after the copy's event.
        """
        for tensor in hidden if isinstance(hidden, tuple) else (hidden,):
            # Not to be reused for the next batch before the cast.
            tensor.record_stream(self._stream)
        cast, peaks = _cast(hidden, dtype)
        return _pinned(cast), _pinned(peaks)

    def drain(self) -> None:
        """Wait for all copies, and give memory that nobody uses back to the device."""
        import torch

        self._ring.drain()
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()


def copy_to_device(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """`tensor` on `device`; on a GPU without waiting for the batch before, as a plain copy does."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _pinned(tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class PendingCopy:
    """The rows of one batch on their way; the first to wait for them also books their time."""

    def __init__(self, marks: list[Any], stages: StageTimes, count: int, tokens: int) -> None:
        self._marks, self._stages = marks, stages
        self._count, self._tokens = count, tokens
        self._lock = threading.Lock()
        self._booked = False

    def wait(self) -> None:
        """Return once all rows are on the host."""
        self._marks[-1].synchronize()
        with self._lock:
            if self._booked:
                return
            self._booked = True
        began, computed, copying, copied = self._marks
        forward, copy = began.elapsed_time(computed), copying.elapsed_time(copied)
        self._stages.add("forward", forward / 1e3, self._count, self._tokens)
        self._stages.add("copy", copy / 1e3, self._count)


def device_copies_for(device: "torch.device", stages: StageTimes) -> HostCopies | CudaCopies:
    """The way from `device` to the host."""
    return CudaCopies(stages, device) if device.type == "cuda" else HostCopies(stages)

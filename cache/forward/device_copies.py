"""Casts the residual streams of a batch to their stored dtypes and copies them to the host.

`PartRunner` runs the model through `device_copies_for(device, stages).run(...)`, which gives
`HostRows`. On a GPU the copies run on a CUDA stream of their own, into pinned memory, while the
next batch is computed: call `HostRows.wait` before reading the rows.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
"""Batches whose copies may be pending while another batch is computed on the device."""


@dataclass(frozen=True)
class HostRows:
    """Rows of one array in its stored dtype, and their peaks; call `wait` before reading."""

    stored: np.ndarray
    """`(..., d_model)` in the stored dtype."""
    peaks: np.ndarray
    """Largest |value| of each row before the cast, `(...)` float32; NaN if a value is NaN."""
    arrival: Callable[[], None] | None = None
    """Returns once the bytes are on the host; None if the bytes are on the host already."""

    def wait(self) -> None:
        """Return once the rows may be read."""
        if self.arrival is not None:
            self.arrival()

    def of_sequence(self, index: int, length: int) -> "HostRows":
        """First `length` rows of sequence `index`, for rows of shape `(sequences, length, ...)`."""
        return HostRows(self.stored[index, :length], self.peaks[index], self.arrival)

    def row_range(self, start: int, stop: int) -> "HostRows":
        """Rows `start:stop`, for rows of shape `(rows, ...)`."""
        return HostRows(self.stored[start:stop], self.peaks[start:stop], self.arrival)


def device_copies_for(device: "torch.device", stages: StageTimes) -> "HostCopies | CudaCopies":
    """Copies from `device` to the host: asynchronous on a GPU, plain elsewhere."""
    return CudaCopies(stages, device) if device.type == "cuda" else HostCopies(stages)


class HostCopies:
    """Cast and copy without overlap: on the CPU, or another device without CUDA streams."""

    def __init__(self, stages: StageTimes) -> None:
        self._stages = stages

    def run(
        self, run_model: "Callable[[], Arrays]", dtypes: dict[ArrayKey, str], tokens: int
    ) -> dict[ArrayKey, HostRows]:
        """Run the model on a batch and copy the arrays named in `dtypes` to the host.

        `tokens` is the number of tokens of the batch without padding, for `stages`.
        """
        began = time.perf_counter()
        arrays = run_model()
        computed = time.perf_counter()
        rows = {key: copy_to_host(arrays[key], dtype) for key, dtype in dtypes.items()}
        n_bytes = sum(array.stored.nbytes for array in rows.values())
        self._stages.add("forward", computed - began, n_bytes, tokens)
        self._stages.add("copy", time.perf_counter() - computed, n_bytes)
        return rows

    def drain(self) -> None:
        """Return at once: no copy is ever pending."""


def copy_to_host(hidden: "torch.Tensor | StoredRows", dtype: str) -> HostRows:
    """Rows in the stored dtype `dtype` on the host, with their peaks.

    The cast runs on the device, where torch is fifteen times as fast as numpy on the host.
    """
    cast, peaks = _cast(hidden, dtype)
    return HostRows(_numpy(cast.cpu()), _numpy(peaks.cpu()))


def _cast(hidden: "torch.Tensor | StoredRows", dtype: str) -> "StoredRows":
    """`hidden` in its stored dtype, and the float32 peak |value| of each row."""
    import torch

    # Logits come from `KeptLogits` cast already, with their peaks.
    if isinstance(hidden, tuple):
        return hidden
    peaks = torch.maximum(hidden.amax(-1), -hidden.amin(-1)).float()
    return hidden.to(getattr(torch, dtype)), peaks


def _numpy(tensor: "torch.Tensor") -> np.ndarray:
    """The tensor's memory as a numpy array; bfloat16, which numpy lacks, as uint16."""
    import torch

    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class CudaCopies:
    """Copies from a GPU on a CUDA stream: one batch is copied while the next one is computed."""

    def __init__(self, stages: StageTimes, device: "torch.device") -> None:
        import torch

        self._stages = stages
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._other_streams: dict[torch.device, torch.cuda.Stream] = {}
        """Streams of further devices that have blocks of the model."""
        self._pending = PendingCopies()

    def run(
        self, run_model: "Callable[[], Arrays]", dtypes: dict[ArrayKey, str], tokens: int
    ) -> dict[ArrayKey, HostRows]:
        """Like `HostCopies.run`, but returns before the rows have arrived on the host."""
        import torch

        # Events on the device: forward began, forward ended, copy began, copy ended.
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        with torch.cuda.device(self._device):
            compute_stream = torch.cuda.current_stream()
            events[0].record(compute_stream)
            arrays = run_model()
            events[1].record(compute_stream)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(events[1])
                events[2].record(self._stream)
                copies = {
                    key: self._copy(arrays[key], dtype)
                    for key, dtype in dtypes.items()
                    if _device_of(arrays[key]) == self._device
                }
                events[3].record(self._stream)
        # A model may be spread over devices: their copies run on streams of their own.
        others = {key: _device_of(arrays[key]) for key in dtypes if key not in copies}
        arrivals: list[Any] = [events[-1]]
        for device in dict.fromkeys(others.values()):
            keys = [key for key in others if others[key] == device]
            if device.type != "cuda":
                copies |= {key: _cast(arrays[key], dtypes[key]) for key in keys}
                continue
            stream = self._other_streams.setdefault(device, torch.cuda.Stream(device))
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                copies |= {key: self._copy(arrays[key], dtypes[key], stream) for key in keys}
                arrivals.append(stream.record_event())

        # Waits for the oldest copy if `DEPTH` copies are pending.
        n_bytes = sum(stored.nbytes for stored, _ in copies.values())
        copy = PendingCopy(events, self._stages, n_bytes, tokens, arrivals=arrivals)
        self._pending.add(copy)
        return {
            key: HostRows(_numpy(stored), _numpy(peaks), copy.wait)
            for key, (stored, peaks) in copies.items()
        }

    def _copy(
        self,
        hidden: "torch.Tensor | StoredRows",
        dtype: str,
        stream: "torch.cuda.Stream | None" = None,
    ) -> "StoredRows":
        """Start the copies of one array and its peaks into pinned host memory, on `stream`.

        torch's allocator reuses pinned memory only after the event of the copy.
        """
        for tensor in hidden if isinstance(hidden, tuple) else (hidden,):
            # Else the memory could be reused for the next batch before the cast has run.
            tensor.record_stream(self._stream if stream is None else stream)
        cast, peaks = _cast(hidden, dtype)
        return _pinned(cast), _pinned(peaks)

    def drain(self) -> None:
        """Wait for all pending copies, then release unused memory of the device."""
        import torch

        self._pending.drain()
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()


def _device_of(hidden: "torch.Tensor | StoredRows") -> "torch.device":
    return (hidden[0] if isinstance(hidden, tuple) else hidden).device


def _pinned(tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Pending(Protocol):
    """A pending copy that can be waited for."""

    def wait(self) -> None: ...


class PendingCopies:
    """Queue of at most `depth` pending copies; `add` waits for the oldest if the queue is full."""

    def __init__(self, depth: int = DEPTH) -> None:
        self._depth = depth
        self._copies: deque[Pending] = deque()

    def add(self, copy: Pending) -> None:
        """Queue `copy`, after the oldest copies have ended if the queue is full."""
        while len(self._copies) >= self._depth:
            self._copies.popleft().wait()
        self._copies.append(copy)

    def drain(self) -> None:
        """Wait for all pending copies."""
        while self._copies:
            self._copies.popleft().wait()


class PendingCopy:
    """Pending copy of the rows of one batch; the first `wait` adds its times to `stages`.

    `events` are CUDA events: forward began, forward ended, copy began, copy ended. The rows are on
    the host after all events `arrivals`, by default the last of these.
    """

    def __init__(
        self,
        events: list[Any],
        stages: StageTimes,
        n_bytes: int,
        tokens: int,
        *,
        arrivals: Sequence[Any] = (),
    ) -> None:
        self._events, self._stages = events, stages
        self._arrivals = arrivals or events[-1:]
        self._bytes, self._tokens = n_bytes, tokens
        self._lock = threading.Lock()
        self._times_added = False

    def wait(self) -> None:
        """Return once all rows are on the host; any thread may call."""
        for event in self._arrivals:
            event.synchronize()
        with self._lock:
            if self._times_added:
                return
            self._times_added = True
        forward_began, forward_ended, copy_began, copy_ended = self._events
        forward_ms = forward_began.elapsed_time(forward_ended)
        copy_ms = copy_began.elapsed_time(copy_ended)
        self._stages.add("forward", forward_ms / 1e3, self._bytes, self._tokens)
        self._stages.add("copy", copy_ms / 1e3, self._bytes)


def copy_to_device(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Copy `tensor` to `device`; on a GPU, the call does not wait for earlier work.

    A plain copy would wait until the GPU has computed the previous batch.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

"""A device that isn't there: tensors that say they are on `meta` but hold their numbers on the CPU.

Within `pretended_device()`, `choose_device("meta")`, `x.to("meta")` and factories with
`device="meta"` give tensors that compute real numbers, autograd included. As a GPU would, it
refuses operations that mix its tensors with those of the CPU (but numbers and CPU indices),
`.numpy()`, and random draws by a generator of the CPU. So a whole fit runs on it, is compared with
the CPU's, and a tensor that was left behind is found. The mode holds for the thread that entered
it. Modules move by `.to`. Streams and pinned memory are those of CUDA and not pretended.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on `DEVICE`; the numbers are in `on_cpu`, on the CPU."""

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor) -> "DeviceTensor":
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=0,
            dtype=on_cpu.dtype,
            device=DEVICE,
            requires_grad=on_cpu.requires_grad,
        )

    def __init__(self, on_cpu: torch.Tensor) -> None:
        self.on_cpu = on_cpu.detach()

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"DeviceTensor({self.on_cpu!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {}, PretendedDevice())

    def __matmul__(self, other: Any) -> Any:
        # torch changes the shape of the product in place, which a wrapper cannot follow.
        if self.dim() == 1 and other.dim() == 2:
            return torch.mv(other.T, self)
        return super().__matmul__(other)

    def tolist(self) -> Any:
        return self.on_cpu.tolist()

    def numpy(self, **_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise TypeError("can't convert a device tensor to numpy; use .cpu() first")


class PretendedDevice(TorchDispatchMode):
    """What the device lacks: float64, or memory for a tensor of more than `largest` bytes."""

    def __init__(self, float64: bool = True, largest: int | None = None) -> None:
        super().__init__()
        self.float64, self.largest = float64, largest
        self.operations: set[str] = set()
        """Names of the operations that ran on the device."""
        self.refused = 0
        """How many tensors did not fit."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {}, self)


@contextmanager
def pretended_device(float64: bool = True, largest: int | None = None) -> Iterator[PretendedDevice]:
    """Context with a device `meta` that computes; out of memory beyond `largest` bytes a tensor."""
    with PretendedDevice(float64, largest) as device:
        yield device


def _unwrap(value: Any) -> Any:
    return value.on_cpu if isinstance(value, DeviceTensor) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any], device: PretendedDevice) -> Any:
    """Run `func` on the CPU, and wrap what a GPU would have computed on the device."""
    name = func.__name__
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, DeviceTensor)]
    here = [x for x in tensors if not isinstance(x, DeviceTensor) and x.dim() > 0]
    if name.startswith(("index.", "index_put", "_index_put")):
        # Indices may be on the CPU.
        here = [x for x in here if x.is_floating_point()]
    if there and here and "copy" not in name:
        shapes = [[tuple(x.shape) for x in group] for group in (there, here)]
        raise RuntimeError(f"{name}: tensors {shapes[0]} on the device, {shapes[1]} on the CPU")

    # Where the result lies.
    to = kwargs.get("device")
    leaves = to is not None and torch.device(to).type == "cpu"
    arrives = to is not None and torch.device(to).type == DEVICE.type
    on_device = arrives or (bool(there) and not leaves)
    if name.startswith("copy_"):
        on_device = isinstance(args[0], DeviceTensor)
    if on_device and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{name}: expected a generator of the device, found one of the CPU")

    if to is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": False}
    result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if on_device:
        device.operations.add(name)
    wrapped = {id(_unwrap(x)): x for x in tensors}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, DeviceTensor):
            return value
        if id(value) in wrapped:
            return wrapped[id(value)]
        if not on_device:
            return value
        _check_tensor(value, name, device)
        return DeviceTensor(value)

    return tree_map(wrap, result)


def _check_tensor(tensor: torch.Tensor, name: str, device: PretendedDevice) -> None:
    """Raise as a device would that lacks float64, or memory for `tensor`."""
    if tensor.dtype == torch.float64 and not device.float64:
        raise TypeError(f"{name}: the device has no float64")
    is_view = tensor.untyped_storage().nbytes() > tensor.nbytes
    if device.largest is not None and tensor.nbytes > device.largest and not is_view:
        device.refused += 1
        raise torch.OutOfMemoryError(f"{name}: out of memory: {tensor.nbytes} bytes")

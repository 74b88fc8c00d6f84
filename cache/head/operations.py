"""Operations of head programs (`program.py`), each written once for numpy and torch.

`OPS` maps the name of an operation to its function: the complete list that a program can run, and
part of the format on disk (cache/README.md). Names, parameters and meaning are those of torch's
aten operators, hence no docstrings; `xp` is a backend, `NumpyOperations` or `TorchOperations`.
Results are float32 (numpy) or of the input's dtype (torch).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from typing import Any

import numpy as np


class NumpyOperations:
    """Backend of the operations: numpy, plus functions that numpy lacks or names differently."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def erf(x: np.ndarray) -> np.ndarray:
        from scipy.special import erf

        return erf(x)

    @staticmethod
    def permute(x: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
        return np.transpose(x, dims)

    @staticmethod
    def pad(x: np.ndarray, widths: list[tuple[int, int]], value: float) -> np.ndarray:
        return np.pad(x, widths, constant_values=value)


class TorchOperations:
    """Backend of the operations: torch, with `pad` as in `NumpyOperations`."""

    def __init__(self) -> None:
        import torch

        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def pad(self, x: Any, widths: list[tuple[int, int]], value: float) -> Any:
        flat = [size for pair in reversed(widths) for size in pair]
        return self._torch.nn.functional.pad(x, flat, value=value)


@dataclass(frozen=True)
class Operation:
    """A function of arrays and numbers, called as `run(xp, **arguments)`."""

    run: Callable[..., Any]

    @cached_property
    def required(self) -> set[str]:
        """Names of the arguments without a default."""
        parameters = list(signature(self.run).parameters.values())[1:]
        return {p.name for p in parameters if p.default is p.empty}

    @cached_property
    def allowed(self) -> set[str]:
        """Names of all arguments."""
        return set(list(signature(self.run).parameters)[1:])


OPS: dict[str, Operation] = {}
"""Name of an operation in programs -> operation."""


def _operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add a function to `OPS`; its name may end in `_` to avoid a Python built-in."""
    OPS[function.__name__.rstrip("_")] = Operation(function)
    return function


def _add_unary(name: str, function: Callable[[Any, Any], Any]) -> None:
    """Add `function(xp, x)` to `OPS`."""

    def run(xp: Any, self: Any) -> Any:
        return function(xp, self)

    OPS[name] = Operation(run)


def _add_binary(name: str, function: Callable[[Any, Any, Any], Any]) -> None:
    """Add `function(xp, a, b)` to `OPS`."""

    def run(xp: Any, self: Any, other: Any) -> Any:
        return function(xp, self, other)

    OPS[name] = Operation(run)


for _name in ("exp", "log", "tanh", "sqrt", "abs", "erf", "sin", "cos"):
    _add_unary(_name, partial(lambda name, xp, x: getattr(xp, name)(x), _name))
_add_unary("neg", lambda xp, x: -x)
_add_unary("rsqrt", lambda xp, x: 1 / xp.sqrt(x))
_add_unary("reciprocal", lambda xp, x: 1 / x)
_add_unary("sigmoid", lambda xp, x: 0.5 * (xp.tanh(x * 0.5) + 1.0))
_add_unary("silu", lambda xp, x: x * (0.5 * (xp.tanh(x * 0.5) + 1.0)))
_add_unary("relu", lambda xp, x: xp.clip(x, 0, None))
_add_unary("t", lambda xp, x: xp.swapaxes(x, -1, -2) if x.ndim > 1 else x)
_add_binary("mul", lambda xp, a, b: a * b)
_add_binary("div", lambda xp, a, b: a / b)
_add_binary("maximum", lambda xp, a, b: xp.maximum(a, b))
_add_binary("minimum", lambda xp, a, b: xp.minimum(a, b))


@_operation
def add(xp: Any, self: Any, other: Any, alpha: float = 1) -> Any:
    return self + (other if alpha == 1 else other * alpha)


@_operation
def sub(xp: Any, self: Any, other: Any, alpha: float = 1) -> Any:
    return self - (other if alpha == 1 else other * alpha)


@_operation
def rsub(xp: Any, self: Any, other: Any, alpha: float = 1) -> Any:
    return other - (self if alpha == 1 else self * alpha)


@_operation
def pow_(xp: Any, self: Any, exponent: Any) -> Any:
    return self * self if isinstance(exponent, int | float) and exponent == 2 else self**exponent


@_operation
def clamp(xp: Any, self: Any, min: float | None = None, max: float | None = None) -> Any:
    return xp.clip(self, min, max)


@_operation
def gelu(xp: Any, self: Any, approximate: str = "none") -> Any:
    if approximate == "tanh":
        # sqrt(2 / π) (x + 0.044715 x³)
        argument = 0.7978845608028654 * (self + 0.044715 * self * self * self)
        return 0.5 * self * (1.0 + xp.tanh(argument))
    # x Φ(x), with 1 / sqrt(2)
    return 0.5 * self * (1.0 + xp.erf(self * 0.7071067811865476))


@_operation
def mean(xp: Any, self: Any, dim: list[int], keepdim: bool = False) -> Any:
    return xp.mean(self, axis=tuple(dim), keepdims=keepdim)


@_operation
def sum_(xp: Any, self: Any, dim: list[int], keepdim: bool = False) -> Any:
    return xp.sum(self, axis=tuple(dim), keepdims=keepdim)


@_operation
def amax(xp: Any, self: Any, dim: list[int], keepdim: bool = False) -> Any:
    return xp.amax(self, axis=tuple(dim), keepdims=keepdim)


@_operation
def var(xp: Any, self: Any, dim: list[int], correction: float = 1, keepdim: bool = False) -> Any:
    axes = tuple(dim)
    centred = self - xp.mean(self, axis=axes, keepdims=True)
    count = 1
    for axis in axes:
        count *= self.shape[axis]
    return xp.sum(centred * centred, axis=axes, keepdims=keepdim) / (count - correction)


@_operation
def softmax(xp: Any, self: Any, dim: int) -> Any:
    powers = xp.exp(self - xp.amax(self, axis=dim, keepdims=True))
    return powers / xp.sum(powers, axis=dim, keepdims=True)


@_operation
def mm(xp: Any, self: Any, mat2: Any) -> Any:
    return self @ mat2


@_operation
def addmm(xp: Any, self: Any, mat1: Any, mat2: Any, beta: float = 1, alpha: float = 1) -> Any:
    product = mat1 @ mat2
    return (self if beta == 1 else self * beta) + (product if alpha == 1 else product * alpha)


@_operation
def layer_norm(
    xp: Any, input: Any, normalized_shape: list[int], weight: Any, bias: Any, eps: float
) -> Any:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - xp.mean(input, axis=axes, keepdims=True)
    out = centred / xp.sqrt(xp.mean(centred * centred, axis=axes, keepdims=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@_operation
def rms_norm(xp: Any, input: Any, normalized_shape: list[int], weight: Any, eps: float) -> Any:
    axes = tuple(range(-len(normalized_shape), 0))
    out = input / xp.sqrt(xp.mean(input * input, axis=axes, keepdims=True) + eps)
    return out if weight is None else out * weight


@_operation
def reshape(xp: Any, self: Any, size: list[int]) -> Any:
    if min(size, default=0) < -1:
        raise ValueError(f"a size of {min(size)}")
    return xp.reshape(self, tuple(size))


@_operation
def expand(xp: Any, self: Any, size: list[int]) -> Any:
    new_axes = len(size) - self.ndim
    shape = [self.shape[axis - new_axes] if n == -1 else n for axis, n in enumerate(size)]
    return xp.broadcast_to(self, tuple(shape))


@_operation
def transpose(xp: Any, self: Any, dim0: int, dim1: int) -> Any:
    return xp.swapaxes(self, dim0, dim1)


@_operation
def permute(xp: Any, self: Any, dims: list[int]) -> Any:
    return xp.permute(self, tuple(dims))


@_operation
def unsqueeze(xp: Any, self: Any, dim: int) -> Any:
    axis = dim if dim >= 0 else dim + self.ndim + 1
    return xp.reshape(self, (*self.shape[:axis], 1, *self.shape[axis:]))


@_operation
def squeeze(xp: Any, self: Any, dim: int | list[int]) -> Any:
    axes = [dim] if isinstance(dim, int) else dim
    removed = {axis % self.ndim for axis in axes if self.shape[axis] == 1}
    return xp.reshape(self, tuple(n for axis, n in enumerate(self.shape) if axis not in removed))


@_operation
def slice_(
    xp: Any,
    self: Any,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    leading_axes = dim % self.ndim
    return self[(slice(None),) * leading_axes + (slice(start, end, step),)]


@_operation
def select(xp: Any, self: Any, dim: int, index: int) -> Any:
    return self[(slice(None),) * (dim % self.ndim) + (index,)]


@_operation
def cat(xp: Any, tensors: list[Any], dim: int = 0) -> Any:
    return xp.concatenate(tuple(tensors), axis=dim)


@_operation
def stack(xp: Any, tensors: list[Any], dim: int = 0) -> Any:
    return xp.stack(tuple(tensors), axis=dim)


@_operation
def pad(xp: Any, self: Any, pad: list[int], value: float = 0.0) -> Any:
    # torch lists the widths before and after each axis, last axis first.
    pairs = [(pad[n], pad[n + 1]) for n in range(0, len(pad), 2)]
    if max(pad, default=0) > _PAD_LIMIT:
        raise ValueError(f"padding of {max(pad)} rows")
    widths = [(0, 0)] * (self.ndim - len(pairs)) + pairs[::-1]
    return xp.pad(self, widths, value)


_PAD_LIMIT = 1 << 14
"""Most rows of padding, above that of any model: a damaged file must not fill the memory."""
OPS["bmm"] = OPS["mm"]

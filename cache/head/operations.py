"""The operations a head program may consist of, once for numpy and torch; nothing else can run.

Names and parameters follow torch's aten operators; `xp` is one of the two backends. All in
float32 (numpy) or the dtype of the input (torch).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import numpy as np


class NumpyOperations:
    """What numpy calls differently, or lacks."""

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
    """What torch calls differently, or lacks."""

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
    """One operation: `run(xp, **arguments)`."""

    run: Callable[..., Any]

    @property
    def required(self) -> set[str]:
        found = list(signature(self.run).parameters.values())[1:]
        return {p.name for p in found if p.default is p.empty}

    @property
    def allowed(self) -> set[str]:
        return set(list(signature(self.run).parameters)[1:])


OPS: dict[str, Operation] = {}


def _op(function: Callable[..., Any]) -> Callable[..., Any]:
    OPS[function.__name__.rstrip("_")] = Operation(function)
    return function


def _unary(name: str, function: Callable[[Any, Any], Any]) -> None:
    def run(xp: Any, self: Any) -> Any:
        return function(xp, self)

    OPS[name] = Operation(run)


def _binary(name: str, function: Callable[[Any, Any, Any], Any]) -> None:
    def run(xp: Any, self: Any, other: Any) -> Any:
        return function(xp, self, other)

    OPS[name] = Operation(run)


for _name in ("exp", "log", "tanh", "sqrt", "abs", "erf", "sin", "cos"):
    _unary(_name, partial(lambda name, xp, x: getattr(xp, name)(x), _name))
_unary("neg", lambda xp, x: -x)
_unary("rsqrt", lambda xp, x: 1 / xp.sqrt(x))
_unary("reciprocal", lambda xp, x: 1 / x)
_unary("sigmoid", lambda xp, x: 0.5 * (xp.tanh(x * 0.5) + 1.0))
_unary("silu", lambda xp, x: x * (0.5 * (xp.tanh(x * 0.5) + 1.0)))
_unary("relu", lambda xp, x: xp.clip(x, 0, None))
_unary("t", lambda xp, x: xp.swapaxes(x, -1, -2) if x.ndim > 1 else x)
_binary("mul", lambda xp, a, b: a * b)
_binary("div", lambda xp, a, b: a / b)
_binary("maximum", lambda xp, a, b: xp.maximum(a, b))
_binary("minimum", lambda xp, a, b: xp.minimum(a, b))


@_op
def add(xp: Any, self: Any, other: Any, alpha: float = 1) -> Any:
    return self + (other if alpha == 1 else other * alpha)


@_op
def sub(xp: Any, self: Any, other: Any, alpha: float = 1) -> Any:
    return self - (other if alpha == 1 else other * alpha)


@_op
def rsub(xp: Any, self: Any, other: Any, alpha: float = 1) -> Any:
    return other - (self if alpha == 1 else self * alpha)


@_op
def pow_(xp: Any, self: Any, exponent: Any) -> Any:
    return self * self if isinstance(exponent, int | float) and exponent == 2 else self**exponent


@_op
def clamp(xp: Any, self: Any, min: float | None = None, max: float | None = None) -> Any:
    return xp.clip(self, min, max)


@_op
def gelu(xp: Any, self: Any, approximate: str = "none") -> Any:
    if approximate == "tanh":
        inner = 0.7978845608028654 * (self + 0.044715 * self * self * self)
        return 0.5 * self * (1.0 + xp.tanh(inner))
    return 0.5 * self * (1.0 + xp.erf(self * 0.7071067811865476))


@_op
def mean(xp: Any, self: Any, dim: list[int], keepdim: bool = False) -> Any:
    return xp.mean(self, axis=tuple(dim), keepdims=keepdim)


@_op
def sum_(xp: Any, self: Any, dim: list[int], keepdim: bool = False) -> Any:
    return xp.sum(self, axis=tuple(dim), keepdims=keepdim)


@_op
def amax(xp: Any, self: Any, dim: list[int], keepdim: bool = False) -> Any:
    return xp.amax(self, axis=tuple(dim), keepdims=keepdim)


@_op
def var(xp: Any, self: Any, dim: list[int], correction: float = 1, keepdim: bool = False) -> Any:
    axes = tuple(dim)
    centred = self - xp.mean(self, axis=axes, keepdims=True)
    count = 1
    for axis in axes:
        count *= self.shape[axis]
    return xp.sum(centred * centred, axis=axes, keepdims=keepdim) / (count - correction)


@_op
def softmax(xp: Any, self: Any, dim: int) -> Any:
    powers = xp.exp(self - xp.amax(self, axis=dim, keepdims=True))
    return powers / xp.sum(powers, axis=dim, keepdims=True)


@_op
def mm(xp: Any, self: Any, mat2: Any) -> Any:
    return self @ mat2


@_op
def addmm(xp: Any, self: Any, mat1: Any, mat2: Any, beta: float = 1, alpha: float = 1) -> Any:
    product = mat1 @ mat2
    return (self if beta == 1 else self * beta) + (product if alpha == 1 else product * alpha)


@_op
def layer_norm(
    xp: Any, input: Any, normalized_shape: list[int], weight: Any, bias: Any, eps: float
) -> Any:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - xp.mean(input, axis=axes, keepdims=True)
    out = centred / xp.sqrt(xp.mean(centred * centred, axis=axes, keepdims=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@_op
def rms_norm(xp: Any, input: Any, normalized_shape: list[int], weight: Any, eps: float) -> Any:
    axes = tuple(range(-len(normalized_shape), 0))
    out = input / xp.sqrt(xp.mean(input * input, axis=axes, keepdims=True) + eps)
    return out if weight is None else out * weight


@_op
def reshape(xp: Any, self: Any, size: list[int]) -> Any:
    if min(size, default=0) < -1:
        raise ValueError(f"a size of {min(size)}")
    return xp.reshape(self, tuple(size))


@_op
def expand(xp: Any, self: Any, size: list[int]) -> Any:
    lead = len(size) - self.ndim
    kept = [self.shape[n - lead] if s == -1 else s for n, s in enumerate(size)]
    return xp.broadcast_to(self, tuple(kept))


@_op
def transpose(xp: Any, self: Any, dim0: int, dim1: int) -> Any:
    return xp.swapaxes(self, dim0, dim1)


@_op
def permute(xp: Any, self: Any, dims: list[int]) -> Any:
    return xp.permute(self, tuple(dims))


@_op
def unsqueeze(xp: Any, self: Any, dim: int) -> Any:
    place = dim if dim >= 0 else dim + self.ndim + 1
    return xp.reshape(self, (*self.shape[:place], 1, *self.shape[place:]))


@_op
def squeeze(xp: Any, self: Any, dim: int | list[int]) -> Any:
    axes = [dim] if isinstance(dim, int) else dim
    gone = {axis % self.ndim for axis in axes if self.shape[axis] == 1}
    return xp.reshape(self, tuple(s for n, s in enumerate(self.shape) if n not in gone))


@_op
def slice_(
    xp: Any,
    self: Any,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    place = dim % self.ndim
    return self[(slice(None),) * place + (slice(start, end, step),)]


@_op
def select(xp: Any, self: Any, dim: int, index: int) -> Any:
    return self[(slice(None),) * (dim % self.ndim) + (index,)]


@_op
def cat(xp: Any, tensors: list[Any], dim: int = 0) -> Any:
    return xp.concatenate(tuple(tensors), axis=dim)


@_op
def stack(xp: Any, tensors: list[Any], dim: int = 0) -> Any:
    return xp.stack(tuple(tensors), axis=dim)


@_op
def pad(xp: Any, self: Any, pad: list[int], value: float = 0.0) -> Any:
    pairs = [(pad[n], pad[n + 1]) for n in range(0, len(pad), 2)]
    if max(pad, default=0) > _PAD_LIMIT:
        raise ValueError(f"padding of {max(pad)} rows")
    widths = [(0, 0)] * (self.ndim - len(pairs)) + pairs[::-1]
    return xp.pad(self, widths, value)


_PAD_LIMIT = 1 << 14
"""More padding than any model adds: a damaged file must not fill the memory."""
OPS["bmm"] = OPS["mm"]

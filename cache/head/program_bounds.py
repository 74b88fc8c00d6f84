"""Bounds of a head program's memory and work, from shapes alone, before anything is computed.

Programs come from strangers: a few nodes can ask for terabytes or for hours. `check_bounds` runs
the program on `ShapeArray`s, which have a shape and no values, for few and for many positions;
every array that an operation makes counts, also those inside the operation. `ProgramHead` calls it
before the first run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files.json_fields import FieldError
from .program import Program

LENGTHS = (2, 1 << 16)
"""Numbers of positions for which the shapes are computed: what grows faster than they do, such as
a product of positions with positions, is far above the bound of the second."""
WIDTHS_OF_RESULT = 16
"""A result has at most this many times max(d_model, vocab) numbers per position."""
WIDTHS_OF_ALL = 64
"""The same for all results together: a tail has few of the width of the vocabulary."""
NARROW = 4096
"""Numbers per position that are allowed beyond, in models of few dimensions."""
FIXED_NUMBERS = 1 << 20
"""Numbers that are allowed at any number of positions, beside those of the head's tensors."""
COPIES_OF_TENSORS = 16
"""Work of preparing the tensors (transposed, scaled), in times that all their numbers are read."""
PRODUCTS_PER_POSITION = 4
"""Multiplications of matrix products per position, in times all numbers of the tensors."""
SMALL_VOCAB = 1 << 16
"""Largest vocabulary of a head with fewer numbers in its tensors than logits."""


@dataclass
class _Budget:
    """Most numbers and products of a program, and the numbers and products counted so far."""

    result: int
    """Most numbers of one result."""
    numbers: int
    """Numbers of all results that are left."""
    products: int
    """Multiplications of matrix products that are left."""

    def spend(self, shape: Sequence[int], products: int = 0) -> None:
        """Count a result of `shape`; raises `ValueError` where it is too large, or all are."""
        size = math.prod(shape)
        self.numbers -= size
        self.products -= products
        if size > self.result or self.numbers < 0 or self.products < 0:
            raise ValueError(f"a result of shape {tuple(shape)} is larger than a head needs")


def check_bounds(
    program: Program, shapes: Mapping[str, tuple[int, ...]], d_model: int, vocab: int
) -> None:
    """Raise `FieldError` unless the program maps `(1, n, d_model)` to `(1, n, vocab)` in bounds.

    `shapes` are those of the head's tensors by name. Memory and work must be those of a head:
    proportional to the number of positions, to the widths and to the size of the tensors.
    """
    stored = sum(math.prod(shape) for shape in shapes.values())
    if vocab > max(stored, SMALL_VOCAB):
        raise FieldError(f"the head program has {vocab} logits, but tensors of {stored} numbers")
    for length in LENGTHS:
        width = max(d_model, vocab)
        budget = _Budget(
            result=length * (WIDTHS_OF_RESULT * width + NARROW) + stored + FIXED_NUMBERS,
            numbers=length * (WIDTHS_OF_ALL * width + NARROW)
            + COPIES_OF_TENSORS * stored
            + FIXED_NUMBERS,
            products=length * (PRODUCTS_PER_POSITION * stored + WIDTHS_OF_ALL * width + NARROW)
            + FIXED_NUMBERS,
        )
        tensors = {name: ShapeArray(shape, budget) for name, shape in shapes.items()}
        try:
            x = ShapeArray((1, length, d_model), budget)
            out = program.run(x, tensors, ShapeOperations())
            if out.shape != (1, length, vocab):
                raise ValueError(f"it gives {out.shape}, not {(1, length, vocab)}")
        except RESULTS_OF_FORGERY as error:
            raise FieldError(f"the head program does not run: {error}") from None


RESULTS_OF_FORGERY = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)
"""Errors of operations whose arguments do not go together."""


class ShapeArray:
    """Stands for a float array in the operations of `operations.py`: a shape without values.

    Arithmetic and indexing give the shape that numpy gives, or raise numpy's error. Each result
    counts in the budget.
    """

    # numpy leaves operators between its scalars and this class to the class.
    __array_ufunc__ = None

    def __init__(self, shape: Sequence[int], budget: _Budget) -> None:
        self.shape: tuple[int, ...] = tuple(int(n) for n in shape)
        self.ndim: int = len(self.shape)
        self.budget = budget

    def result(self, shape: Sequence[int], products: int = 0) -> "ShapeArray":
        """A result of `shape`, made by `products` multiplications."""
        self.budget.spend(shape, products)
        return ShapeArray(shape, self.budget)

    def _elementwise(self, other: Any) -> "ShapeArray":
        if not _is_operand(other):
            raise TypeError(f"{type(other).__name__} where an array or a number is expected")
        shape = other.shape if isinstance(other, ShapeArray) else ()
        return self.result(np.broadcast_shapes(self.shape, shape))

    __add__ = _elementwise
    __radd__ = _elementwise
    __sub__ = _elementwise
    __rsub__ = _elementwise
    __mul__ = _elementwise
    __rmul__ = _elementwise
    __truediv__ = _elementwise
    __rtruediv__ = _elementwise
    __pow__ = _elementwise
    __rpow__ = _elementwise

    def __neg__(self) -> "ShapeArray":
        return self.result(self.shape)

    def __matmul__(self, other: Any) -> "ShapeArray":
        if not isinstance(other, ShapeArray) or not self.ndim or not other.ndim:
            raise TypeError("a matrix product of something else than two arrays")
        left = self.shape if self.ndim > 1 else (1, *self.shape)
        right = other.shape if other.ndim > 1 else (*other.shape, 1)
        if left[-1] != right[-2]:
            raise ValueError(f"a matrix product of shapes {self.shape} and {other.shape}")
        batch = np.broadcast_shapes(left[:-2], right[:-2])
        rows, columns = left[-2:-1][: self.ndim - 1], right[-1:][: other.ndim - 1]
        shape = (*batch, *rows, *columns)
        return self.result(shape, math.prod(shape) * left[-1])

    def __getitem__(self, key: tuple[slice | int, ...]) -> "ShapeArray":
        # A view of one zero has every shape in no memory, and numpy's own rules for indices.
        return self.result(np.broadcast_to(np.float32(0), self.shape)[key].shape)


def _is_operand(value: Any) -> bool:
    return isinstance(value, ShapeArray | int | float)


class ShapeOperations:
    """Backend of the operations for `ShapeArray`: the functions that `operations.py` calls."""

    def __getattr__(self, name: str) -> Callable[..., ShapeArray]:
        if name in ("exp", "log", "tanh", "sqrt", "abs", "erf", "sin", "cos"):
            return lambda x: x.result(x.shape)
        if name in ("mean", "sum", "amax"):
            return _reduce
        raise AttributeError(name)

    @staticmethod
    def clip(x: ShapeArray, low: Any, high: Any) -> ShapeArray:
        for bound in (low, high):
            x = x if bound is None else x._elementwise(bound)
        return x

    @staticmethod
    def maximum(x: Any, other: Any) -> ShapeArray:
        return x._elementwise(other) if isinstance(x, ShapeArray) else other._elementwise(x)

    minimum = maximum

    @staticmethod
    def swapaxes(x: ShapeArray, axis: int, other: int) -> ShapeArray:
        shape = list(x.shape)
        shape[axis], shape[other] = shape[other], shape[axis]
        return x.result(shape)

    @staticmethod
    def permute(x: ShapeArray, dims: tuple[int, ...]) -> ShapeArray:
        axes = _normalized_axes(dims, x.ndim)
        if len(axes) != x.ndim:
            raise ValueError(f"a permutation {dims} of {x.ndim} axes")
        return x.result([x.shape[axis] for axis in axes])

    @staticmethod
    def reshape(x: ShapeArray, shape: tuple[int, ...]) -> ShapeArray:
        size, known = math.prod(x.shape), math.prod(n for n in shape if n != -1)
        if shape.count(-1) == 1 and known and not size % known:
            shape = tuple(size // known if n == -1 else n for n in shape)
        if -1 in shape or math.prod(shape) != size:
            raise ValueError(f"an array of shape {x.shape} as {shape}")
        return x.result(shape)

    @staticmethod
    def broadcast_to(x: ShapeArray, shape: tuple[int, ...]) -> ShapeArray:
        if min(shape, default=0) < 0 or np.broadcast_shapes(x.shape, shape) != shape:
            raise ValueError(f"an array of shape {x.shape} as {shape}")
        return x.result(shape)

    @staticmethod
    def concatenate(arrays: tuple[ShapeArray, ...], axis: int) -> ShapeArray:
        first = arrays[0]
        [axis] = _normalized_axes((axis,), first.ndim)
        for array in arrays:
            if array.shape[:axis] != first.shape[:axis] or (
                array.shape[axis + 1 :] != first.shape[axis + 1 :]
            ):
                raise ValueError(f"arrays of shapes {first.shape} and {array.shape} in a row")
        total = sum(array.shape[axis] for array in arrays)
        return first.result((*first.shape[:axis], total, *first.shape[axis + 1 :]))

    @staticmethod
    def stack(arrays: tuple[ShapeArray, ...], axis: int) -> ShapeArray:
        shape = arrays[0].shape
        [axis] = _normalized_axes((axis,), len(shape) + 1)
        if any(array.shape != shape for array in arrays):
            raise ValueError("a stack of arrays of different shapes")
        return arrays[0].result((*shape[:axis], len(arrays), *shape[axis:]))

    @staticmethod
    def pad(x: ShapeArray, widths: list[tuple[int, int]], value: float) -> ShapeArray:
        if len(widths) != x.ndim or min((n for pair in widths for n in pair), default=0) < 0:
            raise ValueError(f"padding {widths} of {x.ndim} axes")
        return x.result([n + sum(pair) for n, pair in zip(x.shape, widths, strict=True)])


def _reduce(x: ShapeArray, axis: int | tuple[int, ...], keepdims: bool = False) -> ShapeArray:
    """A mean, sum or maximum over `axis`."""
    axes = _normalized_axes((axis,) if isinstance(axis, int) else axis, x.ndim)
    if any(x.shape[n] == 0 for n in axes):
        raise ValueError("a reduction of no numbers")
    x.budget.spend((), math.prod(x.shape))
    kept = [1 if n in axes else size for n, size in enumerate(x.shape)]
    return x.result(kept if keepdims else [s for n, s in enumerate(kept) if n not in axes])


def _normalized_axes(axes: tuple[int, ...], ndim: int) -> list[int]:
    """Numbers of `axes` from 0; raises `ValueError` for one that is absent or comes twice."""
    normalized = [axis + ndim if axis < 0 else axis for axis in axes]
    if any(not 0 <= axis < ndim for axis in normalized) or len(set(normalized)) < len(axes):
        raise ValueError(f"axes {axes} of {ndim}")
    return normalized

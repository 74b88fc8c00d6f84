"""Layout of a residual stream in a block's output tensor: `ResidualAxes`.

Most models give `(batch, length, d_model)`; some put positions first, split d_model into several
axes, repeat the sequence, or put a prompt before it. `find_blocks` infers the layout from two
output shapes; `DecoderBlocks` reads (`unpack`) and writes (`pack`) with it. `tensors_of` and
`replace_tensors` reach the tensors inside tuples, dictionaries and dataclasses.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ResidualAxes:
    """Roles of the axes of an output tensor; all axes but batch and position make up the width."""

    batch: int
    """Number of the batch axis."""
    position: int
    """Number of the position axis."""
    width_sizes: tuple[int, ...]
    """Sizes of the other axes, in order; flattened they are the width."""
    streams: int = 1
    """Copies of the sequence along the position axis; they are laid side by side in the width."""
    offset: int = 0
    """Entries before the first token along the position axis: a prompt that the model adds."""

    @property
    def width(self) -> int:
        """Numbers per token."""
        return math.prod(self.width_sizes) * self.streams

    @property
    def is_plain(self) -> bool:
        """Whether the tensor already is `(batch, length, width)`."""
        return self == ResidualAxes(0, 1, self.width_sizes) and len(self.width_sizes) == 1

    @classmethod
    def infer(
        cls,
        shape: tuple[int, ...],
        smaller_shape: tuple[int, ...],
        ids_shape: tuple[int, int],
        smaller_ids_shape: tuple[int, int],
    ) -> "ResidualAxes | None":
        """Infer the axes by comparing the output shapes for two inputs of different shapes.

        `shape` is the output's for token ids of `ids_shape` `(batch, length)`, `smaller_shape` the
        output's for fewer sequences and fewer tokens. Returns None unless exactly one axis follows
        the batch, one the length, and others are constant.
        """
        if len(shape) != len(smaller_shape):
            return None
        batches, smaller_batches = ids_shape[0], smaller_ids_shape[0]
        length, smaller_length = ids_shape[1], smaller_ids_shape[1]

        # Roles by the change of each axis: as the batch, constant, or otherwise.
        sizes = list(zip(shape, smaller_shape, strict=True))
        batch_axes = [n for n, pair in enumerate(sizes) if pair == (batches, smaller_batches)]
        constant_axes = [n for n, (size, smaller_size) in enumerate(sizes) if size == smaller_size]
        other_axes = [n for n in range(len(sizes)) if n not in batch_axes + constant_axes]
        if len(batch_axes) != 1 or len(other_axes) != 1 or not constant_axes:
            return None

        # The position axis has size streams * length + offset for both inputs.
        position = other_axes[0]
        size, smaller_size = sizes[position]
        streams, remainder = divmod(size - smaller_size, length - smaller_length)
        offset = size - streams * length
        if remainder or streams < 1 or offset < 0 or (streams > 1 and offset):
            return None
        width_sizes = tuple(shape[n] for n in constant_axes)
        return cls(batch_axes[0], position, width_sizes, streams, offset)

    def shape(self, batch: int, length: int) -> tuple[int, ...]:
        """Shape of the model's tensor for `batch` sequences of `length` tokens."""
        sizes = list(self.width_sizes)
        for axis, size in sorted(
            [(self.batch, batch), (self.position, length * self.streams + self.offset)]
        ):
            sizes.insert(axis, size)
        return tuple(sizes)

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        """The model's tensor as `(batch, length, width)`, without a prompt of the model."""
        if self.is_plain:
            return tensor
        rows = tensor.movedim((self.batch, self.position), (0, 1))
        if self.offset:
            rows = rows[:, self.offset :]
        if self.streams > 1:
            rows = rows.unflatten(1, (self.streams, -1)).movedim(1, 2)
        return rows.flatten(2)

    def pack(self, rows: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        """`rows` `(batch, length, width)` as the model's tensor; a prompt is that of `original`."""
        if self.is_plain:
            return rows
        batch, length, _ = rows.shape
        if self.streams > 1:
            rows = rows.reshape(batch, length, self.streams, *self.width_sizes).movedim(2, 1)
        rows = rows.reshape(batch, self.streams * length, *self.width_sizes)
        if self.offset:
            prompt = original.movedim((self.batch, self.position), (0, 1))[:, : self.offset]
            rows = torch.cat([prompt.to(rows), rows], 1)
        return rows.movedim((0, 1), (self.batch, self.position))


def tensors_of(output: Any, depth: int = 2) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors of a module's output, in order, to a nesting of `depth`."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif depth:
        for value in _values(output):
            yield from tensors_of(value, depth - 1)


def _values(output: Any) -> Iterator[Any]:
    """Yield the values of a dictionary, tuple, list or dataclass."""
    if isinstance(output, dict):
        yield from output.values()
    elif isinstance(output, tuple | list):
        yield from output
    elif dataclasses.is_dataclass(output):
        yield from (getattr(output, field.name) for field in dataclasses.fields(output))


def replace_tensors(
    output: Any, change: Callable[[torch.Tensor], torch.Tensor], depth: int = 2
) -> Any:
    """`output` with `change` applied to each tensor of `tensors_of`, in the same order."""
    if isinstance(output, torch.Tensor):
        return change(output) if output.is_floating_point() else output
    if not depth:
        return output
    new = [replace_tensors(value, change, depth - 1) for value in _values(output)]
    # Rebuild the container; a dictionary is changed in place.
    if isinstance(output, dict):
        for key, value in zip(list(output), new, strict=True):
            if value is not output[key]:
                output[key] = value
        return output
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*new)
    if isinstance(output, tuple | list):
        return type(output)(new)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        names = [field.name for field in dataclasses.fields(output)]
        return dataclasses.replace(output, **dict(zip(names, new, strict=True)))
    return output

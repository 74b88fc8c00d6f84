"""Where batch, position and width lie in a tensor of the residual stream."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ResidualAxes:
    """Roles of the axes of a block's output; all but batch and position are flattened to width."""

    batch: int
    position: int
    width_sizes: tuple[int, ...]
    """Sizes of the other axes, in their order."""
    streams: int = 1
    """Copies of the sequence one after the other on the position axis."""
    offset: int = 0
    """Rows before the first token on the position axis: a prompt that the model adds."""

    @property
    def width(self) -> int:
        return math.prod(self.width_sizes) * self.streams

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is `(batch, length, width)` as it stands."""
        return self == ResidualAxes(0, 1, self.width_sizes) and len(self.width_sizes) == 1

    @classmethod
    def infer(
        cls,
        one: tuple[int, ...],
        two: tuple[int, ...],
        ids: tuple[int, int],
        other: tuple[int, int],
    ) -> "ResidualAxes | None":
        """Roles by what changed from `one` to `two` as the input went from `ids` to `other`.

        None if there is not exactly one batch axis, one position axis and a width.
        """
        if len(one) != len(two):
            return None
        batch = [
            n for n, pair in enumerate(zip(one, two, strict=True)) if pair == (ids[0], other[0])
        ]
        rest = [n for n in range(len(one)) if one[n] == two[n]]
        position = [n for n in range(len(one)) if n not in batch and n not in rest]
        if len(batch) != 1 or len(position) != 1 or not rest:
            return None
        place = position[0]
        streams, left = divmod(one[place] - two[place], ids[1] - other[1])
        offset = one[place] - streams * ids[1]
        if left or streams < 1 or offset < 0 or (streams > 1 and offset):
            return None
        return cls(batch[0], place, tuple(one[n] for n in rest), streams, offset)

    def shape(self, batch: int, length: int) -> tuple[int, ...]:
        """Shape of the model's tensor for `batch` sequences of `length` tokens."""
        sizes = list(self.width_sizes)
        for axis, size in sorted(
            [(self.batch, batch), (self.position, length * self.streams + self.offset)]
        ):
            sizes.insert(axis, size)
        return tuple(sizes)

    def unpack(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The model's tensor as `(batch, length, width)`."""
        if self.is_plain:
            return tensor
        rows = tensor.movedim((self.batch, self.position), (0, 1))
        if self.offset:
            rows = rows[:, self.offset :]
        if self.streams > 1:
            rows = rows.unflatten(1, (self.streams, -1)).movedim(1, 2)
        return rows.flatten(2)

    def pack(self, rows: "torch.Tensor") -> "torch.Tensor":
        """`(batch, length, width)` as the model's tensor; rows before the first token are zero."""
        if self.is_plain:
            return rows
        import torch

        batch, length, _ = rows.shape
        if self.streams > 1:
            rows = rows.reshape(batch, length, self.streams, *self.width_sizes).movedim(2, 1)
        rows = rows.reshape(batch, self.streams * length, *self.width_sizes)
        if self.offset:
            rows = torch.nn.functional.pad(rows, [0, 0] * len(self.width_sizes) + [self.offset, 0])
        return rows.movedim((0, 1), (self.batch, self.position))


def tensors_of(output: Any, depth: int = 2) -> Iterator[torch.Tensor]:
    """Floating-point tensors of a module's output, in order."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif depth:
        for value in _values(output):
            yield from tensors_of(value, depth - 1)


def _values(output: Any) -> Iterator[Any]:
    if isinstance(output, dict):
        yield from output.values()
    elif isinstance(output, tuple | list):
        yield from output
    elif dataclasses.is_dataclass(output):
        yield from (getattr(output, field.name) for field in dataclasses.fields(output))


def replace_tensors(
    output: Any, change: Callable[[torch.Tensor], torch.Tensor], depth: int = 2
) -> Any:
    """`output` with `change` applied to what `tensors_of` gives, in the same order."""
    if isinstance(output, torch.Tensor):
        return change(output) if output.is_floating_point() else output
    if not depth:
        return output
    new = [replace_tensors(value, change, depth - 1) for value in _values(output)]
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

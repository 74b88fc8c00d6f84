"""Floating-point tensors in the outputs of modules: alone, in tuples, dictionaries, dataclasses."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch


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

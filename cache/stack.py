"""Finds the decoder blocks of any causal model by watching it run, and takes their outputs.

No list of model names: the blocks are the `ModuleList` whose children map the residual stream to
the same shape, and they are believed only if the model's own tail, given a residual of other
tokens, gives the logits of those tokens. Layer 0 is the input of the first block, layer l the
output of block l.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import ModelError


class _Stop(Exception):
    """Leaves the forward pass after the last block: norm and unembedding are not needed."""


class Stack:
    """The decoder blocks of a model and where the residual stream lies in their outputs."""

    def __init__(self, model: nn.Module, name: str, blocks: list[nn.Module], d_model: int) -> None:
        self.model = model
        self.name = name
        self.blocks = blocks
        self.d_model = d_model

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def residuals(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Layers 0..L for `ids` `(batch, length)`: L + 1 tensors `(batch, length, d_model)`."""
        shape = (*ids.shape, self.d_model)
        taken: list[torch.Tensor] = []

        def take_input(_: nn.Module, args: tuple, kwargs: dict) -> None:
            taken.append(_residual((*args, *kwargs.values()), shape, self.name))

        def take_output(block: nn.Module, _: Any, output: Any) -> None:
            taken.append(_residual(output, shape, self.name))
            if block is self.blocks[-1]:
                raise _Stop

        handles = [self.blocks[0].register_forward_pre_hook(take_input, with_kwargs=True)]
        handles += [block.register_forward_hook(take_output) for block in self.blocks]
        try:
            run(self.model, ids, mask)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(taken) != self.depth + 1:
            raise ModelError(f"{self.name}: {len(taken)} residual streams, not {self.depth + 1}")
        return taken

    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the model with layer L replaced by `hidden`, `(batch, length, d_model)`."""
        with replaced(self.blocks[-1], hidden, self.name):
            return run(self.model, ids).logits


@contextmanager
def replaced(block: nn.Module, hidden: torch.Tensor, name: str) -> Iterator[None]:
    """Within the context `block` gives `hidden` as its residual stream."""

    def put(_: nn.Module, __: Any, output: Any) -> Any:
        return _put(output, hidden, name)

    handle = block.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def run(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    """One forward pass without a key-value cache."""
    kwargs = {} if mask is None else {"attention_mask": mask}
    return model(input_ids=ids, use_cache=False, **kwargs)


def find_stack(model: nn.Module, ids: torch.Tensor, other: torch.Tensor) -> Stack:
    """The decoder blocks of `model`, verified; `ids` and `other`: two batches of one shape.

    Raises `ModelError` if no list of blocks carries the residual stream to the logits.
    """
    reasons = []
    for name, blocks, d_model in _candidates(model, ids):
        stack = Stack(model, name, blocks, d_model)
        try:
            want = run(model, ids).logits
            got = stack.tail(stack.residuals(ids)[-1], other)
        except ModelError as error:
            reasons.append(str(error))
            continue
        if torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())):
            return stack
        reasons.append(f"{name}: logits are not a function of the last block's output alone")
    detail = "; ".join(reasons) or "no ModuleList maps (batch, length, d) to the same shape"
    raise ModelError(
        f"{type(model).__name__} has no decoder blocks that carry one residual stream ({detail})"
    )


def _candidates(model: nn.Module, ids: torch.Tensor) -> list[tuple[str, list[nn.Module], int]]:
    """Module lists all of whose children ran once, in order, on `(batch, length, d)`."""
    lists = {
        n: list(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    calls: dict[int, list[Any]] = {}
    order: list[int] = []
    handles = []

    def watch(module: nn.Module, _: Any, output: Any) -> None:
        calls.setdefault(id(module), []).append(_widths(output, ids.shape))
        order.append(id(module))

    for blocks in lists.values():
        handles += [block.register_forward_hook(watch) for block in blocks]
    try:
        run(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, blocks in lists.items():
        seen = [calls.get(id(block), []) for block in blocks]
        if any(len(widths) != 1 or not widths[0] for widths in seen):
            continue
        common = set.intersection(*(set(widths[0]) for widths in seen))
        places = [order.index(id(block)) for block in blocks]
        if common and places == sorted(places):
            width = next(w for w in seen[0][0] if w in common)
            size = sum(p.numel() for block in blocks for p in block.parameters())
            found.append((size, name, blocks, width))
    return [entry[1:] for entry in sorted(found, key=lambda entry: -entry[0])]


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    if isinstance(values, tuple | list) or isinstance(output, dict):
        return [value for value in values if isinstance(value, torch.Tensor)]
    return []


def _widths(output: Any, shape: torch.Size) -> list[int]:
    return [
        t.shape[-1]
        for t in _tensors(output)
        if t.ndim == 3 and t.shape[:2] == shape and t.is_floating_point()
    ]


def _matches(value: Any, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and tuple(value.shape) == shape
        and value.is_floating_point()
    )


def _residual(output: Any, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """The first tensor of `shape` in a block's output: a tensor, a tuple or a dictionary."""
    for tensor in _tensors(output):
        if _matches(tensor, shape):
            return tensor
    raise ModelError(f"{name}: a block gives no tensor of shape {shape}")


def _put(output: Any, hidden: torch.Tensor, name: str) -> Any:
    """`output` with its residual stream replaced by `hidden`."""
    shape = tuple(hidden.shape)
    if _matches(output, shape):
        return hidden
    if isinstance(output, tuple | list):
        values = list(output)
        for place, value in enumerate(values):
            if _matches(value, shape):
                values[place] = hidden
                return type(output)(values) if type(output) in (tuple, list) else values
    if isinstance(output, dict):
        for key, value in output.items():
            if _matches(value, shape):
                output[key] = hidden
                return output
    raise ModelError(f"{name}: a block gives no tensor of shape {shape}")

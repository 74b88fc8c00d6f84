"""Finds the decoder blocks of any causal model by watching it run, and takes their outputs.

No list of model names: the blocks are the `ModuleList` whose children map the residual stream to
the same shape, and they are believed only if the model's own tail, given a residual of other
tokens, gives the logits of those tokens. Layer 0 is the input of the first block, layer l the
output of the l-th call of a block (a model that loops over its blocks has a layer per call).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .residual_axes import ResidualAxes, replace_tensors, tensors_of


class _Stop(Exception):
    """Leaves the forward pass after the last block: norm and unembedding are not needed."""


class DecoderBlocks:
    """The decoder blocks of a model and where the residual stream lies in their outputs."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        blocks: list[nn.Module],
        axes: ResidualAxes,
        picks: tuple[int, ...],
    ) -> None:
        self.model = model
        self.name = name
        self.blocks = blocks
        """One entry per call; a block that runs in a loop is there several times."""
        self.axes = axes
        self.stream_indices = picks
        """Which of the tensors of this shape carry the stream; several lie side by side."""

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return self.axes.width * len(self.stream_indices)

    def residuals(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Layers 0..L for `ids` `(batch, length)`: L + 1 tensors `(batch, length, d_model)`."""
        taken: list[torch.Tensor] = []

        def take_input(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if not taken:
                taken.append(self._take((*args, *kwargs.values()), ids))

        def take_output(_: nn.Module, __: Any, output: Any) -> None:
            taken.append(self._take(output, ids))
            if len(taken) > self.depth:
                raise _Stop

        handles = [self.blocks[0].register_forward_pre_hook(take_input, with_kwargs=True)]
        handles += [block.register_forward_hook(take_output) for block in self._modules()]
        try:
            run_model(self.model, ids, mask)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(taken) != self.depth + 1:
            raise ModelError(f"{self.name}: {len(taken)} residual streams, not {self.depth + 1}")
        return taken

    def run_tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the model with layer L replaced by `hidden`, `(batch, length, d_model)`."""
        with self.replace_layer(self.depth, hidden):
            return logits_of(run_model(self.model, ids))

    @contextmanager
    def replace_layer(self, layer: int, hidden: torch.Tensor) -> Iterator[None]:
        """Within the context, one forward pass has `hidden` as its layer `layer` (1..L)."""
        calls = 0

        def put(_: nn.Module, __: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            return self._put(output, hidden) if calls == layer else None

        handles = [block.register_forward_hook(put) for block in self._modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(self.blocks))

    def _take(self, output: Any, ids: torch.Tensor) -> torch.Tensor:
        shape = self.axes.shape(*ids.shape)
        found = [t for t in tensors_of(output) if tuple(t.shape) == shape]
        if len(found) <= max(self.stream_indices):
            raise ModelError(
                f"{self.name}: a block gives or takes no tensor of shape {shape} for "
                f"{ids.shape[0]} x {ids.shape[1]} tokens"
            )
        streams = [self.axes.unpack(found[pick]) for pick in self.stream_indices]
        return streams[0] if len(streams) == 1 else torch.cat(streams, -1)

    def _put(self, output: Any, hidden: torch.Tensor) -> Any:
        """`output` with its residual stream replaced by `hidden`."""
        shape = self.axes.shape(*hidden.shape[:2])
        parts = hidden.split(self.axes.width, -1) if len(self.stream_indices) > 1 else (hidden,)
        streams = {p: self.axes.pack(t) for p, t in zip(self.stream_indices, parts, strict=True)}
        seen = iter(range(1 << 30))
        return replace_tensors(
            output,
            lambda t: streams.get(next(seen), t) if tuple(t.shape) == shape else t,
        )


def run_model(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    """One forward pass without a key-value cache, which leaves the model as it was."""
    kwargs = {} if mask is None else {"attention_mask": mask}
    with _unchanged(model):
        return model(input_ids=ids, use_cache=False, **kwargs)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put buffers and numbers of the modules back to what they were before the context.

    Some models remember the longest sequence that they have read (dynamic rotary frequencies),
    and give other residuals for the next one.
    """
    before = [(m, m.__dict__.copy(), m._buffers.copy()) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            if not _are_same(module._buffers, buffers):
                module._buffers.update(buffers)
            if not _are_same(module.__dict__, attributes):
                _restore_numbers(module.__dict__, attributes)


def _are_same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether two dictionaries hold the same objects in the same order."""
    return len(now) == len(before) and all(map(is_, now.values(), before.values()))


def _restore_numbers(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Put back what was a plain value, and remove plain values that are new."""
    for name in [name for name, value in now.items() if _is_plain(value)]:
        if name not in before:
            del now[name]
    now.update({name: value for name, value in before.items() if _is_plain(value)})


def _is_plain(value: Any) -> bool:
    """Whether `value` is a number, a tensor of one number, a word or None."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0
    return value is None or isinstance(value, bool | int | float | str)


def logits_of(output: Any) -> torch.Tensor:
    """The logits of a forward pass."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise ModelError("the model's output has no logits; a causal language model is needed")
    return logits

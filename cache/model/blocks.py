"""The decoder blocks of a causal model: reading the residual stream, replacing a layer of it.

`DecoderBlocks` is made by `find_blocks` (`find_blocks.py`), which knows no model names: blocks are
the `ModuleList` whose children map the residual stream to the same shape, and they are accepted
only if the final norm and unembedding (the *tail*), given layer L, reproduce the model's logits.
The forward passes (`forward/part_runner.py`) call `residuals`; the identification of the head
(`head/identify_head.py`) calls `run_tail`; `ResumableRun` (`resume.py`) runs the blocks above a
layer.

Layer 0 is the input of the first block, layer l the output of the l-th call of a block; a model
that loops over its blocks has a layer per call. `ResidualAxes` says how a block's output is laid
out, if not as `(batch, length, d_model)`.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .residual_axes import ResidualAxes, replace_tensors, tensors_of


class StopForward(Exception):
    """Ends a forward pass after the last block: norm and unembedding are not needed."""


class DecoderBlocks:
    """The decoder blocks of `model`, and the location of the residual stream in their outputs."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        blocks: list[nn.Module],
        axes: ResidualAxes,
        stream_indices: tuple[int, ...],
    ) -> None:
        self.model = model
        self.name = name
        """Name of the `ModuleList`, for messages."""
        self.blocks = blocks
        """One entry per call: a block that runs in a loop is listed once per call."""
        self.axes = axes
        """Layout of the stream's tensors."""
        self.stream_indices = stream_indices
        """Indices of the stream's tensors among a block's tensors of this layout.

        Several are concatenated along d_model."""

    @property
    def depth(self) -> int:
        """Number L of calls of blocks: layers are 0..L."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.axes.width * len(self.stream_indices)

    def residuals(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Layers 0..L for token `ids` `(batch, length)`: L + 1 tensors `(batch, length, d_model)`.

        `mask` `(batch, length)` is the attention mask. Raises `ModelError` if the blocks run less
        often than before.
        """
        return self._run_and_record(ids, mask, stop_after_blocks=True)[0]

    def residuals_and_logits(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """`residuals(ids)`, and the model's logits `(batch, length, vocab)` of the same pass."""
        layers, output = self._run_and_record(ids, None, stop_after_blocks=False)
        return layers, logits_of(output)

    def _run_and_record(
        self, ids: torch.Tensor, mask: torch.Tensor | None, stop_after_blocks: bool
    ) -> tuple[list[torch.Tensor], Any]:
        """Layers 0..L and the output of one pass; no output if the pass stops after the blocks."""
        layers: list[torch.Tensor] = []

        def record_input(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if not layers:
                layers.append(self.extract_stream((*args, *kwargs.values()), ids))

        def record_output(_: nn.Module, __: Any, output: Any) -> None:
            stream = self.extract_stream(output, ids)
            # What follows the blocks may change their output in place.
            layers.append(stream if stop_after_blocks else stream.clone())
            if stop_after_blocks and len(layers) > self.depth:
                raise StopForward

        output = None
        handles = [self.blocks[0].register_forward_pre_hook(record_input, with_kwargs=True)]
        handles += [block.register_forward_hook(record_output) for block in self.distinct_blocks()]
        try:
            output = run_model(self.model, ids, mask)
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(layers) != self.depth + 1:
            raise ModelError(f"{self.name}: {len(layers)} residual streams, not {self.depth + 1}")
        return layers, output

    def first_layer(self, ids: torch.Tensor) -> torch.Tensor:
        """Layer 0 for token `ids` `(batch, length)`: `(batch, length, d_model)`; no block runs."""
        layers: list[torch.Tensor] = []

        def record_input(_: nn.Module, args: tuple, kwargs: dict) -> None:
            layers.append(self.extract_stream((*args, *kwargs.values()), ids))
            raise StopForward

        handle = self.blocks[0].register_forward_pre_hook(record_input, with_kwargs=True)
        try:
            run_model(self.model, ids)
        except StopForward:
            pass
        finally:
            handle.remove()
        return layers[0]

    def run_tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the model with layer L replaced by `hidden`, `(batch, length, vocab)`.

        `hidden` is `(batch, length, d_model)`; `ids` `(batch, length)` still pass all blocks.
        """
        with self.replace_layer(self.depth, hidden):
            return logits_of(run_model(self.model, ids))

    @contextmanager
    def replace_layer(self, layer: int, hidden: torch.Tensor) -> Iterator[None]:
        """Context in which one forward pass has `hidden` as its layer `layer` (1..L)."""
        calls = 0

        def replace_output(_: nn.Module, __: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            return self.replace_stream(output, hidden) if calls == layer else None

        handles = [block.register_forward_hook(replace_output) for block in self.distinct_blocks()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def distinct_blocks(self) -> list[nn.Module]:
        """List each block once, however often it is called."""
        return list(dict.fromkeys(self.blocks))

    def extract_stream(self, output: Any, ids: torch.Tensor) -> torch.Tensor:
        """The residual stream in the output (or input) of a block, `(batch, length, d_model)`.

        `ids` are the token ids, `(batch, length)`. Raises `ModelError` if no tensor has the shape.
        """
        shape = self.axes.shape(*ids.shape)
        tensors = [tensor for tensor in tensors_of(output) if tuple(tensor.shape) == shape]
        if len(tensors) <= max(self.stream_indices):
            raise ModelError(
                f"{self.name}: a block gives or takes no tensor of shape {shape} for "
                f"{ids.shape[0]} x {ids.shape[1]} tokens"
            )
        streams = [self.axes.unpack(tensors[index]) for index in self.stream_indices]
        return streams[0] if len(streams) == 1 else torch.cat(streams, -1)

    def replace_stream(self, output: Any, hidden: torch.Tensor) -> Any:
        """`output` (or input) of a block with `hidden` as its residual stream.

        `hidden` is `(batch, length, d_model)`; a prompt that the model puts before the first token
        stays.
        """
        shape = self.axes.shape(*hidden.shape[:2])
        is_split = len(self.stream_indices) > 1
        parts = hidden.split(self.axes.width, -1) if is_split else (hidden,)
        streams = dict(zip(self.stream_indices, parts, strict=True))
        # Tensors of the stream's shape are counted in the order of `tensors_of`.
        indices = itertools.count()

        def replace_tensor(tensor: torch.Tensor) -> torch.Tensor:
            part = streams.get(next(indices)) if tuple(tensor.shape) == shape else None
            return tensor if part is None else self.axes.pack(part, tensor)

        return replace_tensors(output, replace_tensor)


def run_model(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    """Output of one forward pass without a key-value cache; the model's state stays unchanged."""
    kwargs = {} if mask is None else {"attention_mask": mask}
    with _preserve_state(model):
        return model(input_ids=ids, use_cache=False, **kwargs)


@contextmanager
def _preserve_state(model: nn.Module) -> Iterator[None]:
    """Context that restores the buffers and plain attributes of all modules at its end.

    Some models remember the longest sequence read so far (dynamic rotary frequencies), and would
    give other residuals for the next sequence.
    """
    saved = [(module, module.__dict__.copy(), module._buffers.copy()) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in saved:
            if not _hold_same_objects(module._buffers, buffers):
                module._buffers.update(buffers)
            if not _hold_same_objects(module.__dict__, attributes):
                _restore_plain_values(module.__dict__, attributes)


def _hold_same_objects(current: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Return whether two dictionaries hold the same objects in the same order."""
    return len(current) == len(saved) and all(map(is_, current.values(), saved.values()))


def _restore_plain_values(current: dict[str, Any], saved: dict[str, Any]) -> None:
    """Restore plain values of `current` from `saved`, and remove new plain values."""
    for name in [name for name, value in current.items() if _is_plain(value)]:
        if name not in saved:
            del current[name]
    current.update({name: value for name, value in saved.items() if _is_plain(value)})


def _is_plain(value: Any) -> bool:
    """Return whether `value` is a number, a tensor of no axes, a str or None."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0
    return value is None or isinstance(value, bool | int | float | str)


def logits_of(output: Any) -> torch.Tensor:
    """Logits in a model's output, `(batch, length, vocab)`; raises `ModelError` without them."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise ModelError("the model's output has no logits; a causal language model is needed")
    return logits

"""Runs the blocks above a layer, on a changed residual stream: `ResumableRun`.

The forward pass of a batch is run once, and the output of every block is kept. To resume at layer
l, the model runs again on the same token ids while blocks 1..l give those outputs without
computing, the last of them with the changed stream. Masks, rotary embeddings, position ids and
whatever else the blocks above read are made by the model itself.

`checks/resume_check.py` proves on the spot that a model can be resumed. Measures of
`analysis/basis` run it, in `torch.inference_mode()`. `resuming/resumable_model.py` resumes models
whose lower blocks have not run, with the same contexts (`skip_blocks`, `change_layers`).
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, UsageError
from .blocks import DecoderBlocks, logits_of, run_model
from .residual_axes import replace_tensors


class ResumableRun:
    """One batch of token ids whose forward pass can start again from a changed layer.

    `ids` `(batch, length)` are on the model's device, `mask` `(batch, length)` is the attention
    mask. The whole model runs once, at construction. Memory: the outputs of all blocks, about
    `(depth + 1, batch, length, d_model)` values, and the logits.
    """

    def __init__(
        self, blocks: DecoderBlocks, ids: torch.Tensor, mask: torch.Tensor | None = None
    ) -> None:
        self.blocks = blocks
        self.ids = ids
        self.mask = mask
        self._outputs: list[Any] = []
        """Output of each call of a block, copied."""
        self._first_stream: torch.Tensor | None = None
        """Layer 0."""
        self.logits: torch.Tensor = self._run_and_record()
        """Logits of the model, `(batch, length, vocab)`."""

    def residual(self, layer: int) -> torch.Tensor:
        """Layer `layer` (0..L) of the unchanged pass, `(batch, length, d_model)`; do not modify."""
        self._check_layer(layer)
        if layer:
            return self.blocks.extract_stream(self._outputs[layer - 1], self.ids)
        assert self._first_stream is not None
        return self._first_stream

    def resume(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, length, vocab)` of the model when its layer `layer` is `hidden`.

        `hidden` is `(batch, length, d_model)`, cast to the dtype of the layer; layer 0 is the input
        of the first block, layer L the output of the last. Blocks 1..`layer` do not compute.
        """
        hidden = self._checked_stream(layer, hidden)
        with skip_blocks(self.blocks, layer, hidden, lambda call: self._outputs[call - 1]):
            return self._run_model()

    def overwrite(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of `resume` by a run of all blocks, whose layer `layer` is overwritten."""
        hidden = self._checked_stream(layer, hidden)
        with change_layers(self.blocks, {layer: lambda _: hidden}, self.ids):
            return self._run_model()

    def _run_model(self) -> torch.Tensor:
        return logits_of(run_model(self.blocks.model, self.ids, self.mask))

    def _run_and_record(self) -> torch.Tensor:
        """Run the whole model, keep layer 0 and the output of each block; the logits."""

        def record_input(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._first_stream is None:
                stream = self.blocks.extract_stream((*args, *kwargs.values()), self.ids)
                self._first_stream = stream.clone()

        def record_output(_: nn.Module, __: Any, output: Any) -> None:
            self._outputs.append(copy_output(output))

        blocks = self.blocks
        handles = [blocks.blocks[0].register_forward_pre_hook(record_input, with_kwargs=True)]
        handles += [b.register_forward_hook(record_output) for b in blocks.distinct_blocks()]
        try:
            logits = self._run_model()
        finally:
            for handle in handles:
                handle.remove()
        if len(self._outputs) != blocks.depth:
            raise ModelError(
                f"{blocks.name}: the blocks ran {len(self._outputs)} times, not {blocks.depth}"
            )
        return logits

    def _checked_stream(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """A copy of `hidden` in the dtype of layer `layer`: blocks may change their input."""
        shape = (*self.ids.shape, self.blocks.d_model)
        if tuple(hidden.shape) != shape:
            raise UsageError(
                f"expected a residual stream {shape} for these token ids, found "
                f"{tuple(hidden.shape)}"
            )
        return hidden.to(self.residual(layer), copy=True)

    def _check_layer(self, layer: int) -> None:
        """Raise `UsageError` unless `layer` is one of 0..L."""
        if not 0 <= layer <= self.blocks.depth:
            raise UsageError(
                f"the model has layers 0 to {self.blocks.depth}, there is no layer {layer}"
            )


@contextmanager
def skip_blocks(
    blocks: DecoderBlocks, layer: int, hidden: torch.Tensor, output_of: Callable[[int], Any]
) -> Iterator[None]:
    """Context in which one forward pass has `hidden` as layer `layer`, computed by no block.

    `hidden` is `(batch, length, d_model)`; layer 0 is the input of the first block.
    `output_of(call)` is the output of the call (1..`layer`) of a block for these token ids, which
    is copied; its stream at call `layer` is replaced by `hidden`. Later calls compute, also those
    of a block that was skipped before. The attribute `forward` of each block hides the method of
    the class meanwhile.
    """
    if layer == 0:
        with change_layers(blocks, {0: lambda _: hidden}, hidden[..., 0]):
            yield
        return
    calls = 0

    def stub_of(block: nn.Module) -> Any:
        forward = block.forward

        def give_recorded_output(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > layer:
                return forward(*args, **kwargs)
            output = copy_output(output_of(calls))
            return blocks.replace_stream(output, hidden) if calls == layer else output

        return give_recorded_output

    distinct = blocks.distinct_blocks()
    # A library may have put a `forward` of its own on a block, which comes back.
    own = [vars(block).get("forward") for block in distinct]
    try:
        for block in distinct:
            vars(block)["forward"] = stub_of(block)
        yield
    finally:
        for block, forward in zip(distinct, own, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = forward


LayerChange = Callable[[torch.Tensor], torch.Tensor]
"""A function of a stream `(batch, length, d_model)` that gives the stream to put in its place."""


@contextmanager
def change_layers(
    blocks: DecoderBlocks, changes: Mapping[int, LayerChange], ids: torch.Tensor
) -> Iterator[None]:
    """Context in which one forward pass has its layers 0..L replaced by `changes` of them.

    `ids` are `(batch, length)`. A change is given the stream at its layer, which those of lower
    layers have changed already, and must not write into it; the result is copied and cast.
    """
    calls = 0

    def change(layer: int, values: Any) -> Any:
        stream = blocks.extract_stream(values, ids)
        changed = changes[layer](stream)
        if changed.shape != stream.shape:
            raise UsageError(
                f"a change of layer {layer} gives a stream {tuple(changed.shape)}, expected "
                f"{tuple(stream.shape)}"
            )
        return blocks.replace_stream(values, changed.to(stream, copy=True))

    def change_input(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if calls or 0 not in changes:
            return None
        inputs = change(0, (*args, *kwargs.values()))
        values = dict(zip(kwargs, inputs[len(args) :], strict=True))
        return inputs[: len(args)], values

    def change_output(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return change(calls, output) if calls in changes else None

    handles = [blocks.blocks[0].register_forward_pre_hook(change_input, with_kwargs=True)]
    handles += [block.register_forward_hook(change_output) for block in blocks.distinct_blocks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copy_output(output: Any, depth: int = 2) -> Any:
    """A block's output with copies of its floating-point tensors and of its dictionaries.

    The model may change them in place afterwards. `depth` is the nesting that `tensors_of` reads.
    """
    return replace_tensors(_copy_dictionaries(output, depth), torch.Tensor.clone, depth)


def _copy_dictionaries(output: Any, depth: int) -> Any:
    """`output` with its dictionaries copied, which `replace_tensors` would change in place."""
    if not depth or isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict):
        output = copy.copy(output)
        for key, value in list(output.items()):
            if isinstance(value, dict | tuple | list):
                output[key] = _copy_dictionaries(value, depth - 1)
        return output
    if isinstance(output, tuple | list) and any(isinstance(value, dict) for value in output):
        values = [_copy_dictionaries(value, depth - 1) for value in output]
        is_named = isinstance(output, tuple) and hasattr(output, "_fields")
        return type(output)(*values) if is_named else type(output)(values)
    return output

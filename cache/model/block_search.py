"""Search for the decoder blocks of any causal model, without a list of model names: `find_blocks`.

1. Two forward passes with inputs of different shapes are watched. Candidates are the `ModuleList`s
   whose calls all give a tensor with one batch axis and one position axis (`ResidualAxes.infer`).
2. A candidate is accepted if layer L alone decides the logits: layer L of one batch, put into a
   forward pass of other tokens, must give the logits of the first batch.

`checks/model_checks.py` calls `find_blocks` once per extraction.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..devices import is_out_of_memory
from ..errors import ModelError
from .blocks import DecoderBlocks, logits_of, run_model
from .residual_axes import ResidualAxes, tensors_of

BlockCall = tuple[nn.Module, list[tuple[int, ...]]]
"""A call of a block: the block, and the shapes of its floating-point output tensors."""

MAX_STREAMS = 4
"""Largest number of tensors of an output to try as the residual stream."""


@dataclass(frozen=True)
class Candidate:
    """A `ModuleList` whose calls all give a tensor of the same layout."""

    name: str
    size: int
    """Number of parameters of the blocks."""
    blocks: list[nn.Module]
    """One entry per call."""
    axes: ResidualAxes
    count: int
    """Number of tensors of this layout in every output."""

    def decoder_blocks(self, model: nn.Module) -> Iterator[DecoderBlocks]:
        """Yield readings of the blocks: each tensor as the stream, then all tensors together."""
        for index in range(min(self.count, MAX_STREAMS)):
            yield DecoderBlocks(model, self.name, self.blocks, self.axes, (index,))
        if 1 < self.count <= MAX_STREAMS:
            indices = tuple(range(self.count))
            yield DecoderBlocks(model, self.name, self.blocks, self.axes, indices)


def find_blocks(
    model: nn.Module, ids: torch.Tensor, replacement_ids: torch.Tensor
) -> DecoderBlocks:
    """The verified decoder blocks of `model`.

    `ids` and `replacement_ids` are two batches of token ids of one shape, `(batch, length)`.
    Raises `ModelError` if no list of blocks carries the residual stream to the logits.
    """
    name = type(model).__name__

    # Run the model and collect candidates.
    try:
        output, candidates = find_candidates(model, ids)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} cannot run on a batch of token ids (batch, length): {reason}"
        ) from None
    logits = logits_of(output)
    if logits.shape[:2] != ids.shape:
        raise ModelError(
            f"{name} gives logits {tuple(logits.shape)} for ids {tuple(ids.shape)}; one row of "
            "logits per token is needed"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"{name} gives logits that are not finite")

    # Accept the first candidate whose layer L gives the logits.
    reasons: list[str] = []
    for candidate in candidates:
        for blocks in candidate.decoder_blocks(model):
            reason = _rejection_reason(blocks, ids, replacement_ids, logits)
            if reason is None:
                return blocks
            reasons.append(reason)
    detail = "; ".join(dict.fromkeys(reasons[:4])) or (
        "no ModuleList maps the residual stream to the same shape"
    )
    raise ModelError(f"{name} has no decoder blocks that carry one residual stream ({detail})")


def _rejection_reason(
    blocks: DecoderBlocks, ids: torch.Tensor, replacement_ids: torch.Tensor, logits: torch.Tensor
) -> str | None:
    """Reason to reject `blocks`; None if layer L of `ids` gives their `logits` for other tokens."""
    try:
        tail_logits = blocks.run_tail(blocks.residuals(ids)[-1], replacement_ids)
    except (ModelError, RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        return f"{blocks.name}: {str(error).splitlines()[0]}"
    if torch.allclose(tail_logits, logits, rtol=1e-3, atol=1e-4 * float(logits.abs().max())):
        return None
    return f"{blocks.name}: logits are not a function of the last block's output alone"


def find_candidates(model: nn.Module, ids: torch.Tensor) -> tuple[Any, list[Candidate]]:
    """The model's output for `ids`, `(batch, length)`, and candidates for the decoder blocks.

    Candidates with most parameters come first, then the latest called.
    """
    module_lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    modules = [module for members in module_lists.values() for module in members]

    # Watch two runs, the second with fewer sequences and fewer tokens; both must make the same
    # calls.
    smaller_ids = ids[:-1, : ids.shape[1] - ids.shape[1] // 4]
    output, calls = _record_calls(model, modules, ids)
    _, smaller_calls = _record_calls(model, modules, smaller_ids)
    if [module for module, _ in calls] != [module for module, _ in smaller_calls]:
        return output, []

    # Per module list: layouts that the outputs of all its calls share.
    ranked: list[tuple[int, int, Candidate]] = []
    for name, members in module_lists.items():
        member_set = set(members)
        numbers = [n for n, (module, _) in enumerate(calls) if module in member_set]
        blocks = [calls[n][0] for n in numbers]
        shapes = [(calls[n][1], smaller_calls[n][1]) for n in numbers]
        for axes, count in _common_layouts(shapes, ids, smaller_ids):
            size = sum(p.numel() for block in members for p in block.parameters())
            ranked.append((size, numbers[-1], Candidate(name, size, blocks, axes, count)))
    ranked.sort(key=lambda entry: (-entry[0], -entry[1]))
    return output, [candidate for _, _, candidate in ranked]


def _common_layouts(
    shapes: list[tuple[list[tuple[int, ...]], list[tuple[int, ...]]]],
    ids: torch.Tensor,
    smaller_ids: torch.Tensor,
) -> Iterator[tuple[ResidualAxes, int]]:
    """Yield each layout common to all calls, and its number of tensors in every call.

    `shapes` holds, per call, the shapes of the output tensors for `ids` and for `smaller_ids`.
    """
    batch, length = ids.shape
    smaller_batch, smaller_length = smaller_ids.shape
    layouts_of_calls = [
        [
            axes
            for shape, smaller_shape in zip(call_shapes, smaller_call_shapes, strict=False)
            if (
                axes := ResidualAxes.infer(
                    shape, smaller_shape, (batch, length), (smaller_batch, smaller_length)
                )
            )
        ]
        for call_shapes, smaller_call_shapes in shapes
    ]
    for axes in dict.fromkeys(layouts_of_calls[-1] if layouts_of_calls else ()):
        count = min(layouts.count(axes) for layouts in layouts_of_calls)
        if count:
            yield axes, count


def _record_calls(
    model: nn.Module, modules: list[nn.Module], ids: torch.Tensor
) -> tuple[Any, list[BlockCall]]:
    """The output of one forward pass, and the calls of `modules` in it, in order."""
    calls: list[BlockCall] = []

    def record(module: nn.Module, _: object, output: object) -> None:
        calls.append((module, [tuple(tensor.shape) for tensor in tensors_of(output)]))

    handles = [module.register_forward_hook(record) for module in dict.fromkeys(modules)]
    try:
        output = run_model(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return output, calls

"""Finds the stack of a model: candidates from two watched runs, believed when its tail agrees."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ModelError
from .blocks import DecoderBlocks, logits_of, run_model
from .memory import is_out_of_memory
from .residual_axes import ResidualAxes, tensors_of

Call = tuple[nn.Module, list[tuple[int, ...]]]
"""A block that ran and the shapes of the floating-point tensors it gave."""


@dataclass(frozen=True)
class Candidate:
    """Blocks that all give a tensor of the same roles."""

    name: str
    size: int
    """Parameters in the blocks."""
    blocks: list[nn.Module]
    axes: ResidualAxes
    count: int
    """Tensors of these roles in every output."""

    def stacks(self, model: nn.Module) -> Iterator[DecoderBlocks]:
        """Each tensor as the stream, then all of them together."""
        for pick in range(min(self.count, 4)):
            yield DecoderBlocks(model, self.name, self.blocks, self.axes, (pick,))
        if 1 < self.count <= 4:
            yield DecoderBlocks(model, self.name, self.blocks, self.axes, tuple(range(self.count)))


def find_blocks(model: nn.Module, ids: torch.Tensor, other: torch.Tensor) -> DecoderBlocks:
    """The decoder blocks of `model`, verified; `ids` and `other`: two batches of one shape.

    Raises `ModelError` if no list of blocks carries the residual stream to the logits.
    """
    name = type(model).__name__
    try:
        output, found = run_model(model, ids), find_candidates(model, ids)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} cannot run on a batch of token ids (batch, length): {reason}"
        ) from None
    want = logits_of(output)
    if want.shape[:2] != ids.shape:
        raise ModelError(
            f"{name} gives logits {tuple(want.shape)} for ids {tuple(ids.shape)}; one row of "
            "logits per token is needed"
        )
    if not bool(torch.isfinite(want).all()):
        raise ModelError(f"{name} gives logits that are not finite")
    reasons: list[str] = []
    for candidate in found:
        for stack in candidate.stacks(model):
            reason = _reason_against(stack, ids, other, want)
            if reason is None:
                return stack
            reasons.append(reason)
    detail = "; ".join(dict.fromkeys(reasons[:4])) or (
        "no ModuleList maps the residual stream to the same shape"
    )
    raise ModelError(f"{name} has no decoder blocks that carry one residual stream ({detail})")


def _reason_against(
    stack: DecoderBlocks, ids: torch.Tensor, other: torch.Tensor, want: torch.Tensor
) -> str | None:
    """Why the stack is not the model's, or None if its last layer alone gives the logits."""
    try:
        got = stack.run_tail(stack.residuals(ids)[-1], other)
    except (ModelError, RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        return f"{stack.name}: {str(error).splitlines()[0]}"
    if torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())):
        return None
    return f"{stack.name}: logits are not a function of the last block's output alone"


def find_candidates(model: nn.Module, ids: torch.Tensor) -> list[Candidate]:
    """Module lists whose calls all give a tensor of the same roles; most parameters first."""
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    blocks = [block for members in lists.values() for block in members]
    fewer = ids[:-1, : ids.shape[1] - ids.shape[1] // 4]
    one, two = _watch(model, blocks, ids), _watch(model, blocks, fewer)
    if [call[0] for call in one] != [call[0] for call in two]:
        return []
    pairs = list(zip(one, two, strict=True))
    found = []
    for name, members in lists.items():
        inside = set(members)
        calls = [(n, a, b) for n, (a, b) in enumerate(pairs) if a[0] in inside]
        for axes, count in _roles([(a[1], b[1]) for _, a, b in calls], ids, fewer):
            size = sum(p.numel() for block in members for p in block.parameters())
            run_blocks = [a[0] for _, a, _ in calls]
            found.append((size, calls[-1][0], Candidate(name, size, run_blocks, axes, count)))
    return [c for *_, c in sorted(found, key=lambda entry: (-entry[0], -entry[1]))]


def _roles(
    shapes: list[tuple[list, list]], ids: torch.Tensor, fewer: torch.Tensor
) -> Iterator[tuple[ResidualAxes, int]]:
    """Axis roles that every call has, and how many tensors of each call have them."""
    found = [
        [
            axes
            for a, b in zip(one, two, strict=False)
            if (axes := ResidualAxes.infer(a, b, tuple(ids.shape), tuple(fewer.shape)))  # pyright: ignore[reportArgumentType]
        ]
        for one, two in shapes
    ]
    for axes in dict.fromkeys(found[-1] if found else ()):
        count = min(call.count(axes) for call in found)
        if count:
            yield axes, count


def _watch(model: nn.Module, blocks: list[nn.Module], ids: torch.Tensor) -> list[Call]:
    """The calls of `blocks` in one forward pass, in order."""
    calls: list[Call] = []

    def note(block: nn.Module, _: object, output: object) -> None:
        calls.append((block, [tuple(t.shape) for t in tensors_of(output)]))

    handles = [block.register_forward_hook(note) for block in dict.fromkeys(blocks)]
    try:
        run_model(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return calls

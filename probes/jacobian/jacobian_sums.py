"""Sums of Jacobians over prompts: `JacobianSums`, and the backward passes that add to them.

The estimate of one prompt (Gurnee et al., 2026, the released `jlens`): J_l is the mean over source
positions t of the sum over targets t' of d h_L[t'] / d h_l[t]. One backward pass gives row i of it
for all layers, all sources and all prompts of a batch: its cotangent is 1 at component i of every
target. So d_model backward passes over the blocks above the lowest layer, and one forward pass, are
needed for a batch, whatever the number of layers and targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ...cache.errors import MismatchError

if TYPE_CHECKING:
    import torch

    from ...cache.resuming.resumable_model import ResumableModel


@dataclass(eq=False)
class JacobianSums:
    """Sums over prompts of the mean Jacobian of each layer, `(d_model, d_model)` float64."""

    sums: dict[int, np.ndarray]
    """Layer l -> sum of J_l; row i, column j is d h_L[i] / d h_l[j]."""
    n_prompts: int = 0
    n_positions: int = 0
    """Source positions behind the sums."""

    @classmethod
    def empty(cls, layers: Sequence[int], d_model: int) -> "JacobianSums":
        """Sums of no prompt."""
        return cls({layer: np.zeros((d_model, d_model)) for layer in layers})

    def merge(self, other: "JacobianSums") -> "JacobianSums":
        """The sums of the prompts of both; raises `MismatchError` for other layers or widths."""
        shapes = {layer: values.shape for layer, values in self.sums.items()}
        others = {layer: values.shape for layer, values in other.sums.items()}
        if shapes != others:
            raise MismatchError(
                f"sums of layers and widths {shapes} cannot be merged with those of {others}; fit "
                "both with the same layers of one model"
            )
        return JacobianSums(
            {layer: values + other.sums[layer] for layer, values in self.sums.items()},
            self.n_prompts + other.n_prompts,
            self.n_positions + other.n_positions,
        )

    def means(self) -> dict[int, np.ndarray]:
        """Layer -> J_l, `(d_model, d_model)` float32."""
        return {
            layer: (values / max(1, self.n_prompts)).astype(np.float32)
            for layer, values in self.sums.items()
        }


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts of one length with their states; positions from `first` to `last` - 1 count."""

    tokens: np.ndarray
    """Token ids, `(prompts, length)` int64."""
    states: np.ndarray
    """Lowest layer, `(prompts, length, d_model)` float32."""
    first: int
    last: int
    offset: int | None = None
    """Only the target t + offset counts of each source; None sums all targets."""
    signs: np.ndarray | None = field(default=None, repr=False)
    """Random signs of the targets, `(prompts, length)`, where `offset` is given.

    With signs s of mean 0, s[t + N] times the gradient under the cotangent s is, on average, the
    Jacobian of the target t + N alone: the others cancel."""


def batch_jacobians(
    model: "ResumableModel",
    layers: Sequence[int],
    batch: PromptBatch,
    report: Callable[[int], None] = lambda done: None,
) -> JacobianSums:
    """The sums of one batch; `report` is called with the backward passes done.

    `layers` are ascending, below the last one; `batch.states` are those of the first of them. The
    blocks below it do not run. Gradients are in the dtype of the model, sums in float64.
    """
    import torch

    device, depth = model.device, model.depth
    layers = list(layers)
    streams: dict[int, torch.Tensor] = {}

    def keeping(layer: int) -> "Callable[[torch.Tensor], torch.Tensor]":
        def keep(stream: "torch.Tensor") -> "torch.Tensor":
            streams[layer] = stream
            return stream

        return keep

    with torch.enable_grad():
        lowest = torch.from_numpy(batch.states).to(device).requires_grad_(True)
        streams[layers[0]] = lowest
        changes = {layer: keeping(layer) for layer in layers[1:]}
        if model.can_resume(layers[0]):
            last = model.resume_residual(layers[0], lowest, batch.tokens, changes=changes)
        else:
            changes[layers[0]] = lambda _: lowest
            last = model.run_residual(depth, batch.tokens, changes=changes)
    n_prompts, _, d_model = last.shape
    signs = torch.zeros(last.shape[:2], device=device, dtype=last.dtype)
    sources = slice(batch.first, batch.last)
    if batch.offset is None:
        signs[:, sources] = 1
        weights = signs[:, sources]
    else:
        assert batch.signs is not None
        given = torch.from_numpy(batch.signs).to(signs)
        targets = slice(batch.first + batch.offset, batch.last + batch.offset)
        weights = signs[:, targets] = given[:, targets]
    inputs = [streams[layer] for layer in layers]
    result = JacobianSums.empty(layers, d_model)
    count = batch.last - batch.first
    for component in range(d_model):
        cotangent = torch.zeros_like(last)
        cotangent[:, :, component] = signs
        gradients = torch.autograd.grad(
            last, inputs, cotangent, retain_graph=component < d_model - 1, allow_unused=True
        )
        for layer, gradient in zip(layers, gradients, strict=True):
            if gradient is None:
                continue
            rows = gradient[:, sources].double() * weights[..., None].double()
            result.sums[layer][component] = (rows.sum((0, 1)) / count).cpu().numpy()
        report(component + 1)
    result.n_prompts = n_prompts
    result.n_positions = n_prompts * count
    return result

"""Natural-gradient steps of a linear map that is read through the model's head (K-FAC, EKFAC).

The map is u = z W + c of whitened rows z = (x - mean) whiten. Its Fisher matrix, for
q = softmax(head(u)), is the mean of (z z') ⊗ (g g'), where g is the gradient in u of -log q[y] for
a token y drawn from q. The eigenvectors are taken to be those of the two factors: of E[z z'], the
identity, from the moments of the layer, and of G = E[g g'] (K-FAC: Martens and Grosse, 2015); the
eigenvalues are measured in that basis (EKFAC: George et al., 2018).

`translator_fit.py` holds a `NaturalGradientMap` for each translator of a tuned lens and calls its
steps; losses and gradients come from `training/softmax_loss.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.devices import copy_to_device, copy_to_host
from ...cache.head.head import TorchHead
from ..moments.moments import Moments
from ..ridge.solver import AffineMap
from ..training.softmax_loss import Gradients, Target, Tiles, add_head_gradients, head_losses

DRIFT = 0.05
"""Share of the eigenvalues that every new estimate replaces: an average over some 20 estimates."""
LEAST_VARIANCE = 1e-30
"""Stands for the largest eigenvalue of a layer without variance, which must not be divided by."""


@dataclass(frozen=True, eq=False)
class InputWhitening:
    """Coordinates of a layer's residual stream in which the second moments are the identity."""

    mean: Tensor
    """Mean of the rows, `(d,)` float32."""
    whiten: Tensor
    """z = (x - mean) whiten, `(d, d)` float32."""
    unwhiten: Tensor
    """Inverse of `whiten`, `(d, d)` float32."""

    TENSORS = ("mean", "whiten", "unwhiten")

    @classmethod
    def of(cls, moments: Moments, alpha: float) -> "InputWhitening":
        """Whitening of the rows with these moments, with ridge's penalty `alpha` added.

        With xx = V diag(values) V' of n rows: whiten = V diag(scale)^-1, for
        scale^2 = (values + alpha) / n. The penalty, chosen by cross-validation, is the variance
        below which a direction is noise; whitened by its variance alone, noise would take steps
        as large as the signal. The floor is the rounding error of the eigenvalues.
        """
        values, vectors = np.linalg.eigh(moments.xx)
        floor = max(values[-1], LEAST_VARIANCE) * len(values) * np.finfo(np.float64).eps
        scale = np.sqrt((np.maximum(values, 0) + max(alpha, floor)) / moments.n)
        arrays = moments.mean_x, vectors / scale, scale[:, None] * vectors.T
        return cls(*(torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in arrays))

    def __call__(self, x: Tensor) -> Tensor:
        """Whitened rows z, `(n, d)`."""
        return (x - self.mean) @ self.whiten


class NaturalGradientMap:
    """Map u = z weight + bias of whitened rows during its fit, with an estimate of its curvature.

    A step divides the gradient by the Fisher matrix. Steps have no momentum: with momentum, 200
    steps reached 1.2709 nats, without 1.2683. The map that counts is an average of the maps after
    the steps (Polyak and Juditsky, 1992): steps stay long, and their noise is averaged out.
    """

    STATE = ("weight", "bias", "mean_weight", "mean_bias", "curvature", "outputs")
    """Tensors that change during the fit, as checkpoints name them."""

    def __init__(
        self,
        inputs: InputWhitening,
        damping: float,
        copy: Callable[[Tensor], Tensor] = Tensor.clone,
    ) -> None:
        """`copy` gives the memory of tensors: a copy on a device, or in a `ScratchFile`."""
        self.inputs: InputWhitening = InputWhitening(
            copy(inputs.mean), copy(inputs.whiten), copy(inputs.unwhiten)
        )
        self.damping = damping
        self.copy = copy
        width = len(inputs.mean)
        self.weight: Tensor = copy(torch.zeros(width, width))
        self.bias: Tensor = copy(torch.zeros(width))
        self.mean_weight: Tensor = copy(torch.zeros(width, width))
        """Average of `weight` over the steps, see `apply_gradient`."""
        self.mean_bias: Tensor = copy(torch.zeros(width))
        """Average of `bias` over the steps."""
        self.curvature: Tensor = copy(torch.zeros(width + 1, width))
        """Eigenvalues of the Fisher matrix, (input direction, output direction); the last row is
        the bias's."""
        self.outputs: Tensor = copy(torch.eye(width))
        """Eigenvectors of the output factor G, in columns, `(d, d)`."""

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.weight.device

    def set_map(self, affine: AffineMap) -> None:
        """Set the map and its average to `affine`, a map of raw rows x."""
        weight, bias = (
            torch.from_numpy(array.astype(np.float32)).to(self.device)
            for array in (affine.weight, affine.bias)
        )
        # x A + b = z (unwhiten A) + (b + mean A).
        torch.mm(self.inputs.unwhiten, weight, out=self.weight)
        torch.add(bias, self.inputs.mean @ weight, out=self.bias)
        self.mean_weight.copy_(self.weight)
        self.mean_bias.copy_(self.bias)

    def map(self) -> AffineMap:
        """The averaged map, as a map of raw rows x; float32 arrays."""
        weight = self.inputs.whiten @ self.mean_weight
        bias = self.mean_bias - self.inputs.mean @ weight
        return AffineMap(copy_to_host(weight).numpy(), copy_to_host(bias).numpy())

    def state(self) -> dict[str, Tensor]:
        """The tensors of `STATE`, not copied."""
        return {name: getattr(self, name) for name in self.STATE}

    def copy_state(self, memory: dict[str, Tensor]) -> None:
        """Copy the tensors of `STATE` into those of `memory`, which are made if there are none."""
        for name, tensor in self.state().items():
            if name in memory:
                memory[name].copy_(tensor)
            else:
                memory[name] = self.copy(tensor)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set the tensors of `STATE` to those that `copy_state` copied."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def is_finite(self) -> bool:
        """Whether the map holds neither NaN nor an infinity."""
        return bool(self.mean_weight.isfinite().all()) and bool(self.mean_bias.isfinite().all())

    def translate(self, z: Tensor) -> Tensor:
        """u = z weight + bias of whitened rows z, `(n, d)`."""
        return torch.addmm(self.bias, z, self.weight)

    def translate_by_mean(self, z: Tensor) -> Tensor:
        """The same by the averaged map."""
        return torch.addmm(self.mean_bias, z, self.mean_weight)

    def losses(self, x: Tensor, head: TorchHead, target: Target) -> Tensor:
        """Losses `(n,)` of the averaged map for raw rows `x` `(n, d)`."""
        return head_losses(self.translate_by_mean(self.inputs(x)), head, target)

    def step(self, x: Tensor, head: TorchHead, target: Target, rate: float) -> Tensor:
        """Take a step of `rate` on raw rows `x`; gives the losses before it, `(n,)`."""
        z = self.inputs(x)
        u = self.translate(z)
        u_gradient = torch.zeros_like(u)
        losses = head_losses(u, head, target, Gradients(x=u_gradient, scale=1 / len(x)))
        self.apply_gradient(z, u_gradient, rate)
        return losses

    def apply_gradient(
        self, z: Tensor, u_gradient: Tensor, rate: float, share: float = 1.0
    ) -> None:
        """Take a step of `rate` times the natural gradient.

        `u_gradient` `(n, d)` is the gradient of the mean loss in u, for whitened rows `z`. The map
        after the step replaces a `share` of the average.
        """
        gradient = torch.cat([z.T @ u_gradient, u_gradient.sum(0, keepdim=True)])
        # In the eigenbasis the Fisher matrix is diagonal: divide by the damped eigenvalues.
        gradient = gradient @ self.outputs
        gradient /= self.curvature + self.damping * self.curvature.mean()
        # Back to the coordinates of u.
        direction = gradient @ self.outputs.T
        self.weight.sub_(direction[:-1], alpha=rate)
        self.bias.sub_(direction[-1], alpha=rate)
        self.mean_weight.lerp_(self.weight, share)
        self.mean_bias.lerp_(self.bias, share)

    def output_factor(
        self, x: Tensor, head: TorchHead, generator: torch.Generator, **options: Any
    ) -> Tensor:
        """Estimate of the output factor G = E[g g'] from rows `x` `(n, d)`; `(d, d)`.

        `options` are those of `sampled_slopes`.
        """
        slopes = sampled_slopes(self.translate(self.inputs(x)), head, generator, **options)
        return slopes.T @ slopes / len(x)

    def update_curvature(
        self,
        x: Tensor,
        head: TorchHead,
        generator: torch.Generator,
        share: float = DRIFT,
        **options: Any,
    ) -> None:
        """Replace a `share` of the eigenvalues by an estimate from rows `x` `(n, d)`.

        The eigenvalue of input direction i and output direction j is E[z_i^2 (g outputs)_j^2];
        for the bias z is 1. `options` are those of `sampled_slopes`.
        """
        z = self.inputs(x)
        slopes = sampled_slopes(self.translate(z), head, generator, **options)
        squares = (slopes @ self.outputs).square_()
        values = torch.cat([z.square().T @ squares, squares.sum(0, keepdim=True)]) / len(x)
        self.curvature.lerp_(values, share)


def eigenvectors(factor: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix `(d, d)`, in columns; on the host where the device fails.

    Some devices have no `eigh`.
    """
    try:
        vectors = torch.linalg.eigh(factor)[1]
    except (NotImplementedError, RuntimeError):
        vectors = copy_to_device(torch.linalg.eigh(copy_to_host(factor))[1], factor.device)
    # eigh gives columns one after the other. Store rows one after the other, as a checkpoint does:
    # otherwise products would round differently after a restart.
    return vectors.contiguous()


def sampled_slopes(
    u: Tensor,
    head: TorchHead,
    generator: torch.Generator,
    products: str = "float32",
    tile_rows: Tiles = None,
) -> Tensor:
    """Gradients g in `u` `(n, d)` of -log q[y], y drawn from q = softmax(head(u)); `(n, d)`.

    `generator` is one of the CPU, whatever the device: tokens are then the same everywhere.
    """
    slopes = torch.zeros_like(u)
    quantile = copy_to_device(torch.rand(len(u), generator=generator), u.device)
    gradients = Gradients(x=slopes, products=products)
    add_head_gradients(u, head, Target(quantile=quantile), gradients, tile_rows)
    return slopes

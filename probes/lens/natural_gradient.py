"""Natural-gradient steps of a linear map that is read through the model's head (K-FAC, EKFAC).

The map is u = z W + c of whitened rows z = (x - mean) whiten. Its Fisher matrix, for
q = softmax(head(u)), is the mean of (z z') ⊗ (g g'), where g is the gradient in u of -log q[y] for
a token y drawn from q. The eigenvectors are taken to be those of the two factors: of E[z z'], the
identity, from the moments of the layer, and of G = E[g g'] (K-FAC: Martens and Grosse, 2015); the
eigenvalues are measured in that basis (EKFAC: George et al., 2018).

`translator_fit.py` holds a `NaturalGradientMap` for each translator of a tuned lens and calls its
steps; losses and gradients come from `training/softmax_loss.py`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...cache.devices import copy_to_device
from ...cache.head.head import TorchHead
from ..moments.moments import Moments
from ..ridge.solver import AffineMap
from ..training.softmax_loss import Gradients, Target, Tiles, head_losses

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
    steps reached 1.2709 nats, without 1.2683.
    """

    STATE = ("weight", "bias", "curvature", "outputs")
    """Tensors that change during the fit, as checkpoints name them."""

    def __init__(self, inputs: InputWhitening, damping: float) -> None:
        self.inputs, self.damping = inputs, damping
        width = len(inputs.mean)
        self.weight, self.bias = torch.zeros(width, width), torch.zeros(width)
        self.curvature = torch.zeros(width + 1, width)
        """Eigenvalues of the Fisher matrix, (input direction, output direction); the last row is
        the bias's."""
        self.outputs = torch.eye(width)
        """Eigenvectors of the output factor G, in columns, `(d, d)`."""

    def set_map(self, affine: AffineMap) -> None:
        """Set the map to `affine`, a map of raw rows x."""
        weight, bias = (
            torch.from_numpy(array.astype(np.float32)) for array in (affine.weight, affine.bias)
        )
        # x A + b = z (unwhiten A) + (b + mean A).
        self.weight = self.inputs.unwhiten @ weight
        self.bias = bias + self.inputs.mean @ weight

    def map(self) -> AffineMap:
        """The current map, as a map of raw rows x; float32."""
        weight = self.inputs.whiten @ self.weight
        return AffineMap(weight.numpy(), (self.bias - self.inputs.mean @ weight).numpy())

    def state(self) -> dict[str, Tensor]:
        """Copies of the tensors of `STATE`."""
        return {name: getattr(self, name).clone() for name in self.STATE}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set the tensors of `STATE` to copies of a result of `state`."""
        for name in self.STATE:
            setattr(self, name, state[name].clone())

    def is_finite(self) -> bool:
        """Whether the map holds neither NaN nor an infinity."""
        return bool(self.weight.isfinite().all()) and bool(self.bias.isfinite().all())

    def losses(self, x: Tensor, head: TorchHead, target: Target) -> Tensor:
        """Losses `(n,)` of raw rows `x` `(n, d)`."""
        return head_losses(self._translated(self.inputs(x)), head, target)

    def step(self, x: Tensor, head: TorchHead, target: Target, rate: float) -> Tensor:
        """Take a step of `rate` times the natural gradient; gives the losses before it, `(n,)`."""
        # Gradient of the mean loss in u, then in weight and bias: `(d + 1, d)`.
        z = self.inputs(x)
        u = self._translated(z)
        u_gradient = torch.zeros_like(u)
        losses = head_losses(u, head, target, Gradients(x=u_gradient, scale=1 / len(x)))
        gradient = torch.cat([z.T @ u_gradient, u_gradient.sum(0, keepdim=True)])
        # In the eigenbasis the Fisher matrix is diagonal: divide by the damped eigenvalues.
        gradient = gradient @ self.outputs
        gradient /= self.curvature + self.damping * self.curvature.mean()
        # Back to the coordinates of u.
        direction = gradient @ self.outputs.T
        self.weight.sub_(direction[:-1], alpha=rate)
        self.bias.sub_(direction[-1], alpha=rate)
        return losses

    def output_factor(self, x: Tensor, head: TorchHead, generator: torch.Generator) -> Tensor:
        """Estimate of the output factor G = E[g g'] from rows `x` `(n, d)`; `(d, d)`."""
        slopes = sampled_slopes(self._translated(self.inputs(x)), head, generator)
        return slopes.T @ slopes / len(x)

    def update_curvature(
        self, x: Tensor, head: TorchHead, generator: torch.Generator, share: float = DRIFT
    ) -> None:
        """Replace a `share` of the eigenvalues by an estimate from rows `x` `(n, d)`.

        The eigenvalue of input direction i and output direction j is E[z_i^2 (g outputs)_j^2];
        for the bias z is 1.
        """
        z = self.inputs(x)
        slopes = sampled_slopes(self._translated(z), head, generator)
        squares = (slopes @ self.outputs).square_()
        values = torch.cat([z.square().T @ squares, squares.sum(0, keepdim=True)]) / len(x)
        self.curvature.lerp_(values, share)

    def _translated(self, z: Tensor) -> Tensor:
        """u = z weight + bias, `(n, d)`."""
        return torch.addmm(self.bias, z, self.weight)


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
    head_losses(u, head, Target(quantile=quantile), gradients, tile_rows)
    return slopes

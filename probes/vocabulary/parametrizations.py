"""Forms of a softmax regression: the full matrix, one of low rank, and a map before the head.

They are fitted on states in their own principal axes, x' = (x - mean) axes, and then folded into
plain maps of x. There AdamW's steps, one size for every weight, suit the data: in the raw basis
every coordinate mixes directions whose variances differ by factors of thousands.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache.head.head import TorchHead
from ..training.softmax_loss import Gradients, ParameterTensors, Target, affine_losses, head_losses

FLOOR = 1e-7
"""Smallest variance of an axis that is told from zero, relative to the largest."""
POWER = 0.25
"""Of `Axes`; 0 to 0.5 are about as good, 1 is worse than no axes at all."""
PARAMETRIZATIONS = ("full", "head")


@dataclass(frozen=True)
class PrincipalAxes:
    """Principal axes of the states, each scaled by variance^(-power/2), then all to mean square 1.

    `power` 0 only turns the states, 1 whitens them.
    """

    mean: Tensor
    """`(d,)` float32."""
    axes: Tensor
    """`(d, d)` float32, largest variance first; x' = (x - mean) axes."""
    inverse: Tensor
    """`(d, d)` float32."""

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, power: float = POWER) -> "PrincipalAxes":
        """From float64 moments of the states, `(d,)` and `(d, d)`."""
        variance, turn = torch.linalg.eigh(covariance)
        variance, turn = variance.flip(0), turn.flip(1)
        if not variance[0] > 0:
            variance = torch.ones_like(variance)
        variance = variance.clamp_min(variance[0] * FLOOR)
        scale = variance.pow(-power / 2)
        scale = scale / (variance * scale.square()).mean().sqrt()
        found = mean, turn * scale, (turn / scale).T
        return cls(*(v.float().contiguous() for v in found))

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.mm(rows - self.mean, self.axes)


class FullMatrix:
    """logits = x' weight^T + bias, with `weight` `(vocab, d)`."""

    names = ("weight", "bias")
    rate = 2e-2
    """Learning rate in the middle of the sweep."""

    def __init__(self, vocab: int, d_in: int, products: str = "float32") -> None:
        self.vocab, self.d_in, self.products = vocab, d_in, products
        self.weights = vocab * (d_in + 1)

    def start(self, axes: PrincipalAxes, prior: Tensor) -> ParameterTensors:
        """No weight, and the logarithms `prior` `(vocab,)` of the targets' frequencies as bias."""
        return {"weight": torch.zeros(self.vocab, self.d_in), "bias": prior.clone()}

    def losses(
        self,
        parameters: ParameterTensors,
        x: Tensor,
        target: Target,
        grads: ParameterTensors | None,
    ) -> Tensor:
        """Losses `(n,)`; the gradients of their mean are added to `grads`."""
        wanted = Gradients()
        if grads is not None:
            wanted = Gradients(
                grads["weight"], grads["bias"], None, 1 / max(1, len(x)), self.products
            )
        return affine_losses(x, parameters["weight"], parameters["bias"], target, wanted)

    def folded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        """The same map of raw states."""
        weight = parameters["weight"] @ axes.axes.T
        return {"weight": weight, "bias": parameters["bias"] - weight @ axes.mean}

    def unfolded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        """What `folded` turns into `parameters`."""
        bias = parameters["bias"] + parameters["weight"] @ axes.mean
        return {"weight": parameters["weight"] @ axes.inverse.T, "bias": bias}


class LowRank:
    """logits = (x' down^T) weight^T + bias; `down` is `(rank, d)`, `weight` `(vocab, rank)`."""

    names = ("down", "weight", "bias")
    rate = 1e-2

    def __init__(self, vocab: int, d_in: int, rank: int, products: str = "float32") -> None:
        self.vocab, self.d_in, self.rank, self.products = vocab, d_in, rank, products
        self.weights = vocab * (rank + 1) + rank * d_in

    def start(self, axes: PrincipalAxes, prior: Tensor) -> ParameterTensors:
        """`down` takes the largest principal axes."""
        down = torch.eye(self.rank, self.d_in)
        return {"down": down, "weight": torch.zeros(self.vocab, self.rank), "bias": prior.clone()}

    def losses(
        self,
        parameters: ParameterTensors,
        x: Tensor,
        target: Target,
        grads: ParameterTensors | None,
    ) -> Tensor:
        inner = x @ parameters["down"].T
        wanted = Gradients()
        if grads is not None:
            back, scale = torch.zeros_like(inner), 1 / max(1, len(x))
            wanted = Gradients(grads["weight"], grads["bias"], back, scale, self.products)
        losses = affine_losses(inner, parameters["weight"], parameters["bias"], target, wanted)
        if grads is not None and wanted.x is not None:
            grads["down"].addmm_(wanted.x.T, x)
        return losses

    def folded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        down = parameters["down"] @ axes.axes.T
        bias = parameters["bias"] - parameters["weight"] @ (down @ axes.mean)
        return {"down": down, "weight": parameters["weight"].clone(), "bias": bias}

    def unfolded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        inner = parameters["weight"] @ (parameters["down"] @ axes.mean)
        down = parameters["down"] @ axes.inverse.T
        return {**parameters, "down": down, "bias": parameters["bias"] + inner}


class ThroughHead:
    """logits = head(size (x' weight^T + bias)), `weight` `(d, d)`; starts at the logit lens."""

    names = ("weight", "bias")
    rate = 3e-3

    def __init__(self, head: TorchHead, d_in: int, size: float) -> None:
        self.head, self.d_in = head, d_in
        self.weights = d_in * (d_in + 1)
        self.size = size
        """Root mean square of layer L, so that one step suits every model."""

    def start(self, axes: PrincipalAxes, prior: Tensor) -> ParameterTensors:
        identity = {"weight": torch.eye(self.d_in), "bias": torch.zeros(self.d_in)}
        return self.unfolded(identity, axes)

    def losses(
        self,
        parameters: ParameterTensors,
        x: Tensor,
        target: Target,
        grads: ParameterTensors | None,
    ) -> Tensor:
        hidden = torch.addmm(parameters["bias"], x, parameters["weight"].T).mul_(self.size)
        wanted = Gradients()
        if grads is not None:
            wanted = Gradients(x=torch.zeros_like(hidden), scale=self.size / max(1, len(x)))
        losses = head_losses(hidden, self.head, target, wanted)
        if grads is not None and wanted.x is not None:
            grads["weight"].addmm_(wanted.x.T, x)
            grads["bias"].add_(wanted.x.sum(0))
        return losses

    def folded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        weight = self.size * parameters["weight"] @ axes.axes.T
        return {"weight": weight, "bias": self.size * parameters["bias"] - weight @ axes.mean}

    def unfolded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        bias = (parameters["bias"] + parameters["weight"] @ axes.mean) / self.size
        return {"weight": parameters["weight"] @ axes.inverse.T / self.size, "bias": bias}


Parametrization = FullMatrix | LowRank | ThroughHead


def apply_parametrization(parameters: ParameterTensors, rows: Tensor) -> Tensor:
    """Folded parameters on raw states: logits, or for `ThroughHead` what the head is to read.

    States of any dtype are cast to that of the parameters, on the device of the states.
    """
    parameters = {name: value.to(rows.device) for name, value in parameters.items()}
    rows = rows.to(parameters["weight"].dtype)
    inner = rows @ parameters["down"].T if "down" in parameters else rows
    return torch.addmm(parameters["bias"], inner, parameters["weight"].T)

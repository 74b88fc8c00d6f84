"""Parametrizations of a softmax regression: full matrix, low rank, maps and an MLP before the head.

`VocabFit.form` chooses one for all pairs of a fit; `Trainer` (`descent.py`) fits its parameters,
and `apply_parametrization` applies them after the fit. `FullMatrix`, `LowRank`, `ThroughHead` and
`MlpThroughHead` have the same members:

    names       names of the parameters
    rate        learning rate in the middle of the sweep
    weights     number of weights, for the memory of a fit
    start       parameters before the first step
    losses      loss per row; gradients of the mean loss are added to buffers
    folded      parameters for raw states x, from parameters for rotated states x'
    unfolded    inverse of `folded`

Parameters are fitted on states in their own principal axes, x' = (x - mean) axes. AdamW's steps,
one size for every weight, suit x': in the raw basis every coordinate mixes directions whose
variances differ by factors of thousands.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache.devices import copy_to_device
from ...cache.head.head import TorchHead
from ..training.softmax_loss import Gradients, ParameterTensors, Target, affine_losses, head_losses

FLOOR = 1e-7
"""Least variance of an axis, as a share of the largest: float32 products resolve no less."""
POWER = 0.25
"""Default power of `PrincipalAxes`; 0 to 0.5 are about as good, 1 is worse than raw states."""
PARAMETRIZATIONS = ("auto", "full", "head")
"""Values of `form` of a vocabulary probe; the form of an `MlpProbe` is `mlp`."""
THROUGH_HEAD = ("head", "mlp")
"""Forms whose result the head reads."""
LARGEST_MATRIX = 100_000_000
"""Most weights of a matrix that is fitted where nobody names its form.

With gradients and AdamW's state, a fit keeps five numbers per weight: 2 GB here, 10 GB for the full
matrix of a vocabulary of 128,000 and d_model 4,096."""
RANK_STEP = 64
"""Ranks that `default_rank` gives are multiples of this."""


def default_rank(vocab: int, d_in: int) -> int | None:
    """Largest rank at which a matrix `(vocab, d_in)` keeps to `LARGEST_MATRIX`; None: full rank."""
    if vocab * d_in <= LARGEST_MATRIX:
        return None
    rank = LARGEST_MATRIX // (vocab + d_in) // RANK_STEP * RANK_STEP
    return max(RANK_STEP, rank) if min(vocab, d_in) > RANK_STEP else None


@dataclass(frozen=True)
class PrincipalAxes:
    """Principal axes of the states, each scaled by variance^(-power/2), then all to mean square 1.

    `power` 0 only rotates the states, 1 whitens them.
    """

    mean: Tensor
    """Mean of the states, `(d,)` float32."""
    axes: Tensor
    """x' = (x - mean) axes, `(d, d)` float32, largest variance first."""
    inverse: Tensor
    """Inverse of `axes`, `(d, d)` float32."""

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, power: float = POWER) -> "PrincipalAxes":
        """Axes of states with this mean `(d,)` and covariance `(d, d)`, float64."""
        # Eigenvalues come smallest first.
        variance, rotation = torch.linalg.eigh(covariance)
        variance, rotation = variance.flip(0), rotation.flip(1)
        # States without variance are not scaled.
        if not variance[0] > 0:
            variance = torch.ones_like(variance)
        variance = variance.clamp_min(variance[0] * FLOOR)
        scale = variance.pow(-power / 2)
        # Mean over the axes of E[x'^2] becomes 1.
        scale = scale / (variance * scale.square()).mean().sqrt()
        tensors = mean, rotation * scale, (rotation / scale).T
        return cls(*(tensor.float().contiguous() for tensor in tensors))

    def on_device(self, device: torch.device) -> "PrincipalAxes":
        """The axes on `device`."""
        tensors = self.mean, self.axes, self.inverse
        return PrincipalAxes(*(copy_to_device(tensor, device) for tensor in tensors))

    def __call__(self, rows: Tensor) -> Tensor:
        """Rotated states x', `(n, d)`."""
        return torch.mm(rows - self.mean, self.axes)


class FullMatrix:
    """logits = x' weight' + bias, with `weight` `(vocab, d)` and `bias` `(vocab,)`."""

    names: tuple[str, ...] = ("weight", "bias")
    rate: float = 2e-2

    def __init__(self, vocab: int, d_in: int, products: str = "float32") -> None:
        self.vocab = vocab
        self.d_in = d_in
        self.products = products
        self.weights: int = vocab * (d_in + 1)

    def start(self, axes: PrincipalAxes, log_frequencies: Tensor) -> ParameterTensors:
        """Weight 0; the bias is the logarithms of the targets' frequencies, `(vocab,)`."""
        weight = log_frequencies.new_zeros(self.vocab, self.d_in)
        return {"weight": weight, "bias": log_frequencies.clone()}

    def losses(
        self,
        parameters: ParameterTensors,
        x: Tensor,
        target: Target,
        grads: ParameterTensors | None,
    ) -> Tensor:
        """Losses `(n,)` of rotated states `x`; gradients of their mean are added to `grads`."""
        gradients = Gradients()
        if grads is not None:
            gradients = Gradients(
                weight=grads["weight"],
                bias=grads["bias"],
                scale=1 / max(1, len(x)),
                products=self.products,
            )
        return affine_losses(x, parameters["weight"], parameters["bias"], target, gradients)

    def folded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        """The same map of raw states x, by x' = (x - mean) axes."""
        weight = parameters["weight"] @ axes.axes.T
        return {"weight": weight, "bias": parameters["bias"] - weight @ axes.mean}

    def unfolded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        """The same map of rotated states x', from a map of raw states."""
        bias = parameters["bias"] + parameters["weight"] @ axes.mean
        return {"weight": parameters["weight"] @ axes.inverse.T, "bias": bias}


class LowRank:
    """logits = (x' down') weight' + bias, with `down` `(rank, d)` and `weight` `(vocab, rank)`."""

    names: tuple[str, ...] = ("down", "weight", "bias")
    rate: float = 1e-2

    def __init__(self, vocab: int, d_in: int, rank: int, products: str = "float32") -> None:
        self.vocab = vocab
        self.d_in = d_in
        self.rank = rank
        self.products = products
        self.weights: int = vocab * (rank + 1) + rank * d_in

    def start(self, axes: PrincipalAxes, log_frequencies: Tensor) -> ParameterTensors:
        """`down` takes the `rank` largest principal axes; weight and bias as in `FullMatrix`."""
        return {
            "down": torch.eye(self.rank, self.d_in, device=log_frequencies.device),
            "weight": log_frequencies.new_zeros(self.vocab, self.rank),
            "bias": log_frequencies.clone(),
        }

    def losses(
        self,
        parameters: ParameterTensors,
        x: Tensor,
        target: Target,
        grads: ParameterTensors | None,
    ) -> Tensor:
        """Losses `(n,)` of rotated states `x`; gradients of their mean are added to `grads`."""
        projected = x @ parameters["down"].T
        gradients = Gradients()
        if grads is not None:
            gradients = Gradients(
                weight=grads["weight"],
                bias=grads["bias"],
                x=torch.zeros_like(projected),
                scale=1 / max(1, len(x)),
                products=self.products,
            )
        weight, bias = parameters["weight"], parameters["bias"]
        losses = affine_losses(projected, weight, bias, target, gradients)
        if grads is not None and gradients.x is not None:
            # Chain rule through projected = x down'.
            grads["down"].addmm_(gradients.x.T, x)
        return losses

    def folded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        """The same map of raw states x, by x' = (x - mean) axes."""
        down = parameters["down"] @ axes.axes.T
        bias = parameters["bias"] - parameters["weight"] @ (down @ axes.mean)
        return {"down": down, "weight": parameters["weight"].clone(), "bias": bias}

    def unfolded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        """The same map of rotated states x', from a map of raw states."""
        shift = parameters["weight"] @ (parameters["down"] @ axes.mean)
        down = parameters["down"] @ axes.inverse.T
        return {**parameters, "down": down, "bias": parameters["bias"] + shift}


class ThroughHead:
    """logits = head(size (x' weight' + bias)), with `weight` `(d, d)` and `bias` `(d,)`.

    `size` is the root mean square of layer L, so that the same learning rate suits every model.
    """

    names: tuple[str, ...] = ("weight", "bias")
    rate: float = 3e-3

    def __init__(self, head: TorchHead, d_in: int, size: float) -> None:
        self.head = head
        self.d_in = d_in
        self.size = size
        self.weights: int = d_in * (d_in + 1)

    def start(self, axes: PrincipalAxes, log_frequencies: Tensor) -> ParameterTensors:
        """The logit lens: the head's input is x; `log_frequencies` are not used."""
        identity = {
            "weight": torch.eye(self.d_in, device=axes.axes.device),
            "bias": torch.zeros_like(axes.mean),
        }
        return self.unfolded(identity, axes)

    def losses(
        self,
        parameters: ParameterTensors,
        x: Tensor,
        target: Target,
        grads: ParameterTensors | None,
    ) -> Tensor:
        """Losses `(n,)` of rotated states `x`; gradients of their mean are added to `grads`."""
        hidden = torch.addmm(parameters["bias"], x, parameters["weight"].T).mul_(self.size)
        gradients = Gradients()
        if grads is not None:
            gradients = Gradients(x=torch.zeros_like(hidden), scale=self.size / max(1, len(x)))
        losses = head_losses(hidden, self.head, target, gradients)
        if grads is not None and gradients.x is not None:
            # Chain rule through hidden = size (x weight' + bias).
            grads["weight"].addmm_(gradients.x.T, x)
            grads["bias"].add_(gradients.x.sum(0))
        return losses

    def folded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        """The map from raw states x to the head's input, by x' = (x - mean) axes."""
        weight = self.size * parameters["weight"] @ axes.axes.T
        return {"weight": weight, "bias": self.size * parameters["bias"] - weight @ axes.mean}

    def unfolded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        """The parameters for rotated states x', from a map of raw states to the head's input."""
        bias = (parameters["bias"] + parameters["weight"] @ axes.mean) / self.size
        return {"weight": parameters["weight"] @ axes.inverse.T / self.size, "bias": bias}


class MlpThroughHead:
    """logits = head(size (x' weight' + bias + gelu(x' inner' + inner_bias) outer')).

    `ThroughHead` with a hidden layer beside its map: `inner` `(hidden, d_in)`, `inner_bias`
    `(hidden,)`, `outer` `(d, hidden)`. `outer` begins at 0, so that both begin as the same map.
    """

    names: tuple[str, ...] = ("weight", "bias", "inner", "inner_bias", "outer")
    rate: float = 3e-3

    def __init__(self, head: TorchHead, d_in: int, size: float, hidden: int, seed: int = 0) -> None:
        self.linear: ThroughHead = ThroughHead(head, d_in, size)
        self.hidden = hidden
        self.seed = seed
        self.weights: int = self.linear.weights + hidden * (2 * d_in + 1)

    def start(self, axes: PrincipalAxes, log_frequencies: Tensor) -> ParameterTensors:
        """The logit lens; directions of the hidden layer are drawn by the seed, on the CPU."""
        d_in, device = self.linear.d_in, axes.axes.device
        generator = torch.Generator().manual_seed(self.seed)
        inner = torch.randn(self.hidden, d_in, generator=generator) / d_in**0.5
        inner_bias = torch.randn(self.hidden, generator=generator) / 2
        return {
            **self.linear.start(axes, log_frequencies),
            "inner": copy_to_device(inner, device),
            "inner_bias": copy_to_device(inner_bias, device),
            "outer": torch.zeros(d_in, self.hidden, device=device),
        }

    def losses(
        self,
        parameters: ParameterTensors,
        x: Tensor,
        target: Target,
        grads: ParameterTensors | None,
    ) -> Tensor:
        """Losses `(n,)` of rotated states `x`; gradients of their mean are added to `grads`."""
        size, head = self.linear.size, self.linear.head
        inner = torch.addmm(parameters["inner_bias"], x, parameters["inner"].T)
        active = torch.nn.functional.gelu(inner)
        hidden = torch.addmm(parameters["bias"], x, parameters["weight"].T)
        hidden.addmm_(active, parameters["outer"].T).mul_(size)
        gradients = Gradients()
        if grads is not None:
            gradients = Gradients(x=torch.zeros_like(hidden), scale=size / max(1, len(x)))
        losses = head_losses(hidden, head, target, gradients)
        if grads is not None and gradients.x is not None:
            # Chain rule, first through the sum of the map and the hidden layer.
            grads["weight"].addmm_(gradients.x.T, x)
            grads["bias"].add_(gradients.x.sum(0))
            grads["outer"].addmm_(gradients.x.T, active)
            of_inner = gradients.x @ parameters["outer"]
            of_inner = torch.ops.aten.gelu_backward(of_inner, inner)
            grads["inner"].addmm_(of_inner.T, x)
            grads["inner_bias"].add_(of_inner.sum(0))
        return losses

    def folded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        """The map from raw states x to the head's input, by x' = (x - mean) axes."""
        inner = parameters["inner"] @ axes.axes.T
        return {
            **self.linear.folded(parameters, axes),
            "inner": inner,
            "inner_bias": parameters["inner_bias"] - inner @ axes.mean,
            "outer": self.linear.size * parameters["outer"],
        }

    def unfolded(self, parameters: ParameterTensors, axes: PrincipalAxes) -> ParameterTensors:
        """The parameters for rotated states x', from a map of raw states to the head's input."""
        return {
            **self.linear.unfolded(parameters, axes),
            "inner": parameters["inner"] @ axes.inverse.T,
            "inner_bias": parameters["inner_bias"] + parameters["inner"] @ axes.mean,
            "outer": parameters["outer"] / self.linear.size,
        }


Parametrization = FullMatrix | LowRank | ThroughHead | MlpThroughHead


def apply_parametrization(parameters: ParameterTensors, rows: Tensor) -> Tensor:
    """Apply folded parameters to raw states `(n, d)`: logits, or the head's input.

    The head's input, `(n, d)`, is that of `ThroughHead` and `MlpThroughHead`. States of any dtype
    are cast to that of the parameters, on the device of the states.
    """
    parameters = {name: value.to(rows.device) for name, value in parameters.items()}
    rows = rows.to(parameters["weight"].dtype)
    if "down" in parameters:
        rows = rows @ parameters["down"].T
    mapped = torch.addmm(parameters["bias"], rows, parameters["weight"].T)
    if "outer" in parameters:
        inner = torch.addmm(parameters["inner_bias"], rows, parameters["inner"].T)
        mapped.addmm_(torch.nn.functional.gelu(inner), parameters["outer"].T)
    return mapped

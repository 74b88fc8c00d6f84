"""A first look at the examples: principal axes of every layer, frequencies of the targets."""

import torch
from torch import Tensor

from ..training.softmax_loss import Target
from ..training.threads import ThreadCrew
from .examples import Examples
from .parametrizations import PrincipalAxes

SAMPLE_ROWS = 16384
"""States that are looked at."""
SMOOTHING = 0.1
"""Added to the count of each token, so that unseen ones keep a finite logarithm."""


class Covariance:
    """Mean and covariance of rows; float32 products of shifted rows, float64 sums."""

    def __init__(self, first: Tensor) -> None:
        self.shift = first.mean(0)
        self.rows = 0
        self.total = torch.zeros(first.shape[1], dtype=torch.float64)
        self.products = torch.zeros(first.shape[1], first.shape[1], dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        centred = rows - self.shift
        self.rows += len(rows)
        self.total += centred.sum(0, dtype=torch.float64)
        self.products += centred.T @ centred

    def axes(self) -> PrincipalAxes:
        mean = self.total / self.rows
        covariance = self.products / self.rows - torch.outer(mean, mean)
        return PrincipalAxes.of(mean + self.shift, covariance)


def initial_statistics(
    examples: Examples, layers: list[int], offsets: list[int], vocab: int
) -> tuple[dict[int, PrincipalAxes], dict[int, Tensor]]:
    """Axes by layer and logarithms of the targets' frequencies `(vocab,)` by offset.

    A layer is one thread's: the last bits of eigenvectors depend on how many threads look for them.
    """
    found: dict[int, Covariance] = {}
    counts = {offset: torch.full((vocab,), SMOOTHING) for offset in offsets}
    seen = 0

    def add(rows: Tensor, layer: int) -> None:
        found.setdefault(layer, Covariance(rows)).add(rows)

    with ThreadCrew(max(1, min(len(layers), torch.get_num_threads()))) as crew:
        for step in examples.epoch():
            crew.each(lambda layer, step=step: add(step.hidden[layer], layer), layers)
            for offset in offsets:
                counts[offset] += frequencies(step.target(offset)[1], vocab)
            seen += len(step.hidden[layers[0]])
            if seen >= SAMPLE_ROWS:
                break
        axes = crew.each(lambda layer: found[layer].axes(), layers)
    priors = {offset: (count / count.sum()).log() for offset, count in counts.items()}
    return dict(zip(layers, axes, strict=True)), priors


def frequencies(target: Target, vocab: int) -> Tensor:
    """How often each token is asked for, `(vocab,)` float32."""
    if target.token is not None:
        return torch.bincount(target.token, minlength=vocab).float()
    assert target.p is not None
    return target.p.sum(0)

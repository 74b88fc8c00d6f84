"""Principal axes of every layer and frequencies of the targets, from the first examples of a fit.

`Descent.new_trainer` starts every regression from these statistics: its optimiser works in the
principal axes of the states, and its bias starts at the logarithms of the frequencies.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache.devices import copy_to_device, wide_dtype
from ..training.softmax_loss import Target
from ..training.threads import CPU, ThreadCrew
from .examples import Examples
from .parametrizations import PrincipalAxes

SAMPLE_ROWS = 16384
"""Number of states that the statistics are taken from, rounded up to whole batches."""
SMOOTHING = 0.1
"""Added to the count of each token, so that an unseen token keeps a finite logarithm."""


@dataclass(frozen=True)
class InitialStatistics:
    """Statistics of a sample of the examples, for all pairs of a fit."""

    axes: dict[int, PrincipalAxes]
    """Layer -> principal axes of its states."""
    log_frequencies: dict[int, Tensor]
    """Offset -> logarithms of the targets' frequencies, `(vocab,)` float32."""


def measure_initial_statistics(
    examples: Examples, layers: list[int], offsets: list[int], vocab: int
) -> InitialStatistics:
    """Read about `SAMPLE_ROWS` states of the first epoch and sum them up.

    Each layer is summed and decomposed in one thread: the last bits of eigenvectors depend on how
    many threads compute them. The statistics are on the device of the examples.
    """
    device = examples.device
    covariances: dict[int, _CovarianceSum] = {}
    counts = {offset: torch.full((vocab,), SMOOTHING, device=device) for offset in offsets}
    rows = 0

    def add_states(layer: int, states: Tensor) -> None:
        covariances.setdefault(layer, _CovarianceSum(states)).add(states)

    workers = ThreadCrew.of(len(layers), device).workers
    with ThreadCrew(workers) as crew:
        for batch in examples.epoch():
            crew.map(lambda layer, batch=batch: add_states(layer, batch.hidden[layer]), layers)
            for offset in offsets:
                counts[offset] += _token_counts(batch.target(offset)[1], vocab)
            rows += len(batch.hidden[layers[0]])
            if rows >= SAMPLE_ROWS:
                break
        axes = crew.map(lambda layer: covariances[layer].principal_axes(), layers)
    log_frequencies = {offset: (count / count.sum()).log() for offset, count in counts.items()}
    return InitialStatistics(dict(zip(layers, axes, strict=True)), log_frequencies)


class _CovarianceSum:
    """Sums for mean and covariance of rows `(n, d)`, shifted by the mean of the first batch.

    The shift keeps float32 products accurate; sums are float64, on the host if the device has none.
    """

    def __init__(self, first_rows: Tensor) -> None:
        width, device = first_rows.shape[1], first_rows.device
        self.home = device if wide_dtype(device) == torch.float64 else CPU
        """Device of the sums: one with float64."""
        self.shift = first_rows.mean(0)
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64, device=self.home)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=self.home)

    def add(self, rows: Tensor) -> None:
        """Add rows `(n, d)` float32."""
        shifted = rows - self.shift
        self.count += len(rows)
        # Where the host has the sums, it also sums up the rows.
        self.total += copy_to_device(shifted, self.home).sum(0, dtype=torch.float64)
        self.products += copy_to_device(shifted.T @ shifted, self.home)

    def principal_axes(self) -> PrincipalAxes:
        """Principal axes of all rows: covariance = E[y y'] - E[y] E[y]', y = x - shift."""
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        axes = PrincipalAxes.of(mean + copy_to_device(self.shift, self.home), covariance)
        return axes.on_device(self.shift.device)


def _token_counts(target: Target, vocab: int) -> Tensor:
    """How often each token is the target, `(vocab,)` float32; of distributions, their sum."""
    if target.token is not None:
        return torch.bincount(target.token, minlength=vocab).float()
    assert target.p is not None
    return target.p.sum(0)

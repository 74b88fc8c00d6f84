"""The sweep of learning rates: short fits of a few pairs, whose best rates the others take."""

from dataclasses import dataclass

from ..base.readout import LayerOffset
from ..training.threads import ThreadCrew
from .descent import Descent, advance, distance, held_out_losses, schedule
from .examples import Examples

SWEEP_MORE = 3
"""Learning rates tried beyond the first three, each a factor of 3 on, while the best is an edge."""
BAD = 1e9
"""Stands for a loss that is not finite, and loses to every other."""

Tried = dict[LayerOffset, dict[float, float]]
"""Held-out loss by learning rate, of each pair that was tried."""


@dataclass(frozen=True)
class Sweep:
    """Short fits of the pairs of `descent`, each pair by itself."""

    descent: Descent
    lr: float
    """Where it begins."""
    room: int
    """Fits that are made at the same time."""

    def run(self) -> Tried:
        """Three learning rates, and more for a pair that does best with the least or the most."""
        tried: Tried = {pair: {} for pair in self.descent.pairs}
        validation = self.descent.validation
        if validation is None:
            return tried
        wanted = {pair: [self.lr * 3.0**power for power in (-1, 0, 1)] for pair in tried}
        for _ in range(1 + SWEEP_MORE):
            fits = [(*pair, rate) for pair, rates in wanted.items() for rate in rates]
            for first in range(0, len(fits), self.room):
                found = self._fitted(fits[first : first + self.room], validation)
                for (layer, offset, rate), loss in found.items():
                    tried[layer, offset][rate] = loss
            wanted = {pair: further(found) for pair, found in tried.items()}
            if not any(wanted.values()):
                break
        return tried

    def _fitted(
        self, fits: list[tuple[int, int, float]], validation: Examples
    ) -> dict[tuple[int, int, float], float]:
        """Held-out losses of short fits, all made at once, by layer, offset and learning rate."""
        descent, steps = self.descent, self.descent.sweep_steps
        trainers = {fit: descent.start(fit[:2]) for fit in fits}
        with ThreadCrew.of(len(fits)) as crew:
            for number, step in descent.stream(0, steps):
                share = schedule(number, steps)
                advance(crew, trainers, step, lambda fit, share=share: share * fit[2])
            losses = held_out_losses(crew, trainers, validation)
        return {fit: loss if loss < BAD else BAD for fit, loss in losses.items()}


def further(tried: dict[float, float]) -> list[float]:
    """A learning rate beyond the edge where the best one lies, if it lies on one."""
    rates = sorted(tried)
    if not rates:
        return []
    best = min(rates, key=lambda rate: tried[rate])
    if best == rates[-1]:
        return [best * 3]
    return [best / 3] if best == rates[0] else []


def rates_of(
    pairs: list[LayerOffset], tried: Tried, descent: Descent, lr: float
) -> dict[LayerOffset, float]:
    """The learning rate of each pair: the best of the nearest one that was tried.

    Pairs that could not be measured, for want of held-out rows, tell no rate.
    """
    # What is best for few steps is too much for many.
    share = (descent.sweep_steps / descent.steps) ** 0.25
    rates = {}
    for pair in pairs:
        measured = [other for other in tried if tried[other]]
        nearest = min(measured, key=lambda other: distance(pair, other), default=None)
        found = {} if nearest is None else tried[nearest]
        rates[pair] = share * min(found, key=lambda rate: found[rate], default=lr)
    return rates


def rows_of(tried: Tried) -> list[dict[str, float | None]]:
    """Layer, offset, learning rate and held-out loss of each short fit; None if not finite."""
    return [
        {"layer": layer, "offset": offset, "lr": rate, "validation": loss if loss < BAD else None}
        for (layer, offset), found in tried.items()
        for rate, loss in sorted(found.items())
    ]

"""Sweep of learning rates: short fits of a few pairs, whose best rates the other pairs take.

`fit_groups.py` runs one `Sweep` for a whole fit: on the `representatives` of all pairs. The rates
of all pairs follow by `rates_of`; `rows_of` reports the losses.
"""

from dataclasses import dataclass

from ..base.readout import LayerOffset
from ..training.threads import ThreadCrew
from .descent import Descent, advance, held_out_losses, schedule
from .examples import Examples

SWEEP_MORE = 3
"""Most rates tried past the first three, each a factor of 3 on, while the best is an end."""
BAD = 1e9
"""Stands for a loss that is not finite, and loses to every other."""

SweepLosses = dict[LayerOffset, dict[float, float]]
"""Held-out loss by learning rate, of each pair of the sweep."""


@dataclass(frozen=True)
class Sweep:
    """Short fits of the pairs of `descent` at several learning rates, each pair by itself."""

    descent: Descent
    lr: float
    """Learning rate in the middle of the first three."""
    fits_at_once: int
    """Number of short fits whose weights fit the memory together."""

    def run(self) -> SweepLosses:
        """Try lr / 3, lr and 3 lr, then rates past an end while the end has the lowest loss."""
        losses: SweepLosses = {pair: {} for pair in self.descent.pairs}
        validation = self.descent.validation
        if validation is None:
            return losses
        next_rates = {pair: [self.lr * 3.0**power for power in (-1, 0, 1)] for pair in losses}
        for _ in range(1 + SWEEP_MORE):
            fits = [(*pair, rate) for pair, rates in next_rates.items() for rate in rates]
            for first in range(0, len(fits), self.fits_at_once):
                group = fits[first : first + self.fits_at_once]
                for (layer, offset, rate), loss in self._fit_briefly(group, validation).items():
                    losses[layer, offset][rate] = loss
            next_rates = {pair: rates_beyond(by_rate) for pair, by_rate in losses.items()}
            if not any(next_rates.values()):
                break
        return losses

    def _fit_briefly(
        self, fits: list[tuple[int, int, float]], validation: Examples
    ) -> dict[tuple[int, int, float], float]:
        """Held-out losses of short fits, all made at once, by (layer, offset, learning rate)."""
        descent, steps = self.descent, self.descent.sweep_steps
        trainers = {fit: descent.new_trainer(fit[:2]) for fit in fits}
        with ThreadCrew.of(len(fits), descent.examples.device) as crew:
            for number, batch in descent.stream(0, steps):
                share = schedule(number, steps)
                advance(crew, trainers, batch, lambda fit, share=share: share * fit[2])
            losses = held_out_losses(crew, trainers, validation)
        return {fit: loss if loss < BAD else BAD for fit, loss in losses.items()}


def rates_beyond(losses: dict[float, float]) -> list[float]:
    """The next rate past the best rate, if the best is the lowest or the highest; else none."""
    rates = sorted(losses)
    if not rates:
        return []
    best = min(rates, key=lambda rate: losses[rate])
    if best == rates[-1]:
        return [best * 3]
    return [best / 3] if best == rates[0] else []


def representatives(pairs: list[LayerOffset]) -> list[LayerOffset]:
    """Pairs on which a sweep tries rates: first, middle and last layer at two offsets.

    The offsets are 0, if `pairs` has it, and the middle one of the others.
    """
    selected = []
    for group in ([pair for pair in pairs if pair[1] == 0], [p for p in pairs if p[1] > 0]):
        if group:
            offsets = sorted({offset for _, offset in group})
            middle = offsets[len(offsets) // 2]
            layers = sorted({layer for layer, offset in group if offset == middle})
            indices = sorted({0, len(layers) // 2, len(layers) - 1})
            selected += [(layers[index], middle) for index in indices]
    return selected


def rates_of(
    pairs: list[LayerOffset], losses: SweepLosses, descent: Descent, lr: float
) -> dict[LayerOffset, float]:
    """The learning rate of each pair: the best rate of the nearest pair of the sweep.

    Scaled by (sweep steps / steps)^(1/4), for the best rate of a short fit is too high for a long
    one. Pairs without held-out rows have no losses; if no pair has any, `lr` is taken.
    """
    scale = (descent.sweep_steps / descent.steps) ** 0.25
    measured_pairs = [pair for pair in losses if losses[pair]]
    rates = {}
    for pair in pairs:
        nearest = min(measured_pairs, key=lambda other: distance(pair, other), default=None)
        by_rate = {} if nearest is None else losses[nearest]
        rates[pair] = scale * min(by_rate, key=lambda rate: by_rate[rate], default=lr)
    return rates


def distance(first: LayerOffset, second: LayerOffset) -> tuple[bool, int, int]:
    """Sorting key of how far apart two pairs are: by offset 0 or not, by layer, then by offset.

    The next token (offset 0) is unlike all later ones.
    """
    return (
        (first[1] == 0) != (second[1] == 0),
        abs(first[0] - second[0]),
        abs(first[1] - second[1]),
    )


def rows_of(losses: SweepLosses) -> list[dict[str, float | None]]:
    """Layer, offset, learning rate and held-out loss of each short fit; None if not finite."""
    return [
        {"layer": layer, "offset": offset, "lr": rate, "validation": loss if loss < BAD else None}
        for (layer, offset), by_rate in losses.items()
        for rate, loss in sorted(by_rate.items())
    ]

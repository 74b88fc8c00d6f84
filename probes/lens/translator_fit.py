"""Fits translators by KL to the model, out of core: start, sweep of rates, checked steps.

Every translator goes its own way: it starts from ridge or the logit lens, whichever is better on
the validation split, takes the rate that did best in a short sweep, goes back to its best and
halves the rate where a check finds it worse, and ends as the best that a check has found.

Where the validation split has no pair at its offset there is nothing to choose by: it starts from
ridge, takes the lower rate and ends with its last step.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.files.json_files import plain_value
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import PairScope
from ..base.readout import LayerOffset
from ..ridge.solver import AffineMap
from ..training.minibatches import BUFFER_BYTES, BUFFER_ROWS, MinibatchStream
from ..training.softmax_loss import ModelDistribution, Target
from .natural_gradient import InputWhitening, NaturalGradientMap

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total): `moments` counts positions, `lens` steps."""
RATES = (0.05, 0.15)
"""Rates of the sweep, in units of the natural gradient's own step."""
VALIDATION_POSITIONS = 4096
"""Most positions of the validation split that a check looks at."""
CHECK = 25
"""Steps between two looks at the validation split."""
SWEEP = 10
"""Steps that every rate of the sweep is given."""
WORSE = 1.02
"""A check that finds the KL above this many times the best one goes back."""
OUTPUTS = 4
"""Rows per output, and more, from which the curvature at the start is measured."""
REFRESH = 4
"""Every so many steps, one of so many rows measures the curvature again."""


@dataclass(frozen=True)
class LensFitSettings:
    """How translators are fitted; see `TunedLens`."""

    lr: float | None
    steps: int
    batch: int
    damping: float
    seed: int
    across_documents: bool = False
    drop_first: int = 0

    @property
    def scope(self) -> PairScope:
        """Which pairs are fitted."""
        return PairScope(self.across_documents, self.drop_first)

    @property
    def rates(self) -> tuple[float, ...]:
        """Those that the sweep tries."""
        return RATES if self.lr is None else (self.lr,)


@dataclass(eq=False)
class TranslatorState:
    """One translator on its way."""

    fit: NaturalGradientMap
    alpha: float
    """Ridge's penalty."""
    n: int
    """Pairs that ridge was fitted on."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Where it was best."""
    n_validation: int = 0
    """Pairs of the validation split; without one the last step counts as the best."""
    kl: float = math.inf
    """KL on the validation split there; infinite where it is not finite or there is no pair."""
    step: int = 0
    """Steps it had taken."""
    start: str = "ridge"
    kl_logit: float = math.inf
    kl_ridge: float = math.inf
    rate: float = 0.0
    sweep: dict[float, float] = field(default_factory=dict)
    """Rate -> KL on the validation split after `SWEEP` steps."""
    backs: int = 0
    """How often it went back, at half the rate."""

    def row(self) -> dict[str, Any]:
        """All of it that is no tensor: what `TunedLens.metrics` says; None for an infinite KL."""
        return {
            "start": self.start,
            "kl_logit": plain_value(self.kl_logit),
            "kl_ridge": plain_value(self.kl_ridge),
            "kl": plain_value(self.kl),
            "steps": self.step,
            "lr": self.rate,
            "backs": self.backs,
            "alpha": self.alpha,
            "n": self.n,
            "n_validation": self.n_validation,
            "sweep": [[rate, plain_value(kl)] for rate, kl in self.sweep.items()],
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of it that is a tensor."""
        for name in InputWhitening.TENSORS:
            yield f"inputs.{name}", getattr(self.fit.inputs, name)
        yield from ((f"fit.{name}", tensor) for name, tensor in self.fit.state().items())
        yield from ((f"best.{name}", tensor) for name, tensor in self.best.items())

    @classmethod
    def of(
        cls, row: dict[str, Any], tensors: dict[str, Tensor], damping: float
    ) -> "TranslatorState":
        """The track that `row` and `tensors` described."""

        def part(mark: str) -> dict[str, Tensor]:
            return {k[len(mark) :]: t for k, t in tensors.items() if k.startswith(mark)}

        fit = NaturalGradientMap(InputWhitening(**part("inputs.")), damping)
        fit.restore(part("fit."))

        def read(kl: float | None) -> float:
            return math.inf if kl is None else kl

        return cls(
            fit, row["alpha"], row["n"], part("best."), row["n_validation"], read(row["kl"]),
            row["steps"], row["start"], read(row["kl_logit"]), read(row["kl_ridge"]), row["lr"],
            {float(rate): read(kl) for rate, kl in row["sweep"]}, row["backs"],
        )  # fmt: skip

    def judge(self, kl: float, step: int) -> None:
        """Keep the fit as it is now, or go back to the best one at half the rate."""
        is_best = self.fit.is_finite() if not self.n_validation else kl < self.kl
        if is_best:
            self.keep(kl, step)
        elif not self.n_validation or math.isinf(kl) or kl > WORSE * self.kl:
            self.back()
            self.rate /= 2
            self.backs += 1

    def keep(self, kl: float, step: int) -> None:
        """What the fit is now is the best."""
        self.best, self.kl, self.step = self.fit.state(), kl, step

    def back(self) -> None:
        """Return to the best."""
        self.fit.restore(self.best)


class LensFitRun:
    """The fit of the translators of some layers and offsets, which share every batch."""

    def __init__(
        self,
        cache: ActivationCache,
        tracks: dict[LayerOffset, TranslatorState],
        settings: LensFitSettings,
    ) -> None:
        self.tracks, self.settings = tracks, settings
        self.head = cache.head.torch()
        self.teacher = ModelDistribution(self.head)
        layers = sorted({layer for layer, _ in tracks})
        offsets = sorted({offset for _, offset in tracks})
        batch, seed = settings.batch, settings.seed
        # As many rows whichever layers are fitted together: so do their batches not differ.
        row = sum(cache.residual_array(layer).layout.row_bytes for layer in cache.layers)
        rows = max(batch, min(BUFFER_ROWS, BUFFER_BYTES // row))
        self.train = MinibatchStream(
            cache, layers, offsets, "train", batch, seed, drop_last=True,
            buffer_rows=rows, buffer_bytes=1 << 62, **vars(settings.scope),
        )  # fmt: skip
        self.held = None
        if len(cache.sequences("validation")):
            self.held = MinibatchStream(
                cache, layers, offsets, "validation", batch, seed,
                max_positions=VALIDATION_POSITIONS, shuffle=False, **vars(settings.scope),
            )  # fmt: skip
        self.step = 0

    def rows(
        self, feed: MinibatchStream, step: int = 0
    ) -> Iterator[list[tuple[LayerOffset, Tensor, Target]]]:
        """Batches from number `step` on, for ever: rows with their target for every pair."""
        while True:
            for draw in feed.epoch(*divmod(step, feed.steps)):
                found = []
                for offset, ahead in draw.ahead.items():
                    if not ahead.valid.any():
                        continue
                    assert ahead.residual is not None
                    target = self.teacher.distribution(ahead.residual[ahead.valid])
                    pairs = [pair for pair in self.tracks if pair[1] == offset]
                    found += [(pair, draw.hidden[pair[0]][ahead.valid], target) for pair in pairs]
                yield found
                step += 1

    def check(self) -> dict[LayerOffset, float]:
        """KL of every translator on the validation split; sums in float64.

        Infinite where it is not finite, and where there is no pair.
        """
        sums = {pair: np.zeros(2) for pair in self.tracks}
        if self.held is not None:
            for found in islice(self.rows(self.held), self.held.steps):
                for pair, x, target in found:
                    losses = self.tracks[pair].fit.losses(x, self.head, target)
                    sums[pair] += losses.sum(dtype=torch.float64).item(), len(losses)
        for pair, (_, n) in sums.items():
            self.tracks[pair].n_validation = int(n)
        found = {pair: total / n if n else math.inf for pair, (total, n) in sums.items()}
        return {pair: float(kl) if math.isfinite(kl) else math.inf for pair, kl in found.items()}

    def begin(self, ridge: Mapping[LayerOffset, AffineMap]) -> None:
        """Choose between ridge and the logit lens, and measure the curvature there."""
        for pair, track in self.tracks.items():
            track.fit.set(identity_map(len(ridge[pair].bias)))
        logit = self.check()
        starts = {pair: track.fit.state() for pair, track in self.tracks.items()}
        for pair, track in self.tracks.items():
            track.fit.set(ridge[pair])
        for pair, kl in self.check().items():
            track = self.tracks[pair]
            track.kl_logit, track.kl_ridge = logit[pair], kl
            if track.n_validation and logit[pair] <= kl:
                track.fit.restore(starts[pair])
                track.start = "logit"
        del starts
        self._curvature()
        for track in self.tracks.values():
            track.keep(min(track.kl_logit, track.kl_ridge), 0)

    def _curvature(self) -> None:
        """The curvature at the start, from at least `OUTPUTS` rows per output."""
        width = self.train.cache.d_model
        batches = min(self.train.steps, -(-OUTPUTS * width // self.settings.batch))
        outer = {pair: torch.zeros(width, width) for pair in self.tracks}
        for step, found in enumerate(islice(self.rows(self.train), batches)):
            for pair, x, _ in found:
                fit = self.tracks[pair].fit
                outer[pair] += fit.outer(x, self.head, self._generator(pair, step))
        for pair, factor in outer.items():
            # Row by row, as a checkpoint keeps it: else products round differently after one.
            self.tracks[pair].fit.outputs = torch.linalg.eigh(factor)[1].contiguous()
        for step, found in enumerate(islice(self.rows(self.train), batches)):
            for pair, x, _ in found:
                draws = self._generator(pair, step)
                self.tracks[pair].fit.measure(x, self.head, draws, 1 / (step + 1))

    def sweep(self) -> None:
        """Take the first steps at every rate, each from the start, and keep the best outcome."""
        steps, rates = min(SWEEP, self.settings.steps), self.settings.rates
        starts = {pair: track.best for pair, track in self.tracks.items()}
        for rate in rates:
            for pair, track in self.tracks.items():
                track.fit.restore(starts[pair])
            batches = self.rows(self.train)
            for step in range(steps):
                self._take(step, next(batches), lambda track, now=rate * (1 - step / steps): now)
            for pair, kl in self.check().items():
                track = self.tracks[pair]
                if not track.n_validation:
                    if rate == min(rates) and track.fit.is_finite():
                        track.keep(kl, steps)
                    continue
                track.sweep[rate] = kl
                if kl < track.kl:
                    track.keep(kl, steps)
        for track in self.tracks.values():
            track.rate = min(track.sweep, key=lambda rate: track.sweep[rate], default=min(rates))
            track.back()
        self.step = steps

    def run(self, at_check: Callable[[], None]) -> None:
        """Take the other steps; `at_check` is called after every look at the validation split."""
        batches = self.rows(self.train, self.step)
        while self.step < self.settings.steps:
            falling = (1 + math.cos(math.pi * self.step / self.settings.steps)) / 2
            self._take(self.step, next(batches), lambda track, share=falling: share * track.rate)
            self.step += 1
            if self.step % CHECK == 0 or self.step == self.settings.steps:
                self._judge()
                at_check()

    def _take(
        self,
        step: int,
        found: list[tuple[LayerOffset, Tensor, Target]],
        rate: Callable[[TranslatorState], float],
    ) -> None:
        for pair, x, target in found:
            track = self.tracks[pair]
            if step % REFRESH == 0 and step:
                some = x[: -(-len(x) // REFRESH)]
                track.fit.measure(some, self.head, self._generator(pair, step))
            track.fit.step(x, self.head, target, rate(track))

    def _judge(self) -> None:
        for pair, kl in self.check().items():
            self.tracks[pair].judge(kl, self.step)

    def _generator(self, pair: LayerOffset, step: int) -> torch.Generator:
        """Draws tokens; the same for a pair and a step whatever is fitted beside it."""
        seed = np.random.SeedSequence([self.settings.seed, *pair, step]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))


def identity_map(width: int) -> AffineMap:
    """The logit lens's map."""
    return AffineMap(np.eye(width, dtype=np.float32), np.zeros(width, np.float32))

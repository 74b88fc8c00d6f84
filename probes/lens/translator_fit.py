"""Fit of tuned-lens translators by KL to the model: start, sweep of rates, checked steps.

`fit_groups.py` makes a `LensFitRun` for a group of (layer, offset) pairs, which share every batch
of `MinibatchStream`, and calls `begin`, `sweep` and `run`. Each translator is fitted by itself
(`TranslatorState`, steps by `natural_gradient.py`):

1. It starts from ridge or the logit lens, whichever has the lower KL on the validation split.
2. A sweep tries every learning rate for a few steps; the rate with the lowest KL is taken.
3. Steps follow at a rate that falls to 0. Every `CHECK` steps the KL on the validation split is
   measured: a translator that got worse returns to its best map, at half the rate.
4. The result is the best map of all checks.

Where the validation split has no pair at an offset, nothing can be compared: the translator starts
from ridge, takes the lowest rate and ends with its last step.
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
from ...cache.progress import StageProgress
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.slab_shuffle import BUFFER_ROWS
from ...cache.tokens.segments import PairScope
from ..base.readout import LayerOffset
from ..ridge.solver import AffineMap
from ..training.minibatches import BUFFER_BYTES, MinibatchStream
from ..training.softmax_loss import ModelDistribution, Target
from .natural_gradient import InputWhitening, NaturalGradientMap

Report = StageProgress
"""Called with (stage, done, total): stage `moments` counts positions, `lens` steps."""
PairRows = tuple[LayerOffset, Tensor, Target]
"""(layer, offset), rows `(n, d)` of the layer at t, and the model's distribution at t+N."""
RATES = (0.05, 0.15)
"""Learning rates of the sweep; 1 is the full natural-gradient step."""
VALIDATION_POSITIONS = 4096
"""Most positions of the validation split that a check reads."""
CHECK = 25
"""Steps between two checks on the validation split."""
SWEEP = 10
"""Steps of each learning rate in the sweep."""
WORSE = 1.02
"""A KL of more than this many times the best one makes a translator return to its best map."""
OUTPUTS = 4
"""Rows per output dimension from which the curvature at the start is measured, at least."""
REFRESH = 4
"""Every `REFRESH` steps, one row in `REFRESH` measures the curvature again: 1/16 of the rows."""


@dataclass(frozen=True)
class LensFitSettings:
    """Parameters of the fit of translators; see `TunedLens`."""

    lr: float | None
    steps: int
    batch: int
    damping: float
    seed: int
    across_documents: bool = False
    drop_first: int = 0

    @property
    def scope(self) -> PairScope:
        """Scope of the pairs (t, t+N) that are fitted."""
        return PairScope(self.across_documents, self.drop_first)

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates that the sweep tries."""
        return RATES if self.lr is None else (self.lr,)


@dataclass(eq=False)
class TranslatorState:
    """State of one translator during the fit: current map, best map so far, learning rate."""

    fit: NaturalGradientMap
    """Current map."""
    alpha: float
    """Penalty of the ridge map."""
    n: int
    """Number of pairs that the ridge map was fitted on."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """`fit.state()` of the best map."""
    n_validation: int = 0
    """Number of pairs of the validation split; with 0 the last step counts as the best."""
    kl: float = math.inf
    """KL of the best map on the validation split, in nats; infinite if not finite or without a
    pair."""
    step: int = 0
    """Number of steps that the best map had taken."""
    start: str = "ridge"
    """Map that the fit started from: `ridge` or `logit`."""
    kl_logit: float = math.inf
    """KL of the logit lens on the validation split."""
    kl_ridge: float = math.inf
    """KL of the ridge map on the validation split."""
    rate: float = 0.0
    """Current learning rate, before the schedule."""
    sweep: dict[float, float] = field(default_factory=dict)
    """Learning rate -> KL on the validation split after `SWEEP` steps."""
    backs: int = 0
    """How often the translator returned to its best map, at half the rate."""

    def record_check(self, kl: float, step: int) -> None:
        """Save the current map as the best, or return to the best map at half the rate."""
        is_best = self.fit.is_finite() if not self.n_validation else kl < self.kl
        if is_best:
            self.save_as_best(kl, step)
        elif not self.n_validation or math.isinf(kl) or kl > WORSE * self.kl:
            self.restore_best()
            self.rate /= 2
            self.backs += 1

    def save_as_best(self, kl: float, step: int) -> None:
        """Save the current map, with this KL after `step` steps, as the best one."""
        self.best, self.kl, self.step = self.fit.state(), kl, step

    def restore_best(self) -> None:
        """Return to the best map."""
        self.fit.restore(self.best)

    def row(self) -> dict[str, Any]:
        """Everything except tensors, as JSON, for checkpoints and `TunedLens.metrics`.

        An infinite KL becomes None.
        """
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
        """All tensors with their names in a checkpoint."""
        for name in InputWhitening.TENSORS:
            yield f"inputs.{name}", getattr(self.fit.inputs, name)
        yield from ((f"fit.{name}", tensor) for name, tensor in self.fit.state().items())
        yield from ((f"best.{name}", tensor) for name, tensor in self.best.items())

    @classmethod
    def of(
        cls, row: dict[str, Any], tensors: dict[str, Tensor], damping: float
    ) -> "TranslatorState":
        """The state that `row` and `tensors` describe."""

        def with_prefix(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

        def infinite_if_none(kl: float | None) -> float:
            return math.inf if kl is None else kl

        fit = NaturalGradientMap(InputWhitening(**with_prefix("inputs.")), damping)
        fit.restore(with_prefix("fit."))
        return cls(
            fit=fit,
            alpha=row["alpha"],
            n=row["n"],
            best=with_prefix("best."),
            n_validation=row["n_validation"],
            kl=infinite_if_none(row["kl"]),
            step=row["steps"],
            start=row["start"],
            kl_logit=infinite_if_none(row["kl_logit"]),
            kl_ridge=infinite_if_none(row["kl_ridge"]),
            rate=row["lr"],
            sweep={float(rate): infinite_if_none(kl) for rate, kl in row["sweep"]},
            backs=row["backs"],
        )


class LensFitRun:
    """The fit of the translators of a group of layers and offsets, which share every batch."""

    def __init__(
        self,
        cache: ActivationCache,
        translators: dict[LayerOffset, TranslatorState],
        settings: LensFitSettings,
    ) -> None:
        self.translators, self.settings = translators, settings
        self.head = cache.head.torch()
        self.model = ModelDistribution(self.head)
        layers = sorted({layer for layer, _ in translators})
        offsets = sorted({offset for _, offset in translators})
        # The buffer size must not depend on which layers are fitted together, or the batches would
        # differ: compute it for all layers of the cache.
        row_bytes = sum(cache.residual_array(layer).layout.row_bytes for layer in cache.layers)
        self.train = MinibatchStream(
            cache,
            layers,
            offsets,
            split="train",
            batch=settings.batch,
            seed=settings.seed,
            drop_last=True,
            buffer_rows=max(settings.batch, min(BUFFER_ROWS, BUFFER_BYTES // row_bytes)),
            buffer_bytes=1 << 62,
            **vars(settings.scope),
        )
        self.validation = None
        if len(cache.sequences("validation")):
            self.validation = MinibatchStream(
                cache,
                layers,
                offsets,
                split="validation",
                batch=settings.batch,
                seed=settings.seed,
                max_positions=VALIDATION_POSITIONS,
                shuffle=False,
                **vars(settings.scope),
            )
        self.step = 0
        """Number of steps taken."""

    def begin(self, ridge: Mapping[LayerOffset, AffineMap]) -> None:
        """Choose between ridge and the logit lens, and measure the curvature at the start."""
        # KL of the logit lens.
        for pair, translator in self.translators.items():
            translator.fit.set_map(identity_map(len(ridge[pair].bias)))
        kl_logit = self.validation_kl()
        logit_lenses = {pair: t.fit.state() for pair, t in self.translators.items()}
        # KL of ridge; return to the logit lens where ridge is not better.
        for pair, translator in self.translators.items():
            translator.fit.set_map(ridge[pair])
        for pair, kl_ridge in self.validation_kl().items():
            translator = self.translators[pair]
            translator.kl_logit, translator.kl_ridge = kl_logit[pair], kl_ridge
            if translator.n_validation and kl_logit[pair] <= kl_ridge:
                translator.fit.restore(logit_lenses[pair])
                translator.start = "logit"
        del logit_lenses
        self._measure_curvature()
        for translator in self.translators.values():
            translator.save_as_best(min(translator.kl_logit, translator.kl_ridge), 0)

    def sweep(self) -> None:
        """Take the first steps at every learning rate, each from the start; keep the best map."""
        steps, rates = min(SWEEP, self.settings.steps), self.settings.rates
        starts = {pair: translator.best for pair, translator in self.translators.items()}
        for rate in rates:
            for pair, translator in self.translators.items():
                translator.fit.restore(starts[pair])
            batches = self._batches(self.train)
            for step in range(steps):
                falling_rate = rate * (1 - step / steps)
                self._take_step(step, next(batches), lambda _, rate=falling_rate: rate)
            for pair, kl in self.validation_kl().items():
                translator = self.translators[pair]
                if not translator.n_validation:
                    if rate == min(rates) and translator.fit.is_finite():
                        translator.save_as_best(kl, steps)
                    continue
                translator.sweep[rate] = kl
                if kl < translator.kl:
                    translator.save_as_best(kl, steps)
        for translator in self.translators.values():
            by_rate = translator.sweep
            translator.rate = min(by_rate, key=lambda rate: by_rate[rate], default=min(rates))
            translator.restore_best()
        self.step = steps

    def run(self, at_check: Callable[[], None]) -> None:
        """Take all further steps; `at_check` is called after every check."""
        batches = self._batches(self.train, self.step)
        while self.step < self.settings.steps:
            # Half a cosine, from 1 to 0.
            share = (1 + math.cos(math.pi * self.step / self.settings.steps)) / 2
            self._take_step(self.step, next(batches), lambda t, share=share: share * t.rate)
            self.step += 1
            if self.step % CHECK == 0 or self.step == self.settings.steps:
                self._judge()
                at_check()

    def validation_kl(self) -> dict[LayerOffset, float]:
        """KL of every translator on the validation split, in nats; sums in float64.

        Infinite where the KL is not finite, and without a pair. Sets `n_validation`.
        """
        sums = {pair: np.zeros(2) for pair in self.translators}
        if self.validation is not None:
            for batch in islice(self._batches(self.validation), self.validation.steps):
                for pair, x, target in batch:
                    losses = self.translators[pair].fit.losses(x, self.head, target)
                    sums[pair] += losses.sum(dtype=torch.float64).item(), len(losses)
        kl = {}
        for pair, (total, n) in sums.items():
            self.translators[pair].n_validation = int(n)
            mean = total / n if n else math.inf
            kl[pair] = float(mean) if math.isfinite(mean) else math.inf
        return kl

    def _batches(self, stream: MinibatchStream, step: int = 0) -> Iterator[list[PairRows]]:
        """Batches from number `step` on, endlessly: rows and targets of every pair."""
        while True:
            for minibatch in stream.epoch(*divmod(step, stream.steps)):
                pair_rows = []
                for offset, ahead in minibatch.ahead.items():
                    if not ahead.valid.any():
                        continue
                    # All layers of an offset share the target.
                    assert ahead.residual is not None
                    target = self.model.distribution(ahead.residual[ahead.valid])
                    pairs = [pair for pair in self.translators if pair[1] == offset]
                    pair_rows += [
                        (pair, minibatch.hidden[pair[0]][ahead.valid], target) for pair in pairs
                    ]
                yield pair_rows
                step += 1

    def _measure_curvature(self) -> None:
        """Measure the curvature at the start, from at least `OUTPUTS` rows per output."""
        width = self.train.cache.d_model
        batches = min(self.train.steps, -(-OUTPUTS * width // self.settings.batch))
        # First pass: the output factors G, and their eigenvectors.
        factors = {pair: torch.zeros(width, width) for pair in self.translators}
        for step, batch in enumerate(islice(self._batches(self.train), batches)):
            for pair, x, _ in batch:
                fit = self.translators[pair].fit
                factors[pair] += fit.output_factor(x, self.head, self._generator(pair, step))
        for pair, factor in factors.items():
            # eigh gives columns one after the other. Store rows one after the other, as a
            # checkpoint does: otherwise products would round differently after a restart.
            self.translators[pair].fit.outputs = torch.linalg.eigh(factor)[1].contiguous()
        # Second pass: the eigenvalues in that basis, as the mean over the batches.
        for step, batch in enumerate(islice(self._batches(self.train), batches)):
            for pair, x, _ in batch:
                generator = self._generator(pair, step)
                fit = self.translators[pair].fit
                fit.update_curvature(x, self.head, generator, 1 / (step + 1))

    def _take_step(
        self, step: int, batch: list[PairRows], rate: Callable[[TranslatorState], float]
    ) -> None:
        """Take one step of every translator that has rows in the batch."""
        for pair, x, target in batch:
            translator = self.translators[pair]
            if step % REFRESH == 0 and step:
                few_rows = x[: -(-len(x) // REFRESH)]
                translator.fit.update_curvature(few_rows, self.head, self._generator(pair, step))
            translator.fit.step(x, self.head, target, rate(translator))

    def _judge(self) -> None:
        for pair, kl in self.validation_kl().items():
            self.translators[pair].record_check(kl, self.step)

    def _generator(self, pair: LayerOffset, step: int) -> torch.Generator:
        """Random tokens of a pair at a step, whatever other pairs are fitted."""
        seed = np.random.SeedSequence([self.settings.seed, *pair, step]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))


def identity_map(width: int) -> AffineMap:
    """The map of the logit lens: weight `(width, width)` identity, bias 0."""
    return AffineMap(np.eye(width, dtype=np.float32), np.zeros(width, np.float32))

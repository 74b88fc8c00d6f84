"""Fit of tuned-lens translators by KL to the model: start, sweep of rates, checked steps.

`fit_groups.py` makes a `LensFitRun` for a group of (layer, offset) pairs, which share every batch
of `MinibatchStream`, and calls `begin`, `sweep` and `run`. Each translator is fitted by itself
(`TranslatorState`, steps by `natural_gradient.py`):

1. It starts from ridge or the logit lens, whichever has the lower KL on the validation split.
2. A sweep tries every learning rate for a few steps; the rate with the lowest KL is taken.
3. Steps follow, at a rate that stays until the KL has stopped falling, for a third of the steps at
   most, and then falls to 0 within twice as many steps again. The map that counts is an average of
   the maps after the steps, of the later ones mostly. Every `CHECK` steps its KL on the validation
   split is measured: a translator that got worse returns to its best map, at half the rate.
4. The result is the best averaged map of all checks.

Where the validation split has no pair at an offset, nothing can be compared: the translator starts
from ridge, takes the lowest rate and all steps, and ends with the average after the last.

No number of steps is known before: a rate that falls over the last part of them ends as low as one
that falls all the time (Hägele et al., 2405.18392). Measured on a llama of 5 layers x 64 with
287,000 rows, 400 steps: a rate that falls over the last third ended at 1.2940 nats (mean of layers,
test split), over the last two thirds at 1.2915, along half a cosine at 1.2912.

A step takes the rows of a batch in tiles: the model's distribution of a tile is computed once, for
all layers. Rows, translators and head are on one device; numbers that decide are on the host.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.devices import TileRows, copy_to_device, copy_to_host, iterate_on_device
from ...cache.files.json_files import plain_value
from ...cache.head.head import TorchHead
from ...cache.head.row_buffers import reused_rows
from ...cache.progress import StageProgress
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.slab_shuffle import BUFFER_ROWS
from ...cache.tokens.segments import PairScope
from ..base.readout import LayerOffset
from ..ridge.solver import AffineMap
from ..training.minibatches import BUFFER_BYTES, Minibatch, MinibatchStream, copy_minibatch
from ..training.softmax_loss import (
    Gradients,
    ModelDistribution,
    Target,
    add_head_gradients,
    head_losses,
    most_tile_rows,
)
from .natural_gradient import InputWhitening, NaturalGradientMap, eigenvectors

Report = StageProgress
"""Called with (stage, done, total): stage `moments` counts positions, `lens` steps."""
CPU = torch.device("cpu")
CopyTensor = Callable[[Tensor], Tensor]
Translate = Callable[["TranslatorState", Tensor], Tensor]
"""Gives the translated rows u `(n, d)` of a translator and rows x `(n, d)`."""
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
LEAST_GAIN, PATIENCE = 0.003, 3
"""The KL has stopped falling after `PATIENCE` checks in a row that lowered it by less than this
share together."""
FALL = 2.0
"""Steps during which the rate falls to 0, as a share of the steps before."""
LATE = 4
"""Weight of the later maps in the average: of t maps, most of it is of the last t / `LATE`."""
OUTPUTS = 4
"""Rows per output dimension from which the curvature at the start is measured, at least."""
FIRST_BYTES = 64 << 20
"""Most memory of the first batches, which the curvature and each rate of the sweep take anew."""
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
    products: str = "float32"
    """dtype of the products with the unembedding in steps, `float32` or `bfloat16`; the KL on the
    validation split is always of float32."""

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
    taken: int = 0
    """Number of steps taken."""
    reference_kl: float = math.inf
    """Best KL at the check that `idle` is counted from."""
    idle: int = 0
    """Checks since the KL was `reference_kl`, without a fall by `LEAST_GAIN`."""
    falls_from: int | None = None
    """Step of the check at which the KL had stopped falling; None before."""

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step, of at most `steps`; 0 after the last step of the translator."""
        # The rate is 0 after the last step at the latest, ...
        start = int(steps / (1 + FALL))
        if self.falls_from is not None:
            start = min(start, self.falls_from)
        # ... and at a check.
        length = min(-(-int(FALL * start) // CHECK) * CHECK, steps - start)
        return self.rate * min(1.0, max(0.0, 1 - (step - start) / max(1, length)))

    def record_check(self, kl: float, step: int) -> None:
        """Save the current map as the best, or return to the best map at half the rate."""
        self.taken = step
        is_best = self.fit.is_finite() if not self.n_validation else kl < self.kl
        if is_best:
            self.save_as_best(kl, step)
        elif not self.n_validation or math.isinf(kl) or kl > WORSE * self.kl:
            self.restore_best()
            self.rate /= 2
            self.backs += 1
        if not self.n_validation or self.falls_from is not None:
            return
        self.idle += 1
        if self.kl < (1 - LEAST_GAIN) * self.reference_kl:
            self.reference_kl, self.idle = self.kl, 0
        if self.idle >= PATIENCE:
            self.falls_from = step

    def save_as_best(self, kl: float, step: int) -> None:
        """Save the current map, with this KL after `step` steps, as the best one."""
        self.fit.copy_state(self.best)
        self.kl, self.step = kl, step

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
            "taken": self.taken,
            "lr": self.rate,
            "backs": self.backs,
            "alpha": self.alpha,
            "n": self.n,
            "n_validation": self.n_validation,
            "sweep": [[rate, plain_value(kl)] for rate, kl in self.sweep.items()],
        }

    def checkpoint_row(self) -> dict[str, Any]:
        """`row`, with the numbers that only a fit that goes on needs."""
        reference = {"reference_kl": plain_value(self.reference_kl), "idle": self.idle}
        return {**self.row(), **reference, "falls_from": self.falls_from}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, on the host, with their names in a checkpoint."""
        for name in InputWhitening.TENSORS:
            yield f"inputs.{name}", copy_to_host(getattr(self.fit.inputs, name))
        for name, tensor in self.fit.state().items():
            yield f"fit.{name}", copy_to_host(tensor)
        for name, tensor in self.best.items():
            yield f"best.{name}", copy_to_host(tensor)

    @classmethod
    def of(
        cls, row: dict[str, Any], tensors: dict[str, Tensor], damping: float, copy: CopyTensor
    ) -> "TranslatorState":
        """The state that `row` and `tensors` describe; `copy` as of `NaturalGradientMap`."""

        def with_prefix(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

        def infinite_if_none(kl: float | None) -> float:
            return math.inf if kl is None else kl

        fit = NaturalGradientMap(InputWhitening(**with_prefix("inputs.")), damping, copy)
        fit.restore(with_prefix("fit."))
        return cls(
            fit=fit,
            alpha=row["alpha"],
            n=row["n"],
            best={name: copy(tensor) for name, tensor in with_prefix("best.").items()},
            n_validation=row["n_validation"],
            kl=infinite_if_none(row["kl"]),
            step=row["steps"],
            start=row["start"],
            kl_logit=infinite_if_none(row["kl_logit"]),
            kl_ridge=infinite_if_none(row["kl_ridge"]),
            rate=row["lr"],
            sweep={float(rate): infinite_if_none(kl) for rate, kl in row["sweep"]},
            backs=row["backs"],
            taken=row["taken"],
            reference_kl=infinite_if_none(row["reference_kl"]),
            idle=row["idle"],
            falls_from=row["falls_from"],
        )


@dataclass(frozen=True, eq=False)
class OffsetRows:
    """Rows of a batch that have a target at one offset, on the device of the fit."""

    offset: int
    residual: Tensor
    """residual_L[t+N], `(n, d)` float32."""
    hidden: dict[LayerOffset, Tensor]
    """Rows residual_l[t] of each pair of the offset, `(n, d)` float32."""


class LensFitRun:
    """The fit of the translators of several layers and offsets, which share every batch."""

    def __init__(
        self,
        cache: ActivationCache,
        translators: dict[LayerOffset, TranslatorState],
        settings: LensFitSettings,
        device: torch.device = CPU,
    ) -> None:
        self.translators = translators
        self.settings = settings
        self.device = device
        self.head: TorchHead = cache.head.torch(device)
        self.tiles: TileRows = TileRows(most_tile_rows(cache.vocab), device)
        layers = sorted({layer for layer, _ in translators})
        offsets = sorted({offset for _, offset in translators})
        # The buffer size must not depend on which layers are fitted together, or the batches would
        # differ: compute it for all layers of the cache.
        row_bytes = sum(cache.residual_array(layer).layout.row_bytes for layer in cache.layers)
        self.train: MinibatchStream = MinibatchStream(
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
        self.validation: MinibatchStream | None = None
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
        self.step: int = 0
        """Number of steps taken."""
        self.fitted = list(translators)
        """Pairs whose translators take further steps."""
        self.sweep_steps: int = min(SWEEP, settings.steps)
        """Number of steps of each learning rate in the sweep."""
        self._first: list[list[OffsetRows]] = []
        """The first batches until the sweep ends, where they fit `FIRST_BYTES`."""

    def begin(self) -> None:
        """Choose between ridge, the present maps, and the logit lens; measure the curvature."""
        kl_logit, kl_of_ridge = self.validation_kls(lambda _, x: x, translate_by_mean)
        for pair, kl_ridge in kl_of_ridge.items():
            translator = self.translators[pair]
            translator.kl_logit, translator.kl_ridge = kl_logit[pair], kl_ridge
            if translator.n_validation and kl_logit[pair] <= kl_ridge:
                translator.fit.set_map(identity_map(self.train.cache.d_model))
                translator.start = "logit"
        self._measure_curvature()
        for translator in self.translators.values():
            translator.save_as_best(min(translator.kl_logit, translator.kl_ridge), 0)
            translator.reference_kl = translator.kl

    def sweep(self) -> None:
        """Take the first steps at every learning rate, each from the start; keep the best map."""
        steps, rates = self.sweep_steps, self.settings.rates
        starts: dict[LayerOffset, dict[str, Tensor]] = {pair: {} for pair in self.translators}
        for pair, translator in self.translators.items():
            if len(rates) > 1:
                translator.fit.copy_state(starts[pair])
        for number, rate in enumerate(rates):
            for pair, translator in self.translators.items():
                if number:
                    translator.fit.restore(starts[pair])
            for step, batch in enumerate(self._first_batches(steps)):
                falling_rate = rate * (1 - step / steps)
                self._take_step(step, batch, lambda _, rate=falling_rate: rate, 1.0)
            for pair, kl in self.validation_kl(translate_by_mean).items():
                translator = self.translators[pair]
                if not translator.n_validation:
                    if rate == min(rates) and translator.fit.is_finite():
                        translator.save_as_best(kl, steps)
                    continue
                translator.sweep[rate] = kl
                if kl < translator.kl:
                    translator.save_as_best(kl, steps)
        self._first = []
        for translator in self.translators.values():
            by_rate = translator.sweep
            translator.rate = min(by_rate, key=lambda rate: by_rate[rate], default=min(rates))
            translator.restore_best()
            translator.taken, translator.reference_kl = steps, translator.kl
        self.step = steps

    def run(self, at_check: Callable[[], None]) -> None:
        """Take all further steps; `at_check` is called after every check."""
        self._drop_finished()
        batches = self._batches(self.train, self.step)
        while self.step < self.settings.steps and self.fitted:
            # The average of t maps with weights that grow as t to the power of LATE.
            mean_share = (LATE + 1) / (self.step - self.sweep_steps + 1 + LATE)
            self._take_step(
                self.step,
                next(batches),
                lambda translator, step=self.step: translator.rate_at(step, self.settings.steps),
                mean_share,
            )
            self.step += 1
            if self.step % CHECK == 0 or self.step == self.settings.steps:
                self._judge()
                self._drop_finished()
                at_check()

    def validation_kl(self, translate: Translate) -> dict[LayerOffset, float]:
        """KL on the validation split of every translator that is fitted, in nats.

        `translate(translator, x)` gives its rows u. Infinite where the KL is not finite, and
        without a pair. Sets `n_validation`.
        """
        (kl,) = self.validation_kls(translate)
        return kl

    def validation_kls(self, *translations: Translate) -> list[dict[LayerOffset, float]]:
        """`validation_kl` of several maps of each translator, which share the model's distribution.

        Sums in float64.
        """
        sums = {(pair, i): np.zeros(2) for pair in self.fitted for i in range(len(translations))}
        if self.validation is not None:
            for batch in islice(self._batches(self.validation), self.validation.steps):
                for rows in batch:
                    for key, losses in self._validation_losses(rows, translations).items():
                        total = copy_to_host(losses).sum(dtype=torch.float64).item()
                        sums[key] += total, len(losses)
        kls: list[dict[LayerOffset, float]] = [{} for _ in translations]
        for (pair, i), (total, n) in sums.items():
            self.translators[pair].n_validation = int(n)
            mean = total / n if n else math.inf
            kls[i][pair] = float(mean) if math.isfinite(mean) else math.inf
        return kls

    def _drop_finished(self) -> None:
        """Leave out translators that take no further step."""
        steps = self.settings.steps
        rates = {pair: t.rate_at(self.step, steps) for pair, t in self.translators.items()}
        self.fitted: list[LayerOffset] = [pair for pair, rate in rates.items() if rate > 0]

    def _batches(self, stream: MinibatchStream, step: int = 0) -> Iterator[list[OffsetRows]]:
        """Batches from number `step` on, endlessly: rows of every offset, on the device."""
        while True:
            minibatches = stream.epoch(*divmod(step, stream.steps))
            for minibatch in iterate_on_device(minibatches, self.device, copy_minibatch):
                yield [
                    self._offset_rows(minibatch, offset)
                    for offset, ahead in minibatch.ahead.items()
                    if ahead.valid.any()
                ]
                step += 1

    def _first_batches(self, number: int) -> Iterator[list[OffsetRows]]:
        """The first `number` batches of the train split; read once where they fit `FIRST_BYTES`.

        To read one batch, a whole buffer of shuffled rows is filled.
        """
        most = max(number, self.sweep_steps)
        rows = most * self.settings.batch * (len(self.train.layers) + len(self.train.offsets))
        if 4 * rows * self.train.cache.d_model > FIRST_BYTES:
            return islice(self._batches(self.train), number)
        if len(self._first) < most:
            self._first = list(islice(self._batches(self.train), most))
        return iter(self._first[:number])

    def _offset_rows(self, minibatch: Minibatch, offset: int) -> OffsetRows:
        """The rows of a minibatch, on the device, that have a target at `offset`."""
        ahead = minibatch.ahead[offset]
        assert ahead.residual is not None
        selection: Any = slice(None)
        if not ahead.valid.all():
            selection = copy_to_device(ahead.valid.nonzero()[:, 0], self.device)
        pairs = [pair for pair in self.fitted if pair[1] == offset]
        hidden = {pair: minibatch.hidden[pair[0]][selection] for pair in pairs}
        return OffsetRows(offset, ahead.residual[selection], hidden)

    def _measure_curvature(self) -> None:
        """Measure the curvature at the start, from at least `OUTPUTS` rows per output."""
        width = self.train.cache.d_model
        batches = min(self.train.steps, -(-OUTPUTS * width // self.settings.batch))
        options = {"products": self.settings.products, "tile_rows": self.tiles}
        # First pass: the output factors G, and their eigenvectors, in the place of these.
        for step, batch in enumerate(self._first_batches(batches)):
            for pair, x in rows_of_pairs(batch):
                fit = self.translators[pair].fit
                factor = fit.output_factor(x, self.head, self._generator(pair, step), **options)
                fit.outputs.mul_(float(step > 0)).add_(factor)
        for translator in self.translators.values():
            translator.fit.outputs.copy_(eigenvectors(translator.fit.outputs))
        # Second pass: the eigenvalues in that basis, as the mean over the batches.
        for step, batch in enumerate(self._first_batches(batches)):
            for pair, x in rows_of_pairs(batch):
                generator = self._generator(pair, step)
                fit = self.translators[pair].fit
                fit.update_curvature(x, self.head, generator, 1 / (step + 1), **options)

    def _take_step(
        self,
        step: int,
        batch: list[OffsetRows],
        rate: Callable[[TranslatorState], float],
        mean_share: float,
    ) -> None:
        """Take one step of every translator that has rows in the batch."""
        if step % REFRESH == 0 and step:
            options = {"products": self.settings.products, "tile_rows": self.tiles}
            for pair, x in rows_of_pairs(batch):
                few_rows, generator = x[: -(-len(x) // REFRESH)], self._generator(pair, step)
                fit = self.translators[pair].fit
                fit.update_curvature(few_rows, self.head, generator, **options)
        for rows in batch:
            z = {pair: self.translators[pair].fit.inputs(x) for pair, x in rows.hidden.items()}
            gradients = self._step_gradients(rows, z)
            for pair, gradient in gradients.items():
                translator = self.translators[pair]
                translator.fit.apply_gradient(z[pair], gradient, rate(translator), mean_share)

    def _step_gradients(
        self, rows: OffsetRows, z: dict[LayerOffset, Tensor]
    ) -> dict[LayerOffset, Tensor]:
        """Gradient of the mean loss in u of each pair, `(n, d)`, for whitened rows `z`."""
        n = len(rows.residual)
        gradients = {pair: torch.empty_like(whitened) for pair, whitened in z.items()}

        def write_gradients(tile: slice) -> None:
            # Gradients of rounded products, and without losses: most of the work of a fit.
            products = self.settings.products
            target = self._model_distribution(rows.residual[tile], products, negentropy=False)
            for pair, whitened in z.items():
                u = self.translators[pair].fit.translate(whitened[tile])
                options = Gradients(x=gradients[pair][tile].zero_(), scale=1 / n, products=products)
                add_head_gradients(u, self.head, target, options, len(u))

        self.tiles.run(n, write_gradients)
        return gradients

    def _validation_losses(
        self, rows: OffsetRows, translations: Sequence[Translate]
    ) -> dict[tuple[LayerOffset, int], Tensor]:
        """KL of each pair and number of a translation for every row, `(n,)`."""
        losses = {
            (pair, i): x.new_empty(len(x))
            for pair, x in rows.hidden.items()
            for i in range(len(translations))
        }

        def write_losses(tile: slice) -> None:
            target = self._model_distribution(rows.residual[tile])
            for (pair, i), pair_losses in losses.items():
                u = translations[i](self.translators[pair], rows.hidden[pair][tile])
                pair_losses[tile] = head_losses(u, self.head, target, tile_rows=len(u))

        self.tiles.run(len(rows.residual), write_losses)
        return losses

    def _model_distribution(
        self, residual: Tensor, products: str = "float32", negentropy: bool = True
    ) -> Target:
        """The model's distribution for the rows of a tile; valid until the next tile."""
        memory = reused_rows("model", len(residual), self.head.head.vocab, residual)
        model = ModelDistribution(self.head, len(residual))
        return model.distribution(residual, memory, products=products, negentropy=negentropy)

    def _judge(self) -> None:
        for pair, kl in self.validation_kl(translate_by_mean).items():
            self.translators[pair].record_check(kl, self.step)

    def _generator(self, pair: LayerOffset, step: int) -> torch.Generator:
        """Random tokens of a pair at a step, whatever other pairs are fitted."""
        seed = np.random.SeedSequence([self.settings.seed, *pair, step]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))


def rows_of_pairs(batch: list[OffsetRows]) -> Iterator[tuple[LayerOffset, Tensor]]:
    """Every pair of a batch, with its rows of the layer, `(n, d)`."""
    for rows in batch:
        yield from rows.hidden.items()


def translate_by_mean(translator: TranslatorState, x: Tensor) -> Tensor:
    """Rows `x` `(n, d)` translated by the averaged map."""
    return translator.fit.translate_by_mean(translator.fit.inputs(x))


def identity_map(width: int) -> AffineMap:
    """The map of the logit lens: weight `(width, width)` identity, bias 0."""
    return AffineMap(np.eye(width, dtype=np.float32), np.zeros(width, np.float32))

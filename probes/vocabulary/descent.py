"""Stochastic descent: many softmax regressions at once in one stream of batches.

AdamW in the principal axes of the states (`forms`), linear warm-up and decay, a learning rate from
a short sweep (`sweep`), stopped on held-out loss. Each (layer, offset) is fitted by one thread with
its own arithmetic, so that results do not depend on which others are fitted beside it.

Chosen by measurement: held-out cross-entropy of the sample model's layer 3 at N = 1, one pass over
150,000 positions, best learning rate each. AdamW on raw states 4.399, on states of mean square 1
4.375, in principal axes 4.321, whitened 4.410; beta2 .99 for .999 in scaled axes 4.303 for 4.336;
batches of 512 4.295, of 256 4.328. Orthogonalised momentum (Muon) 4.534 and the same with scaled
rows 4.504, at their best a tenth dearer a step; one-sided Shampoo 4.914. Three passes: raw 4.249,
in principal axes 4.198.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...cache.files.json_files import plain_value
from ..base.readout import LayerOffset
from ..training.checkpoint import Checkpoint
from ..training.softmax_loss import ParameterTensors, Target
from ..training.threads import ThreadCrew
from .examples import ExampleBatch, Examples
from .parametrizations import Parametrization, PrincipalAxes

EVALUATIONS = 8
"""Measurements of the held-out loss during a fit."""
PATIENCE = 2
"""Measurements in a row without a gain after which a regression stops."""
LEAST_STEPS = 200
"""Steps of a fit on few rows, which are then seen more often than `epochs`."""
WARM_UP = 20
"""Most steps over which the learning rate rises; a tenth of a short fit."""
SWEEP_SHARE, SWEEP_STEPS = 1 / 16, 64
"""Steps of a sweep's fits: this share of the steps of the fit, at most so many."""
BETAS = (0.9, 0.99)
"""AdamW's; .95 and .99 do better than .999 here."""
CHECKPOINT_SECONDS = 60.0
"""Between two checkpoints."""


@dataclass(frozen=True)
class Outcome:
    """What came of one regression."""

    parameters: ParameterTensors
    """The best ones, as a map of raw states."""
    last: dict[str, float | None]
    """Their line of `history`."""
    history: list[dict[str, float | None]]
    """Step, training loss since the line before, held-out loss; nats, None where not finite."""


class Trainer:
    """One regression with its optimiser and what was measured of it."""

    def __init__(
        self, form: Parametrization, axes: PrincipalAxes, parameters: ParameterTensors
    ) -> None:
        self.form, self.axes = form, axes
        self.parameters = {name: parameters[name].contiguous().clone() for name in form.names}
        self.optimiser = torch.optim.AdamW(
            list(self.parameters.values()), lr=0.0, betas=BETAS, weight_decay=0.0, fused=True
        )
        self.best: ParameterTensors | None = None
        self.best_loss = float("inf")
        self.worse = 0
        """Measurements since the best one."""
        self.history: list[dict[str, float | None]] = []
        """Step, mean training loss since the measurement before, held-out loss; nats.

        None for a loss that is not finite; without held-out rows there is no held-out loss."""
        self.loss_sum, self.loss_rows = 0.0, 0

    @property
    def stopped(self) -> bool:
        return self.worse >= PATIENCE

    def step(self, x: Tensor, target: Target, lr: float, grads: ParameterTensors) -> None:
        """One step on rows `x`; `grads` is room for the gradients."""
        for name, value in self.parameters.items():
            value.grad = grads[name].zero_()
        self.loss_sum += float(self.form.losses(self.parameters, x, target, grads).sum())
        self.loss_rows += len(x)
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.step()
        for value in self.parameters.values():
            value.grad = None

    def measured(self, step: int, held_out: float | None) -> None:
        """Note the held-out loss, keep the parameters if it is the best so far."""
        training = self.loss_sum / max(1, self.loss_rows)
        self.loss_sum, self.loss_rows = 0.0, 0
        row = {"step": step, "train": plain_value(training)}
        more = {} if held_out is None else {"validation": plain_value(held_out)}
        self.history.append({**row, **more})
        if held_out is None:
            return
        self.worse += 1
        if held_out < self.best_loss:
            self.best_loss, self.worse = held_out, 0
            self.best = {name: value.clone() for name, value in self.parameters.items()}

    def chosen(self) -> dict[str, float | None]:
        """The line of `history` of the parameters that `outcome` gives."""
        return self.history[-1 - self.worse] if self.best is not None else self.history[-1]

    def outcome(self) -> Outcome:
        """What it is worth now."""
        found = self.form.folded(self.best or self.parameters, self.axes)
        return Outcome(found, self.chosen(), self.history)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that changes, as JSON and tensors."""
        numbers = {k: getattr(self, k) for k in ("worse", "history", "loss_rows")}
        # JSON has no word for a sum that is not finite.
        numbers["loss_sum"] = plain_value(self.loss_sum)
        numbers["best_loss"] = None if self.best is None else self.best_loss
        tensors = {f"now.{name}": value for name, value in self.parameters.items()}
        tensors |= {f"best.{name}": value for name, value in (self.best or {}).items()}
        for name, value in self.parameters.items():
            for key, found in self.optimiser.state.get(value, {}).items():
                tensors[f"{key}.{name}"] = found
        return numbers, tensors

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take the state of `state`."""
        for key in ("worse", "history", "loss_rows"):
            setattr(self, key, numbers[key])
        self.loss_sum = math.nan if numbers["loss_sum"] is None else numbers["loss_sum"]
        self.best = None
        if numbers["best_loss"] is not None:
            self.best_loss = numbers["best_loss"]
            self.best = {name: tensors[f"best.{name}"] for name in self.parameters}
        for name, value in self.parameters.items():
            value.copy_(tensors[f"now.{name}"])
            if f"exp_avg.{name}" in tensors:
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimiser.state[value] = {key: tensors[f"{key}.{name}"] for key in keys}


Trainers = dict[Any, Trainer]
"""By (layer, offset), or anything that begins with these two."""


def _turn(
    crew: ThreadCrew, trainers: Trainers, keys: list[Any], step: ExampleBatch
) -> dict[int, Tensor]:
    """States of each layer in their principal axes."""
    axes = {key[0]: trainers[key].axes for key in keys}
    found = crew.each(lambda layer: axes[layer](step.hidden[layer]), axes)
    return dict(zip(axes, found, strict=True))


def _each_pair(
    crew: ThreadCrew,
    trainers: Trainers,
    step: ExampleBatch,
    work: Callable[[Any, Tensor, Target], None],
) -> None:
    """`work(key, states, target)` for every regression that still runs and has a row.

    States are turned once for all offsets of a layer, targets made once for all layers of an
    offset; of the targets only one offset's are kept, for distributions are large.
    """
    active = [key for key, trainer in trainers.items() if not trainer.stopped]
    turned = _turn(crew, trainers, active, step)

    def one(item: tuple[Any, Tensor | None, Target]) -> None:
        key, rows, target = item
        x = turned[key[0]] if rows is None else turned[key[0]][rows]
        if len(x):
            work(key, x, target)

    for offset in dict.fromkeys(key[1] for key in active):
        ((rows, target),) = crew.each(step.target, [offset])
        crew.each(one, [(key, rows, target) for key in active if key[1] == offset])


def advance(
    crew: ThreadCrew, trainers: Trainers, step: ExampleBatch, rates: Callable[[Any], float]
) -> None:
    """One step of every regression, at the learning rate `rates(key)`."""

    def fit(key: Any, x: Tensor, target: Target) -> None:
        trainer = trainers[key]
        trainer.step(x, target, rates(key), crew.room(trainer.parameters))

    _each_pair(crew, trainers, step, fit)


def held_out_losses(crew: ThreadCrew, trainers: Trainers, validation: Examples) -> dict[Any, float]:
    """Mean loss of every regression that still runs on all of `validation`; sums in float64."""
    sums, counts = dict.fromkeys(trainers, 0.0), dict.fromkeys(trainers, 0)

    def measure(key: Any, x: Tensor, target: Target) -> None:
        trainer = trainers[key]
        losses = trainer.form.losses(trainer.parameters, x, target, None)
        sums[key] += float(losses.double().sum())
        counts[key] += len(x)

    for step in validation.epoch():
        _each_pair(crew, trainers, step, measure)
    return {key: sums[key] / counts[key] for key in trainers if counts[key]}


@dataclass
class Descent:
    """A fit of one group of regressions, all steps of it."""

    examples: Examples
    validation: Examples | None
    start: Callable[..., Trainer]
    """A new regression for a (layer, offset), the same every time."""
    pairs: list[LayerOffset]
    epochs: int
    rates: dict[LayerOffset, float] = field(default_factory=dict)
    """Learning rate of each pair."""
    checkpoint: Checkpoint | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    progress: Callable[[int], None] = lambda rows: None
    """Told the rows of each step."""

    @property
    def steps(self) -> int:
        """Steps of the fit."""
        return max(self.epochs * self.examples.steps, LEAST_STEPS)

    @property
    def sweep_steps(self) -> int:
        """Steps of the short fits of a sweep."""
        return min(SWEEP_STEPS, max(WARM_UP, int(self.steps * SWEEP_SHARE)))

    @property
    def positions(self) -> int:
        """Rows that all steps read."""
        return self.steps * self.examples.rows // self.examples.steps

    def run(self) -> dict[LayerOffset, Outcome]:
        """Fit all pairs; goes on from the checkpoint if there is one."""
        with self.checkpoint.held() if self.checkpoint else nullcontext():
            trainers = {pair: self.start(pair) for pair in self.pairs}
            found = self.checkpoint.load() if self.checkpoint else None
            done = 0 if found is None else self._restore(trainers, *found)
            if found is None:
                self._save(trainers, 0)
            with ThreadCrew.of(len(self.pairs)) as crew:
                self._descend(crew, trainers, done)
                found = crew.each(Trainer.outcome, trainers.values())
        return dict(zip(trainers, found, strict=True))

    def _descend(self, crew: ThreadCrew, trainers: Trainers, done: int) -> None:
        every, saved = max(1, self.steps // EVALUATIONS), time.monotonic()
        left = self.positions - self._report(done * self.positions // self.steps)
        for number, step in self.stream(done):
            if all(trainer.stopped for trainer in trainers.values()):
                break
            share = schedule(number, self.steps)
            advance(crew, trainers, step, lambda pair, share=share: share * self.rates[pair])
            taken = number + 1
            if taken % every == 0 or taken == self.steps:
                self._measure(crew, trainers, taken)
            left -= self._report(min(left, len(next(iter(step.hidden.values())))))
            if time.monotonic() - saved >= self.checkpoint_seconds:
                self._save(trainers, taken)
                saved = time.monotonic()
        self._report(left)
        self._save(trainers, self.steps)

    def _report(self, rows: int) -> int:
        self.progress(rows)
        return rows

    def stream(self, done: int, steps: int | None = None) -> Iterator[tuple[int, ExampleBatch]]:
        """Numbered batches from number `done` on, epoch after epoch."""
        steps = self.steps if steps is None else steps
        while done < steps:
            epoch, inside = divmod(done, self.examples.steps)
            for step in self.examples.epoch(epoch, inside):
                yield done, step
                done += 1
                if done == steps:
                    return

    def _measure(self, crew: ThreadCrew, trainers: Trainers, taken: int) -> None:
        active = {k: t for k, t in trainers.items() if not t.stopped}
        losses = held_out_losses(crew, active, self.validation) if self.validation else {}
        for key, trainer in active.items():
            trainer.measured(taken, losses.get(key))

    def _save(self, trainers: Trainers, step: int) -> None:
        if self.checkpoint is None:
            return
        numbers, tensors = {}, {}
        for (layer, offset), trainer in trainers.items():
            key = f"{layer}.{offset}"
            numbers[key], found = trainer.state()
            tensors |= {f"{key}.{name}": value for name, value in found.items()}
        self.checkpoint.save({"step": step, "trainers": numbers}, tensors)

    def _restore(
        self, trainers: Trainers, state: dict[str, Any], tensors: dict[str, Tensor]
    ) -> int:
        for (layer, offset), trainer in trainers.items():
            start = f"{layer}.{offset}."
            mine = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
            trainer.restore(state["trainers"][start[:-1]], mine)
        return state["step"]


def representatives(pairs: list[LayerOffset]) -> list[LayerOffset]:
    """First, middle and last layer at offset 0, where it is asked for, and at a later one."""
    out = []
    for group in ([p for p in pairs if p[1] == 0], [p for p in pairs if p[1] > 0]):
        if group:
            offsets = sorted({offset for _, offset in group})
            offset = offsets[len(offsets) // 2]
            layers = sorted({layer for layer, other in group if other == offset})
            places = sorted({0, len(layers) // 2, len(layers) - 1})
            out += [(layers[place], offset) for place in places]
    return out


def distance(pair: LayerOffset, other: LayerOffset) -> tuple[bool, int, int]:
    """How far apart two pairs are: the next token is unlike those further on, then by layer."""
    return (
        (pair[1] == 0) != (other[1] == 0),
        abs(pair[0] - other[0]),
        abs(pair[1] - other[1]),
    )


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at `step`: up, then down to 0 at the end."""
    rise = max(1, min(WARM_UP, steps // 10))
    return min(1.0, (step + 1) / rise) * (1 - step / steps)

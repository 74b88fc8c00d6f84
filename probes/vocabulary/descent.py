"""AdamW descent of many softmax regressions at once, all in the same stream of batches.

`Descent` fits the regressions of a group of (layer, offset) pairs; each is a `Trainer`, with its
own AdamW optimiser in the principal axes of the states (`parametrizations.py`). The learning rate
rises linearly, then falls to 0; its size comes from a short sweep (`learning_rate_sweep.py`).
A regression stops when its held-out loss no longer falls. Each regression is fitted by one thread
with its own arithmetic, so results do not depend on which others are fitted beside it.
`VocabFit.descent` (`fit_job.py`) makes a `Descent`; `fit_groups.py` and the sweep run it.

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
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...cache.devices import copy_to_device, copy_to_host
from ...cache.files.json_files import plain_value
from ..base.readout import LayerOffset
from ..training.checkpoint import Checkpoint
from ..training.softmax_loss import ParameterTensors, Target
from ..training.threads import ThreadCrew
from .examples import ExampleBatch, Examples
from .initial_statistics import InitialStatistics, measure_initial_statistics
from .parametrizations import Parametrization, PrincipalAxes

EVALUATIONS = 8
"""Measurements of the held-out loss during a fit."""
PATIENCE = 2
"""Measurements in a row without a gain after which a regression stops."""
LEAST_STEPS = 200
"""Fewest steps of a fit; few rows are then seen more often than `epochs`."""
WARM_UP = 20
"""Most steps over which the learning rate rises; a tenth of a short fit."""
SWEEP_SHARE, SWEEP_STEPS = 1 / 16, 64
"""Steps of a sweep's fits: this share of the steps of the fit, at most so many."""
BETAS = (0.9, 0.99)
"""AdamW's decay rates of the moments; .95 and .99 do better than .999 here."""
PENDING_LOSSES = 64
"""Most losses of steps that a regression leaves on the device before it asks for them."""
CHECKPOINT_SECONDS = 60.0
"""Time between two checkpoints, in seconds."""


@dataclass(frozen=True)
class Outcome:
    """Result of one regression."""

    parameters: ParameterTensors
    """Parameters with the lowest held-out loss, as a map of raw states."""
    last: dict[str, float | None]
    """Row of `history` of these parameters."""
    history: list[dict[str, float | None]]
    """Step, training loss since the row before, held-out loss; nats, None where not finite."""


class Trainer:
    """One regression during its fit: parameters, optimiser, best parameters, measured losses."""

    def __init__(
        self, form: Parametrization, axes: PrincipalAxes, parameters: ParameterTensors
    ) -> None:
        self.form = form
        self.axes = axes
        self.parameters: dict[str, Tensor] = {
            name: parameters[name].contiguous().clone() for name in form.names
        }
        # torch has a fused step for the CPU, and chooses the step of other devices itself.
        self.optimiser: torch.optim.AdamW = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=0.0,
            betas=BETAS,
            weight_decay=0.0,
            fused=True if self.device.type == "cpu" else None,
        )
        self.best: ParameterTensors | None = None
        """Parameters with the lowest held-out loss; None before the first finite loss."""
        self.best_loss: float = float("inf")
        self.worse: int = 0
        """Measurements since the best one."""
        self.history: list[dict[str, float | None]] = []
        """Step, mean training loss since the measurement before, held-out loss; nats.

        None for a loss that is not finite; without held-out rows the key is missing."""
        self._loss_sum = 0.0
        self.loss_rows: int = 0
        self._losses: list[Tensor] = []
        """Sums of the losses of steps that are not in `_loss_sum` yet, on the device."""

    @property
    def loss_sum(self) -> float:
        """Sum of the training losses since the measurement before."""
        for loss in self._losses:
            self._loss_sum += float(loss)
        self._losses = []
        return self._loss_sum

    @loss_sum.setter
    def loss_sum(self, value: float) -> None:
        self._loss_sum, self._losses = value, []

    @property
    def stopped(self) -> bool:
        """Whether the held-out loss no longer falls."""
        return self.worse >= PATIENCE

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self.parameters.values())).device

    def on_device(self, form: Parametrization, device: torch.device) -> "Trainer":
        """The same regression on `device`, where `form` is the same, too."""
        axes = self.axes.on_device(device)
        parameters = {n: copy_to_device(v.detach(), device) for n, v in self.parameters.items()}
        moved = Trainer(form, axes, parameters)
        moved.restore(*self.state())
        return moved

    def step(self, x: Tensor, target: Target, lr: float, grads: ParameterTensors) -> None:
        """Take one AdamW step on rows `x` `(n, d)`; `grads` are buffers for the gradients."""
        for name, value in self.parameters.items():
            value.grad = grads[name].zero_()
        # A number would be waited for: the device then has nothing to do meanwhile.
        self._losses.append(self.form.losses(self.parameters, x, target, grads).sum())
        if len(self._losses) == PENDING_LOSSES:
            _ = self.loss_sum
        self.loss_rows += len(x)
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.step()
        # The buffers belong to the thread, which fits other regressions too.
        for value in self.parameters.values():
            value.grad = None

    def record_losses(self, step: int, held_out_loss: float | None) -> None:
        """Append a row to `history`; save the parameters if the held-out loss is the lowest."""
        training_loss = self.loss_sum / max(1, self.loss_rows)
        self._loss_sum, self.loss_rows = 0.0, 0
        row = {"step": step, "train": plain_value(training_loss)}
        if held_out_loss is not None:
            row["validation"] = plain_value(held_out_loss)
        self.history.append(row)
        if held_out_loss is None:
            return
        self.worse += 1
        if held_out_loss < self.best_loss:
            self.best_loss, self.worse = held_out_loss, 0
            self.best = {name: value.clone() for name, value in self.parameters.items()}

    def outcome(self) -> Outcome:
        """The best parameters so far, or the last ones if no held-out loss was finite."""
        folded = self.form.folded(self.best or self.parameters, self.axes)
        parameters = {name: copy_to_host(value) for name, value in folded.items()}
        row = self.history[-1 - self.worse] if self.best is not None else self.history[-1]
        return Outcome(parameters, row, self.history)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that changes during the fit, for a checkpoint: JSON, and tensors on the CPU.

        The device is none of it: a fit may go on on another one.
        """
        numbers = {
            "worse": self.worse,
            "history": self.history,
            "loss_rows": self.loss_rows,
            # JSON has no word for a sum that is not finite.
            "loss_sum": plain_value(self.loss_sum),
            "best_loss": None if self.best is None else self.best_loss,
        }
        tensors = {f"now.{name}": value for name, value in self.parameters.items()}
        tensors |= {f"best.{name}": value for name, value in (self.best or {}).items()}
        for name, value in self.parameters.items():
            for key, moment in self.optimiser.state.get(value, {}).items():
                tensors[f"{key}.{name}"] = moment
        return numbers, {name: copy_to_host(tensor) for name, tensor in tensors.items()}

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Set everything to a result of `state`."""
        self.worse, self.history = numbers["worse"], numbers["history"]
        self.loss_rows = numbers["loss_rows"]
        self._losses = []
        self._loss_sum = math.nan if numbers["loss_sum"] is None else numbers["loss_sum"]
        self.best = None
        if numbers["best_loss"] is not None:
            self.best_loss = numbers["best_loss"]
            self.best = {
                name: copy_to_device(tensors[f"best.{name}"], value.device)
                for name, value in self.parameters.items()
            }
        for name, value in self.parameters.items():
            value.copy_(tensors[f"now.{name}"])
            if f"exp_avg.{name}" in tensors:
                # The number of the step stays on the CPU.
                state = {"step": tensors[f"step.{name}"]}
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = copy_to_device(tensors[f"{key}.{name}"], value.device)
                self.optimiser.state[value] = state


Trainers = dict[Any, Trainer]
"""By (layer, offset), or by a longer tuple that begins with layer and offset."""


@dataclass
class Descent:
    """Fit of one group of regressions, all steps of it."""

    form: Parametrization
    """Parametrization of every regression."""
    n_classes: int
    """Number of classes (tokens) of every regression."""
    examples: Examples
    """Examples to fit."""
    validation: Examples | None
    """Examples that the held-out loss is measured on."""
    pairs: list[LayerOffset]
    """The (layer, offset) of every regression."""
    epochs: int
    """Passes over the examples, at most; see `LEAST_STEPS`."""
    rates: dict[LayerOffset, float] = field(default_factory=dict)
    """Learning rate of each pair."""
    checkpoint: Checkpoint | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    progress: Callable[[int], None] = lambda rows: None
    """Called with the number of rows of each step."""

    @property
    def steps(self) -> int:
        """Number of steps of the fit."""
        return max(self.epochs * self.examples.steps, LEAST_STEPS)

    @property
    def sweep_steps(self) -> int:
        """Number of steps of each short fit of a sweep."""
        return min(SWEEP_STEPS, max(WARM_UP, int(self.steps * SWEEP_SHARE)))

    @property
    def positions(self) -> int:
        """Number of rows that all steps read together."""
        return self.steps * self.examples.rows // self.examples.steps

    def new_trainer(self, pair: LayerOffset, fitted: ParameterTensors | None = None) -> Trainer:
        """The regression of `pair` before its first step, or with `fitted` parameters.

        The first call reads the examples once, for the initial statistics of all pairs.
        """
        layer, offset = pair
        axes = self._statistics.axes[layer]
        if fitted is None:
            parameters = self.form.start(axes, self._statistics.log_frequencies[offset])
        else:
            parameters = self.form.unfolded(fitted, axes)
        return Trainer(self.form, axes, parameters)

    @cached_property
    def _statistics(self) -> InitialStatistics:
        layers = list(dict.fromkeys(layer for layer, _ in self.pairs))
        offsets = list(dict.fromkeys(offset for _, offset in self.pairs))
        return measure_initial_statistics(self.examples, layers, offsets, self.n_classes)

    def run(self) -> dict[LayerOffset, Outcome]:
        """Fit all pairs; continues from the checkpoint if the folder holds one."""
        with self.checkpoint.lock() if self.checkpoint else nullcontext():
            trainers = {pair: self.new_trainer(pair) for pair in self.pairs}
            saved = self.checkpoint.load() if self.checkpoint else None
            if saved is None:
                first_step = 0
                self._save(trainers, 0)
            else:
                first_step = self._restore(trainers, *saved)
            with ThreadCrew.of(len(self.pairs), self.examples.device) as crew:
                self._descend(crew, trainers, first_step)
                outcomes = crew.map(Trainer.outcome, trainers.values())
        return dict(zip(trainers, outcomes, strict=True))

    def _descend(self, crew: ThreadCrew, trainers: Trainers, first_step: int) -> None:
        """Take all steps from `first_step` on, with measurements and checkpoints between them."""
        evaluation_steps, saved_at = max(1, self.steps // EVALUATIONS), time.monotonic()
        rows_left = self.positions - self._report(first_step * self.positions // self.steps)
        for number, batch in self.stream(first_step):
            if all(trainer.stopped for trainer in trainers.values()):
                break
            # One step of every regression, at its share of the learning rate.
            share = schedule(number, self.steps)
            advance(crew, trainers, batch, lambda pair, share=share: share * self.rates[pair])
            steps_taken = number + 1
            if steps_taken % evaluation_steps == 0 or steps_taken == self.steps:
                self._measure(crew, trainers, steps_taken)
            rows_left -= self._report(min(rows_left, len(next(iter(batch.hidden.values())))))
            if time.monotonic() - saved_at >= self.checkpoint_seconds:
                self._save(trainers, steps_taken)
                saved_at = time.monotonic()
        # Regressions that stopped early need no more rows; the progress still ends at the total.
        self._report(rows_left)
        self._save(trainers, self.steps)

    def _report(self, rows: int) -> int:
        self.progress(rows)
        return rows

    def stream(
        self, first_step: int, steps: int | None = None
    ) -> Iterator[tuple[int, ExampleBatch]]:
        """Batches with their numbers, from `first_step` to before `steps`, epoch after epoch."""
        number = first_step
        steps = self.steps if steps is None else steps
        while number < steps:
            epoch, step_in_epoch = divmod(number, self.examples.steps)
            for batch in self.examples.epoch(epoch, step_in_epoch):
                yield number, batch
                number += 1
                if number == steps:
                    return

    def _measure(self, crew: ThreadCrew, trainers: Trainers, steps_taken: int) -> None:
        active = {key: trainer for key, trainer in trainers.items() if not trainer.stopped}
        losses = held_out_losses(crew, active, self.validation) if self.validation else {}
        for key, trainer in active.items():
            trainer.record_losses(steps_taken, losses.get(key))

    def _save(self, trainers: Trainers, step: int) -> None:
        if self.checkpoint is None:
            return
        numbers, tensors = {}, {}
        for (layer, offset), trainer in trainers.items():
            key = f"{layer}.{offset}"
            numbers[key], trainer_tensors = trainer.state()
            tensors |= {f"{key}.{name}": value for name, value in trainer_tensors.items()}
        self.checkpoint.save({"step": step, "trainers": numbers}, tensors)

    def _restore(
        self, trainers: Trainers, state: dict[str, Any], tensors: dict[str, Tensor]
    ) -> int:
        """Set the trainers to a checkpoint; gives the number of the next step."""
        for (layer, offset), trainer in trainers.items():
            key = f"{layer}.{offset}"
            prefix = f"{key}."
            trainer_tensors = {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
            trainer.restore(state["trainers"][key], trainer_tensors)
        return state["step"]


def advance(
    crew: ThreadCrew, trainers: Trainers, batch: ExampleBatch, rates: Callable[[Any], float]
) -> None:
    """Take one step of every regression that still runs, at the learning rate `rates(key)`."""

    def take_step(key: Any, x: Tensor, target: Target) -> None:
        trainer = trainers[key]
        trainer.step(x, target, rates(key), crew.gradient_buffers(trainer.parameters))

    _for_each_regression(crew, trainers, batch, take_step)


def held_out_losses(crew: ThreadCrew, trainers: Trainers, validation: Examples) -> dict[Any, float]:
    """Mean loss on all of `validation` of every regression that still runs; sums in float64."""
    sums, counts = dict.fromkeys(trainers, 0.0), dict.fromkeys(trainers, 0)

    def add_losses(key: Any, x: Tensor, target: Target) -> None:
        trainer = trainers[key]
        losses = trainer.form.losses(trainer.parameters, x, target, None)
        sums[key] += float(copy_to_host(losses).double().sum())
        counts[key] += len(x)

    for batch in validation.epoch():
        _for_each_regression(crew, trainers, batch, add_losses)
    return {key: sums[key] / counts[key] for key in trainers if counts[key]}


def _for_each_regression(
    crew: ThreadCrew,
    trainers: Trainers,
    batch: ExampleBatch,
    work: Callable[[Any, Tensor, Target], None],
) -> None:
    """Call `work(key, states, target)` for every regression that still runs and has a row.

    States `(n, d)` are in the principal axes of their layer.
    """
    active = [key for key, trainer in trainers.items() if not trainer.stopped]
    # Rotate the states once for all offsets of a layer.
    axes = {key[0]: trainers[key].axes for key in active}
    rotated = crew.map(lambda layer: axes[layer](batch.hidden[layer]), axes)
    states = dict(zip(axes, rotated, strict=True))

    def work_on_rows(item: tuple[Any, Tensor | None, Target]) -> None:
        key, rows, target = item
        x = states[key[0]] if rows is None else states[key[0]][rows]
        if len(x):
            work(key, x, target)

    # Make targets once for all layers of an offset, and free them before the next offset:
    # distributions over the vocabulary are large.
    for offset in dict.fromkeys(key[1] for key in active):
        ((rows, target),) = crew.map(batch.target, [offset])
        crew.map(work_on_rows, [(key, rows, target) for key in active if key[1] == offset])


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at `step` of `steps`: linear rise, then linear fall to 0."""
    rise = max(1, min(WARM_UP, steps // 10))
    return min(1.0, (step + 1) / rise) * (1 - step / steps)

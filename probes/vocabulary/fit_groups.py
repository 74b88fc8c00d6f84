"""Fit of a vocabulary probe's pairs: one learning-rate sweep for all, then group by group.

`VocabProbe.fit` calls `fit_vocab_groups`. A group is as many (layer, offset) pairs as fit memory
together; groups are fitted one after the other in this process (`LocalRunner`) or on the workers
of a dask cluster (`ClusterRunner`). Neither the groups nor the workers change a bit of the result:
all groups draw the same batches, at learning rates from one sweep over the whole fit, and each
pair has its own arithmetic. `fit_job.py` shows who calls whom.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...cache.cluster import threads_of
from ...cache.devices import choose_device, memory_budget
from ...cache.errors import UsageError
from ...cache.progress import Progress
from ...cache.store.activation_cache import ActivationCache
from ..base.readout import LayerOffset
from ..base.resources import ProgressCounter
from ..training.checkpoint import Checkpoint, lock_folder
from ..training.threads import thread_pool
from .descent import Outcome
from .fit_job import CacheVocabFit, VocabFit
from .learning_rate_sweep import Sweep, SweepLosses, rates_of, representatives, rows_of

SavedState = tuple[dict[str, Any], dict[str, Tensor]]
"""State and tensors of a checkpoint."""
Task = Callable[[VocabFit], Any]
"""Work on a fit, run in this process or on a worker."""


@dataclass(frozen=True)
class VocabFitPlan:
    """Groups and learning rates, settled before the first group is fitted."""

    groups: list[list[LayerOffset]]
    rates: dict[LayerOffset, float]
    """Learning rate of each pair."""
    rows: list[dict[str, float | None]]
    """Layer, offset, learning rate and held-out loss of each fit of the sweep."""
    positions: int
    """Number of rows of an epoch."""


@dataclass(frozen=True)
class CheckpointFolder:
    """Folder of the checkpoints of a fit: the plan, and a subfolder for each group."""

    folder: Path
    identity: dict[str, Any]
    """Data and parameters of the fit; a checkpoint of another fit is refused."""
    seconds: float
    """Time between two checkpoints of a group, in seconds."""

    def plan_checkpoint(self) -> Checkpoint:
        """Checkpoint that holds the plan."""
        return Checkpoint(self.folder / "plan", self.identity, "plan.json")

    def group_checkpoint(
        self, number: int, pairs: list[LayerOffset], rates: dict[LayerOffset, float]
    ) -> Checkpoint:
        """Checkpoint of one group, which is identified by its pairs and learning rates too."""
        identity = {
            **self.identity,
            "pairs": _pairs_as_lists(pairs),
            "rates": [rates[pair] for pair in pairs],
        }
        return Checkpoint(self.folder / str(number), identity)

    def save_plan(self, plan: VocabFitPlan) -> None:
        """Save groups, learning rates and losses of the sweep."""
        state = {
            "step": 0,
            "groups": [_pairs_as_lists(pairs) for pairs in plan.groups],
            "sweep": plan.rows,
            "rates": list(plan.rates.values()),
        }
        self.plan_checkpoint().save(state, {})

    def remove(self, plan: VocabFitPlan) -> None:
        """Remove all checkpoints; the plan last, for it names the groups."""
        for number, pairs in enumerate(plan.groups):
            self.group_checkpoint(number, pairs, plan.rates).remove()
        self.plan_checkpoint().remove()


def fit_vocab_groups(
    fit: VocabFit,
    lr: float,
    sweep: bool,
    memory: int,
    client: Any = None,
    checkpoints: CheckpointFolder | None = None,
    progress: Progress | None = None,
    *,
    worker_device: str = "cpu",
) -> tuple[VocabFitPlan, dict[LayerOffset, Outcome]]:
    """Fit all pairs of `fit`; gives the plan and the outcome of each pair.

    `lr` is the learning rate, or with `sweep` the middle of the rates to try. `memory` in bytes
    bounds this process, or each worker of `client`, and the device. Workers fit on their
    `worker_device`.
    """
    if client is None:
        runner = LocalRunner(fit, memory_budget(fit.device, memory))
    else:
        runner = ClusterRunner(fit, memory, client, worker_device)
    # Another process may still work in the same folder: wait for its end.
    with lock_folder(None if checkpoints is None else checkpoints.folder):
        saved_plan = checkpoints.plan_checkpoint().load() if checkpoints else None
        groups = _saved_groups(saved_plan, runner)
        if groups is None:
            groups = divide(fit.pairs, runner.pairs_at_once, runner.threads)
        # The progress counts labelled positions, then the rows of all groups.
        group_positions = fit.descent(fit.pairs).positions
        counter = ProgressCounter(fit.positions + len(groups) * group_positions, progress)
        fit.progress = counter.add
        plan = _make_plan(fit, runner, groups, lr, sweep, saved_plan)
        if checkpoints is not None and saved_plan is None:
            checkpoints.save_plan(plan)
        tasks = [
            partial(
                fit_vocab_group,
                number=number,
                pairs=pairs,
                rates={pair: plan.rates[pair] for pair in pairs},
                checkpoints=checkpoints,
            )
            for number, pairs in enumerate(groups)
        ]
        outcomes: dict[LayerOffset, Outcome] = {}
        for _, group_outcomes in runner.run_all(tasks):
            outcomes |= group_outcomes
            if client is not None:
                counter.add(group_positions)
        if checkpoints is not None:
            checkpoints.remove(plan)
    return plan, {pair: outcomes[pair] for pairs in groups for pair in pairs}


def _saved_groups(
    saved_plan: SavedState | None, runner: "LocalRunner"
) -> list[list[LayerOffset]] | None:
    """The groups of a fit that was killed, if each still fits the memory."""
    if saved_plan is None:
        return None
    groups = [[(layer, offset) for layer, offset in pairs] for pairs in saved_plan[0]["groups"]]
    return groups if max(map(len, groups)) <= runner.pairs_at_once else None


def _make_plan(
    fit: VocabFit,
    runner: "LocalRunner",
    groups: list[list[LayerOffset]],
    lr: float,
    sweep: bool,
    saved_plan: SavedState | None,
) -> VocabFitPlan:
    """The saved plan, or a new plan from a sweep over the representatives of all pairs."""
    descent = fit.descent(fit.pairs)
    rates, rows = dict.fromkeys(fit.pairs, lr), []
    if saved_plan is not None:
        state = saved_plan[0]
        rates, rows = dict(zip(rates, state["rates"], strict=True)), state["sweep"]
    elif sweep and descent.validation is not None:
        swept_pairs = representatives(fit.pairs)
        sweep_groups = divide(swept_pairs, runner.pairs_at_once, runner.threads)
        tasks = [
            partial(sweep_group, pairs=pairs, lr=lr, fits_at_once=runner.pairs_at_once)
            for pairs in sweep_groups
        ]
        losses: SweepLosses = {}
        for _, group_losses in runner.run_all(tasks):
            losses |= group_losses
        # Workers end in any order; the report has the order of the pairs.
        losses = {pair: losses[pair] for pair in swept_pairs}
        rates, rows = rates_of(fit.pairs, losses, descent, lr), rows_of(losses)
    return VocabFitPlan(groups, rates, rows, descent.examples.rows)


def divide(
    pairs: Sequence[LayerOffset], largest_group: int, fewest_groups: int
) -> list[list[LayerOffset]]:
    """Cut `pairs` into equal groups of at most `largest_group`, neighbours together.

    At least `fewest_groups` groups, if there are so many pairs.
    """
    number = min(len(pairs), max(fewest_groups, -(-len(pairs) // largest_group)))
    edges = [len(pairs) * i // number for i in range(number + 1)]
    return [list(pairs[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _pairs_as_lists(pairs: list[LayerOffset]) -> list[list[int]]:
    """Pairs as JSON reads them back."""
    return [list(pair) for pair in pairs]


def sweep_group(
    fit: VocabFit, pairs: list[LayerOffset], lr: float, fits_at_once: int
) -> SweepLosses:
    """Task: the sweep of a few pairs."""
    return Sweep(fit.descent(pairs), lr, fits_at_once).run()


def fit_vocab_group(
    fit: VocabFit,
    number: int,
    pairs: list[LayerOffset],
    rates: dict[LayerOffset, float],
    checkpoints: CheckpointFolder | None,
) -> dict[LayerOffset, Outcome]:
    """Task: the fit of one group, with its own checkpoint."""
    descent = fit.descent(pairs, rates)
    descent.progress = fit.progress
    if checkpoints is not None:
        descent.checkpoint = checkpoints.group_checkpoint(number, pairs, rates)
        descent.checkpoint_seconds = checkpoints.seconds
    return descent.run()


class LocalRunner:
    """Runs tasks in this process, one after the other, each with all threads."""

    threads = 1
    """Number of tasks that run at the same time."""

    def __init__(self, fit: VocabFit, memory: int) -> None:
        self.fit = fit
        self.pairs_at_once: int = fit.pairs_in_memory(memory)
        """Most pairs of a task."""

    def run_all(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Number and result of every task, in any order."""
        for number, task in enumerate(tasks):
            yield number, task(self.fit)


class ClusterRunner(LocalRunner):
    """Runs tasks on the threads of a dask cluster, each task with one thread of torch's."""

    def __init__(self, fit: VocabFit, memory: int, client: Any, device: str) -> None:
        if not isinstance(fit, CacheVocabFit):
            raise UsageError(
                "client= is for a fit from a cache, which workers open on their own; rows are "
                "fitted in this process: leave client= out"
            )
        threads = threads_of(client).values()
        super().__init__(fit, memory // max(threads))
        self.client = client
        self.cache_fit = fit
        self.threads: int = sum(threads)
        self.device = device
        """Device of each worker."""

    def run_all(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Number and result of every task, as they end; unfinished tasks are cancelled."""
        from distributed import as_completed

        fit = self.cache_fit
        # Resolve `auto` here: processors of workers may differ.
        options = {**fit.options, "products": fit.products}
        data = fit.cache, fit.pairs, options, self.scattered_top_tokens, self.device
        futures = {
            self.client.submit(run_on_worker, task, *data, pure=False): number
            for number, task in enumerate(tasks)
        }
        try:
            for future in as_completed(futures, loop=self.client.loop):
                yield futures[future], future.result()
                future.release()
        finally:
            for future in futures:
                future.cancel()

    @cached_property
    def scattered_top_tokens(self) -> Any:
        """The model's top tokens, computed once in this process and sent to all workers."""
        if not len(self.cache_fit.labelled):
            return None
        top_tokens = np.asarray(self.cache_fit.top_tokens())
        return self.client.scatter(top_tokens, broadcast=True, hash=False)


def run_on_worker(
    task: Task,
    cache: ActivationCache,
    pairs: list[LayerOffset],
    options: dict[str, Any],
    top_tokens: np.ndarray | None,
    device: str,
) -> Any:
    """Run `task` on a fit of `cache`, in a new thread that has one thread of torch's."""

    def run() -> Any:
        fit = CacheVocabFit.of(cache, pairs, options, choose_device(device))
        fit.shared_top_tokens = top_tokens
        return task(fit)

    with thread_pool(1) as pool:
        return pool.submit(run).result()

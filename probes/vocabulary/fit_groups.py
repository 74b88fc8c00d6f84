"""Fits the pairs of a vocabulary probe: one sweep for all, then group by group, here or on workers.

Neither the groups nor the workers change a bit of the result: all groups draw the same batches, at
learning rates that one sweep over the whole fit has found, and each pair has its own arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...cache.cluster import threads_of
from ...cache.errors import UsageError
from ...cache.progress import Progress
from ...cache.store.activation_cache import ActivationCache
from ..base.readout import LayerOffset
from ..base.resources import ProgressCounter
from ..training.checkpoint import Checkpoint
from ..training.threads import thread_pool
from .descent import Outcome, representatives
from .fit_job import CacheVocabFit, VocabFit
from .learning_rate_sweep import Sweep, Tried, rates_of, rows_of

Known = tuple[dict[str, Any], dict[str, Tensor]]
"""What a checkpoint gives: JSON and tensors."""


@dataclass(frozen=True)
class VocabFitPlan:
    """What is settled before the groups are fitted."""

    groups: list[list[LayerOffset]]
    rates: dict[LayerOffset, float]
    """Learning rate of each pair."""
    rows: list[dict[str, float | None]]
    """Layer, offset, learning rate and held-out loss of each fit of the sweep."""
    positions: int
    """Rows of an epoch."""

    def calls(self, kept: "CheckpointFolder | None") -> list[tuple[Any, ...]]:
        """What `fit_group` is called with, once for each group."""
        return [
            (number, pairs, {pair: self.rates[pair] for pair in pairs}, kept)
            for number, pairs in enumerate(self.groups)
        ]


@dataclass(frozen=True)
class CheckpointFolder:
    """Where a fit is kept while it lasts."""

    folder: Path
    identity: dict[str, Any]
    """Of the fit."""
    seconds: float
    """Between two checkpoints of a group."""

    def plan(self) -> Checkpoint:
        """Of the plan."""
        return Checkpoint(self.folder / "plan", self.identity, "plan.json")

    def group(
        self, number: int, pairs: list[LayerOffset], rates: dict[LayerOffset, float]
    ) -> Checkpoint:
        """Of one group."""
        about = {"pairs": listed(pairs), "rates": [rates[pair] for pair in pairs]}
        return Checkpoint(self.folder / str(number), {**self.identity, **about})

    def save(self, plan: VocabFitPlan) -> None:
        """Keep what need not be found again."""
        state = {"groups": [listed(pairs) for pairs in plan.groups], "sweep": plan.rows}
        self.plan().save({"step": 0, **state, "rates": list(plan.rates.values())}, {})

    def remove(self, plan: VocabFitPlan) -> None:
        """Drop all of it; the plan last, for it says which groups there are."""
        for number, pairs in enumerate(plan.groups):
            self.group(number, pairs, plan.rates).remove()
        self.plan().remove()
        with suppress(OSError):
            self.folder.rmdir()


def fit_vocab_groups(
    job: VocabFit,
    lr: float,
    sweep: bool,
    memory: int,
    client: Any = None,
    kept: CheckpointFolder | None = None,
    progress: Progress | None = None,
) -> tuple[VocabFitPlan, dict[LayerOffset, Outcome]]:
    """Fit all pairs of `job` at the learning rate `lr`, or where a sweep begins with it."""
    team = LocalRunner(job, memory) if client is None else ClusterRunner(job, memory, client)
    with kept.plan().held() if kept else nullcontext():
        known = kept.plan().load() if kept else None
        groups = known_groups(known, team) or divide(job.pairs, team.room, team.threads)
        steps = job.descent(job.pairs).positions
        count = ProgressCounter(job.positions + len(groups) * steps, progress)
        job.progress = count.add
        plan = planned(job, team, groups, lr, sweep, known)
        if kept is not None and known is None:
            kept.save(plan)
        found: dict[int, dict[LayerOffset, Outcome]] = {}
        for number, outcomes in team.each(fit_vocab_group, plan.calls(kept)):
            found[number] = outcomes
            if client is not None:
                count.add(steps)
        if kept is not None:
            kept.remove(plan)
    return plan, {pair: found[n][pair] for n, pairs in enumerate(groups) for pair in pairs}


def known_groups(known: Known | None, team: "LocalRunner") -> list[list[LayerOffset]] | None:
    """The groups that a fit was cut into before it was killed, if each still fits the memory."""
    if known is None:
        return None
    groups = [[(la, n) for la, n in pairs] for pairs in known[0]["groups"]]
    return groups if max(map(len, groups)) <= team.room else None


def planned(
    job: VocabFit,
    team: "LocalRunner",
    groups: list[list[LayerOffset]],
    lr: float,
    sweep: bool,
    known: Known | None,
) -> VocabFitPlan:
    """The plan that was kept, or a new one from a sweep over all pairs."""
    whole = job.descent(job.pairs)
    rates, rows = dict.fromkeys(job.pairs, lr), []
    if known is not None:
        rates, rows = dict(zip(rates, known[0]["rates"], strict=True)), known[0]["sweep"]
    elif sweep and whole.validation is not None:
        tried = try_rates(job, team, lr)
        rates, rows = rates_of(job.pairs, tried, whole, lr), rows_of(tried)
    return VocabFitPlan(groups, rates, rows, whole.examples.rows)


def try_rates(job: VocabFit, team: "LocalRunner", lr: float) -> Tried:
    """Held-out losses of short fits of the representatives of all pairs."""
    some = representatives(job.pairs)
    calls = [(pairs, lr, team.room) for pairs in divide(some, team.room, team.threads)]
    found: Tried = {}
    for _, tried in team.each(sweep_group, calls):
        found |= tried
    return {pair: found[pair] for pair in some}


def divide(pairs: Sequence[LayerOffset], most: int, least: int) -> list[list[LayerOffset]]:
    """Groups of at most `most` pairs, `least` groups if there are so many pairs.

    Pairs of a layer stay neighbours.
    """
    number = min(len(pairs), max(least, -(-len(pairs) // most)))
    edges = [len(pairs) * i // number for i in range(number + 1)]
    return [list(pairs[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def listed(pairs: list[LayerOffset]) -> list[list[int]]:
    """Pairs as JSON has them."""
    return [list(pair) for pair in pairs]


def sweep_group(job: VocabFit, pairs: list[LayerOffset], lr: float, room: int) -> Tried:
    """The sweep of a few pairs."""
    return Sweep(job.descent(pairs), lr, room).run()


def fit_vocab_group(
    job: VocabFit,
    number: int,
    pairs: list[LayerOffset],
    rates: dict[LayerOffset, float],
    kept: CheckpointFolder | None,
) -> dict[LayerOffset, Outcome]:
    """The fit of one group."""
    descent = job.descent(pairs, rates)
    descent.progress = job.progress
    if kept is not None:
        descent.checkpoint = kept.group(number, pairs, rates)
        descent.checkpoint_seconds = kept.seconds
    return descent.run()


class LocalRunner:
    """This process, which does one thing after the other with all its threads."""

    threads = 1

    def __init__(self, job: VocabFit, memory: int) -> None:
        self.job, self.room = job, job.room(memory)

    def each(
        self, work: Callable[..., Any], calls: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """Number and result of `work(job, *call)` for all calls, in any order."""
        for number, call in enumerate(calls):
            yield number, work(self.job, *call)


class ClusterRunner(LocalRunner):
    """The threads of a cluster; each takes one group, with one thread of torch's."""

    def __init__(self, job: VocabFit, memory: int, client: Any) -> None:
        if not isinstance(job, CacheVocabFit):
            raise UsageError(
                "client= is for a fit from a cache, which workers open on their own; rows are "
                "fitted in this process: leave client= out"
            )
        threads = threads_of(client).values()
        super().__init__(job, memory // max(threads))
        self.client, self.cache_job, self.threads = client, job, sum(threads)

    def each(
        self, work: Callable[..., Any], calls: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        from distributed import as_completed

        job = self.cache_job
        assert job.cache is not None
        options = {**job.options, "products": job.products}
        sent = job.cache, job.pairs, options, self.tops
        futures = {
            self.client.submit(on_worker, work, *sent, *call, pure=False): number
            for number, call in enumerate(calls)
        }
        try:
            for future in as_completed(futures, loop=self.client.loop):
                yield futures[future], future.result()
                future.release()
        finally:
            for future in futures:
                future.cancel()

    @cached_property
    def tops(self) -> Any:
        """The model's top tokens, found here, once, and lent to all workers."""
        if not len(self.cache_job.labelled):
            return None
        return self.client.scatter(np.asarray(self.cache_job.tops()), broadcast=True, hash=False)


def on_worker(
    work: Callable[..., Any],
    cache: ActivationCache,
    pairs: list[LayerOffset],
    options: dict[str, Any],
    tops: np.ndarray | None,
    *call: Any,
) -> Any:
    """`work` on `cache`, in a thread of its own with one thread of torch's."""

    def fit() -> Any:
        job = CacheVocabFit.of(cache, pairs, options)
        job.given = tops
        return work(job, *call)

    with thread_pool(1) as pool:
        return pool.submit(fit).result()

"""Collects the moments of a cache for all layers, offsets and folds: out of core, in parallel."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import UsageError
from ..cache.store import ActivationCache
from ..cache.tokens import folds_of
from .moments import PRODUCTS, Accumulator, Moments, MomentSet, Pair, Shifted, merge_all

Progress = Callable[[int, int], None]
OFFSETS = (0, 1, 2, 3)
BLOCK_ROWS = 2048
"""Rows of one block of products; 2048 to 16384 are equally fast, twice this is the most."""
MEMORY = 2 << 30
"""Default budget in bytes, where a quarter of the machine's memory is not less."""


@dataclass(frozen=True)
class Pass:
    """One pass over the split, for as many layers and offsets as the memory allows."""

    layers: tuple[int, ...]
    offsets: tuple[int, ...]
    folds: int
    split: str
    products: str
    rows: int
    """Rows of a block."""
    tasks: int
    """Contiguous runs of sequences, worked on at the same time."""

    def bytes(self, d_model: int) -> int:
        """Memory of the accumulators of all tasks and the blocks they work on."""
        matrices = 2 * len(self.layers) * len(self.offsets) * self.folds * (self.tasks + 1)
        scratch = self.tasks * (len(self.offsets) + 3) * (d_model + self.rows)
        return 8 * d_model * (d_model * matrices + scratch)


def collect(
    cache: ActivationCache,
    layers: Sequence[int] | None = None,
    offsets: Sequence[int] = OFFSETS,
    **options: Any,
) -> MomentSet:
    """Moments of every layer and offset per fold, in as few passes as the memory budget allows.

    `options` are those of `collect_passes`. The result holds all matrices at once; where they
    are too many, fit from `collect_passes`, as `RidgeProbe` does.
    """
    found = list(collect_passes(cache, layers, offsets, **options))
    pairs = {pair: parts for part in found for pair, parts in part.pairs.items()}
    return MomentSet(dict(sorted(pairs.items())), cache.id, found[0].geometry, found[0].split)


def collect_passes(
    cache: ActivationCache,
    layers: Sequence[int] | None = None,
    offsets: Sequence[int] = OFFSETS,
    *,
    folds: int = 5,
    split: str = "train",
    products: str = "float64",
    memory: int | None = None,
    rows: int | None = None,
    tasks: int | None = None,
    client: Any = None,
    progress: Progress | None = None,
) -> Iterator[MomentSet]:
    """The moments of one group of layers after the other, each within `memory` bytes.

    `tasks` runs of sequences are summed up at the same time, by default one per core (of the
    `dask.distributed` cluster of `client`). `progress(done_positions, total_positions)` counts
    the positions of all passes. Raises `NotFoundError` for a layer the cache does not hold.
    """
    layers = cache.layers if layers is None else tuple(layers)
    check_request(cache, layers, offsets, folds, products)
    first = Pass(
        tuple(layers), tuple(offsets), folds, split, products,
        rows or cache.block_rows(BLOCK_ROWS), tasks or cores(client),
    )  # fmt: skip
    plans = divide(first, memory or default_memory(), cache.d_model)
    positions = int(cache.sequence_length[cache.split(split)].sum())
    count = Counter(positions * len(plans), progress)
    for plan in plans:
        parts = run_tasks(cache, plan, client, count)
        yield MomentSet(merge_runs(parts), cache.id, cache.head.geometry, split)


def check_request(
    cache: ActivationCache, layers: Sequence[int], offsets: Sequence[int], folds: int, products: str
) -> None:
    """Raise a `UsageError` for a request that cannot be right."""
    for layer in (*layers, cache.depth):
        cache.layer(layer)
    if not layers or not offsets or min(offsets) < 0:
        raise UsageError("name at least one layer and one offset; offsets are 0 or more")
    if folds < 1:
        raise UsageError(f"folds must be at least 1, not {folds}")
    if products not in PRODUCTS:
        raise UsageError(f"products must be one of {', '.join(PRODUCTS)}, not {products!r}")


def divide(plan: Pass, memory: int, d_model: int) -> list[Pass]:
    """Passes that fit `memory`: fewer layers, then fewer offsets, then fewer tasks each."""

    def part(i: int, j: int) -> Pass:
        chosen = plan.layers[i : i + layers], plan.offsets[j : j + offsets]
        return replace(plan, layers=chosen[0], offsets=chosen[1], tasks=tasks)

    def fits() -> bool:
        return part(0, 0).bytes(d_model) <= memory

    layers, offsets, tasks = len(plan.layers), len(plan.offsets), plan.tasks
    while layers > 1 and not fits():
        layers -= 1
    while offsets > 1 and not fits():
        offsets -= 1
    while tasks > 1 and not fits():
        tasks -= 1
    return [
        part(i, j)
        for i in range(0, len(plan.layers), layers)
        for j in range(0, len(plan.offsets), offsets)
    ]


Sums = dict[tuple[int, int, int], Moments]
"""By layer, offset and fold."""


def run_tasks(cache: ActivationCache, plan: Pass, client: Any, count: "Counter") -> list[Sums]:
    """The sums of every task, in the order of their sequences."""
    from dask.base import compute
    from dask.delayed import delayed

    parts = range(plan.tasks)
    if client is None:
        calls = [partial(sum_run, cache, plan, part, count.add) for part in parts]
        work = [delayed(call, pure=False)() for call in calls]
        with one_blas_thread():
            return list(compute(*work, scheduler="threads", num_workers=plan.tasks))
    from distributed import as_completed

    # Only the path and the plan travel: each worker opens the cache on its own.
    futures = [client.submit(sum_run, cache.path, plan, part, pure=False) for part in parts]
    for future in as_completed(futures):
        if future.status == "finished":
            part = futures.index(future)
            count.add(sum(len(cache.rows(window)) for window in windows(cache, plan, part)))
    return client.gather(futures)


def windows(cache: ActivationCache, plan: Pass, part: int) -> list[np.ndarray]:
    """Sequences of one task, in windows that hold about one block of every fold."""
    found = list(cache.blocks(cache.split(plan.split), plan.rows * plan.folds))
    return found[len(found) * part // plan.tasks : len(found) * (part + 1) // plan.tasks]


def sum_run(
    cache: ActivationCache | Path,
    plan: Pass,
    part: int,
    report: Callable[[int], None] = lambda positions: None,
) -> Sums:
    """Add up the moments of one contiguous run of sequences."""
    cache = cache if isinstance(cache, ActivationCache) else ActivationCache(cache)
    keys = [(la, o, f) for la in plan.layers for o in plan.offsets for f in range(plan.folds)]
    sums = {key: Accumulator(cache.d_model, cache.d_model) for key in keys}
    for window in windows(cache, plan, part):
        fold = folds_of(cache.sequence_hash[window], plan.folds)
        for number in range(plan.folds):
            for block in cache.blocks(window[fold == number], 2 * plan.rows):
                add_block(cache, plan, block, number, sums)
        report(len(cache.rows(window)))
    return {key: total.result() for key, total in sums.items()}


def add_block(
    cache: ActivationCache,
    plan: Pass,
    sequences: np.ndarray,
    fold: int,
    sums: dict[tuple[int, int, int], Accumulator],
) -> None:
    """Read whole `sequences` of one fold, every layer once, and add their moments."""
    rows, lengths = cache.rows(sequences), cache.sequence_length[sequences]
    last = cache.layer(cache.depth)[rows]
    targets = Shifted.of(last, lengths, plan.offsets, plan.products)
    for layer in plan.layers:
        x = last if layer == cache.depth else cache.layer(layer)[rows]
        for offset, block in zip(plan.offsets, targets.moments(x), strict=True):
            sums[layer, offset, fold].add(block)


def merge_runs(runs: list[Sums]) -> dict[Pair, tuple[Moments, ...]]:
    """Moments per fold of each (layer, offset), merged in the order of the runs."""
    folds = 1 + max(fold for _, _, fold in runs[0])
    pairs = dict.fromkeys((layer, offset) for layer, offset, _ in runs[0])
    return {
        (layer, offset): tuple(
            merge_all([run.pop((layer, offset, fold)) for run in runs]) for fold in range(folds)
        )
        for layer, offset in pairs
    }


class Counter:
    """Counts positions of several threads and tells a callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, positions: int) -> None:
        with self._lock:
            self.done += positions
            if self._progress is not None:
                self._progress(self.done, self.total)


def one_blas_thread() -> AbstractContextManager[Any]:
    """Limit BLAS to one thread in the whole process, while each core works on its own task.

    To be entered by the thread that waits for the tasks: what a task's thread asks for is undone
    by the first task that ends. Workers of `dask.distributed` start with the same limit.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def cores(client: Any = None) -> int:
    """Threads of the cluster of `client`, or cores that this process may use."""
    from dask.system import CPU_COUNT

    return CPU_COUNT if client is None else max(1, sum(client.nthreads().values()))


def default_memory() -> int:
    """`MEMORY`, or a quarter of the machine's memory if that is less; bytes."""
    return min(MEMORY, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)


def collect_rows(
    x: Any, y: Any, folds: int, products: str, client: Any = None
) -> tuple[Moments, ...]:
    """Moments of contiguous folds (as `KFold` cuts them) of numpy or dask arrays of rows."""
    from dask.base import compute
    from dask.delayed import delayed

    y = check_rows(x, y, folds)
    rows = max(1024, (2 << 20) // x.shape[1])
    edges = np.cumsum([0] + [len(x) // folds + (fold < len(x) % folds) for fold in range(folds)])
    totals = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        cuts = [*range(start, stop, rows), stop] if stop > start else [start, start]
        parts: list[Any] = [
            delayed(Moments.of, pure=False)(x[a:b], y[a:b], products)
            for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ]
        while len(parts) > 1:
            groups = [parts[i : i + 8] for i in range(0, len(parts), 8)]
            parts = [delayed(merge_all, pure=False)(group) for group in groups]
        totals.append(parts[0])
    if client is not None and not isinstance(x, np.ndarray):
        return tuple(client.gather(client.compute(totals)))
    with one_blas_thread():
        return tuple(compute(*totals, scheduler="threads", num_workers=cores()))


def check_rows(x: Any, y: Any, folds: int) -> Any:
    """`y` as `(n, d_out)`; raises `UsageError` if it does not go with `x` `(n, d_in)`."""
    if y is None or not all(hasattr(rows, "shape") for rows in (x, y)):
        raise UsageError("fit takes a cache, or two arrays: rows X (n, d_in) and targets y")
    if x.ndim != 2 or y.ndim not in (1, 2) or x.shape[0] != y.shape[0]:
        raise UsageError(f"X must be (n, d_in) and y (n, d_out); found {x.shape} and {y.shape}")
    if not 0 < folds <= x.shape[0]:
        raise UsageError(f"{x.shape[0]} rows cannot be cut into {folds} folds")
    return y[:, None] if y.ndim == 1 else y

"""Collects the moments of a cache for all layers, offsets and folds: out of core, in parallel."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...cache.cluster import results
from ...cache.errors import UsageError
from ...cache.progress import Progress
from ...cache.store.activation_cache import ActivationCache
from ..base.resources import ProgressCounter, available_cores, one_blas_thread
from .moment_set import MomentSet
from .moments import Moments, merge_all
from .pass_plan import CachePass, MomentRequest, plan_passes
from .row_identity import sequences_digest
from .shifted_sums import ShiftedSums

OFFSETS = (0, 1, 2, 3)
TAIL_ROWS = 512
"""Rows of a block of rows near the ends of sequences: few, so that they are read soon."""
SHIFT_ROWS = 256
"""Random rows whose median rows are shifted by."""
Shift = dict[int, np.ndarray]
"""What the rows of each layer are shifted by, `(d_model,)` float64."""


def collect_moments(
    cache: ActivationCache,
    layers: Sequence[int] | None = None,
    offsets: Sequence[int] = OFFSETS,
    targets: Sequence[int] | None = None,
    *,
    folds: int = 5,
    split: str = "train",
    products: str = "float64",
    across_documents: bool = False,
    drop_first: int = 0,
    **options: Any,
) -> MomentSet:
    """Moments of every (layer, offset, target) per fold, in as few passes as the memory allows.

    Targets are layers; the default is the last one. Pairs stay inside one document unless
    `across_documents`; the `drop_first` first positions of each sequence are in none. `options` are
    those of `collect_passes`. The
    result holds all matrices at once; where they are too many, fit from `collect_passes`, as
    `RidgeProbe` does. Raises `NotFoundError` for a layer the cache does not hold.
    """
    asked = MomentRequest.of(
        cache, layers, offsets, targets, folds=folds, split=split, products=products,
        across_documents=across_documents, drop_first=drop_first,
    )  # fmt: skip
    found = list(collect_passes(cache, asked, **options))
    pairs = {pair: parts for part in found for pair, parts in part.pairs.items()}
    return found[0].with_pairs({pair: pairs[pair] for pair in asked.pairs})


def collect_passes(
    cache: ActivationCache,
    request: MomentRequest,
    *,
    client: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[MomentSet]:
    """The moments of one group of layers after the other; `options` are those of `plan_passes`.

    `client` is one of `dask.distributed`, whose workers see the cache under the same path.
    `progress(done_positions, total_positions)` counts the positions of all passes.
    """
    plans = plan_passes(cache, request, client=client, **options)
    count = ProgressCounter(sum(plan.positions(cache) for plan in plans), progress)
    for plan in plans:
        yield run_pass(cache, plan, client, count)


def run_pass(
    cache: ActivationCache,
    plan: CachePass,
    client: Any = None,
    count: "ProgressCounter | None" = None,
) -> MomentSet:
    """The moments of one pass."""
    numbers = plan.sequences(cache)
    shift = shifts(cache, numbers, {*plan.request.layers, *plan.request.targets})
    sums = run_tasks(cache, plan, shift, client, count or ProgressCounter(0, None))
    return MomentSet.of(cache, plan.request, sums.moments(shift), sequences_digest(numbers))


def shifts(cache: ActivationCache, numbers: np.ndarray, layers: set[int]) -> Shift:
    """Medians of `SHIFT_ROWS` random rows of the sequences `numbers`, rounded to float32.

    A median is within one standard deviation of the mean, and stays among most rows where some
    are massive: pairs at an offset may have none of those (first tokens are never targets).
    """
    lengths = cache.sequence_length[numbers]
    ends, draw = np.cumsum(lengths), np.random.default_rng(0)
    if not len(ends):
        return {layer: np.zeros(cache.d_model) for layer in layers}
    chosen = np.sort(draw.integers(0, ends[-1], min(SHIFT_ROWS, int(ends[-1]))))
    sequence = np.searchsorted(ends, chosen, side="right")
    rows = cache.sequence_start[numbers][sequence] + chosen - (ends - lengths)[sequence]
    medians = {layer: np.median(cache.residual_array(layer)[rows], axis=0) for layer in layers}
    # Subtracting a float32 from float32 rows near it is exact.
    return {layer: found.astype(np.float32).astype(np.float64) for layer, found in medians.items()}


def run_tasks(
    cache: ActivationCache, plan: CachePass, shift: Shift, client: Any, count: "ProgressCounter"
) -> ShiftedSums:
    """The sums of all tasks, added in the order of their sequences."""
    from dask.base import compute
    from dask.delayed import delayed

    with one_blas_thread():
        if client is not None:
            return add_up(run_on(client, cache, plan, shift, count))
        calls = [
            partial(sum_run, cache, plan, shift, task, count.add) for task in range(plan.tasks)
        ]
        work = [delayed(call, pure=False)() for call in calls]
        return add_up(iter(compute(*work, scheduler="threads", num_workers=plan.tasks)))


def run_on(
    client: Any, cache: ActivationCache, plan: CachePass, shift: Shift, count: "ProgressCounter"
) -> Iterator[ShiftedSums]:
    """The sums of each task from the cluster of `client`, whose workers open the cache."""
    calls = [(cache, plan, shift, task) for task in range(plan.tasks)]
    # In order: sums then do not depend on which worker was first.
    for task, sums in enumerate(results(client, sum_run_alone, calls)):
        yield sums
        count.add(int(cache.sequence_length[plan.run(cache, task)].sum()))


def add_up(sums: Iterator[ShiftedSums]) -> ShiftedSums:
    """All `sums`, added to the first."""
    total = next(sums)
    for other in sums:
        total.add(other)
    return total


def sum_run_alone(cache: ActivationCache, plan: CachePass, shift: Shift, task: int) -> ShiftedSums:
    """`sum_run` in a worker process, which it leaves with one BLAS thread per task."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, user_api="blas")
    return sum_run(cache, plan, shift, task)


def sum_run(
    cache: ActivationCache,
    plan: CachePass,
    shift: Shift,
    task: int,
    report: Callable[[int], None] = lambda positions: None,
) -> ShiftedSums:
    """Add up one contiguous run of sequences; reads every layer once per block."""
    asked = plan.request
    sums = ShiftedSums(asked.layers, asked.offsets, asked.targets, asked.folds, cache.d_model)
    for fold, kind, rows in blocks_of(cache, plan, plan.run(cache, task), report):
        add_block(cache, asked, shift, fold, kind, rows, sums)
    return sums


def blocks_of(
    cache: ActivationCache, plan: CachePass, numbers: np.ndarray, report: Callable[[int], None]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Fold, kind and positions of every block of source rows of the sequences `numbers`."""
    asked = plan.request
    kinds = len(asked.offsets)
    held: dict[int, list[np.ndarray]] = {}
    folds = cache.sequence_folds(asked.folds, asked.split)
    for window in cache.blocks(numbers, plan.rows * asked.folds):
        rows, lengths = cache.positions_of(window), cache.sequence_length[window]
        left = asked.scope.largest_offsets(cache, window)
        kind = np.searchsorted(asked.offsets, left, side="right") - 1
        fold = np.repeat(folds[window], lengths)
        keys = np.where(kind < 0, -1, fold * kinds + kind)
        for key in np.unique(keys[keys >= 0]).tolist():
            size = plan.rows if key % kinds == kinds - 1 else min(plan.rows, TAIL_ROWS)
            waiting = np.concatenate([*held.pop(key, []), rows[keys == key]])
            full = len(waiting) // size * size
            for start in range(0, full, size):
                yield key // kinds, key % kinds, waiting[start : start + size]
            held[key] = [waiting[full:]]
        report(len(rows))
    for key, (waiting,) in held.items():
        if len(waiting):
            yield key // kinds, key % kinds, waiting


def add_block(
    cache: ActivationCache,
    asked: MomentRequest,
    shift: Shift,
    fold: int,
    kind: int,
    rows: np.ndarray,
    sums: ShiftedSums,
) -> None:
    """Add the pairs of the source `rows`, all of one fold and kind."""
    offsets = asked.offsets[: kind + 1]
    ends = np.concatenate([rows + offset for offset in offsets])
    needed, where = np.unique(ends, return_inverse=True) if len(offsets) > 1 else (ends, None)
    ys: list[list[np.ndarray]] = [[] for _ in offsets]
    for target, layer in enumerate(asked.targets):
        read = shifted(cache, layer, needed, shift, asked.products)
        for offset in range(len(offsets)):
            part = slice(offset * len(rows), (offset + 1) * len(rows))
            ys[offset].append(read if where is None else read[where[part]])
            sums.add_targets(fold, offset, target, ys[offset][target])
    sums.n[fold, kind] += len(rows)
    for number, layer in enumerate(asked.layers):
        sums.add_rows(fold, kind, number, shifted(cache, layer, rows, shift, asked.products), ys)


def shifted(
    cache: ActivationCache, layer: int, rows: np.ndarray, shift: Shift, products: str
) -> np.ndarray:
    """Rows of a layer, shifted, in the dtype of the products."""
    read = cache.residual_array(layer)[rows]
    if products == "float32":
        read -= shift[layer].astype(np.float32)
        return read
    return read - shift[layer]


def moments_of_rows(
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
    with one_blas_thread():
        if client is not None and not isinstance(x, np.ndarray):
            return tuple(client.gather(client.compute(totals)))
        return tuple(compute(*totals, scheduler="threads", num_workers=available_cores()))


def check_rows(x: Any, y: Any, folds: int) -> Any:
    """`y` as `(n, d_out)`; raises `UsageError` if it does not go with `x` `(n, d_in)`."""
    if y is None or not all(hasattr(rows, "shape") for rows in (x, y)):
        raise UsageError("fit takes a cache, or two arrays: rows X (n, d_in) and targets y")
    if x.ndim != 2 or y.ndim not in (1, 2) or x.shape[0] != y.shape[0]:
        raise UsageError(f"X must be (n, d_in) and y (n, d_out); found {x.shape} and {y.shape}")
    if not 0 < folds <= x.shape[0]:
        raise UsageError(f"n_samples={x.shape[0]} rows cannot be cut into {folds} folds")
    return y[:, None] if y.ndim == 1 else y

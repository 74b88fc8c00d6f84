"""Collects the moments of a cache for all layers, offsets and folds: out of core, in parallel.

collect_moments     all moments at once
collect_passes      group after group, each within the memory (see `pass_plan.py`)
collect_pass        one pass: blocks of rows -> `ShiftedSums` per task -> `MomentSet`; on a device
                    the products are those of `device_sums.py`
moments_of_rows     the moments of two arrays, numpy or dask, without a cache
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

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
from .shifted_sums import Shift, ShiftedSums
from .source_blocks import SourceBlock, source_blocks

if TYPE_CHECKING:
    import torch

OFFSETS = (0, 1, 2, 3)
SHIFT_ROWS = 256
"""Random rows with the median that rows are shifted by."""


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
    those of `collect_passes`. The result holds all matrices at once; where they are too many, fit
    from `collect_passes`, as `RidgeProbe` does. Raises `NotFoundError` for a layer that the cache
    does not hold.
    """
    request = MomentRequest.of(
        cache,
        layers,
        offsets,
        targets,
        folds=folds,
        split=split,
        products=products,
        across_documents=across_documents,
        drop_first=drop_first,
    )
    groups = list(collect_passes(cache, request, **options))
    pairs = {pair: parts for group in groups for pair, parts in group.pairs.items()}
    return replace(groups[0], pairs={pair: pairs[pair] for pair in request.pairs})


def collect_passes(
    cache: ActivationCache,
    request: MomentRequest,
    *,
    client: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[MomentSet]:
    """The moments of one group of layers after the other; `options` are those of `plan_passes`.

    `client` is one of `dask.distributed`, whose workers see the cache under the same path; with a
    `device`, each worker sums on its own. `progress(done_positions, total_positions)` counts the
    positions of all passes.
    """
    plans = plan_passes(cache, request, client=client, **options)
    counter = ProgressCounter(sum(plan.positions(cache) for plan in plans), progress)
    for plan in plans:
        yield collect_pass(cache, plan, client, counter)


def collect_pass(
    cache: ActivationCache,
    plan: CachePass,
    client: Any = None,
    counter: ProgressCounter | None = None,
) -> MomentSet:
    """The moments of one pass: all tasks are summed up, in the order of their sequences."""
    sequences = plan.sequences(cache)
    shift = median_rows(cache, sequences, {*plan.request.layers, *plan.request.targets})
    counter = counter or ProgressCounter(0, None)
    with one_blas_thread():
        if client is None:
            sums = _sums_of_threads(cache, plan, shift, counter)
        else:
            sums = _sums_of_cluster(cache, plan, shift, counter, client)
    return MomentSet.of(cache, plan.request, sums.moments(shift), sequences_digest(sequences))


def median_rows(cache: ActivationCache, sequences: np.ndarray, layers: set[int]) -> Shift:
    """Medians of `SHIFT_ROWS` random rows of `sequences`, rounded to float32.

    A median is within one standard deviation of the mean, and stays among most rows where some
    are massive: pairs at an offset may have none of those (first tokens are never targets).
    """
    lengths = cache.sequence_length[sequences]
    ends, rng = np.cumsum(lengths), np.random.default_rng(0)
    if not len(ends):
        return {layer: np.zeros(cache.d_model) for layer in layers}
    # Numbers of random positions, counted through the sequences, as rows of the cache.
    numbers = np.sort(rng.integers(0, ends[-1], min(SHIFT_ROWS, int(ends[-1]))))
    index = np.searchsorted(ends, numbers, side="right")
    rows = cache.sequence_start[sequences][index] + numbers - (ends - lengths)[index]
    medians = {layer: np.median(cache.residual_array(layer)[rows], axis=0) for layer in layers}
    # Subtracting a float32 from float32 rows near it is exact.
    return {
        layer: median.astype(np.float32).astype(np.float64) for layer, median in medians.items()
    }


def _sums_of_threads(
    cache: ActivationCache, plan: CachePass, shift: Shift, counter: ProgressCounter
) -> ShiftedSums:
    """The sums of all tasks, one thread each; on a device there is one task."""
    calls = [partial(sum_task, cache, plan, shift, task, counter.add) for task in range(plan.tasks)]
    if plan.device is not None:
        return reduce(ShiftedSums.add, (call() for call in calls))
    with ThreadPoolExecutor(plan.tasks) as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            return reduce(ShiftedSums.add, (future.result() for future in futures))
        finally:
            # After an error or an interrupt, tasks that have not begun do not run.
            for future in futures:
                future.cancel()


def _sums_of_cluster(
    cache: ActivationCache, plan: CachePass, shift: Shift, counter: ProgressCounter, client: Any
) -> ShiftedSums:
    """The sums of all tasks from the workers of `client`, which open the cache themselves."""
    calls = [(cache, plan, shift, task) for task in range(plan.tasks)]

    def counted_sums() -> Iterator[ShiftedSums]:
        for task, sums in enumerate(results(client, sum_task_on_worker, calls)):
            yield sums
            counter.add(int(cache.sequence_length[plan.task_sequences(cache, task)].sum()))

    # In the order of tasks: sums then do not depend on which worker was first.
    return reduce(ShiftedSums.add, counted_sums())


def sum_task_on_worker(
    cache: ActivationCache, plan: CachePass, shift: Shift, task: int
) -> ShiftedSums:
    """`sum_task` in a worker process, which keeps one BLAS thread per task from then on."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, user_api="blas")
    return sum_task(cache, plan, shift, task)


def sum_task(
    cache: ActivationCache,
    plan: CachePass,
    shift: Shift,
    task: int,
    report: Callable[[int], None] = lambda positions: None,
) -> ShiftedSums:
    """Sums over one contiguous run of sequences; `report` is told the positions of each block."""
    request = plan.request
    blocks = source_blocks(cache, plan, plan.task_sequences(cache, task), report)
    if plan.device is not None:
        from .device_sums import sum_on_device

        return sum_on_device(cache, request, shift, blocks, plan.block_rows, plan.device)
    sums = ShiftedSums(
        request.layers, request.offsets, request.targets, request.folds, cache.d_model
    )
    for block in blocks:
        add_block(sums, block, cache, request, shift)
    return sums


def add_block(
    sums: ShiftedSums,
    block: SourceBlock,
    cache: ActivationCache,
    request: MomentRequest,
    shift: Shift,
) -> None:
    """Add the pairs of the sources of `block` to `sums`; reads every layer once."""
    rows, offsets = block.rows, request.offsets[: block.reach + 1]
    distinct, index = block.targets(request.offsets)
    # Targets y, by offset and target layer.
    ys: list[list[np.ndarray]] = [[] for _ in offsets]
    for target, layer in enumerate(request.targets):
        distinct_rows = shifted_rows(cache, layer, distinct, shift, request.products)
        for offset in range(len(offsets)):
            part = slice(offset * len(rows), (offset + 1) * len(rows))
            y = distinct_rows if index is None else distinct_rows[index[part]]
            ys[offset].append(y)
            sums.add_targets(block.fold, offset, target, y)
    # Sources x of every layer, with all targets.
    sums.n[block.fold, block.reach] += len(rows)
    for number, layer in enumerate(request.layers):
        x = shifted_rows(cache, layer, rows, shift, request.products)
        sums.add_rows(block.fold, block.reach, number, x, ys)


def shifted_rows(
    cache: ActivationCache, layer: int, rows: np.ndarray, shift: Shift, products: str
) -> np.ndarray:
    """Rows of a layer less its shift, `(n, d_model)` in the dtype of the products."""
    states = cache.residual_array(layer)[rows]
    if products == "float32":
        states -= shift[layer].astype(np.float32)
        return states
    return states - shift[layer]


def moments_of_rows(
    x: Any,
    y: Any,
    folds: int,
    products: str,
    client: Any = None,
    *,
    device: "torch.device | None" = None,
) -> tuple[Moments, ...]:
    """Moments of contiguous folds (as `KFold` cuts them) of numpy or dask arrays of rows.

    Products are those of `device`, None for numpy on the CPU or on the workers of `client`.
    """
    from dask.base import compute
    from dask.delayed import delayed

    y = check_rows(x, y, folds)
    rows = max(1024, (2 << 20) // x.shape[1])
    edges = np.cumsum([0] + [len(x) // folds + (fold < len(x) % folds) for fold in range(folds)])
    if device is not None:
        from .device_sums import moments_on_device

        bounds = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        return tuple(moments_on_device(x[a:b], y[a:b], rows, products, device) for a, b in bounds)
    totals = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        # The moments of each block of rows, ...
        cuts = [*range(start, stop, rows), stop] if stop > start else [start, start]
        parts: list[Any] = [
            delayed(Moments.of, pure=False)(x[a:b], y[a:b], products)
            for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ]
        # ... merged eight by eight until those of the fold are left.
        while len(parts) > 1:
            groups = [parts[i : i + 8] for i in range(0, len(parts), 8)]
            parts = [delayed(merge_all, pure=False)(group) for group in groups]
        totals.append(parts[0])
    with one_blas_thread():
        if client is not None and not isinstance(x, np.ndarray):
            return tuple(client.gather(client.compute(totals)))
        return tuple(compute(*totals, scheduler="threads", num_workers=available_cores()))


def check_rows(x: Any, y: Any, folds: int) -> Any:
    """`y` as `(n, d_out)`; raises `UsageError` if `x` is not `(n, d_in)` with as many rows."""
    if y is None or not all(hasattr(rows, "shape") for rows in (x, y)):
        raise UsageError("fit takes a cache, or two arrays: rows X (n, d_in) and targets y")
    if x.ndim != 2 or y.ndim not in (1, 2) or x.shape[0] != y.shape[0]:
        raise UsageError(f"X must be (n, d_in) and y (n, d_out); found {x.shape} and {y.shape}")
    if not 0 < folds <= x.shape[0]:
        raise UsageError(f"n_samples={x.shape[0]} rows cannot be cut into {folds} folds")
    return y[:, None] if y.ndim == 1 else y

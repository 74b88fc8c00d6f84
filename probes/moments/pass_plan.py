"""Plans passes over a cache: which layers, offsets and targets at a time fit the memory.

A `MomentRequest` says which moments a fit needs; `plan_passes` turns it into `CachePass`es, which
`collect_moments.py` runs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.cluster import threads_of
from ...cache.devices import memory_budget
from ...cache.errors import UsageError
from ...cache.number_ranges import as_tuple
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import PairScope
from ..base.resources import available_cores, default_memory
from .moments import PRODUCTS
from .shifted_sums import LayerOffsetTarget

if TYPE_CHECKING:
    import torch

BLOCK_ROWS = 4096
"""Rows of one block of products; 2048 to 16384 are about equally fast."""
SMALL_ROWS = 512
"""Rows of a block below which products are slow."""
MOST_FOLDS = 1 << 16
"""Most folds of a cross-validation; each has moments of its own."""
FEWEST_SEQUENCES = 64
"""Sequences of a random draw at least, so that every fold has some."""
SOLVE_MATRICES = 14
"""Float64 matrices `(d_model, d_model)` that the solution of one (layer, offset) works on."""


@dataclass(frozen=True)
class MomentRequest:
    """Which moments a fit needs: every (layer, offset, target), per fold of a split."""

    layers: tuple[int, ...]
    """Layers of x."""
    offsets: tuple[int, ...]
    """Offsets N of the pairs (t, t+N), ascending."""
    targets: tuple[int, ...]
    """Layers of y."""
    folds: int = 5
    split: str = "train"
    products: str = "float64"
    """dtype of the products of blocks, one of `PRODUCTS`."""
    across_documents: bool = False
    """Whether pairs may join two documents of a sequence."""
    drop_first: int = 0
    """Positions at the start of each sequence that are no sources."""
    max_positions: int | None = None
    """Most positions that are read, of a random draw of whole sequences; None for all."""

    @classmethod
    def of(
        cls,
        cache: ActivationCache,
        layers: Sequence[int] | None,
        offsets: Iterable[int],
        targets: Sequence[int] | None,
        **options: Any,
    ) -> "MomentRequest":
        """A checked request of `cache`; None means all layers, and the last layer as the target."""
        if layers is None:
            layers = cache.layers
        if targets is None:
            targets = (cache.n_blocks,)
        return cls(
            tuple(dict.fromkeys(as_tuple(layers, "layers"))),
            tuple(sorted(set(as_tuple(offsets, "offsets")))),
            tuple(dict.fromkeys(as_tuple(targets, "targets"))),
            **options,
        ).check(cache)

    def check(self, cache: ActivationCache) -> "MomentRequest":
        """Raise `UsageError` for a request that cannot be right, `NotFoundError` for a layer."""
        for layer in (*self.layers, *self.targets):
            cache.residual_array(layer)
        if not self.layers or not self.offsets or not self.targets or min(self.offsets) < 0:
            raise UsageError(
                "name at least one layer, one offset and one target; offsets are 0 or more"
            )
        if not 1 <= self.folds <= MOST_FOLDS:
            raise UsageError(f"folds must be at least 1 and at most {MOST_FOLDS}, not {self.folds}")
        if self.products not in PRODUCTS:
            raise UsageError(
                f"products must be one of {', '.join(PRODUCTS)}, not {self.products!r}"
            )
        cache.sequences(self.split)
        self.scope.check()
        return self

    def sequences(self, cache: ActivationCache) -> np.ndarray:
        """Numbers of the sequences that are counted, ascending."""
        numbers = cache.sequences(self.split)
        if not self.is_sample(cache):
            return numbers
        shuffled = np.random.default_rng(0).permutation(numbers)
        drawn = np.cumsum(cache.sequence_length[shuffled]) <= self.max_positions
        return np.sort(shuffled[: max(int(drawn.sum()), FEWEST_SEQUENCES)])

    def is_sample(self, cache: ActivationCache) -> bool:
        """Whether some sequences of the split are not counted."""
        numbers = cache.sequences(self.split)
        return (
            self.max_positions is not None
            and len(numbers) > FEWEST_SEQUENCES
            and int(cache.sequence_length[numbers].sum()) > self.max_positions
        )

    @property
    def scope(self) -> PairScope:
        """Which pairs (t, t+N) are counted."""
        return PairScope(self.across_documents, self.drop_first)

    @property
    def pairs(self) -> list[LayerOffsetTarget]:
        """All (layer, offset, target)."""
        return [(la, n, m) for la in self.layers for n in self.offsets for m in self.targets]

    def for_pairs(self, pairs: Iterable[LayerOffsetTarget]) -> "list[MomentRequest]":
        """Requests that together have `pairs`, each exactly once.

        A request has every combination of its layers, offsets and targets; any set of pairs is cut
        into few of them.
        """
        # The offsets of each (layer, target).
        offsets_of: dict[tuple[int, int], tuple[int, ...]] = {}
        for layer, offset, target in sorted(pairs):
            offsets_of[layer, target] = (*offsets_of.get((layer, target), ()), offset)
        # Layers that need the same offsets of a target go together, ...
        layers_of: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {}
        for (layer, target), offsets in offsets_of.items():
            layers_of[target, offsets] = (*layers_of.get((target, offsets), ()), layer)
        # ... and then targets that are needed of the same layers and offsets.
        targets_of: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]] = {}
        for (target, offsets), layers in layers_of.items():
            targets_of[layers, offsets] = (*targets_of.get((layers, offsets), ()), target)
        return [
            replace(self, layers=layers, offsets=offsets, targets=targets)
            for (layers, offsets), targets in targets_of.items()
        ]

    def matrices(self) -> int:
        """Number of matrices `(d_model, d_model)` of the moments, of all folds."""
        return len(self.layers) * len(self.offsets) * (1 + len(self.targets)) * self.folds

    def bytes(self, d_model: int) -> int:
        """Bytes of the moments, without the means."""
        return 8 * d_model**2 * self.matrices()


@dataclass(frozen=True)
class CachePass:
    """One pass over the split, for as many layers and offsets as the memory allows."""

    request: MomentRequest
    first_sequence: int
    """Number of the first sequence that is read."""
    block_rows: int
    """Rows of a block of products."""
    tasks: int
    """Contiguous runs of sequences that are summed up at the same time."""
    cores: int
    """Solutions that are computed at the same time afterwards."""
    device: "torch.device | None" = None
    """Device of the products; None for numpy on the CPU."""

    def bytes(self, d_model: int) -> int:
        """Most memory at a time: sums and blocks of all tasks, or moments and their solutions."""
        request, sums = self.request, self.request.bytes(d_model)
        # Several targets share the spectra of all folds.
        matrices = SOLVE_MATRICES + request.folds * (len(request.targets) > 1)
        solutions = len(request.layers) * len(request.offsets)
        solving = 8 * matrices * d_model**2 * min(self.cores, solutions)
        # On a device, sums are added up there and copied once.
        copies = max(self.tasks, 2) if self.device is None else self.tasks
        return max(copies * sums + self.block_bytes(d_model), sums + solving)

    def device_bytes(self, d_model: int) -> int:
        """Most memory of a device at a time: sums and blocks of one task, or a solution's work."""
        sums, blocks = self.request.bytes(d_model), self.block_bytes(d_model) // self.tasks
        return max(sums + blocks, 8 * d_model**2 * (SOLVE_MATRICES + 2 * self.request.folds))

    def block_bytes(self, d_model: int) -> int:
        """Bytes of the blocks and products that all tasks work on."""
        itemsize = np.dtype(self.request.products).itemsize
        arrays = 1 + len(self.request.offsets) * len(self.request.targets)
        # 16 bytes an entry for rows as stored, as float32, and as gathered.
        block = self.block_rows * d_model * (itemsize * arrays + 16)
        return self.tasks * (block + 2 * itemsize * d_model**2)

    def sequences(self, cache: ActivationCache) -> np.ndarray:
        """Numbers of the sequences of this pass."""
        numbers = self.request.sequences(cache)
        return numbers[np.searchsorted(numbers, self.first_sequence) :]

    def positions(self, cache: ActivationCache) -> int:
        """Positions that this pass reads."""
        return int(cache.sequence_length[self.sequences(cache)].sum())

    def task_sequences(self, cache: ActivationCache, task: int) -> np.ndarray:
        """Sequences of one task; all tasks have about the same number of positions."""
        numbers = self.sequences(cache)
        ends = np.cumsum(cache.sequence_length[numbers])
        total = int(ends[-1]) if len(ends) else 0
        edges = [total * part // self.tasks for part in (task, task + 1)]
        start, stop = np.searchsorted(ends, edges, side="right")
        return numbers[start : stop if task + 1 < self.tasks else None]


def plan_passes(
    cache: ActivationCache,
    request: MomentRequest,
    *,
    first_sequence: int = 0,
    memory: int | None = None,
    rows: int | None = None,
    tasks: int | None = None,
    client: Any = None,
    device: "torch.device | None" = None,
) -> list[CachePass]:
    """Passes that stay within `memory` bytes each, over sequences from `first_sequence` on.

    A budget that is too small for one (layer, offset, target) with all its folds is exceeded.
    `tasks` runs of sequences are summed up at the same time, by default one per core (of the
    cluster of `client`), a block of `rows` at a time. On a `device`, one run at a time (with a
    `client`, one per worker), and sums and blocks are within its free memory, too.
    """
    tasks_at_once = available_cores(client)
    if device is not None:
        tasks_at_once = 1 if client is None else len(threads_of(client))
    whole = CachePass(
        request,
        first_sequence,
        rows or cache.block_rows(BLOCK_ROWS),
        tasks or tasks_at_once,
        available_cores() if device is None else 1,
        device,
    )
    memory = memory or default_memory()
    # The devices of workers may not be here.
    on_device = memory if device is None or client is not None else memory_budget(device, memory)
    return divide_pass(whole, memory, cache.d_model, on_device)


def reason_of_passes(
    passes: Sequence[CachePass], requests: Sequence[MomentRequest], memory: int, d_model: int
) -> str | None:
    """Say what of `requests` does not fit `memory` bytes, and that it takes these `passes`.

    None where each request takes one pass within the memory.
    """
    if not passes:
        return None
    largest = max(plan.bytes(d_model) for plan in passes)
    if largest > memory:
        folds = passes[0].request.folds
        over = f"{len(passes)} passes" if len(passes) > 1 else "one pass"
        return (
            f"the moments of one (layer, offset) in {folds} folds and their solution take "
            f"{largest / 1e6:,.1f} MB, more than the memory of {memory / 1e6:,.1f} MB: they are "
            f"collected one by one, and that much is taken, in {over} over the rows"
        )
    if len(passes) <= len(requests):
        return None
    whole = max(replace(passes[0], request=request).bytes(d_model) for request in requests)
    pairs = [len(plan.request.pairs) for plan in passes]
    return (
        f"moments of {sum(pairs)} (layer, offset) do not fit the memory of {memory / 1e6:,.1f} MB: "
        f"up to {max(pairs)} are collected at a time, in {len(passes)} passes over the rows, each "
        f"of which reads the target layer again; with {whole / 1e6:,.1f} MB (--memory), all are "
        "collected at once"
    )


def divide_pass(
    plan: CachePass, memory: int, d_model: int, device_memory: int | None = None
) -> list[CachePass]:
    """Passes within `memory` bytes: fewer layers, then targets, offsets and tasks each.

    `device_memory` is the number of bytes for the plan's device, by default the same.
    """
    on_device = memory if device_memory is None else device_memory
    # Smaller blocks first, down to `SMALL_ROWS`, where blocks would take a quarter of the memory.
    while plan.block_rows > SMALL_ROWS and plan.block_bytes(d_model) > on_device // 4:
        plan = replace(plan, block_rows=max(SMALL_ROWS, plan.block_rows // 2))

    sizes = {name: len(getattr(plan.request, name)) for name in ("layers", "targets", "offsets")}
    tasks = plan.tasks

    def part(starts: dict[str, int]) -> CachePass:
        """The pass over `sizes` layers, targets and offsets from `starts` on."""
        numbers = {
            name: getattr(plan.request, name)[start : start + sizes[name]]
            for name, start in starts.items()
        }
        return replace(plan, request=replace(plan.request, **numbers), tasks=tasks)

    def fits() -> bool:
        first = part(dict.fromkeys(sizes, 0))
        if plan.device is not None and first.device_bytes(d_model) > on_device:
            return False
        return first.bytes(d_model) <= memory

    # Take fewer of each until the first part fits.
    for name in sizes:
        while sizes[name] > 1 and not fits():
            sizes[name] -= 1
    while tasks > 1 and not fits():
        tasks -= 1
    return [
        part({"layers": layer, "targets": target, "offsets": offset})
        for layer in range(0, len(plan.request.layers), sizes["layers"])
        for offset in range(0, len(plan.request.offsets), sizes["offsets"])
        for target in range(0, len(plan.request.targets), sizes["targets"])
    ]

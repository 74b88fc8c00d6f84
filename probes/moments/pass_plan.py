"""Plans passes over a cache: which layers, offsets and targets at a time, within the memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.number_ranges import as_tuple
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import PairScope
from ..base.resources import available_cores, default_memory
from .moments import PRODUCTS
from .shifted_sums import LayerOffsetTarget

BLOCK_ROWS = 4096
"""Rows of one block of products; 2048 to 16384 are about equally fast."""
SMALL_ROWS = 512
"""Rows of a block below which products are slow."""
SOLVE_MATRICES = 14
"""Matrices of float64 that the solution of one (layer, offset) works on at a time."""


@dataclass(frozen=True)
class MomentRequest:
    """Which moments are wanted."""

    layers: tuple[int, ...]
    """Layers of x."""
    offsets: tuple[int, ...]
    """Ascending."""
    targets: tuple[int, ...]
    """Layers of y."""
    folds: int = 5
    split: str = "train"
    products: str = "float64"
    across_documents: bool = False
    """Whether pairs may join two documents of a sequence."""
    drop_first: int = 0
    """Positions at the start of each sequence that are no sources."""

    @classmethod
    def of(
        cls,
        cache: ActivationCache,
        layers: Sequence[int] | None,
        offsets: Iterable[int],
        targets: Sequence[int] | None,
        **options: Any,
    ) -> "MomentRequest":
        """A request of `cache`, by default of all layers, with the last one as the target."""
        return cls(
            cache.layers if layers is None else tuple(dict.fromkeys(as_tuple(layers, "layers"))),
            tuple(sorted(set(as_tuple(offsets, "offsets")))),
            (cache.n_blocks,)
            if targets is None
            else tuple(dict.fromkeys(as_tuple(targets, "targets"))),
            **options,
        ).check(cache)

    def check(self, cache: ActivationCache) -> "MomentRequest":
        """Raise a `UsageError` for a request that cannot be right."""
        for layer in (*self.layers, *self.targets):
            cache.residual_array(layer)
        if not self.layers or not self.offsets or not self.targets or min(self.offsets) < 0:
            raise UsageError(
                "name at least one layer, one offset and one target; offsets are 0 or more"
            )
        if self.folds < 1:
            raise UsageError(f"folds must be at least 1, not {self.folds}")
        if self.products not in PRODUCTS:
            raise UsageError(
                f"products must be one of {', '.join(PRODUCTS)}, not {self.products!r}"
            )
        cache.sequences(self.split)
        self.scope.check()
        return self

    @property
    def scope(self) -> PairScope:
        """Which pairs are counted."""
        return PairScope(self.across_documents, self.drop_first)

    @property
    def pairs(self) -> list[LayerOffsetTarget]:
        """All (layer, offset, target)."""
        return [(la, n, m) for la in self.layers for n in self.offsets for m in self.targets]

    def of_pairs(self, pairs: Iterable[LayerOffsetTarget]) -> "list[MomentRequest]":
        """Requests that want `pairs`, each exactly once."""
        offsets: dict[tuple[int, int], tuple[int, ...]] = {}
        for layer, offset, target in sorted(pairs):
            offsets[layer, target] = (*offsets.get((layer, target), ()), offset)
        layers: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {}
        for (layer, target), chosen in offsets.items():
            layers[target, chosen] = (*layers.get((target, chosen), ()), layer)
        targets: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]] = {}
        for (target, chosen), found in layers.items():
            targets[found, chosen] = (*targets.get((found, chosen), ()), target)
        return [
            replace(self, layers=found, offsets=chosen, targets=several)
            for (found, chosen), several in targets.items()
        ]

    def matrices(self) -> int:
        """Matrices `(d_model, d_model)` of the moments, of all folds."""
        return len(self.layers) * len(self.offsets) * (1 + len(self.targets)) * self.folds

    def bytes(self, d_model: int) -> int:
        """Bytes of the moments, but for the means."""
        return 8 * d_model**2 * self.matrices()


@dataclass(frozen=True)
class CachePass:
    """One pass over the split, for as many layers and offsets as the memory allows."""

    request: MomentRequest
    first: int
    """Sequences before this one are left out."""
    rows: int
    """Rows of a block."""
    tasks: int
    """Contiguous runs of sequences, worked on at the same time."""
    cores: int
    """Solutions worked on at the same time afterwards."""

    def bytes(self, d_model: int) -> int:
        """Most memory at a time: sums and blocks of all tasks, or moments and their solutions."""
        asked, sums = self.request, self.request.bytes(d_model)
        # Several targets share the spectra of all folds.
        matrices = SOLVE_MATRICES + asked.folds * (len(asked.targets) > 1)
        sources = len(asked.layers) * len(asked.offsets)
        solving = 8 * matrices * d_model**2 * min(self.cores, sources)
        return max(max(self.tasks, 2) * sums + self.blocks(d_model), sums + solving)

    def blocks(self, d_model: int) -> int:
        """Bytes of the blocks and products that all tasks work on."""
        itemsize = np.dtype(self.request.products).itemsize
        arrays = 1 + len(self.request.offsets) * len(self.request.targets)
        # Rows as they are stored, read and gathered, beside those of the products.
        rows = self.rows * d_model * (itemsize * arrays + 16)
        return self.tasks * (rows + 2 * itemsize * d_model**2)

    def sequences(self, cache: ActivationCache) -> np.ndarray:
        """Numbers of the sequences of this pass."""
        numbers = cache.sequences(self.request.split)
        return numbers[np.searchsorted(numbers, self.first) :]

    def positions(self, cache: ActivationCache) -> int:
        """Positions that this pass reads."""
        return int(cache.sequence_length[self.sequences(cache)].sum())

    def run(self, cache: ActivationCache, task: int) -> np.ndarray:
        """Sequences of one task; all tasks have about the same number of positions."""
        numbers = self.sequences(cache)
        ends = np.cumsum(cache.sequence_length[numbers])
        total = int(ends[-1]) if len(ends) else 0
        edges = [total * part // self.tasks for part in (task, task + 1)]
        start, stop = np.searchsorted(ends, edges, side="right")
        return numbers[start : stop if task + 1 < self.tasks else None]


def divide_passes(plan: CachePass, memory: int, d_model: int) -> list[CachePass]:
    """Passes within `memory` bytes: fewer layers, then targets, offsets and tasks each.

    Blocks are made smaller first, down to `SMALL_ROWS`, where they would take a quarter of it.
    """
    while plan.rows > SMALL_ROWS and plan.blocks(d_model) > memory // 4:
        plan = replace(plan, rows=max(SMALL_ROWS, plan.rows // 2))
    sizes = {name: len(getattr(plan.request, name)) for name in ("layers", "targets", "offsets")}
    tasks = plan.tasks

    def part(starts: dict[str, int]) -> CachePass:
        chosen = {n: getattr(plan.request, n)[at : at + sizes[n]] for n, at in starts.items()}
        return replace(plan, request=replace(plan.request, **chosen), tasks=tasks)

    def fits() -> bool:
        return part(dict.fromkeys(sizes, 0)).bytes(d_model) <= memory

    for name in sizes:
        while sizes[name] > 1 and not fits():
            sizes[name] -= 1
    while tasks > 1 and not fits():
        tasks -= 1
    asked = plan.request
    return [
        part({"layers": i, "targets": k, "offsets": j})
        for i in range(0, len(asked.layers), sizes["layers"])
        for j in range(0, len(asked.offsets), sizes["offsets"])
        for k in range(0, len(asked.targets), sizes["targets"])
    ]


def plan_passes(
    cache: ActivationCache,
    request: MomentRequest,
    *,
    first: int = 0,
    memory: int | None = None,
    rows: int | None = None,
    tasks: int | None = None,
    client: Any = None,
) -> list[CachePass]:
    """Passes that stay within `memory` bytes each; sequences before number `first` are left out.

    A budget that is too small for one (layer, offset, target) with all its folds is exceeded.
    `tasks` runs of sequences are summed up at the same time, by default one per core (of the
    cluster of `client`), a block of `rows` at a time.
    """
    whole = CachePass(
        request,
        first,
        rows or cache.block_rows(BLOCK_ROWS),
        tasks or available_cores(client),
        available_cores(),
    )
    return divide_passes(whole, memory or default_memory(), cache.d_model)

"""Sums of one pass over a cache on a device of torch, as `shifted_sums.py` has them on the CPU.

`sum_on_device` reads the rows of each block in threads ahead of the device, in their stored dtype,
and gives `ShiftedSums`. Where the device has float64, rows are cast and shifted there, products are
those of the request and sums stay there until the end of the pass. On a device without float64,
products of blocks are float32 and are added up in float64 on the host: a relative error of about
1e-6 in the moments, as with `products="float32"`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ...cache.devices import TileRows, copy_to_device, copy_to_host, wide_dtype
from ...cache.store.activation_cache import ActivationCache
from ..base.resources import available_cores
from .moments import Moments, centred, merge_all, sum_of_squares
from .pass_plan import SMALL_ROWS, MomentRequest
from .shifted_sums import FIELDS, Shift, ShiftedSums
from .source_blocks import SourceBlock

Item = TypeVar("Item")
READERS = 4
"""Most threads that read rows ahead; each has the rows of one layer of a block."""


def sum_on_device(
    cache: ActivationCache,
    request: MomentRequest,
    shift: Shift,
    blocks: Iterable[SourceBlock],
    block_rows: int,
    device: torch.device,
) -> ShiftedSums:
    """The sums of `request` over the pairs of all `blocks`, of at most `block_rows` sources.

    Rows are less their layer's `shift`. Where the memory of `device` runs out, products of fewer
    rows follow.
    """
    sums = DeviceSums(request, shift, cache.d_model, block_rows, device)
    calls = (call for block in blocks for call in _reading_calls(cache, request, block))
    for add, rows in _read_ahead(calls, min(READERS, available_cores())):
        add(sums, rows)
    return sums.on_host()


def _reading_calls(
    cache: ActivationCache, request: MomentRequest, block: SourceBlock
) -> "Iterator[Callable[[], tuple[Callable[[DeviceSums, Tensor], None], Tensor]]]":
    """Calls that read the rows of each target and each layer of `block`.

    Each gives the method of `DeviceSums` that takes the rows, and the rows.
    """
    distinct, index = block.targets(request.offsets)

    def read(
        layer: int, rows: np.ndarray, add: "Callable[[DeviceSums, Tensor], None]"
    ) -> "tuple[Callable[[DeviceSums, Tensor], None], Tensor]":
        return add, stored_rows(cache, layer, rows)

    for number, layer in enumerate(request.targets):

        def add_targets(sums: "DeviceSums", rows: Tensor, number: int = number) -> None:
            sums.add_targets(block, index, number, rows)

        yield partial(read, layer, distinct, add_targets)
    for number, layer in enumerate(request.layers):

        def add_sources(sums: "DeviceSums", rows: Tensor, number: int = number) -> None:
            sums.add_sources(block, number, rows)

        yield partial(read, layer, block.rows, add_sources)


def _read_ahead(calls: Iterable[Callable[[], Item]], threads: int) -> Iterator[Item]:
    """Results of `calls` in their order; `threads` threads run those that come next."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def stored_rows(cache: ActivationCache, layer: int, rows: np.ndarray) -> Tensor:
    """Rows of a layer in the stored dtype, `(n, d_model)`; the device casts them."""
    array = cache.residual_array(layer)
    stored = torch.from_numpy(np.ascontiguousarray(array.take_stored(rows)))
    return stored.view(torch.bfloat16) if array.layout.logical_dtype == "bfloat16" else stored


class DeviceSums:
    """Sums over pairs, block by block, with the fields of `ShiftedSums`.

    For each block `add_targets` is called for every target first, then `add_sources` for every
    layer.
    """

    def __init__(
        self,
        request: MomentRequest,
        shift: Shift,
        d_model: int,
        block_rows: int,
        device: torch.device,
    ) -> None:
        self.request = request
        self.device = device
        wide = wide_dtype(device)
        self.dtype: torch.dtype = torch.float32 if request.products == "float32" else wide
        """dtype of the products of blocks."""
        self.home: torch.device = device if wide == torch.float64 else torch.device("cpu")
        """Device of the sums: one with float64."""
        self.tiles: TileRows = TileRows(block_rows, device, fewest=min(SMALL_ROWS, block_rows))
        self.shift: dict[int, Tensor] = {
            layer: copy_to_device(torch.from_numpy(constant).to(self.dtype), device)
            for layer, constant in shift.items()
        }
        layers, offsets, targets = len(request.layers), len(request.offsets), len(request.targets)
        reaches = request.folds, offsets
        shapes = {
            "x": (*reaches, layers, d_model),
            "xx": (*reaches, layers, d_model, d_model),
            "y": (*reaches, targets, d_model),
            "yy": (*reaches, targets),
            "xy": (*reaches, targets, layers, d_model, d_model),
        }
        self.n: np.ndarray = np.zeros(reaches, np.int64)
        self.sums: dict[str, Tensor] = {
            name: torch.zeros(shape, dtype=torch.float64, device=self.home)
            for name, shape in shapes.items()
        }
        """Sums as in `ShiftedSums`, by the name of the field."""
        self._product = torch.empty(0, dtype=self.dtype, device=device)
        if self.dtype != torch.float64:
            self._product = torch.empty(d_model, d_model, dtype=self.dtype, device=device)
        self._targets: list[Tensor] = []
        """Rows of each target of the present block in the stored dtype, on the device."""
        self._index: list[Tensor | slice] = []
        """Of each offset: which of these rows belong to the sources of the block, `(n,)`."""

    def add_targets(
        self, block: SourceBlock, index: np.ndarray | None, target: int, rows: Tensor
    ) -> None:
        """Add the targets of `block` in the target layer number `target`.

        `rows` `(m, d_model)` are distinct rows in the stored dtype; `index` `(offsets n,)` says
        which of them belong to the sources, offset by offset, None for rows of one offset.
        """
        n = len(block.rows)
        if target == 0:
            self._targets = []
            self._index = [slice(0, n)]
            if index is not None:
                numbers: Tensor = copy_to_device(torch.from_numpy(index), self.device)
                self._index = list(numbers.split(n))
        self._targets.append(copy_to_device(rows, self.device))
        for offset in range(len(self._index)):
            key = block.fold, offset, target

            def add_tile(tile: slice, offset: int = offset, key: tuple[int, ...] = key) -> None:
                y = self._target_rows(offset, target, tile)
                total, squares = self._row_sum(y), self._sum_of_squares(y)
                self.sums["y"][key].add_(total)
                self.sums["yy"][key].add_(squares)

            self.tiles.run(n, add_tile)

    def add_sources(self, block: SourceBlock, layer: int, rows: Tensor) -> None:
        """Add the sources of `block` in the layer number `layer`, with all their targets.

        `rows` are `(n, d_model)` in the stored dtype.
        """
        if layer == 0:
            self.n[block.fold, block.reach] += len(rows)
        reach = block.fold, block.reach, layer
        rows = copy_to_device(rows, self.device)

        def add_tile(tile: slice) -> None:
            x = self._shifted(rows[tile], self.request.layers[layer])
            total = self._row_sum(x)
            # All targets are made before the first sum changes: a tile for which memory runs out
            # is computed again.
            targets = {
                (block.fold, offset, target, layer): self._target_rows(offset, target, tile)
                for offset in range(len(self._index))
                for target in range(len(self._targets))
            }
            self.sums["x"][reach].add_(total)
            self._add_product(self.sums["xx"][reach], x, x)
            for key, y in targets.items():
                self._add_product(self.sums["xy"][key], x, y)

        self.tiles.run(len(rows), add_tile)

    def on_host(self) -> ShiftedSums:
        """The sums as numpy arrays; those on the device are freed."""
        request, width = self.request, self.sums["x"].shape[-1]
        sums = ShiftedSums(request.layers, request.offsets, request.targets, request.folds, width)
        sums.n = self.n
        for name in FIELDS[1:]:
            setattr(sums, name, copy_to_host(self.sums.pop(name)).numpy())
        return sums

    def _target_rows(self, offset: int, target: int, tile: slice) -> Tensor:
        """Shifted targets at an offset of a tile of the block's sources, `(n, d_model)`."""
        numbers = self._index[offset]
        rows = self._targets[target][tile if isinstance(numbers, slice) else numbers[tile]]
        return self._shifted(rows, self.request.targets[target])

    def _shifted(self, rows: Tensor, layer: int) -> Tensor:
        """Stored rows of a layer less its shift, in the dtype of the products."""
        return rows.to(self.dtype, copy=True).sub_(self.shift[layer])

    def _row_sum(self, rows: Tensor) -> Tensor:
        """Sum of rows, `(d_model,)`, on the device of the sums."""
        if self.home == self.device:
            return rows.sum(0, dtype=torch.float64)
        return copy_to_host(rows.sum(0))

    def _sum_of_squares(self, rows: Tensor) -> Tensor:
        """Sum of all squared entries, on the device of the sums."""
        squares = torch.linalg.vecdot(rows, rows)
        squares = squares if self.home == self.device else copy_to_host(squares)
        return squares.sum(dtype=torch.float64)

    def _add_product(self, total: Tensor, x: Tensor, y: Tensor) -> None:
        """Add x' y to `total` `(d_model, d_model)`, in place."""
        if x.dtype == total.dtype:
            total.addmm_(x.T, y)
            return
        torch.mm(x.T, y, out=self._product)
        total += self._product if self.home == self.device else copy_to_host(self._product)


def moments_on_device(
    x: Any, y: Any, block_rows: int, products: str, device: torch.device
) -> Moments:
    """Moments of rows `x` `(n, d_in)` and `y` `(n, d_out)`, numpy or dask, on the host.

    Blocks of `block_rows` rows, less their means, are multiplied on `device`.
    """
    wide = wide_dtype(device)
    dtype = "float32" if wide == torch.float32 else products
    home = device if wide == torch.float64 else torch.device("cpu")
    tiles = TileRows(block_rows, device, fewest=min(SMALL_ROWS, block_rows))
    total = Moments.zero(x.shape[1], y.shape[1])
    for start in range(0, len(x), block_rows):
        rows = [np.asarray(array[start : start + block_rows]) for array in (x, y)]
        parts: list[Moments] = []

        def add_tile(
            tile: slice, rows: list[np.ndarray] = rows, parts: list[Moments] = parts
        ) -> None:
            (mean_x, x_rows), (mean_y, y_rows) = (centred(array[tile], dtype) for array in rows)
            on_device = [copy_to_device(torch.from_numpy(r), device) for r in (x_rows, y_rows)]
            means: list[Any] = [
                copy_to_device(torch.from_numpy(mean), home) for mean in (mean_x, mean_y)
            ]
            xx, xy = (
                cast(Any, copy_to_device(on_device[0].T @ right, home).double())
                for right in on_device
            )
            parts.append(Moments(len(x_rows), means[0], means[1], xx, xy, sum_of_squares(y_rows)))

        tiles.run(len(rows[0]), add_tile)
        # Tensors take the place of arrays until the end.
        total = merge_all([*([total] if total.n else []), *parts])
    names = ("mean_x", "mean_y", "xx", "xy")
    tensors = {name: getattr(total, name) for name in names if total.n}
    return replace(total, **{name: copy_to_host(t).numpy() for name, t in tensors.items()})

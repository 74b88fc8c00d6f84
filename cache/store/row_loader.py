"""RowLoader: shuffled rows of a cache as torch batches, to train sparse autoencoders and the like.

A `RowLoader` is an `IterableDataset` over one split of an `ActivationCache`: pass it to a torch
DataLoader. The order of rows is that of `slab_shuffle.py` (slabs in random order, shuffled in a
buffer); this file reads the slabs, decodes rows in the shuffled order and cuts them into batches.
Files on disk that are not compressed need no buffer: their slabs are brought into memory, and rows
gathered from the memory maps.
"""

import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import MismatchError, UsageError
from ..format.array import OPEN_SHARDS, CacheArray
from ..format.shard import LOADED_SECONDS
from ..number_ranges import as_tuple, is_several
from .activation_cache import ActivationCache
from .row_runs import RowRuns
from .slab_shuffle import Slabs, SlabShuffle

GATHER_BYTES = 8 << 20
"""Size of rows that are gathered, then decoded, at a time: a batch of usual size, as a rule."""
ALIGNMENT = 64
"""Bytes of a vector register: processors write whole ones faster."""
Batch = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Rows, or (rows, token ids)."""
Gather = Callable[[np.ndarray], np.ndarray]
"""Gives the rows of an array with these numbers, in the stored dtype."""


class RowLoader(IterableDataset[Batch]):
    """Batches of rows of one layer, `(batch_rows, d_model)`, or of several, `(rows, layers, d)`.

    One iteration is one epoch: every row of the split once, in an order that follows from `seed`
    and `set_epoch` alone. With `with_tokens` a batch is `(rows, token ids)`. Memory: `buffer_rows`
    rows in the stored dtype, per layer and worker; of uncompressed files on disk, these are pages
    of the files. Give it to a DataLoader with
    `batch_size=None`; its workers, and the `world_size` ranks of a distributed run, share the
    slabs of an epoch. With `drop_last` all of them give equally many batches. `slab_rows` is by
    default 128, or a whole chunk where chunks are read as a whole: from an object store, or
    compressed.
    """

    def __init__(
        self,
        cache: ActivationCache,
        layer: int | Sequence[int],
        *,
        batch_rows: int = 4096,
        split: str = "train",
        shuffle: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        buffer_rows: int = 32768,
        slab_rows: int | None = None,
        drop_last: bool = False,
        with_tokens: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        slab_rows = cache.slab_rows if slab_rows is None else slab_rows
        sizes = {"batch_rows": batch_rows, "buffer_rows": buffer_rows, "slab_rows": slab_rows}
        _check_arguments(sizes, rank, world_size, seed)
        self.cache = cache
        self.layers: tuple[int, ...] = as_tuple(layer, "layer")
        self.stacked: bool = is_several(layer)
        numbers = {**sizes, "seed": seed, "rank": rank, "world_size": world_size}
        batch_rows, buffer_rows, slab_rows, seed, rank, world_size = as_tuple(
            tuple(numbers.values()), ", ".join(numbers)
        )
        self.batch_rows = batch_rows
        self.slab_rows = slab_rows
        self.buffer_rows = buffer_rows
        self.split = split
        self.shuffle = shuffle
        self.seed = seed
        self.dtype = dtype
        self.drop_last = drop_last
        self.with_tokens = with_tokens
        self.rank = rank
        self.world_size = world_size
        self._runs = RowRuns.of(cache, cache.sequences(split))
        self._layer_arrays = [cache.residual_array(layer) for layer in self.layers]
        if not self._layer_arrays or not len(self._runs):
            raise UsageError(f"no rows: layers {self.layers}, {len(self._runs)} in split {split!r}")
        # Shared memory: persistent workers of a DataLoader see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._batches_done = 0
        """Batches of this epoch that the current iteration has given or skipped."""
        self._first_batch = 0
        """Batch at which the next iteration starts."""

    @property
    def epoch(self) -> int:
        """Number of the epoch, which `set_epoch` sets."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, which begins at its first batch."""
        self._epoch.fill_(epoch)
        self._batches_done = self._first_batch = 0

    def batches(self, workers: int = 1) -> int:
        """Number of batches of this rank in an epoch, over all `workers` of a DataLoader."""
        return sum(self._batch_count(worker, workers) for worker in range(workers))

    def state_dict(self) -> dict[str, Any]:
        """Epoch and batch number of this process after its last batch, for `load_state_dict`.

        Workers of a DataLoader are other processes: take the state with `num_workers=0`, or
        through torchdata's StatefulDataLoader.
        """
        return {**self._identity(), "epoch": self.epoch, "batch": self._batches_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken.

        Raises `MismatchError` for the state of a loader with other arguments.
        """
        identity = self._identity()
        changed = [name for name in identity if identity[name] != state.get(name)]
        if changed:
            differences = "; ".join(
                f"{name} was {state.get(name)!r}, is {identity[name]!r}" for name in changed
            )
            raise MismatchError(f"this state is of another loader: {differences}")
        self.set_epoch(state["epoch"])
        self._batches_done = self._first_batch = state["batch"]

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        batch_count = self._batch_count(worker, workers)
        self._batches_done, self._first_batch = self._first_batch, 0
        for batch in self._batches(worker, workers, self._batches_done):
            if self._batches_done == batch_count:
                return
            self._batches_done += 1
            yield batch

    def _identity(self) -> dict[str, Any]:
        """Arguments that decide the order of rows; a state is loaded only if all are equal."""
        return {
            "cache": self.cache.id,
            "layers": list(self.layers),
            "split": self.split,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "batch_rows": self.batch_rows,
            "slab_rows": self.slab_rows,
            "buffer_rows": self.buffer_rows,
            "drop_last": self.drop_last,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    def _shuffle_of(self, worker: int, workers: int) -> SlabShuffle:
        """Order of the slabs of one worker among the workers of all ranks."""
        rows = np.array([len(self._runs)])
        return SlabShuffle(
            Slabs.cut(np.zeros(1, np.int64), rows, self.slab_rows),
            self.seed,
            self.shuffle,
            buffer_rows=max(1, self.buffer_rows // self.slab_rows) * self.slab_rows,
            reader=self.rank * workers + worker,
            readers=self.world_size * workers,
        )

    def _row_count(self, worker: int, workers: int) -> int:
        """Number of rows of a worker in an epoch."""
        shuffle = self._shuffle_of(worker, workers)
        return shuffle.slabs.select(shuffle.slab_order(self.epoch)).rows

    def _batch_count(self, worker: int, workers: int) -> int:
        """Number of batches of a worker in an epoch."""
        if not self.drop_last:
            return -(-self._row_count(worker, workers) // self.batch_rows)
        # Every worker of every rank gives as many full batches as the worker with the fewest rows:
        # slabs do not divide evenly among workers, and the last slab of the split is short.
        slabs = -(-len(self._runs) // self.slab_rows)
        missing_rows = slabs * self.slab_rows - len(self._runs)
        fewest_rows = slabs // (self.world_size * workers) * self.slab_rows - missing_rows
        return max(0, fewest_rows) // self.batch_rows

    def _batches(self, worker: int, workers: int, first_batch: int) -> Iterator[Batch]:
        """The batches of a worker from number `first_batch` on."""
        self._read_first_row()
        first_row = first_batch * self.batch_rows
        rows_left = self._row_count(worker, workers) - first_row
        memory = BatchMemory()
        batch, filled = self._empty_batch(memory, rows_left), 0
        gather_rows = max(1, GATHER_BYTES // max(a.layout.row_bytes for a in self._layer_arrays))
        for gathers, order in self._fillings(worker, workers, first_row):
            start = 0
            while start < len(order):
                # Gather until the batch is full or the filling is used up.
                rows = order[start : start + min(gather_rows, len(batch[0]) - filled)]
                self._gather_into(batch, filled, gathers, rows)
                start, filled = start + len(rows), filled + len(rows)
                if filled == len(batch[0]):
                    residual = batch[0] if self.stacked else batch[0][:, 0]
                    yield (residual, batch[1]) if self.with_tokens else residual
                    rows_left -= filled
                    del residual, batch  # so that memory of batches that nobody keeps is free
                    batch, filled = self._empty_batch(memory, rows_left), 0

    def _read_first_row(self) -> None:
        """Read one row of each layer: a cache with rows of a forged width fails before memory for
        many of them is taken."""
        positions = self._runs.positions(0, 1)
        first = positions.start if isinstance(positions, slice) else int(positions[0])
        for array in self._layer_arrays:
            array.read_stored(first, first + 1)

    def _empty_batch(
        self, memory: "BatchMemory", rows_left: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for rows `(n, layers, d_model)` and token ids `(n,)` of the next batch."""
        rows = max(0, min(rows_left, self.batch_rows))
        shape = (rows, len(self.layers), self.cache.d_model)
        return memory.empty(shape, self.dtype), torch.empty(rows, dtype=torch.int64)

    def _gather_into(
        self,
        batch: tuple[torch.Tensor, torch.Tensor],
        start: int,
        gathers: list[Gather],
        rows: np.ndarray,
    ) -> None:
        """Write the rows that `gathers` give, decoded, into a batch from its row `start` on."""
        residual, tokens = (tensor[start : start + len(rows)] for tensor in batch)
        for number, array in enumerate(self._layer_arrays):
            residual[:, number] = _decoded(gathers[number](rows), array.layout.logical_dtype)
        if self.with_tokens:
            tokens[:] = torch.from_numpy(gathers[-1](rows))

    def _fillings(
        self, worker: int, workers: int, first_row: int
    ) -> Iterator[tuple[list[Gather], np.ndarray]]:
        """For each filling, what gathers its rows (one per layer, then tokens), and their order.

        The first `first_row` rows of the epoch are skipped. A filling's rows are lost at the next
        step of the iterator.
        """
        shuffle = self._shuffle_of(worker, workers)
        arrays = [*self._layer_arrays, *([self.cache.tokens] if self.with_tokens else [])]
        fillings = shuffle.fillings(self.epoch, first_row)
        if all(_is_gathered_from_maps(array) for array in arrays):
            for filling in fillings:
                positions = self._positions_of(shuffle.slabs.select(filling.slabs))
                gathers = [MappedSlabs(array, positions).gather for array in arrays]
                yield gathers, positions[filling.rows]
            return
        buffers = [
            np.empty((shuffle.buffer_size, *array.shape[1:]), array.layout.stored_dtype)
            for array in arrays
        ]
        for filling in fillings:
            for array, buffer in zip(arrays, buffers, strict=True):
                self._read_slabs(array, shuffle.slabs.select(filling.slabs), buffer)
            yield [partial(np.take, buffer, axis=0) for buffer in buffers], filling.rows

    def _positions_of(self, slabs: Slabs) -> np.ndarray:
        """Positions of the rows of `slabs`, one slab after the other, `(rows,)` int64."""
        row_shifts = slabs.starts - (np.cumsum(slabs.sizes) - slabs.sizes)
        return self._runs.positions_of(np.arange(slabs.rows) + np.repeat(row_shifts, slabs.sizes))

    def _read_slabs(self, array: CacheArray, slabs: Slabs, buffer: np.ndarray) -> None:
        """Read the rows of `slabs` into `buffer`, one slab after the other."""
        buffer_starts = np.cumsum(slabs.sizes) - slabs.sizes
        # Read in the order on disk, so that a compressed chunk is decoded once.
        for number in np.argsort(slabs.starts):
            start, size = int(slabs.starts[number]), int(slabs.sizes[number])
            target = buffer[buffer_starts[number] : buffer_starts[number] + size]
            positions = self._runs.positions(start, start + size)
            if isinstance(positions, slice):
                array.read_stored(positions.start, positions.stop, target)
            else:
                target[...] = array.take_stored(positions)


class BatchMemory:
    """Two blocks of memory for batches; a block is used again when no tensor refers to it.

    A batch of some MB that the system's allocator gives anew, page by page, costs as much as the
    rows in it. In a usual loop a batch lives until the next one is made: so two blocks.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[np.ndarray, Callable[[], Any]]] = []
        """Blocks, the newest last, each with a weak reference to the part that a tensor has."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any numbers, at an address that is a multiple of 64."""
        size = math.prod(shape) * dtype.itemsize
        for index, (block, part) in enumerate(self._blocks):
            if part() is None and len(block) >= size + ALIGNMENT:
                del self._blocks[index]
                break
        else:
            block = np.empty(size + ALIGNMENT, np.uint8)
            del self._blocks[:-1]
        first = -block.ctypes.data % ALIGNMENT
        part_of_block = block[first : first + size]
        # Tensors, and all views of them, keep alive the array that they were made from.
        self._blocks.append((block, weakref.ref(part_of_block)))
        return torch.from_numpy(part_of_block).view(dtype).view(shape)


class MappedSlabs:
    """Slabs in the memory maps of an array, brought into memory, from which rows are gathered.

    `positions` are those of the rows, slab by slab.
    """

    def __init__(self, array: CacheArray, positions: np.ndarray) -> None:
        self._array = array
        is_first = np.ones(len(positions), bool)
        np.not_equal(positions[1:], positions[:-1] + 1, out=is_first[1:])
        starts = positions[is_first]
        sizes = np.diff(np.flatnonzero(is_first), append=len(positions))
        order = np.argsort(starts)  # as on disk
        self._runs = list(zip(starts[order].tolist(), sizes[order].tolist(), strict=True))
        self._load()

    def _load(self) -> None:
        for start, size in self._runs:
            self._array.load(start, start + size)
        self._loaded_at = time.monotonic()

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """Rows at some of the positions, `(n, ...)`, in the stored dtype."""
        # Pages of rows that wait for a slow consumer may have left memory.
        if time.monotonic() - self._loaded_at > LOADED_SECONDS:
            self._load()
        return self._array.take_stored(positions)


def _is_gathered_from_maps(array: Any) -> bool:
    """Whether any rows of `array` are gathered from maps that stay open; false for views."""
    if not isinstance(array, CacheArray):
        return False
    return array.is_mapped and array.layout.shards <= OPEN_SHARDS


def _check_arguments(sizes: dict[str, int], rank: int, world_size: int, seed: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if not 0 <= rank < world_size:
        raise UsageError(f"rank must lie in 0..{world_size - 1}, got {rank}")
    if seed < 0:
        raise UsageError(f"seed must be at least 0, got {seed}")


def _decoded(stored: np.ndarray, logical_dtype: str) -> torch.Tensor:
    """The stored rows as a torch tensor; bfloat16 is stored as 16-bit integers."""
    if logical_dtype == "bfloat16":
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)

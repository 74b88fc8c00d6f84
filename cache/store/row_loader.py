"""RowLoader: shuffled rows of a cache as torch batches, to train sparse autoencoders and the like.

A `RowLoader` is an `IterableDataset` over one split of an `ActivationCache`: pass it to a torch
DataLoader. The order of rows is that of `slab_shuffle.py` (slabs in random order, shuffled in a
buffer); this file reads the slabs, decodes rows in the shuffled order and cuts them into batches.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import MismatchError, UsageError
from ..format.array import CacheArray
from ..number_ranges import as_tuple, is_several
from .activation_cache import ActivationCache
from .row_runs import RowRuns
from .slab_shuffle import Slabs, SlabShuffle

GATHER_ROWS = 256
"""Rows gathered and decoded at a time: few enough to stay in the processor's cache."""
Batch = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Rows, or (rows, token ids)."""


class RowLoader(IterableDataset[Batch]):
    """Batches of rows of one layer, `(batch_rows, d_model)`, or of several, `(rows, layers, d)`.

    One iteration is one epoch: every row of the split once, in an order that follows from `seed`
    and `set_epoch` alone. With `with_tokens` a batch is `(rows, token ids)`. Memory: a buffer of
    `buffer_rows` rows in the stored dtype, per layer and worker. Give it to a DataLoader with
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
        self.layers, self.stacked = as_tuple(layer, "layer"), is_several(layer)
        numbers = {**sizes, "seed": seed, "rank": rank, "world_size": world_size}
        batch_rows, buffer_rows, slab_rows, seed, rank, world_size = as_tuple(
            tuple(numbers.values()), ", ".join(numbers)
        )
        self.batch_rows, self.slab_rows, self.buffer_rows = batch_rows, slab_rows, buffer_rows
        self.split, self.shuffle, self.seed = split, shuffle, seed
        self.dtype, self.drop_last, self.with_tokens = dtype, drop_last, with_tokens
        self.rank, self.world_size = rank, world_size
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
        batch, filled = self._empty_batch(rows_left), 0
        for buffers, order in self._filled_buffers(worker, workers, first_row):
            start = 0
            while start < len(order):
                # Gather until the batch is full or the buffer is empty.
                rows = order[start : start + min(GATHER_ROWS, len(batch[0]) - filled)]
                self._gather_into(batch, filled, buffers, rows)
                start, filled = start + len(rows), filled + len(rows)
                if filled == len(batch[0]):
                    residual = batch[0] if self.stacked else batch[0][:, 0]
                    yield (residual, batch[1]) if self.with_tokens else residual
                    rows_left -= filled
                    batch, filled = self._empty_batch(rows_left), 0

    def _read_first_row(self) -> None:
        """Read one row of each layer: a cache with rows of a forged width fails before memory for
        many of them is taken."""
        positions = self._runs.positions(0, 1)
        first = positions.start if isinstance(positions, slice) else int(positions[0])
        for array in self._layer_arrays:
            array.read_stored(first, first + 1)

    def _empty_batch(self, rows_left: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for rows `(n, layers, d_model)` and token ids `(n,)` of the next batch."""
        rows = max(0, min(rows_left, self.batch_rows))
        shape = (rows, len(self.layers), self.cache.d_model)
        return torch.empty(shape, dtype=self.dtype), torch.empty(rows, dtype=torch.int64)

    def _gather_into(
        self,
        batch: tuple[torch.Tensor, torch.Tensor],
        start: int,
        buffers: list[np.ndarray],
        rows: np.ndarray,
    ) -> None:
        """Copy `rows` of the buffers, decoded, into a batch from its row `start` on."""
        residual, tokens = (tensor[start : start + len(rows)] for tensor in batch)
        for number, array in enumerate(self._layer_arrays):
            stored = np.take(buffers[number], rows, axis=0)
            residual[:, number] = _decoded(stored, array.layout.logical_dtype)
        if self.with_tokens:
            tokens[:] = torch.from_numpy(np.take(buffers[-1], rows))

    def _filled_buffers(
        self, worker: int, workers: int, first_row: int
    ) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """Filled buffers (one per layer, then tokens) and the order in which their rows are given.

        The first `first_row` rows of the epoch are skipped. The buffers are filled again at the
        next step of the iterator.
        """
        shuffle = self._shuffle_of(worker, workers)
        arrays = [*self._layer_arrays, *([self.cache.tokens] if self.with_tokens else [])]
        buffers = [
            np.empty((shuffle.buffer_size, *array.shape[1:]), array.layout.stored_dtype)
            for array in arrays
        ]
        for filling in shuffle.fillings(self.epoch, first_row):
            for array, buffer in zip(arrays, buffers, strict=True):
                self._read_slabs(array, shuffle.slabs.select(filling.slabs), buffer)
            yield buffers, filling.rows

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

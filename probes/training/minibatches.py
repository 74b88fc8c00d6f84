"""Shuffled minibatches of a cache for stochastic fits, for all layers and offsets at once.

`MinibatchStream` gives batches of positions t: residual_l[t] of all layers and, for every offset
N, residual_L[t+N] and the tokens at and after t+N. Tuned lenses (`lens/translator_fit.py`) and
vocabulary probes (`vocabulary/examples.py`) are fitted on them. The order of positions is that of
`shuffled_batches.py`; `_SlabBuffer` reads the slabs and decodes rows from them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...cache.background import iterate_in_background
from ...cache.errors import UsageError
from ...cache.format.array import CacheArray
from ...cache.format.dtypes import decode_rows_into
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.sequence_draw import draw_sequences
from ...cache.store.slab_shuffle import BUFFER_ROWS, SLAB_ROWS, Slabs
from ...cache.tokens.segments import PairScope, dropped_rows, is_sparse, sequence_of
from .shuffled_batches import ShuffledBatches

BUFFER_BYTES = 256 << 20
"""Most memory of the buffer, in bytes; wide rows are shuffled among fewer positions."""
GATHER_ROWS = 256
"""Rows gathered and decoded at a time: few enough to stay in the processor's cache."""


@dataclass(frozen=True)
class OffsetTargets:
    """Targets N positions after each row of a minibatch; only `valid` rows have a target."""

    valid: torch.Tensor
    """Whether (t, t+N) is a pair of the `PairScope`, `(n,)` bool."""
    residual: torch.Tensor | None
    """residual_L[t+N], `(n, d_model)` float32, zeros where not valid; None if not requested."""
    token: torch.Tensor
    """Token at t+N, `(n,)` int64, -1 where not valid."""
    text: torch.Tensor
    """Token that follows t+N in the text, which the model is to predict, `(n,)` int64.

    -1 where t+N is the end of the document, and where not valid."""


@dataclass(frozen=True)
class Minibatch:
    """Batch of positions t, the same for every layer and offset."""

    epoch: int
    step: int
    positions: torch.Tensor
    """Positions in the cache, `(n,)` int64."""
    hidden: dict[int, torch.Tensor]
    """Layer -> residual_l[t], `(n, d_model)` float32."""
    ahead: dict[int, OffsetTargets]
    """Offset N -> targets at t+N."""

    def __len__(self) -> int:
        return len(self.positions)


def copy_minibatch(minibatch: Minibatch, copy: Callable[[torch.Tensor], torch.Tensor]) -> Minibatch:
    """The minibatch with its residual streams copied by `copy`; the rest stays on the host."""
    hidden = {layer: copy(rows) for layer, rows in minibatch.hidden.items()}
    ahead = {
        offset: targets
        if targets.residual is None
        else replace(targets, residual=copy(targets.residual))
        for offset, targets in minibatch.ahead.items()
    }
    return replace(minibatch, hidden=hidden, ahead=ahead)


class MinibatchStream:
    """Batches of `batch` positions of a split, out of core, in an order that `seed` decides.

    Every position t of the selected sequences comes once per epoch, except the `drop_first` first
    positions of each sequence, with the residual streams of all `layers` at t and, for each of
    `offsets`, residual_L[t+N] (`residual=True`) and the tokens at and after t+N. Any batch can be
    reached without reading the batches before. `sequences` are sequence numbers, by default all
    of `split`; `max_positions` limits them to whole sequences in a seeded random draw (one at
    least). `across_documents` allows pairs of two documents, as in `PairScope`. Memory: a buffer
    of at most `buffer_rows` positions and about `buffer_bytes` bytes, and `prefetch` batches that
    a thread prepares. Raises `NotFoundError` for a layer that the cache lacks, `UsageError`
    without rows.
    """

    def __init__(
        self,
        cache: ActivationCache,
        layers: Sequence[int],
        offsets: Sequence[int],
        split: str = "train",
        batch: int = 1024,
        seed: int = 0,
        *,
        sequences: np.ndarray | None = None,
        max_positions: int | None = None,
        residual: bool = True,
        shuffle: bool = True,
        drop_last: bool = False,
        buffer_rows: int = BUFFER_ROWS,
        buffer_bytes: int = BUFFER_BYTES,
        slab_rows: int = SLAB_ROWS,
        prefetch: int = 0,
        across_documents: bool = False,
        drop_first: int = 0,
    ) -> None:
        self.layers: tuple[int, ...] = tuple(layers)
        self.offsets: tuple[int, ...] = tuple(offsets)
        if not self.layers or not self.offsets or min(self.offsets) < 0:
            raise UsageError("name at least one layer and one offset; offsets are 0 or more")
        sizes = {"batch": batch, "buffer_rows": buffer_rows, "slab_rows": slab_rows}
        for name, value in sizes.items():
            if value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if seed < 0:
            raise UsageError(f"seed must be at least 0, not {seed}")
        self.cache = cache
        self.residual = residual
        self.prefetch = prefetch
        self.scope: PairScope = PairScope(across_documents, drop_first).check()
        sequences = cache.sequences(split) if sequences is None else np.sort(sequences)
        if max_positions is not None:
            sequences = draw_sequences(cache, sequences, max_positions, seed)
        self.sequences = sequences
        self.layer_arrays: dict[int, CacheArray] = {
            layer: cache.residual_array(layer) for layer in self.layers
        }
        self.last_array: CacheArray | None = (
            cache.residual_array(cache.n_blocks) if residual else None
        )
        run_starts, run_sizes = self._position_runs(split)
        rows = min(buffer_rows, max(batch, buffer_bytes // self._buffer_row_bytes(slab_rows)))
        slabs = Slabs.cut(run_starts, run_sizes, min(slab_rows, rows))
        self.order: ShuffledBatches = ShuffledBatches(slabs, batch, seed, shuffle, rows, drop_last)

    @property
    def positions(self) -> int:
        """Number of positions of an epoch."""
        return self.order.slabs.rows

    @property
    def steps(self) -> int:
        """Number of batches of an epoch."""
        return self.order.steps

    def epoch(self, epoch: int = 0, step: int = 0) -> Iterator[Minibatch]:
        """The batches of `epoch` from number `step` on."""
        minibatches = self._minibatches(epoch, step)
        return iterate_in_background(minibatches, self.prefetch) if self.prefetch else minibatches

    def __iter__(self) -> Iterator[Minibatch]:
        return self.epoch()

    def _position_runs(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """First positions and sizes of runs of neighbouring positions, `(runs,)` int64."""
        dropped = dropped_rows(self.cache, self.sequences, self.scope.drop_first)
        starts = self.cache.sequence_start[self.sequences] + dropped
        lengths = self.cache.sequence_length[self.sequences] - dropped
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        if not len(lengths):
            drop_first = self.scope.drop_first
            but = f" but the first {drop_first} of each sequence" if dropped.any() else ""
            raise UsageError(
                f"the {split} split of this cache has no position{but}; extract more sequences or "
                "take another split"
            )
        # Join sequences that are neighbours in the cache.
        is_first = np.ones(len(starts), bool)
        is_first[1:] = starts[1:] != (starts + lengths)[:-1]
        run = np.cumsum(is_first) - 1
        return starts[is_first], np.bincount(run, lengths).astype(np.int64)

    def _buffer_row_bytes(self, slab_rows: int) -> int:
        """Bytes of one position in the buffer; layer L is also read past the end of each slab."""
        layer_bytes = sum(array.layout.row_bytes for array in self.layer_arrays.values())
        last_bytes = self.last_array.layout.row_bytes if self.last_array is not None else 0
        return layer_bytes + last_bytes * (slab_rows + max(self.offsets) + 1) // slab_rows

    def _minibatches(self, epoch: int, step: int) -> Iterator[Minibatch]:
        buffer, parts = _SlabBuffer(self), []
        for group in self.order.groups(epoch, step):
            buffer.fill(group.slabs)
            for number, piece in enumerate(group.pieces):
                parts.append(buffer.take(piece))
                if number < len(group.pieces) - 1 or group.complete:
                    yield self._join_parts(epoch, step, parts)
                    step, parts = step + 1, []

    def _join_parts(self, epoch: int, step: int, parts: "list[_BatchPart]") -> Minibatch:
        """Join the rows of a minibatch, which come from one or more buffer fillings."""
        positions = np.concatenate([part.positions for part in parts])
        hidden = {layer: _join([part.hidden[layer] for part in parts]) for layer in self.layers}
        largest_offset = np.concatenate([part.largest_offset for part in parts])
        ahead = {}
        for offset in self.offsets:
            valid = torch.from_numpy(largest_offset >= offset)
            token = torch.from_numpy(np.concatenate([part.tokens[offset] for part in parts]))
            text = torch.from_numpy(np.concatenate([part.text[offset] for part in parts]))
            token, text = token.masked_fill(~valid, -1), text.masked_fill(~valid, -1)
            residual = None
            if self.last_array is not None:
                residual = _join([part.last[offset] for part in parts])
                residual = residual.masked_fill_(~valid[:, None], 0)
            ahead[offset] = OffsetTargets(valid, residual, token, text)
        return Minibatch(epoch, step, torch.from_numpy(positions), hidden, ahead)


@dataclass(frozen=True)
class _BatchPart:
    """Rows of one batch that come from one filling of the buffer.

    Values at t+N are arbitrary where (t, t+N) is no pair; `_join_parts` masks them."""

    positions: np.ndarray
    hidden: dict[int, torch.Tensor]
    """Layer -> residual_l[t], `(n, d_model)` float32."""
    last: dict[int, torch.Tensor]
    """Offset -> residual_L[t+N], `(n, d_model)` float32."""
    largest_offset: np.ndarray
    """Largest N with (t, t+N) a pair, counted up to one more than the largest offset, `(n,)`."""
    tokens: dict[int, np.ndarray]
    """Offset -> token at t+N, `(n,)` int64."""
    text: dict[int, np.ndarray]
    """Offset -> token that follows t+N in the text, -1 at the end of the document, `(n,)` int64."""


class _SlabBuffer:
    """Slabs in their stored dtype; of layer L and the tokens also the rows after each slab.

    A slab of n positions t takes n rows of the arrays over t (`positions`, `hidden`), and n + lead
    rows of the arrays over t+N (`last`, `tokens`, `largest_offset`, `text`), lead being one more
    than the largest offset.
    """

    def __init__(self, stream: MinibatchStream) -> None:
        self.stream = stream
        rows, d_model = stream.order.buffer_size, stream.cache.d_model
        self.positions = np.empty(rows, np.int64)
        self.hidden = {
            layer: np.empty((rows, d_model), array.layout.stored_dtype)
            for layer, array in stream.layer_arrays.items()
        }
        self.row_ahead = np.empty(rows, np.int64)
        """Row of each position t in the arrays over t+N."""
        self.tokens = np.zeros(0, np.int32)
        self.largest_offset, self.text = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.documents = np.zeros(0, np.int64)
        self.last: np.ndarray | None = None

    def fill(self, slab_numbers: np.ndarray) -> None:
        """Read the slabs with these numbers, one after the other."""
        stream, lead = self.stream, max(self.stream.offsets) + 1
        slabs = stream.order.slabs.select(slab_numbers)
        # Positions of the rows, and their rows in the arrays over t+N.
        slab_of_row = np.repeat(np.arange(len(slab_numbers)), slabs.sizes)
        slab_ends = np.cumsum(slabs.sizes)
        rows = np.arange(slab_ends[-1])
        shift = slabs.starts - slab_ends + slabs.sizes
        self.positions[: len(rows)] = rows + shift[slab_of_row]
        self.row_ahead[: len(rows)] = rows + lead * slab_of_row
        for layer, array in stream.layer_arrays.items():
            _read_runs(array, slabs, self.hidden[layer])
        # Grow the arrays over t+N if this filling has more slabs than those before.
        rows_ahead = len(rows) + lead * len(slab_numbers)
        if len(self.tokens) < rows_ahead:
            self.tokens = np.zeros(rows_ahead, np.int32)
            if stream.last_array is not None:
                shape = (rows_ahead, stream.cache.d_model)
                self.last = np.zeros(shape, stream.last_array.layout.stored_dtype)
        # Nothing is read past the end of the cache: these rows are valid for no offset.
        strides = slabs.sizes + lead
        stops = np.minimum(slabs.starts + strides, stream.cache.positions)
        extended = Slabs(slabs.starts, stops - slabs.starts)
        _read_runs(stream.cache.tokens, extended, self.tokens, strides)
        self._find_segment_ends(extended, strides)
        if stream.last_array is not None and self.last is not None:
            _read_runs(stream.last_array, extended, self.last, strides)

    def _find_segment_ends(self, extended: Slabs, strides: np.ndarray) -> None:
        """Set `largest_offset` and `text` of the rows that were read of the `extended` slabs."""
        cache, across_documents = self.stream.cache, self.stream.scope.across_documents
        # Position in the cache of each row; the number of positions where none was read.
        stride_ends = np.cumsum(strides)
        row_in_slab = np.arange(stride_ends[-1]) - np.repeat(stride_ends - strides, strides)
        is_read = row_in_slab < np.repeat(extended.sizes, strides)
        position = row_in_slab + np.repeat(extended.starts, strides)
        position = np.where(is_read, position, cache.positions)
        # A segment begins with each slab, sequence and, unless pairs may cross, document.
        is_first = row_in_slab == 0
        sequence = sequence_of(cache, position)
        sequence[~is_read] = -1
        is_first[1:] |= sequence[1:] != sequence[:-1]
        if not across_documents and cache.document_numbers is not None:
            if len(self.documents) < len(position):
                self.documents = np.zeros(len(position), np.int64)
            _read_runs(cache.document_numbers, extended, self.documents, strides)
            document = self.documents[: len(position)]
            is_first[1:] |= document[1:] != document[:-1]
        # The largest offset of a row is its distance to the last row of its segment.
        starts = np.flatnonzero(is_first)
        ends = np.append(starts[1:], len(position))
        self.largest_offset = np.repeat(ends, ends - starts) - 1 - np.arange(len(position))
        self.text = np.full(len(position), -1, np.int64)
        if is_sparse(cache):
            # Neighbouring rows are no neighbours in the text.
            self.text[is_read] = cache.following_tokens(position[is_read], across_documents)
        else:
            has_next = np.flatnonzero(self.largest_offset > 0)
            self.text[has_next] = self.tokens[has_next + 1]

    def take(self, rows: np.ndarray) -> _BatchPart:
        """Decode the positions t in `rows` of the buffer, with their targets at all offsets."""
        stream, ahead = self.stream, self.row_ahead[rows]
        hidden = {
            layer: _gather_rows(self.hidden[layer], rows, array.layout.logical_dtype)
            for layer, array in stream.layer_arrays.items()
        }
        last = {}
        if stream.last_array is not None and self.last is not None:
            dtype = stream.last_array.layout.logical_dtype
            last = {n: _gather_rows(self.last, ahead + n, dtype) for n in stream.offsets}
        return _BatchPart(
            positions=self.positions[rows],
            hidden=hidden,
            last=last,
            largest_offset=self.largest_offset[ahead],
            tokens={n: self.tokens[ahead + n].astype(np.int64) for n in stream.offsets},
            text={n: self.text[ahead + n] for n in stream.offsets},
        )


def _read_runs(array: Any, runs: Slabs, out: np.ndarray, strides: np.ndarray | None = None) -> None:
    """Read runs of rows of an array of the cache into `out`.

    Each run begins `strides` rows after the run before, by default right after its end.
    """
    row = 0
    strides = runs.sizes if strides is None else strides
    columns = runs.starts.tolist(), runs.sizes.tolist(), strides.tolist()
    for start, size, stride in zip(*columns, strict=True):
        array.read_stored(start, start + size, out[row : row + size])
        row += stride


def _gather_rows(stored: np.ndarray, rows: np.ndarray, logical_dtype: str) -> torch.Tensor:
    """Rows of `stored` `(rows, d_model)`, decoded, as a float32 tensor `(n, d_model)`."""
    out = np.empty((len(rows), stored.shape[1]), np.float32)
    for start in range(0, len(rows), GATHER_ROWS):
        block = slice(start, start + GATHER_ROWS)
        decode_rows_into(np.take(stored, rows[block], axis=0), logical_dtype, out[block])
    return torch.from_numpy(out)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

"""Feeds stochastic fits: shuffled minibatches of a cache, for all layers and offsets at once."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any

import numpy as np
import torch

from ...cache.errors import UsageError
from ...cache.format.dtypes import decode_rows_into
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import PairScope, dropped_rows, is_sparse, sequence_of
from .shuffled_order import BUFFER_ROWS, SLAB_ROWS, ShuffledBatches, Slabs, draw_sequences

BUFFER_BYTES = 256 << 20
"""Most memory of the buffer; the rows of fewer positions are shuffled where they are wider."""
GATHER_ROWS = 256
"""Rows gathered and decoded at a time: they stay in the processor's cache."""


@dataclass(frozen=True)
class OffsetTargets:
    """What lies N positions after each row of a draw; rows without it are not `valid`."""

    valid: torch.Tensor
    """Whether (t, t+N) is a pair of the `PairScope`, `(n,)` bool."""
    residual: torch.Tensor | None
    """residual_L[t+N], `(n, d_model)` float32, zeros where not valid; None if not asked for."""
    token: torch.Tensor
    """Token at t+N, `(n,)` int64, -1 where not valid."""
    text: torch.Tensor
    """Token that the text goes on with after t+N, which the model is to predict, `(n,)` int64.

    -1 where the document goes on no further, and where not valid."""


@dataclass(frozen=True)
class Minibatch:
    """One batch of positions t, the same for every layer and offset."""

    epoch: int
    step: int
    positions: torch.Tensor
    """Positions in the cache, `(n,)` int64."""
    hidden: dict[int, torch.Tensor]
    """Layer -> residual_l[t], `(n, d_model)` float32."""
    ahead: dict[int, OffsetTargets]
    """Offset N -> what lies there."""

    def __len__(self) -> int:
        return len(self.positions)


class MinibatchStream:
    """Batches of `batch` positions of a split, out of core, in an order that `seed` decides.

    Every position t of the chosen sequences, but the `drop_first` first ones of each, comes once
    per epoch, with the residual streams of all
    `layers` at t and, for each of `offsets`, residual_L[t+N] (`residual=True`) and the tokens
    there. Any batch can be reached without reading those before it. `sequences` are numbers of
    sequences; by default those of `split`, of which at most `max_positions` positions are taken,
    whole sequences in a seeded random draw (one at least). `across_documents` allows pairs of two
    documents, as in `PairScope`. Memory: a buffer of at most
    `buffer_rows` positions and about `buffer_bytes` bytes, and `prefetch` batches that a thread
    prepares. Raises `NotFoundError` for a layer that the cache lacks, `UsageError` without rows.
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
        self.layers, self.offsets = tuple(layers), tuple(offsets)
        _check(self.layers, self.offsets, batch, seed, buffer_rows, slab_rows)
        self.cache, self.residual, self.prefetch = cache, residual, prefetch
        self.scope = PairScope(across_documents, drop_first).check()
        chosen = cache.sequences(split) if sequences is None else np.sort(sequences)
        if max_positions is not None:
            chosen = draw_sequences(cache, chosen, max_positions, seed)
        self.sequences = chosen
        dropped = dropped_rows(cache, chosen, self.scope.drop_first)
        lengths = cache.sequence_length[chosen] - dropped
        starts, lengths = (
            (cache.sequence_start[chosen] + dropped)[lengths > 0],
            lengths[lengths > 0],
        )
        if not len(lengths):
            but = f" but the first {drop_first} of each sequence" if dropped.any() else ""
            raise UsageError(
                f"the {split} split of this cache has no position{but}; extract more sequences or "
                "take another split"
            )
        ends = starts + lengths
        self._sources = {layer: cache.residual_array(layer) for layer in self.layers}
        self._last = cache.residual_array(cache.n_blocks) if residual else None
        first = np.ones(len(starts), bool)
        first[1:] = starts[1:] != ends[:-1]
        run = np.cumsum(first) - 1
        rows = min(buffer_rows, max(batch, buffer_bytes // self._row_bytes(slab_rows)))
        runs = np.bincount(run, lengths).astype(np.int64)
        slabs = Slabs.cut(starts[first], runs, min(slab_rows, rows))
        self.order = ShuffledBatches(slabs, batch, seed, shuffle, rows, drop_last)

    @property
    def positions(self) -> int:
        """Positions of an epoch."""
        return self.order.slabs.rows

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return self.order.steps

    def epoch(self, epoch: int = 0, step: int = 0) -> Iterator[Minibatch]:
        """The batches of `epoch` from number `step` on."""
        draws = self._draws(epoch, step)
        return in_background(draws, self.prefetch) if self.prefetch else draws

    def __iter__(self) -> Iterator[Minibatch]:
        return self.epoch()

    def _row_bytes(self, slab_rows: int) -> int:
        """Bytes of one position in the buffer."""
        stored = sum(source.layout.row_bytes for source in self._sources.values())
        ahead = self._last.layout.row_bytes if self._last is not None else 0
        return stored + ahead * (slab_rows + max(self.offsets) + 1) // slab_rows

    def _draws(self, epoch: int, step: int) -> Iterator[Minibatch]:
        buffer, parts = _Buffer(self), []
        for group in self.order.groups(epoch, step):
            buffer.fill(group.slabs)
            for number, piece in enumerate(group.pieces):
                parts.append(buffer.take(piece))
                if number < len(group.pieces) - 1 or group.complete:
                    yield self._draw(epoch, step, parts)
                    step, parts = step + 1, []

    def _draw(self, epoch: int, step: int, parts: "list[_Rows]") -> Minibatch:
        positions = np.concatenate([part.positions for part in parts])
        hidden = {layer: _join([p.hidden[layer] for p in parts]) for layer in self.layers}
        left = np.concatenate([part.left for part in parts])
        ahead = {}
        for offset in self.offsets:
            valid = torch.from_numpy(left >= offset)
            token, text = (
                torch.from_numpy(np.concatenate([part[offset] for part in found]))
                for found in ([p.tokens for p in parts], [p.text for p in parts])
            )
            residual = _join([p.last[offset] for p in parts]) if self._last is not None else None
            if residual is not None:
                residual = residual.masked_fill_(~valid[:, None], 0)
            token, text = token.masked_fill(~valid, -1), text.masked_fill(~valid, -1)
            ahead[offset] = OffsetTargets(valid, residual, token, text)
        return Minibatch(epoch, step, torch.from_numpy(positions), hidden, ahead)


@dataclass(frozen=True)
class _Rows:
    """Rows of one batch that come from one filling of the buffer."""

    positions: np.ndarray
    hidden: dict[int, torch.Tensor]
    last: dict[int, torch.Tensor]
    """Offset -> residual_L[t+N]; anything where there is none."""
    left: np.ndarray
    """Positions that follow in the segment, counted up to one more than the largest offset."""
    tokens: dict[int, np.ndarray]
    """Offset -> token at t+N; anything where there is none."""
    text: dict[int, np.ndarray]
    """Offset -> token that follows t+N in the text, -1 at its end; anything where t+N is none."""


class _Buffer:
    """Slabs as they are stored; of layer L and the tokens also what follows each slab."""

    def __init__(self, feed: MinibatchStream) -> None:
        self.feed = feed
        self.room = feed.order.room
        self.positions = np.empty(self.room, np.int64)
        self.hidden = {
            layer: np.empty((self.room, feed.cache.d_model), source.layout.stored_dtype)
            for layer, source in feed._sources.items()
        }
        self.at = np.empty(self.room, np.int64)
        """Where each row lies in `tokens` and `last`."""
        self.tokens = np.zeros(0, np.int32)
        self.left, self.text = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.documents = np.zeros(0, np.int64)
        self.last: np.ndarray | None = None

    def fill(self, slabs: np.ndarray) -> None:
        """Read `slabs`, one after the other."""
        feed, lead = self.feed, max(self.feed.offsets) + 1
        starts, sizes = feed.order.slabs.starts[slabs], feed.order.slabs.sizes[slabs]
        number, ends = np.repeat(np.arange(len(slabs)), sizes), np.cumsum(sizes)
        rows = np.arange(ends[-1])
        self.positions[: len(rows)] = rows + (starts - ends + sizes)[number]
        self.at[: len(rows)] = rows + lead * number
        for layer, source in feed._sources.items():
            _read(source, starts, sizes, self.hidden[layer])
        room = len(rows) + lead * len(slabs)
        if len(self.tokens) < room:
            self.tokens = np.zeros(room, np.int32)
            if feed._last is not None:
                shape = (room, feed.cache.d_model)
                self.last = np.zeros(shape, feed._last.layout.stored_dtype)
        # Past the end of the cache nothing is read: what lies there is valid for no offset.
        followed = np.minimum(starts + sizes + lead, feed.cache.positions) - starts
        _read(feed.cache.tokens, starts, followed, self.tokens, sizes + lead)
        self._look_ahead(starts, sizes + lead, followed)
        if feed._last is not None and self.last is not None:
            _read(feed._last, starts, followed, self.last, sizes + lead)

    def _look_ahead(self, starts: np.ndarray, sizes: np.ndarray, followed: np.ndarray) -> None:
        """Find where segments end, and the text's next tokens, in what was read of all slabs."""
        cache, across = self.feed.cache, self.feed.scope.across_documents
        ends = np.cumsum(sizes)
        place = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        read = place < np.repeat(followed, sizes)
        position = np.where(read, place + np.repeat(starts, sizes), cache.positions)
        # A segment begins with each slab, sequence and, unless pairs may cross, document.
        begins = place == 0
        sequence = sequence_of(cache, position)
        sequence[~read] = -1
        begins[1:] |= sequence[1:] != sequence[:-1]
        if not across and cache.document_numbers is not None:
            if len(self.documents) < len(place):
                self.documents = np.zeros(len(place), np.int64)
            _read(cache.document_numbers, starts, followed, self.documents, sizes)
            document = self.documents[: len(place)]
            begins[1:] |= document[1:] != document[:-1]
        first = np.flatnonzero(begins)
        after = np.append(first[1:], len(place))
        self.left = np.repeat(after, after - first) - 1 - np.arange(len(place))
        self.text = np.full(len(place), -1, np.int64)
        if is_sparse(cache):
            self.text[read] = cache.following_tokens(position[read], across)
        else:
            goes_on = np.flatnonzero(self.left > 0)
            self.text[goes_on] = self.tokens[goes_on + 1]

    def take(self, rows: np.ndarray) -> _Rows:
        """The rows with numbers `rows`, decoded."""
        feed, at = self.feed, self.at[rows]
        hidden = {
            layer: _gather(self.hidden[layer], rows, source.layout.logical_dtype)
            for layer, source in feed._sources.items()
        }
        last = {}
        if feed._last is not None and self.last is not None:
            dtype = feed._last.layout.logical_dtype
            last = {n: _gather(self.last, at + n, dtype) for n in feed.offsets}
        tokens = {n: self.tokens[at + n].astype(np.int64) for n in feed.offsets}
        text = {n: self.text[at + n] for n in feed.offsets}
        return _Rows(self.positions[rows], hidden, last, self.left[at], tokens, text)


def _read(
    source: Any,
    starts: np.ndarray,
    sizes: np.ndarray,
    out: np.ndarray,
    strides: np.ndarray | None = None,
) -> None:
    """Read runs of rows into `out`, each `strides` rows after the one before."""
    row = 0
    steps = sizes if strides is None else strides
    for start, size, stride in zip(starts.tolist(), sizes.tolist(), steps.tolist(), strict=True):
        source.read_stored(start, start + size, out[row : row + size])
        row += stride


def _gather(stored: np.ndarray, rows: np.ndarray, logical_dtype: str) -> torch.Tensor:
    """Rows as a float32 tensor."""
    out = np.empty((len(rows), stored.shape[1]), np.float32)
    for start in range(0, len(rows), GATHER_ROWS):
        part = out[start : start + GATHER_ROWS]
        decode_rows_into(
            np.take(stored, rows[start : start + GATHER_ROWS], axis=0), logical_dtype, part
        )
    return torch.from_numpy(out)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_background(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """`items`, of which a thread prepares up to `depth` ahead; its errors come out here."""
    queue: Queue[Any] = Queue(depth)
    done, closed = object(), threading.Event()

    def put(item: Any) -> bool:
        while not closed.is_set():
            try:
                queue.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((done, None))
        except BaseException as error:  # noqa: BLE001 - raised again by the reader
            put((done, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        closed.set()
        while True:
            try:
                queue.get_nowait()
            except Empty:
                break
        thread.join()


def _check(
    layers: tuple[int, ...], offsets: tuple[int, ...], batch: int, seed: int, buffer: int, slab: int
) -> None:
    if not layers or not offsets or min(offsets) < 0:
        raise UsageError("name at least one layer and one offset; offsets are 0 or more")
    for name, value in {"batch": batch, "buffer_rows": buffer, "slab_rows": slab}.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    if seed < 0:
        raise UsageError(f"seed must be at least 0, not {seed}")

"""Runs the batches of a part through the model and hands their rows to a writer thread."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LeaseLostError, ModelError
from ..files.leases import Lease
from ..format.journal import PartRecord
from ..format.layout import ArrayKey, array_name
from ..format.logits_arrays import FULL
from ..store.activation_cache import ActivationCache
from ..store.part_writer import PartWriter
from .batches import WINDOW_CHUNKS, BatchHalving, SequenceBatch, plan_batches
from .device_copies import HostRows, copy_to_device, device_copies_for
from .stage_times import StageTimes

if TYPE_CHECKING:
    from ..model.blocks import DecoderBlocks
    from .kept_logits import KeptLogits


Batches = Generator[int | None, None, None]
"""Extracts a part: rows after each batch, None when all that is left to do is to commit."""


class PartRunner:
    """Extracts parts of `cache` with the blocks of `stack`; rows of `ancestor` are copied.

    A batch that does not fit into memory runs in halves, whose rows may differ from the whole
    one's in their last bits. `stages` books what each stage takes.
    """

    def __init__(
        self,
        cache: ActivationCache,
        stack: "DecoderBlocks",
        ancestor: ActivationCache | None = None,
        on_error: str = "quarantine",
        stages: StageTimes | None = None,
    ) -> None:
        self.cache = cache
        self.stack = stack
        self.ancestor = ancestor
        self.on_error = on_error
        self.contexts = cache.contexts
        self.starts, self.rows = self.contexts.row, self.contexts.rows
        self.lengths = self.contexts.length
        self.sparse = cache.has("context/ids")
        self.device = next(stack.model.parameters()).device
        self.stages = StageTimes() if stages is None else stages
        self._copies = device_copies_for(self.device, self.stages)
        self._halving = BatchHalving(self.lengths, self._copies.drain)
        self._alone: dict[
            tuple[SequenceBatch, tuple[ArrayKey, ...]], dict[int, dict[ArrayKey, HostRows]]
        ] = {}

    @cached_property
    def _head_pass(self) -> "KeptLogits | None":
        """Takes the logits that the cache keeps."""
        from .kept_logits import KeptLogits

        return KeptLogits.of(self.cache, self.device)

    def write_part(
        self,
        part: int,
        keys: tuple[ArrayKey, ...],
        expected: PartRecord | None = None,
        held: Lease | None = None,
    ) -> Batches:
        """Extract and commit the arrays `keys` of `part`; yields the rows after each batch.

        What follows the None that it yields, the commit, may run in another thread.
        """
        layout = self.cache.manifest.layout
        with PartWriter(self.cache.path, layout, part, keys, held) as writer:
            with _Background() as background:
                yield self._copy(writer)
                for batch in self._plan(part):
                    yield from self._run(batch, writer, background)
            yield None
            with self.stages.timed("write"):
                writer.commit(expected)

    def _run(
        self, batch: SequenceBatch, writer: PartWriter, background: "_Background"
    ) -> Iterator[int]:
        """Hand the rows of `batch`, in pieces where it is too large, to the background."""
        if kept := self._alone.get((batch, tuple(writer.dtypes))):
            pieces = iter([(batch, kept)])
        else:
            pieces = self._halving.run(batch, lambda piece: self._forward(piece, writer.dtypes))
        for piece, sequences in pieces:
            with self.stages.waiting():
                background.put(self._write, writer, sequences)
            yield sum(last - first for _, first, last in self._inside(writer, piece))

    def _inside(self, writer: PartWriter, batch: SequenceBatch) -> Iterator[tuple[int, int, int]]:
        """Each sequence of `batch` with its first position and end inside the part."""
        for number in batch.sequences:
            start = int(self.starts[number])
            stop = start + int(self.rows[number])
            yield number, max(start, writer.start), min(stop, writer.stop)

    def _plan(self, part: int) -> list[SequenceBatch]:
        """Batches of the part, but for the sequences that are copied."""
        manifest = self.cache.manifest
        batch_tokens = 0 if manifest.alone else manifest.batch_tokens
        held = 0 if self.ancestor is None else len(self.ancestor.sequence_length)
        batches = plan_batches(
            self.starts[held:], self.rows[held:], manifest.layout, part,
            batch_tokens, manifest.pad, self.lengths[held:], self._window_rows(),
        )  # fmt: skip
        return [
            SequenceBatch(tuple(held + number for number in batch.sequences)) for batch in batches
        ]

    def _window_rows(self) -> int | None:
        """Sorting within a batch's rows where they are wide: begun chunks are held in memory."""
        manifest = self.cache.manifest
        if manifest.capture.logits != FULL:
            return None
        return min(manifest.batch_tokens, WINDOW_CHUNKS * manifest.layout.chunk_rows)

    def _copy(self, writer: PartWriter) -> int:
        """Take the rows that the ancestor has from it; returns how many."""
        if self.ancestor is None:
            return 0
        stop = min(writer.stop, self.ancestor.positions)
        size = self.cache.manifest.layout.chunk_rows
        for key in writer.dtypes:
            source = self.ancestor.array(array_name(key))
            step = min(size, source.layout.chunk_rows)
            for start in range(writer.start, stop, step):
                writer.write(key, start, source.read(start, min(start + step, stop)))
        for number, reason in self.ancestor.quarantined.items():
            first = int(self.ancestor.sequence_start[number])
            if first < stop and first + int(self.ancestor.sequence_length[number]) > writer.start:
                writer.quarantine.setdefault(number, reason)
        return max(0, stop - writer.start)

    def _write(self, writer: PartWriter, sequences: dict[int, dict[ArrayKey, "HostRows"]]) -> None:
        """Hand the rows of a batch that lie in the part to `writer`, once they are here."""
        for arrays in sequences.values():
            for rows in arrays.values():
                rows.wait()
        written, began = 0, time.perf_counter()
        batch = SequenceBatch(tuple(sequences))
        for number, first, last in self._inside(writer, batch):
            start = int(self.starts[number])
            for key, rows in sequences[number].items():
                # Logits are computed for the kept positions alone.
                every = self.sparse and isinstance(key, int)
                inside = self._kept(first, last) if every else slice(first - start, last - start)
                reason = writer.reason_too_large(key, rows.peaks[inside])
                bad = writer.put(key, first, rows.stored[inside], rows.peaks[inside])
                written += rows.stored[inside].nbytes
                if reason:
                    self._quarantine(writer, number, reason, "cannot be kept: ")
                elif bad:
                    where = f"at layer {key}" if isinstance(key, int) else f"in {key}"
                    reason = f"{bad} non-finite values {where}"
                    self._quarantine(writer, number, reason, "has ")
        self.stages.add("write", time.perf_counter() - began, written)

    def _kept(self, first: int, last: int) -> np.ndarray:
        """Indices in their sequence of the positions `first:last` of the cache."""
        return self.cache.array("tokens/index").read(first, last)

    def _quarantine(self, writer: PartWriter, number: int, reason: str, verb: str) -> None:
        """Leave sequence `number` out of the splits, or stop if the caller asked for that."""
        numbers = [number]
        if self.sparse:
            numbers = np.flatnonzero(self.cache.array("sequences/context")[:] == number).tolist()
        if self.on_error == "raise":
            row = int(self.cache.array("sequences/row_id")[numbers[0]])
            raise ModelError(
                f"sequence {numbers[0]} (document {row}) {verb}{reason}; --on-error quarantine "
                "keeps going and leaves such sequences out of the splits"
            )
        for sequence in numbers:
            writer.quarantine.setdefault(sequence, reason)

    def _forward(
        self, batch: SequenceBatch, dtypes: dict[ArrayKey, str]
    ) -> dict[int, dict[ArrayKey, "HostRows"]]:
        """Sequence -> array -> rows of the batch; a lone sequence is kept for the next part."""
        arrays = self._residuals(batch, dtypes)
        found: dict[int, dict[ArrayKey, HostRows]] = {}
        before = 0
        for place, number in enumerate(batch.sequences):
            length, after = int(self.lengths[number]), before + int(self.rows[number])
            found[number] = {
                key: rows.part(place, length) if isinstance(key, int) else rows.run(before, after)
                for key, rows in arrays.items()
            }
            before = after
        if len(batch.sequences) == 1:
            self._alone = {(batch, tuple(dtypes)): found}
        return found

    def _residuals(
        self, batch: SequenceBatch, dtypes: dict[ArrayKey, str]
    ) -> dict[ArrayKey, "HostRows"]:
        """Arrays of a batch on the host in their stored dtypes.

        Layers are `(sequences, length, d_model)`, logits have one row per kept position.
        """
        import torch

        lengths = [int(self.lengths[number]) for number in batch.sequences]
        ids = np.zeros((len(lengths), max(lengths)), np.int64)
        for place, number in enumerate(batch.sequences):
            start = int(self.contexts.start[number])
            ids[place, : lengths[place]] = self.contexts.ids[start : start + lengths[place]]
        tokens = torch.from_numpy(ids)
        mask = None
        if min(lengths) < max(lengths):
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()

        takes = None if all(isinstance(key, int) for key in dtypes) else self._head_pass
        kept = None if takes is None else torch.from_numpy(self._flat_rows(batch, max(lengths)))

        def run() -> dict[ArrayKey, Any]:
            there = None if mask is None else copy_to_device(mask, self.device)
            hidden = self.stack.residuals(copy_to_device(tokens, self.device), there)
            arrays: dict[ArrayKey, Any] = dict(enumerate(hidden))
            if takes is not None and kept is not None:
                rows = hidden[-1].flatten(0, 1)[copy_to_device(kept, self.device)]
                arrays |= takes(rows)
            return arrays

        with torch.inference_mode():
            return self._copies.take(run, dtypes, sum(lengths))

    def _flat_rows(self, batch: SequenceBatch, length: int) -> np.ndarray:
        """Kept positions of a batch padded to `length`, as rows of its flat tensor."""
        found = []
        for place, number in enumerate(batch.sequences):
            first, rows = int(self.starts[number]), int(self.rows[number])
            inside = self._kept(first, first + rows) if self.sparse else np.arange(rows)
            found.append(place * length + inside.astype(np.int64))
        return np.concatenate(found)


class _Background:
    """One thread that writes a few batches behind the model; its first error is raised on exit."""

    def __init__(self, depth: int = 2) -> None:
        self._tasks: queue.Queue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.Queue(
            depth
        )
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "_Background":
        self._thread.start()
        return self

    def put(self, function: Callable[..., None], *args: Any) -> None:
        """Run `function(*args)` later; raises the error of an earlier task."""
        if self._error is not None:
            raise self._error
        self._tasks.put((function, args))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._error is None:
                try:
                    task[0](*task[1])
                except BaseException as error:  # raised again in the main thread
                    self._error = error

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self._tasks.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error


class Commits:
    """At most one commit on its way; a part that another worker took over is dropped."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "commit")
        self._last: Future[None] | None = None

    def take(self, batches: Batches) -> None:
        """Let `batches` go on to its end, after the commit before it; raises that one's error."""
        self.wait()
        self._last = self._pool.submit(_finish, batches)

    def wait(self) -> None:
        """Return when nothing is on its way; raises the error of what was."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Let the commit on its way end, whatever comes of it."""
        self._pool.shutdown()


def _finish(batches: Batches) -> None:
    with suppress(LeaseLostError):
        for _ in batches:
            pass


@contextmanager
def commits() -> Iterator[Commits]:
    """Commits of one extraction; the last one has ended when the context does."""
    found = Commits()
    try:
        yield found
        found.wait()
    finally:
        found.close()

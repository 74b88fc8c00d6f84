"""Extracts one part of a cache: runs its batches through the model, writes and commits its rows.

`write_missing_parts` and the repair of damaged parts make a `PartExtraction` per part. The model
runs in a `PartRunner`, which all parts share; the files are written by a `PartWriter`.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..background import BackgroundThread
from ..errors import CorruptError, ModelError
from ..files.leases import Lease
from ..format.journal import PartRecord
from ..format.layout import ArrayKey, array_name
from ..format.logits_arrays import FULL
from ..store.activation_cache import ActivationCache
from ..store.part_writer import PartWriter
from .batches import WINDOW_CHUNKS, SequenceBatch, plan_batches
from .part_runner import PartRunner, SequenceRows

QUEUED_BATCHES = 2
"""Batches that may wait for the writer; the model stands still when one more is computed."""


class PartExtraction:
    """Extraction of the arrays `keys` of one part: `write_batches`, then `commit`.

    A context manager: leaving the context drops rows that were not committed. The commit may run
    in another thread, while `runner` computes the next part. `lease` is checked before any file
    appears; `LeaseLostError` is raised if another worker took the part over.
    """

    def __init__(
        self,
        runner: PartRunner,
        part: int,
        keys: tuple[ArrayKey, ...],
        lease: Lease | None = None,
    ) -> None:
        layout = runner.cache.manifest.layout
        self._runner = runner
        self._writer = PartWriter(runner.cache.path, layout, part, keys, lease)
        self._ancestor = self._readable_ancestor()

    def write_batches(self) -> Iterator[int]:
        """Run and write all batches; yields the number of rows after each batch.

        Rows of the ancestor are copied first. A thread writes the rows of one batch while the
        model computes the next one.
        """
        with BackgroundThread(QUEUED_BATCHES) as background:
            yield self._copy_ancestor_rows()
            for planned in self._plan_batches():
                # A planned batch may run in pieces if memory does not hold all of its sequences.
                for batch, rows_of_sequence in self._runner.run(planned, self._writer.dtypes):
                    with self._runner.stages.waiting():
                        background.put(self._write_rows, rows_of_sequence)
                    # The rows of a batch must not stay in memory while the next one is computed.
                    del rows_of_sequence
                    yield sum(stop - start for _, start, stop in self._rows_in_part(batch))

    def commit(self, expected: PartRecord | None = None) -> None:
        """Make all files of the part appear, then the journal's record of them.

        No record is written if `expected`, an earlier record, has the same shards.
        """
        with self._runner.stages.timed("write"):
            self._writer.commit(expected)

    def __enter__(self) -> "PartExtraction":
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def _readable_ancestor(self) -> ActivationCache | None:
        """The ancestor to copy rows from; None if it has no row of this part, or damaged ones.

        Rows that both caches share by a hard link are damaged in both: the model computes them.
        """
        ancestor = self._runner.ancestor
        if ancestor is None or ancestor.positions <= self._writer.start:
            return None
        try:
            for key in self._writer.dtypes:
                for start, stop in self._ancestor_pieces(ancestor, key):
                    ancestor.array(array_name(key)).read_stored(start, stop)
        except CorruptError:
            return None
        return ancestor

    def _ancestor_pieces(
        self, ancestor: ActivationCache, key: ArrayKey
    ) -> Iterator[tuple[int, int]]:
        """The rows that `ancestor` has of this part of an array, chunk by chunk: start and stop."""
        chunk_rows = self._runner.cache.manifest.layout.chunk_rows
        step = min(chunk_rows, ancestor.array(array_name(key)).layout.chunk_rows)
        stop = min(self._writer.stop, ancestor.positions)
        for start in range(self._writer.start, stop, step):
            yield start, min(start + step, stop)

    def _copy_ancestor_rows(self) -> int:
        """Copy the rows that the ancestor has of this part; returns the number of rows."""
        ancestor, writer = self._ancestor, self._writer
        if ancestor is None:
            return 0
        stop = min(writer.stop, ancestor.positions)
        for key in writer.dtypes:
            source = ancestor.array(array_name(key))
            for start, end in self._ancestor_pieces(ancestor, key):
                writer.write(key, start, source.read(start, end))
            # The largest value before the cast is no longer in the rows, but in their records.
            for record in ancestor.committed.values():
                if writer.start <= record.start and record.stop <= stop:
                    writer.widen_range(key, record.arrays[array_name(key)].absmax)

        # Sequences of this part that the ancestor quarantines stay in quarantine.
        for sequence, reason in ancestor.quarantined.items():
            first = int(ancestor.sequence_start[sequence])
            end = first + int(ancestor.sequence_length[sequence])
            if first < stop and end > writer.start:
                writer.quarantine.setdefault(sequence, reason)
        return max(0, stop - writer.start)

    def _plan_batches(self) -> list[SequenceBatch]:
        """Batches of the sequences that are not copied from the ancestor."""
        runner = self._runner
        manifest, ancestor = runner.cache.manifest, self._ancestor
        n_copied = 0 if ancestor is None else len(ancestor.sequence_length)
        window_rows = None
        if manifest.capture.logits == FULL:
            # Rows of `vocab` numbers are wide, and begun chunks are held in memory: short windows.
            window_rows = min(manifest.batch_tokens, WINDOW_CHUNKS * manifest.layout.chunk_rows)
        batches = plan_batches(
            starts=runner.starts[n_copied:],
            lengths=runner.rows[n_copied:],
            layout=manifest.layout,
            part=self._writer.part,
            batch_tokens=0 if manifest.alone else manifest.batch_tokens,
            pad=manifest.pad,
            sizes=runner.lengths[n_copied:],
            window_rows=window_rows,
        )
        return [
            SequenceBatch(tuple(n_copied + sequence for sequence in batch.sequences))
            for batch in batches
        ]

    def _rows_in_part(self, batch: SequenceBatch) -> Iterator[tuple[int, int, int]]:
        """Each sequence of `batch` with its first and last + 1 position inside the part."""
        for sequence in batch.sequences:
            start = int(self._runner.starts[sequence])
            stop = start + int(self._runner.rows[sequence])
            yield sequence, max(start, self._writer.start), min(stop, self._writer.stop)

    def _write_rows(self, rows_of_sequence: SequenceRows) -> None:
        """Write the rows of a batch that lie in the part, once they are on the host."""
        runner, writer = self._runner, self._writer
        for arrays in rows_of_sequence.values():
            for rows in arrays.values():
                rows.wait()
        written_bytes, began = 0, time.perf_counter()
        batch = SequenceBatch(tuple(rows_of_sequence))
        for sequence, first, stop in self._rows_in_part(batch):
            start = int(runner.starts[sequence])
            for key, rows in rows_of_sequence[sequence].items():
                # Layers have a row per token of the sequence; logits one per kept position.
                if runner.sparse and isinstance(key, int):
                    index = runner.kept_token_indices(first, stop)
                else:
                    index = slice(first - start, stop - start)
                stored, peaks = rows.stored[index], rows.peaks[index]
                reason = writer.reason_too_large(key, peaks)
                n_nonfinite = writer.put(key, first, stored, peaks)
                written_bytes += stored.nbytes
                if reason:
                    self._quarantine(sequence, reason, verb="cannot be kept: ")
                elif n_nonfinite:
                    array = f"at layer {key}" if isinstance(key, int) else f"in {key}"
                    reason = f"{n_nonfinite} non-finite values {array}"
                    self._quarantine(sequence, reason, verb="has ")
        runner.stages.add("write", time.perf_counter() - began, written_bytes)

    def _quarantine(self, context: int, reason: str, verb: str) -> None:
        """Leave the sequences of `context` out of the splits; raises if `on_error` is `raise`."""
        cache = self._runner.cache
        sequences = [context]
        if self._runner.sparse:
            sequences = np.flatnonzero(cache.array("sequences/context")[:] == context).tolist()
        if self._runner.on_error == "raise":
            document = int(cache.array("sequences/row_id")[sequences[0]])
            raise ModelError(
                f"sequence {sequences[0]} (document {document}) {verb}{reason}; "
                "--on-error quarantine keeps going and leaves such sequences out of the splits"
            )
        for sequence in sequences:
            self._writer.quarantine.setdefault(sequence, reason)

"""Runs the batches of a part through the model and hands their rows to a writer thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .batches import Batch, plan_part
from .create import PartWriter
from .errors import ModelError
from .journal import PartRecord
from .store import ActivationCache

if TYPE_CHECKING:
    from .stack import Stack


class PartRunner:
    """Extracts parts of `cache` with the blocks of `stack`; rows of `ancestor` are copied."""

    def __init__(
        self,
        cache: ActivationCache,
        stack: "Stack",
        ancestor: ActivationCache | None = None,
        on_error: str = "quarantine",
    ) -> None:
        self.cache = cache
        self.stack = stack
        self.ancestor = ancestor
        self.on_error = on_error
        self.starts = cache.sequence_start
        self.lengths = cache.sequence_length
        self.device = next(stack.model.parameters()).device
        self._straddler: tuple[int, list[np.ndarray]] | None = None

    def write_part(
        self, part: int, layers: tuple[int, ...], expected: PartRecord | None = None
    ) -> Iterator[int]:
        """Extract and commit `layers` of `part`; yields the number of rows after each batch."""
        with PartWriter(self.cache.path, self.cache.manifest.layout, part, layers) as writer:
            with _Background() as background:
                yield self._copy(writer)
                for batch in self._plan(part):
                    rows = 0
                    for number, hidden in self._forward(batch):
                        first = max(int(self.starts[number]), writer.start)
                        last = min(int(self.starts[number] + self.lengths[number]), writer.stop)
                        background.put(self._write_sequence, writer, number, hidden, first, last)
                        rows += last - first
                    yield rows
            writer.commit(expected)

    def _plan(self, part: int) -> list[Batch]:
        """Batches of the part, but for the sequences that are copied."""
        manifest = self.cache.manifest
        pad = bool(manifest.extra.get("pad", True))
        held = 0 if self.ancestor is None else len(self.ancestor.sequence_length)
        batches = plan_part(
            self.starts[held:], self.lengths[held:], manifest.layout, part,
            manifest.batch_tokens, pad,
        )  # fmt: skip
        return [Batch(tuple(held + number for number in batch.sequences)) for batch in batches]

    def _copy(self, writer: PartWriter) -> int:
        """Take the rows that the ancestor has from it; returns how many."""
        if self.ancestor is None:
            return 0
        stop = min(writer.stop, self.ancestor.positions)
        size = self.cache.manifest.layout.chunk_rows
        for layer in writer.dtypes:
            source = self.ancestor.layer(layer)
            for start in range(writer.start, stop, size):
                end = min(start + size, stop)
                writer.write(layer, start, source.read(start, end))
        return max(0, stop - writer.start)

    def _write_sequence(
        self, writer: PartWriter, number: int, hidden: list[np.ndarray], first: int, last: int
    ) -> None:
        start = int(self.starts[number])
        for layer in writer.dtypes:
            bad = writer.write(layer, first, hidden[layer][first - start : last - start])
            if bad:
                reason = f"{bad} non-finite values at layer {layer}"
                if self.on_error == "raise":
                    row = int(self.cache.array("sequences/row_id")[number])
                    raise ModelError(
                        f"sequence {number} (document {row}) has {reason}; --on-error quarantine "
                        "keeps going and leaves such sequences out of the splits"
                    )
                writer.quarantine.setdefault(number, reason)

    def _forward(self, batch: Batch) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Each sequence of `batch` with its layers, `(length, d_model)` float32."""
        if self._straddler is not None and batch.sequences == (self._straddler[0],):
            yield self._straddler
            return
        layers = self._residuals(batch)
        for place, number in enumerate(batch.sequences):
            rows = [layer[place, : self.lengths[number]] for layer in layers]
            if len(batch.sequences) == 1:
                self._straddler = (number, rows)
            yield number, rows

    def _residuals(self, batch: Batch) -> list[np.ndarray]:
        """All layers of a batch on the host, `(sequences, length, d_model)` float32."""
        import torch

        lengths = [int(self.lengths[number]) for number in batch.sequences]
        ids = np.zeros((len(lengths), max(lengths)), np.int64)
        for place, number in enumerate(batch.sequences):
            start = int(self.starts[number])
            ids[place, : lengths[place]] = self.cache.tokens[start : start + lengths[place]]
        tokens = torch.from_numpy(ids).to(self.device)
        mask = None
        if min(lengths) < max(lengths):
            mask = (
                (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(self.device)
            )
        with torch.inference_mode():
            return [layer.float().cpu().numpy() for layer in self.stack.residuals(tokens, mask)]


class _Background:
    """One thread that writes while the model computes; its first error is raised on exit."""

    def __init__(self, depth: int = 64) -> None:
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

"""Runs the batches of a part through the model and hands their rows to a writer thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .batches import Batch, plan_part
from .create import PartWriter
from .errors import ModelError
from .journal import PartRecord
from .store import ActivationCache

if TYPE_CHECKING:
    import torch

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
        self._alone: dict[tuple[int, ...], dict[int, dict[int, Rows]]] = {}

    def write_part(
        self, part: int, layers: tuple[int, ...], expected: PartRecord | None = None
    ) -> Iterator[int]:
        """Extract and commit `layers` of `part`; yields the number of rows after each batch."""
        with PartWriter(self.cache.path, self.cache.manifest.layout, part, layers) as writer:
            with _Background() as background:
                yield self._copy(writer)
                for batch in self._plan(part):
                    sequences = self._forward(batch, writer.dtypes)
                    background.put(self._write, writer, sequences)
                    yield sum(last - first for _, first, last in self._inside(writer, batch))
            writer.commit(expected)

    def _inside(self, writer: PartWriter, batch: Batch) -> Iterator[tuple[int, int, int]]:
        """Each sequence of `batch` with its first position and end inside the part."""
        for number in batch.sequences:
            start = int(self.starts[number])
            stop = start + int(self.lengths[number])
            yield number, max(start, writer.start), min(stop, writer.stop)

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

    def _write(self, writer: PartWriter, sequences: dict[int, dict[int, "Rows"]]) -> None:
        """Hand the rows of a batch that lie in the part to `writer`."""
        batch = Batch(tuple(sequences))
        for number, first, last in self._inside(writer, batch):
            start = int(self.starts[number])
            for layer, rows in sequences[number].items():
                inside = slice(first - start, last - start)
                bad = writer.put(layer, first, rows.stored[inside], rows.peaks[inside])
                if bad:
                    self._quarantine(writer, number, f"{bad} non-finite values at layer {layer}")

    def _quarantine(self, writer: PartWriter, number: int, reason: str) -> None:
        if self.on_error == "raise":
            row = int(self.cache.array("sequences/row_id")[number])
            raise ModelError(
                f"sequence {number} (document {row}) has {reason}; --on-error quarantine keeps "
                "going and leaves such sequences out of the splits"
            )
        writer.quarantine.setdefault(number, reason)

    def _forward(self, batch: Batch, dtypes: dict[int, str]) -> dict[int, dict[int, "Rows"]]:
        """Sequence -> layer -> rows of the batch; a lone sequence is kept for the next part."""
        if batch.sequences in self._alone:
            return self._alone[batch.sequences]
        layers = self._residuals(batch, dtypes)
        found = {
            number: {
                layer: Rows(r.stored[place, : self.lengths[number]], r.peaks[place])
                for layer, r in layers.items()
            }
            for place, number in enumerate(batch.sequences)
        }
        if len(batch.sequences) == 1:
            self._alone = {batch.sequences: found}
        return found

    def _residuals(self, batch: Batch, dtypes: dict[int, str]) -> dict[int, "Rows"]:
        """Layers of a batch on the host, `(sequences, length, d_model)` in their stored dtypes."""
        import torch

        lengths = [int(self.lengths[number]) for number in batch.sequences]
        ids = np.zeros((len(lengths), max(lengths)), np.int64)
        for place, number in enumerate(batch.sequences):
            start = int(self.starts[number])
            ids[place, : lengths[place]] = self.cache.tokens[start : start + lengths[place]]
        tokens = torch.from_numpy(ids).to(self.device)
        mask = None
        if min(lengths) < max(lengths):
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            mask = mask.long().to(self.device)
        with torch.inference_mode():
            hidden = self.stack.residuals(tokens, mask)
            return {layer: _to_host(hidden[layer], dtype) for layer, dtype in dtypes.items()}


@dataclass(frozen=True)
class Rows:
    """Rows of one layer as they are stored, and their peaks."""

    stored: np.ndarray
    """`(..., d_model)` in the stored dtype."""
    peaks: np.ndarray
    """Largest |value| of each row before the cast, `(...)` float32; NaN if a value is."""


def _to_host(hidden: "torch.Tensor", dtype: str) -> Rows:
    """Cast on the device, where it is fifteen times as fast as numpy's, then one copy."""
    import torch

    peaks = torch.maximum(hidden.amax(-1), -hidden.amin(-1)).float().cpu().numpy()
    cast = hidden.to(getattr(torch, dtype)).cpu()
    stored = cast.view(torch.uint16) if dtype == "bfloat16" else cast
    return Rows(stored.numpy(), peaks)


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

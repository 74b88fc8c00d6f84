"""Runs batches of sequences through the model and gives their rows on the host.

One `PartRunner` serves all parts of an extraction; `PartExtraction` calls `run` for each batch of a
part and writes the rows. Device to host: `device_copies.py`; kept logits: `kept_logits.py`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..format.layout import ArrayKey
from ..model.model_devices import input_device
from ..store.activation_cache import ActivationCache, Contexts
from .batches import BatchHalving, SequenceBatch
from .device_copies import HostRows, copy_to_device, device_copies_for
from .stage_times import StageTimes

if TYPE_CHECKING:
    import torch

    from ..model.blocks import DecoderBlocks
    from .kept_logits import KeptLogits

SequenceRows = dict[int, dict[ArrayKey, HostRows]]
"""Sequence -> array -> rows of that sequence."""


class PartRunner:
    """The model (`stack`) and the settings that all parts of an extraction of `cache` share.

    `ancestor` is the cache whose rows are copied instead of computed. `on_error` says what happens
    to a sequence with non-finite values: `quarantine` or `raise`. A batch that does not fit into
    memory runs in halves, whose rows may differ from the whole batch's in their last bits. The
    seconds and bytes of each stage are added to `stages`.
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
        self.contexts: Contexts = cache.contexts
        self.starts: np.ndarray = self.contexts.row
        self.rows: np.ndarray = self.contexts.rows
        self.lengths: np.ndarray = self.contexts.length
        self.sparse: bool = cache.has("context/ids")
        """Whether only some positions of each sequence are kept."""
        self.image_keys: np.ndarray | None = cache.image_keys
        """First id of each context for the model, in caches of images."""
        self.device: torch.device = input_device(stack.model)
        self.stages: StageTimes = StageTimes() if stages is None else stages
        self._copies = device_copies_for(self.device, self.stages)
        self._halving = BatchHalving(self.lengths, self._copies.drain)
        self._last_lone_sequence: dict[
            tuple[SequenceBatch, tuple[ArrayKey, ...]], SequenceRows
        ] = {}
        """Rows of the latest batch of one sequence: the next part may begin with its end."""
        self._logits_of_cache: KeptLogits | None = None

    def run(
        self, batch: SequenceBatch, dtypes: dict[ArrayKey, str]
    ) -> Iterator[tuple[SequenceBatch, SequenceRows]]:
        """Run `batch` through the model; yields its pieces, in order, with their rows.

        One piece is the whole batch, if memory holds it. `dtypes` gives the arrays to keep, with
        their stored dtypes. Raises `ModelError` if one sequence alone does not fit into memory.
        """
        if rows := self._last_lone_sequence.get((batch, tuple(dtypes))):
            yield batch, rows
        else:
            yield from self._halving.run(batch, lambda piece: self._forward(piece, dtypes))

    def kept_token_indices(self, start: int, stop: int) -> np.ndarray:
        """Index in its sequence of each position `start:stop` of the cache."""
        return self.cache.array("tokens/index").read(start, stop)

    def _forward(self, batch: SequenceBatch, dtypes: dict[ArrayKey, str]) -> SequenceRows:
        """Rows of each sequence of `batch`; those of a lone sequence are kept for the next part."""
        arrays = self._residuals(batch, dtypes)
        rows_of_sequence: SequenceRows = {}
        start = 0
        for index, sequence in enumerate(batch.sequences):
            length, stop = int(self.lengths[sequence]), start + int(self.rows[sequence])
            rows_of_sequence[sequence] = {
                key: rows.of_sequence(index, length)
                if isinstance(key, int)
                else rows.row_range(start, stop)
                for key, rows in arrays.items()
            }
            start = stop
        if len(batch.sequences) == 1:
            self._last_lone_sequence = {(batch, tuple(dtypes)): rows_of_sequence}
        return rows_of_sequence

    def _residuals(
        self, batch: SequenceBatch, dtypes: dict[ArrayKey, str]
    ) -> dict[ArrayKey, HostRows]:
        """Arrays of a batch on the host in their stored dtypes.

        Layers are `(sequences, length, d_model)`, padded to the longest sequence; logits have one
        row per kept position.
        """
        import torch

        # Token ids, padded with zeros on the right, and a mask if any sequence is shorter.
        lengths = [int(self.lengths[sequence]) for sequence in batch.sequences]
        ids = np.zeros((len(lengths), max(lengths)), np.int64)
        for index, sequence in enumerate(batch.sequences):
            start = int(self.contexts.start[sequence])
            ids[index, : lengths[index]] = self.contexts.ids[start : start + lengths[index]]
        if self.image_keys is not None:
            ids[:, 0] = self.image_keys[list(batch.sequences)]
        tokens = torch.from_numpy(ids)
        mask = None
        if min(lengths) < max(lengths):
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()

        # Logits are computed for the kept positions alone.
        keeps_logits = not all(isinstance(key, int) for key in dtypes)
        kept_rows = None
        if keeps_logits:
            kept_rows = torch.from_numpy(self._kept_rows(batch, max(lengths)))

        def run_model() -> dict[ArrayKey, Any]:
            device_mask = None if mask is None else copy_to_device(mask, self.device)
            hidden = self.stack.residuals(copy_to_device(tokens, self.device), device_mask)
            arrays: dict[ArrayKey, Any] = dict(enumerate(hidden))
            if kept_rows is not None:
                last = hidden[-1]  # blocks of one model may be on several devices
                compute_logits = self._kept_logits(last.device)
                arrays |= compute_logits(last.flatten(0, 1)[copy_to_device(kept_rows, last.device)])
            return arrays

        with torch.inference_mode():
            return self._copies.run(run_model, dtypes, sum(lengths))

    def _kept_rows(self, batch: SequenceBatch, length: int) -> np.ndarray:
        """Kept positions of a batch as rows of the flat `(sequences * length)` tensor."""
        rows = []
        for index, sequence in enumerate(batch.sequences):
            first, count = int(self.starts[sequence]), int(self.rows[sequence])
            if self.sparse:
                token_index = self.kept_token_indices(first, first + count)
            else:
                token_index = np.arange(count)
            rows.append(index * length + token_index.astype(np.int64))
        return np.concatenate(rows)

    def _kept_logits(self, device: "torch.device") -> "KeptLogits":
        """Computes the logits that the cache keeps, on the device of layer L."""
        from .kept_logits import KeptLogits

        if self._logits_of_cache is None:
            self._logits_of_cache = KeptLogits.of(self.cache, device)
        assert self._logits_of_cache is not None
        return self._logits_of_cache

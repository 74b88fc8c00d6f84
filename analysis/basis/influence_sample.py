"""Whole sequences of a cache, in batches for the model: `InfluenceSample`, `SampleBatch`.

`measure_model_influence` (`model_influence.py`) changes the rows of these sequences and runs the
model on them. Batches obey the cache's rules: sequences share a batch, or are padded, only where
the extraction has measured that this leaves their rows as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ...cache.errors import UsageError
from ...cache.forward.batches import group_sequences
from ...cache.store.sequence_draw import draw_sequences
from ...cache.tokens.segments import PairScope, context_indices, is_sparse
from ...probes.base.resampling import ResamplingUnits

if TYPE_CHECKING:
    import torch

    from ...cache.store.activation_cache import ActivationCache

VOCAB_BYTES = 64 << 20
"""Largest float32 matrix `(batch, length, vocab)` of a batch of several sequences."""


@dataclass(frozen=True, eq=False)
class InfluenceSample:
    """Whole sequences, and the positions of them that are changed and measured.

    Sample indices count the positions of all `sequences`, one sequence after the other.
    """

    cache: "ActivationCache"
    sequences: np.ndarray
    """Numbers of whole sequences, ascending."""
    counted: np.ndarray
    """Whether each position is changed and measured, by sample index, `(n,)` bool."""
    units: ResamplingUnits
    """Documents of the positions."""

    @classmethod
    def draw(
        cls, cache: "ActivationCache", positions: int, drop_first: int, seed: int
    ) -> "InfluenceSample":
        """Draw sequences of the test split of up to `positions` positions, one at least.

        The `drop_first` first positions of each context are not counted. Raises `UsageError` if the
        cache keeps only some positions of its sequences, or the split is empty.
        """
        PairScope(drop_first=drop_first).check()
        if is_sparse(cache):
            raise UsageError(
                "the model can only be resumed on whole sequences, and this cache keeps some of "
                "their positions; extract the texts with positions='all'"
            )
        numbers = cache.sequences("test")
        if not len(numbers):
            raise UsageError("the test split of this cache is empty; extract more sequences")
        sequences = draw_sequences(cache, numbers, positions, seed)
        counted = context_indices(cache, cache.positions_of(sequences)) >= drop_first
        if not counted.any():
            raise UsageError(
                f"no test sequence is longer than drop_first={drop_first}; give a smaller one"
            )
        units = ResamplingUnits.of(cache, sequences, seed)
        return cls(cache, sequences, counted, units)

    @property
    def n(self) -> int:
        """Number of counted positions."""
        return int(self.counted.sum())

    @cached_property
    def starts(self) -> np.ndarray:
        """Sample index of the first position of each sequence."""
        lengths = self.cache.sequence_length[self.sequences]
        return np.cumsum(lengths) - lengths

    def unit_sizes(self) -> np.ndarray:
        """Number of counted positions of each resampling unit, `(units,)` float64."""
        numbers = self.units.unit_numbers[self.counted]
        return np.bincount(numbers, minlength=self.units.n_resampled).astype(np.float64)

    def batches(self, batch_tokens: int | None = None) -> Iterator["SampleBatch"]:
        """Cut the sequences into batches of equal or similar length, longest first.

        A batch has at most `batch_tokens` tokens, padding included, or a single sequence; default
        are as many as `VOCAB_BYTES` of logits, and no more than the extraction ran at once.
        """
        cache, manifest = self.cache, self.cache.manifest
        limit = min(manifest.batch_tokens, VOCAB_BYTES // (4 * cache.vocab))
        limit = 1 if manifest.alone else batch_tokens or limit
        lengths = cache.sequence_length
        order = self.sequences[np.lexsort((self.sequences, -lengths[self.sequences]))]
        one_window = np.zeros(len(order), np.int64)
        for batch in group_sequences(order, lengths, one_window, limit, manifest.pad):
            yield SampleBatch(self, np.array(batch.sequences))


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """Some sequences of a sample, as rows of one batch, padded to the longest.

    Arrays of `(n,)` list the positions of the text, one sequence after the other, without padding.
    """

    sample: InfluenceSample
    sequences: np.ndarray
    """Numbers of the sequences, `(batch,)`, longest first."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, `(batch,)`."""
        return self.sample.cache.sequence_length[self.sequences]

    @cached_property
    def row(self) -> np.ndarray:
        """Row of each position in the batch, `(n,)`."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def column(self) -> np.ndarray:
        """Column of each position in the batch: its index in its sequence, `(n,)`."""
        return np.concatenate([np.arange(length) for length in self.lengths])

    @cached_property
    def positions(self) -> np.ndarray:
        """Number of each position in the cache, `(n,)`."""
        return self.sample.cache.positions_of(self.sequences)

    @cached_property
    def sample_index(self) -> np.ndarray:
        """Sample index of each position, `(n,)`."""
        numbers = np.searchsorted(self.sample.sequences, self.sequences)
        return np.repeat(self.sample.starts[numbers], self.lengths) + self.column

    @cached_property
    def counted(self) -> np.ndarray:
        """Whether each position is changed and measured, `(n,)` bool."""
        return self.sample.counted[self.sample_index]

    @cached_property
    def unit_numbers(self) -> np.ndarray:
        """Resampling unit of each counted position."""
        return self.sample.units.unit_numbers[self.sample_index[self.counted]]

    def model_inputs(
        self, device: "torch.device"
    ) -> "tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]":
        """Token ids, attention mask and counted positions, each `(batch, length)`, on `device`.

        Shorter sequences are padded with zeros on the right, as in an extraction; without padding
        there is no mask.
        """
        import torch

        shape = (len(self.lengths), int(self.lengths.max()))
        ids, counted = np.zeros(shape, np.int64), np.zeros(shape, bool)
        ids[self.row, self.column] = self.sample.cache.tokens.take(self.positions)
        counted[self.row, self.column] = self.counted
        mask = None
        if self.lengths.min() < self.lengths.max():
            in_text = np.arange(shape[1]) < self.lengths[:, None]
            mask = torch.from_numpy(in_text.astype(np.int64)).to(device)
        return torch.from_numpy(ids).to(device), mask, torch.from_numpy(counted).to(device)

"""Stimulus-response alignment of a lens with its model (Belrose et al., 2303.08112, section 4.2).

The state of a layer at one position is replaced by that of another position (resampling). The
change of the lens's prediction there is the stimulus, the change of the model's the response; their
alignment is the weighted Aitchison cosine (`distribution_changes.py`). `measure_model_influence`
draws the points once (`StimulusPoints`) and adds them up by layer (`AlignmentTally`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...probes.base.resampling import bootstrap_interval
from .distribution_changes import aitchison_cosine
from .influence_sample import InfluenceSample, SampleBatch
from .layer_pass import LayerPass

if TYPE_CHECKING:
    from ...probes.basis.layer_basis import LayerBasis


@dataclass(frozen=True, eq=False)
class StimulusPoints:
    """Positions whose state is replaced, and the positions that the new states come from."""

    sample_index: np.ndarray
    """Sample index of each replaced position, ascending, `(points,)`."""
    donors: np.ndarray
    """Position in the cache of each new state, `(points,)`."""

    @classmethod
    def draw(cls, sample: InfluenceSample, count: int, seed: int) -> "StimulusPoints":
        """Draw `count` of the counted positions at random, and another position for each.

        All positions are drawn if there are fewer. One position comes from each of `count` equal
        pieces of the text, so that sequences have about as many points as their length allows, and
        few passes cover them all.
        """
        rng = np.random.default_rng([seed, 1])
        counted = np.flatnonzero(sample.counted)
        count = min(count, len(counted)) if len(counted) > 1 else 0
        borders = np.arange(count + 1) * len(counted) // max(count, 1)
        numbers = rng.integers(borders[:-1], borders[1:])
        # A donor is any of the other counted positions.
        others = (numbers + rng.integers(1, max(len(counted), 2), count)) % len(counted)
        positions = sample.cache.positions_of(sample.sequences)
        return cls(counted[numbers], positions[counted[others]])

    def rounds(self, batch: SampleBatch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield groups of the points in `batch`, of one point per sequence.

        A group is the numbers of its points, and their indices among the positions of the batch.
        """
        indices = np.flatnonzero(np.isin(batch.sample_index, self.sample_index))
        numbers = np.searchsorted(self.sample_index, batch.sample_index[indices])
        rows = batch.row[indices]
        # Points of one sequence stand side by side: number them from its first.
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        for number in range(rank.max() + 1 if len(rank) else 0):
            yield numbers[rank == number], indices[rank == number]


class AlignmentTally:
    """Sums of the alignment of one layer by document: of whole states, and of a basis's span."""

    def __init__(self, points: StimulusPoints, layer: int, basis: "LayerBasis", units: int) -> None:
        self._points = points
        self._layer = layer
        self._basis = basis
        self._counts = np.zeros((2, units))
        """Points with a defined alignment by (whole or span, unit)."""
        self._sums = np.zeros((2, units))
        """Sum of their alignments."""

    def add(self, layer_pass: LayerPass, clean_logits: torch.Tensor) -> None:
        """Replace the states of the points in a batch, one per sequence at a time.

        `clean_logits` `(n, vocab)` are the model's at the counted positions.
        """
        batch = layer_pass.batch
        device = layer_pass.hidden.device
        sample, residuals = batch.sample, batch.sample.cache.residual_array(self._layer)
        counted_index = np.cumsum(batch.counted) - 1
        for numbers, indices in self._points.rounds(batch):
            row, column, counted = (
                torch.from_numpy(index).to(device)
                for index in (batch.row[indices], batch.column[indices], counted_index[indices])
            )
            states = layer_pass.hidden[row, column]
            donors = torch.from_numpy(residuals.take(self._points.donors[numbers])).to(device)
            treated = (donors, self._basis.ablate(states, replacement=donors))
            lens_control = layer_pass.lens_logits(states)
            units = sample.units.unit_numbers[batch.sample_index[indices]]
            for kind, new_states in enumerate(treated):
                changed = layer_pass.hidden.clone()
                changed[row, column] = new_states
                cosine = aitchison_cosine(
                    stimulus=(lens_control, layer_pass.lens_logits(new_states)),
                    response=(clean_logits[counted], layer_pass.model_logits(changed)[row, column]),
                )
                self._add_values(kind, units, cosine.cpu().numpy())

    def _add_values(self, kind: int, units: np.ndarray, values: np.ndarray) -> None:
        defined = np.isfinite(values)
        np.add.at(self._counts[kind], units[defined], 1)
        np.add.at(self._sums[kind], units[defined], values[defined])

    def results(self, weights: np.ndarray) -> list[dict[str, float | int | None]]:
        """Mean, 95 % interval and number of points, of whole states and of the span.

        `weights` come from `resampling_counts`. Points where a distribution does not change, such
        as the embedding of the same token, are left out.
        """
        rows = []
        for counts, sums in zip(self._counts, self._sums, strict=True):
            n = int(counts.sum())
            low, high = bootstrap_interval(counts, sums, weights)
            mean = float(sums.sum() / n) if n else None
            rows.append({"mean": mean, "low": low, "high": high, "n": n})
        return rows

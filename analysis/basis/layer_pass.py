"""`LayerPass`: one layer of a batch, read by the lens and, resumed from there, by the model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .influence_sample import SampleBatch

if TYPE_CHECKING:
    from ...cache.head.head import TorchHead
    from ...cache.model.resume import ResumableRun
    from ...probes.ridge.solver import AffineMap

Readout = Callable[[torch.Tensor], torch.Tensor]


class LensOnDevice:
    """The lens of one layer on torch tensors: head(rows @ weight + bias), in float32."""

    def __init__(self, head: "TorchHead", affine: "AffineMap", device: torch.device) -> None:
        # Copies: the arrays of a loaded map are not writable.
        self._head = head
        self._weight = torch.tensor(affine.weight, dtype=torch.float32, device=device)
        self._bias = torch.tensor(affine.bias, dtype=torch.float32, device=device)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits `(..., vocab)` of rows `(..., d_model)`."""
        return self._head(rows @ self._weight + self._bias)


@dataclass(frozen=True, eq=False)
class LayerPass:
    """The stream of one layer of a batch, from the cache, and what model and lens make of it."""

    batch: SampleBatch
    hidden: torch.Tensor
    """Rows of the cache in the text, of the model in the padding; `(batch, length, d_model)`."""
    counted: torch.Tensor
    """Whether each position is changed and measured, `(batch, length)` bool."""
    lens_logits: Readout
    """Logits of the lens, from rows `(..., d_model)`."""
    model_logits: Readout
    """Logits `(batch, length, vocab)` of the model, from a stream `(batch, length, d_model)`."""

    @property
    def rows(self) -> torch.Tensor:
        """The counted rows, `(n, d_model)` float32."""
        return self.hidden[self.counted]

    def changed_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits `(n, vocab)` of the model at the counted positions when `rows` are the layer's."""
        changed = self.hidden.clone()
        changed[self.counted] = rows
        return self.model_logits(changed)[self.counted]


def cached_stream(run: "ResumableRun", batch: SampleBatch, layer: int) -> torch.Tensor:
    """Layer `layer` of `batch`, `(batch, length, d_model)` float32 on the model's device.

    Rows are those of the cache; in the padding they are those of the model's own pass.
    """
    hidden = run.residual(layer).float().clone()
    rows = batch.sample.cache.residual_array(layer).take(batch.positions)
    row, column = (torch.from_numpy(index).to(hidden.device) for index in (batch.row, batch.column))
    hidden[row, column] = torch.from_numpy(rows).to(hidden.device)
    return hidden

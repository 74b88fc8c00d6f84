"""Logit lens (nostalgebraist, 2020): the model's own head on the residual stream of any layer.

`LogitLens` needs no fit. `evaluate` and `heatmap` read it as they read any `Readout`, as the
baseline of tuned lenses.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...cache.number_ranges import as_tuple
from ..base.display_methods import DisplayMethods, HeatmapMethods
from ..base.readout import ReadoutBatch

if TYPE_CHECKING:
    import torch

    from ...cache.store.activation_cache import ActivationCache


class LogitLens(DisplayMethods, HeatmapMethods):
    """The model's head applied to the unchanged residual stream of `layers`, at all `offsets`.

    At every offset N the prediction is that for the token after t, scored against t+N.
    """

    kind = "logit"

    def __init__(self, layers: int | Iterable[int], offsets: int | Iterable[int]) -> None:
        self.layers: tuple[int, ...] = as_tuple(layers, "layers")
        self.offsets: tuple[int, ...] = as_tuple(offsets, "offsets")

    def __repr__(self) -> str:
        return f"LogitLens(layers={self.layers}, offsets={self.offsets})"

    @classmethod
    def of(cls, cache: "ActivationCache", offsets: int | Iterable[int]) -> "LogitLens":
        """The logit lens for every layer of `cache`."""
        return cls(cache.layers, offsets)

    def pairs(self) -> list[tuple[int | None, int]]:
        """The (layer, offset) pairs to read."""
        return [(layer, offset) for layer in self.layers for offset in self.offsets]

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Logits `(n, vocab)` that the head gives for the rows; the same at every offset."""
        assert batch.hidden is not None
        return batch.head(batch.hidden)

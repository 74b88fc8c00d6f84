"""`Readout`: what evaluation asks of anything that predicts tokens from a cache.

All probes, lenses and baselines are readouts. `analysis/evaluation/probe_evaluation.py` hands each
a `ReadoutBatch` per (layer, offset) and measures the logits that come back.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ...cache.errors import UsageError
from ...cache.head.head import TorchHead

if TYPE_CHECKING:
    import torch


LayerOffset = tuple[int, int]
"""(layer, offset)."""


@dataclass(frozen=True)
class ReadoutBatch:
    """Positions t of whole sequences for which (t, t+N) lies in one sequence and one document."""

    hidden: "torch.Tensor | None"
    """Residual stream of the layer at t, `(n, d_model)` float32; None without a layer."""
    last_token: "torch.Tensor"
    """Token at t+N, the last one the model read before the token to be predicted, `(n,)` int64."""
    head: TorchHead
    """The cache's head."""
    token: "torch.Tensor | None" = None
    """Token at t, the last one that the residual stream has seen, `(n,)` int64."""
    previous_token: "torch.Tensor | None" = None
    """Token at t+N-1, -1 where t+N is the first of its text, `(n,)` int64."""
    position: "torch.Tensor | None" = None
    """Position t+N in the cache, `(n,)` int64."""


class Readout(Protocol):
    """Gives a distribution over the vocabulary for what the model says at t+N.

    A readout with the attribute `reads_target_alone = True` reads t+N and tokens before it, and
    says the same of a target at every offset: evaluation asks it once for a target.
    """

    @property
    def kind(self) -> str:
        """Name in tables: `logit`, `ridge`, `lens`, `vocab`, `bigram`, ..."""
        ...

    def pairs(self) -> list[tuple[int | None, int]]:
        """The (layer, offset) pairs that can be read; layer None without a residual stream."""
        ...

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Logits (or log-probabilities), `(n, vocab)` float32, on the device of the batch.

        What `batch.head` gives may be returned, and may be changed; it is written to again for the
        next batch, so a readout that keeps logits copies them.
        """
        ...


def check_readout(probe: Any) -> None:
    """Raise `UsageError` unless `probe` predicts tokens: it has `pairs` and `logits`."""
    if not callable(getattr(probe, "pairs", None)) or not callable(getattr(probe, "logits", None)):
        kind = getattr(probe, "kind", type(probe).__name__)
        raise UsageError(
            f"a {kind} predicts nothing: give probes that predict tokens, such as a ridge probe, a "
            "lens, a vocabulary probe or a baseline"
        )

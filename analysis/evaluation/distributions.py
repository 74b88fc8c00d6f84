"""The model's distribution at target positions, `Reference`, and buffers to compare it with probes.

A `Reference` is computed once for a window of positions and shared by all probes, whose logits
`compare_pairs` compares with it (`comparison.py`). Matrices `(rows, vocab)` are read in tiles that
stay in the processor's cache, and none is allocated.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .pair_tiles import default_tile_rows

if TYPE_CHECKING:
    import torch


class MeasureBuffers:
    """Matrices that the comparison of up to `rows` rows of `vocab` logits writes to."""

    def __init__(self, rows: int, vocab: int, device: "torch.device | str" = "cpu") -> None:
        import torch

        self.rows = rows
        """Most rows of a comparison."""
        self.q: torch.Tensor = torch.empty(rows, vocab, device=device)
        """Probabilities of the probe, float32."""
        self.difference: torch.Tensor = torch.empty(rows, vocab, device=device)
        """Log-probabilities of the probe, then log p - log q, float32."""


@dataclass(frozen=True)
class Reference:
    """The model's distribution at target positions, computed once and shared by all probes."""

    log_p: "torch.Tensor"
    """Logarithms of the probabilities, `(n, vocab)` float32."""
    p: "torch.Tensor"
    """The probabilities, `(n, vocab)` float32: kept, because to read them takes half the time of
    an exponential, for each probe and offset."""
    top: "torch.Tensor"
    """The model's top token, the lowest id on ties, `(n,)` int64."""
    text: "torch.Tensor"
    """The text's next token, -1 at the end of the text, `(n,)` int64."""
    defined: "torch.Tensor"
    """Whether the model's logits are a distribution, `(n,)` bool."""

    @classmethod
    def of(
        cls,
        logits: "torch.Tensor",
        text: "torch.Tensor",
        log_p: "torch.Tensor | None" = None,
        p: "torch.Tensor | None" = None,
    ) -> "Reference":
        """The reference of the model's logits `(n, vocab)` and the text's next tokens `(n,)`.

        `log_p` and `p`, `(n, vocab)` float32, are written to; `log_p` may be `logits` itself.
        """
        import torch

        logits = logits.float()
        n, vocab = logits.shape
        log_p = torch.empty_like(logits) if log_p is None else log_p
        p = torch.empty_like(logits) if p is None else p
        top, largest = torch.empty_like(text), logits.new_empty(n)
        tile_rows = min(n, default_tile_rows(vocab, logits.device))
        for start in range(0, n, max(1, tile_rows)):
            tile = slice(start, min(n, start + tile_rows))
            top[tile] = top_token(logits[tile])
            largest[tile] = value_at(logits[tile], top[tile])
            torch.softmax(logits[tile], -1, out=p[tile])
            log_top = value_at(p[tile], top[tile]).log_()
            # log p = logits - largest + log p(top); NaN and +inf end as NaN in the whole row.
            shifted = torch.sub(logits[tile], largest[tile, None], out=log_p[tile])
            shifted.add_(log_top[:, None])
        return cls(log_p, p, top, text, largest.isfinite())

    @property
    def confidence(self) -> np.ndarray:
        """The model's largest probability, `(n,)` float32; NaN where undefined."""
        return value_at(self.p, self.top).cpu().numpy()


def top_token(logits: "torch.Tensor") -> "torch.Tensor":
    """The lowest id among the largest logits, `(n,)` int64.

    A NaN counts as the largest. torch and numpy both promise the first maximum.
    """
    import torch

    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def value_at(values: "torch.Tensor", token: "torch.Tensor") -> "torch.Tensor":
    """The value of each row at its `token` `(n,)`, from `values` `(n, vocab)`."""
    return values.gather(-1, token[:, None])[:, 0]

"""Takes the logits that a cache keeps from layer L on the device, a tile of rows at a time."""

from typing import TYPE_CHECKING

import torch

from ..format.logits_arrays import FULL, FULL_ARRAY, NARROW_VOCAB, TOP_ARRAYS, top_size
from ..head.head import Head

if TYPE_CHECKING:
    from ..store.activation_cache import ActivationCache

TILE_BYTES = 32 << 20
"""Most bytes of float32 logits at a time; four times as many are in use at most."""
StoredRows = tuple[torch.Tensor, torch.Tensor]
"""Rows in their stored dtype, and the float32 peak |value| of each row before the cast."""


class KeptLogits:
    """Layer L, `(rows, d_model)`, to the arrays of a logits mode, `(rows, numbers of a row)`.

    The head runs in float32 on the residual stream as the model computed it, before any cast.
    """

    def __init__(self, head: Head, mode: str, dtype: str, device: torch.device) -> None:
        self._head = head.torch(str(device))
        self._top = top_size(mode)
        self._dtype = getattr(torch, dtype)
        self._narrow = head.vocab <= NARROW_VOCAB
        self.tile_rows = max(1, TILE_BYTES // (4 * head.vocab))

    @classmethod
    def of(cls, cache: "ActivationCache", device: torch.device) -> "KeptLogits | None":
        """The pass for the arrays of `cache`; None if it keeps no logits."""
        mode = cache.manifest.capture.logits
        if mode != FULL and not top_size(mode):
            return None
        name = FULL_ARRAY if mode == FULL else TOP_ARRAYS[1]
        return cls(cache.head, mode, cache.array(name).layout.logical_dtype, device)

    def __call__(self, hidden: torch.Tensor) -> dict[str, StoredRows]:
        """The arrays' rows by name."""
        tiles = [self._tile(self._head(rows.float())) for rows in hidden.split(self.tile_rows)]
        arrays: dict[str, StoredRows] = {}
        for name in tiles[0]:
            stored, peaks = zip(*(tile[name] for tile in tiles), strict=True)
            arrays[name] = torch.cat(stored), torch.cat(peaks)
        if self._top and self._narrow:
            # Through int16, of the same bits: few operations know uint16.
            ids, peaks = arrays[TOP_ARRAYS[0]]
            arrays[TOP_ARRAYS[0]] = ids.view(torch.uint16), peaks
        return arrays

    def _tile(self, logits: torch.Tensor) -> dict[str, StoredRows]:
        if not self._top:
            return {FULL_ARRAY: self._cast(logits)}
        values, ids = logits.topk(self._top)
        logsumexp = logits.logsumexp(-1, keepdim=True)
        # The others' own sum: one minus that of the largest would drown in rounding.
        others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        tail = (others - logsumexp).exp()
        taken = (
            (ids.to(torch.int16 if self._narrow else torch.int32), torch.zeros_like(tail[:, 0])),
            self._cast(values),
            (logsumexp, logsumexp[:, 0].abs()),
            (tail, tail[:, 0]),
        )
        return dict(zip(TOP_ARRAYS, taken, strict=True))

    def _cast(self, values: torch.Tensor) -> StoredRows:
        peaks = torch.maximum(values.amax(-1), -values.amin(-1))
        return values.to(self._dtype), peaks

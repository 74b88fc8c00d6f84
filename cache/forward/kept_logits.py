"""Computes the logits that a cache keeps (top-k or all) from layer L, on the device.

`PartRunner` calls a `KeptLogits` on each batch. Logits are computed for a tile of rows at a time,
because float32 logits of a whole batch would not fit into memory. Arrays and modes:
`format/logits_arrays.py`.
"""

from typing import TYPE_CHECKING

import torch

from ..format.logits_arrays import FULL, FULL_ARRAY, NARROW_VOCAB, TOP_ARRAYS, top_size
from ..head.head import Head

if TYPE_CHECKING:
    from ..store.activation_cache import ActivationCache

TILE_BYTES = 32 << 20
"""Most bytes of the float32 logits of a tile; peak memory is four times as much."""
StoredRows = tuple[torch.Tensor, torch.Tensor]
"""Rows in their stored dtype, and the float32 peak |value| of each row before the cast."""


class KeptLogits:
    """Maps layer L, `(rows, d_model)`, to the arrays of a logits mode, `(rows, ...)`.

    `mode` is `full` or `topk:K`, `dtype` the stored dtype of the logits. The head runs in float32
    on the residual stream in the model's own dtype, before any cast to the stored dtype.
    """

    def __init__(self, head: Head, mode: str, dtype: str, device: torch.device) -> None:
        self._head = head.torch(str(device))
        self._top = top_size(mode)
        self._dtype = getattr(torch, dtype)
        self._narrow = head.vocab <= NARROW_VOCAB
        self.tile_rows: int = max(1, TILE_BYTES // (4 * head.vocab))

    @classmethod
    def of(cls, cache: "ActivationCache", device: torch.device) -> "KeptLogits | None":
        """The `KeptLogits` of `cache`; None if `cache` keeps no logits."""
        mode = cache.manifest.capture.logits
        if mode != FULL and not top_size(mode):
            return None
        name = FULL_ARRAY if mode == FULL else TOP_ARRAYS[1]
        return cls(cache.head, mode, cache.array(name).layout.logical_dtype, device)

    def __call__(self, hidden: torch.Tensor) -> dict[str, StoredRows]:
        """Array name -> rows of the array, for `hidden` of shape `(rows, d_model)`."""
        tiles = [self._tile(self._head(rows.float())) for rows in hidden.split(self.tile_rows)]
        arrays: dict[str, StoredRows] = {}
        for name in tiles[0]:
            stored, peaks = zip(*(tile[name] for tile in tiles), strict=True)
            arrays[name] = torch.cat(stored), torch.cat(peaks)
        if self._top and self._narrow:
            # Ids were computed as int16, with the same bits: torch has few operations for uint16.
            ids, peaks = arrays[TOP_ARRAYS[0]]
            arrays[TOP_ARRAYS[0]] = ids.view(torch.uint16), peaks
        return arrays

    def _tile(self, logits: torch.Tensor) -> dict[str, StoredRows]:
        """Array name -> rows of the array, for `logits` of shape `(tile rows, vocab)`."""
        if not self._top:
            return {FULL_ARRAY: self._cast(logits)}
        values, ids = logits.topk(self._top)
        logsumexp = logits.logsumexp(-1, keepdim=True)

        # Probability of all tokens outside the top k, summed over these tokens: one minus the sum
        # of the top k would be lost in rounding.
        others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        tail = (others - logsumexp).exp()

        # (rows, peaks) in the order of TOP_ARRAYS: ids, values, logsumexp, tail.
        arrays = (
            (ids.to(torch.int16 if self._narrow else torch.int32), torch.zeros_like(tail[:, 0])),
            self._cast(values),
            (logsumexp, logsumexp[:, 0].abs()),
            (tail, tail[:, 0]),
        )
        return dict(zip(TOP_ARRAYS, arrays, strict=True))

    def _cast(self, values: torch.Tensor) -> StoredRows:
        """`values` in the stored dtype, and the peak |value| of each row."""
        peaks = torch.maximum(values.amax(-1), -values.amin(-1))
        return values.to(self._dtype), peaks

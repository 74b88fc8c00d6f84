"""Logits of a tile of rows, block by block, and the way of their gradient back to the rows.

`HeadTile` multiplies rows by the unembedding; `softmax_loss.py` turns the logits of each block into
a gradient, or into probabilities, while the block lies in the processor's cache. No pass goes over
the whole tile. All memory is used again by the next tile of the thread.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...cache.head.head import TorchHead
from ...cache.head.row_buffers import reused_rows

CACHE_BYTES = 256 << 10
"""Size of the logits of a block on the CPU, which its passes find in the processor's cache."""


def cache_blocks(logits: Tensor) -> Iterator[slice]:
    """Blocks of the rows of `logits` for passes over them: of `CACHE_BYTES` in float32 on the CPU.

    On other devices, all rows at once: each operation costs a start there.
    """
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(1, CACHE_BYTES // (4 * logits.shape[1]))
    yield from (slice(start, start + rows) for start in range(0, len(logits), max(1, rows)))


class HeadTile:
    """The logits of one tile, by a head that is a formula.

    logits = cap(scale (normed unembedding' + bias)), with cap(z) = softcap tanh(z / softcap).
    Without a softcap and with bfloat16, all logits of a row lack one and the same number, which a
    softmax does not see: the normed row times the mean of the unembedding.
    """

    def __init__(
        self, head: TorchHead, normed: Tensor, products: str, memory: Tensor | None = None
    ) -> None:
        """`normed` `(n, d_model)` are rows after the final norm; `products` is `float32` or
        `bfloat16`. The logits are written into `memory` `(n, vocab)` float32, if given."""
        self.head = head
        self.normed = normed
        self.memory = memory
        self.rounds: bool = products == "bfloat16"
        shape = len(normed), head.head.vocab
        if self.rounds:
            self.product = reused_rows("product", *shape, like=normed, dtype=torch.bfloat16)
            torch.mm(normed.bfloat16(), head.rounded_unembedding.T, out=self.product)
        else:
            self.product: Tensor = (
                reused_rows("logits", *shape, like=normed) if memory is None else memory
            )
            torch.addmm(head.bias, normed, head.unembedding.T, out=self.product)
        self._slope: Tensor | None = None
        """Derivative of cap at the logits of the last block; None without a softcap."""
        self._sums: list[Tensor] = []
        """Sums of the gradients over the vocabulary, which a softcap makes differ from 0."""

    def blocks(self) -> Iterator[slice]:
        """Blocks of rows, in order."""
        return cache_blocks(self.product)

    def logits(self, rows: slice, slope: bool = False) -> Tensor:
        """Logits of a block, `(n, vocab)` float32: in the memory given, or valid until the next
        block. With `slope`, `take_gradient` may follow."""
        z = self._linear(rows)
        softcap = self.head.head.softcap
        if softcap is not None:
            z.div_(softcap).tanh_()
            if slope:
                # Derivative of cap: 1 - tanh².
                self._slope = torch.square(z, out=reused_rows("cap", *z.shape, like=z))
                self._slope.neg_().add_(1)
            z.mul_(softcap)
        return z

    def _linear(self, rows: slice) -> Tensor:
        """scale (normed unembedding' + bias) of a block."""
        z = self.product[rows]
        if self.rounds:
            rounded = z
            if self.memory is None:
                z = reused_rows("block", *rounded.shape, like=self.normed)
            else:
                z = self.memory[rows]
            torch.add(rounded, self.head.bias, out=z)
            if self.head.head.softcap is not None:
                z.add_((self.normed[rows] @ self.head.mean_unembedding)[:, None])
        if self.head.head.scale != 1.0:
            z.mul_(self.head.head.scale)
        return z

    def take_gradient(self, rows: slice, gradient: Tensor) -> None:
        """Keep the `gradient` in the logits of the last block, `(n, vocab)`, in their memory."""
        if self._slope is not None:
            gradient.mul_(self._slope)
            if self.rounds:
                self._sums.append(gradient.sum(1))
        if self.rounds:
            self.product[rows].copy_(gradient)

    def normed_gradient(self) -> Tensor:
        """Gradient in the normed rows, `(n, d_model)`, of the gradients that were taken."""
        if self.rounds:
            gradient = (self.product @ self.head.rounded_unembedding).float()
            if self._sums:
                gradient.addr_(torch.cat(self._sums), self.head.mean_unembedding)
        else:
            gradient = self.product @ self.head.unembedding
        scale = self.head.head.scale
        return gradient if scale == 1.0 else gradient.mul_(scale)

"""`ProbeHead`: the head that probes read in an evaluation, with buffers and quicker products.

A probe's logits are measured before the next probe is read, so all probes can write to one matrix:
a new one for each would cost as much time as measuring it. Products in bfloat16 take half the time
or less where the processor multiplies bfloat16. Rounded logits would be wrong in their third digit.
The head's product is therefore taken of the *difference* to the model,

    logits of the probe = logits of the model + (z_probe - z_model) Wᵀ,    z = norm(h)

where the model's logits are exact in float32: the rounding is a part of the difference, which is
what KL measures, and vanishes with it. On random heads (d 256 and 1024, vocabulary 4,000 and
16,000) a mean KL of .01 to 4.4 nats moved by 1e-6 to 3e-4 of itself and a single row's by .2 %;
with rounded logits, by 1e-4 to 1.4e-2 and up to 7 %.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.head.head import Head, TorchHead
from ...probes.training.softmax_loss import cache_blocks, fast_products
from .pair_tiles import as_rows

if TYPE_CHECKING:
    import torch

    from .distributions import Reference

PRODUCTS = ("auto", "float32", "bfloat16")
"""Precisions of the head's products for probes."""
WIDE_VOCAB = 1 << 15
"""Tokens from which the head's products take most of an evaluation's time."""


class VocabBuffers:
    """Matrices `(rows, vocab)` by name, kept for the next window."""

    def __init__(self, vocab: int, device: "torch.device") -> None:
        self.vocab = vocab
        self.device = device
        self._matrices: dict[str, torch.Tensor] = {}

    def rows(self, name: str, count: int, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """The first `count` rows of the matrix `name`, whose values are what was last written."""
        import torch

        matrix = self._matrices.get(name)
        if matrix is None or len(matrix) < count:
            # The old matrix goes first: both together may not fit.
            self._matrices.pop(name, None)
            matrix = torch.empty(count, self.vocab, dtype=dtype, device=self.device)
            self._matrices[name] = matrix
        return matrix[:count]

    def clear(self) -> None:
        """Give up all matrices, such as after a window for which memory ran out."""
        self._matrices.clear()


class ModelRows:
    """The model's own rows at the targets of a window: what differences are taken to."""

    def __init__(self, normed: "torch.Tensor", reference: "Reference") -> None:
        self.normed = normed
        """The input of the unembedding, `(targets, d_model)` float32."""
        self.reference = reference


class ProbeHead(TorchHead):
    """A head whose calls write logits into a buffer, and which otherwise is the given head.

    The first call after `start_batch` with the rows of the batch gives a matrix of the buffers,
    valid until the next batch. Other calls, as of a probe that calls the head twice, give matrices
    of their own.
    """

    def __init__(self, head: TorchHead, buffers: VocabBuffers, products: str = "float32") -> None:
        self._head, self._buffers = head, buffers
        self.head: Head = head.head
        self.products = products
        """`float32` or `bfloat16`."""
        self.model_rows: ModelRows | None = None
        """Set for each window if products are in bfloat16."""
        self._name, self._targets = "", np.zeros(0, np.int64)

    def __getattr__(self, name: str) -> Any:
        # Tensors of the head; programs refuse theirs with a message.
        return getattr(self._head, name)

    def start_batch(self, name: str, targets: np.ndarray) -> None:
        """Let the next call write to the buffer `name`, if its rows are as many as `targets`.

        `targets` `(n,)` are the numbers of the targets in the window whose model rows are
        subtracted, one for each row; any would do, the nearest are rounded least.
        """
        self._name, self._targets = name, targets

    def normalize(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Apply the final norm, see `TorchHead.normalize`."""
        return self._head.normalize(hidden)

    def __call__(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits `(n, vocab)` in float32 of residuals `hidden`, `(n, d_model)`."""
        name, self._name = self._name, ""
        if not name or hidden.ndim != 2 or len(hidden) != len(self._targets):
            return self._head(hidden)
        out = self._buffers.rows(name, len(hidden))
        if self.model_rows is None:
            self._head.write_logits(hidden, out)
            return out
        return self._write_rounded(hidden, self.model_rows, out)

    def _write_rounded(
        self, hidden: "torch.Tensor", model: ModelRows, out: "torch.Tensor"
    ) -> "torch.Tensor":
        """Write the model's logits and the product of the difference in bfloat16 into `out`.

        Up to a number for each row, which no softmax sees.
        """
        import torch

        reference = model.reference
        rows = torch.from_numpy(self._targets).to(hidden.device)
        difference = self._head.normalize(hidden) - model.normed[rows]
        if self.head.scale != 1.0:
            difference *= self.head.scale
        product = self._buffers.rows("product", len(hidden), torch.bfloat16)
        torch.mm(difference.bfloat16(), self._head.rounded_unembedding.T, out=product)
        # Block by block, which stays in the processor's cache: a sum of both dtypes takes thrice
        # the time of a conversion and a sum.
        for block in cache_blocks(out):
            out[block].copy_(product[block]).add_(reference.log_p[as_rows(self._targets[block])])
        return out


def choose_products(products: str, head: TorchHead, device: "torch.device") -> str:
    """`float32` or `bfloat16` for the head's products of probes, from `PRODUCTS`.

    `auto` is bfloat16 for `WIDE_VOCAB` tokens and more, where the processor multiplies it faster.
    Heads that are not linear after their norm (a softcap, a program) take float32.
    """
    if head.head.kind != "explicit" or head.head.softcap is not None:
        return "float32"
    if products != "auto":
        return products
    if head.head.vocab < WIDE_VOCAB:
        return "float32"
    return "bfloat16" if device.type != "cpu" else fast_products()


def check_products(products: str) -> None:
    """Raise `UsageError` unless `products` is one of `PRODUCTS`."""
    if products not in PRODUCTS:
        raise UsageError(f"products must be one of {', '.join(PRODUCTS)}, not {products!r}")


def rounding_notes(products: str) -> list[str]:
    """A note that says how far `bfloat16` products move the measures; none for `float32`."""
    if products != "bfloat16":
        return []
    return [
        "the head's products for probes are in bfloat16, of the difference to the model: a KL "
        "moves by some 0.03 % of itself, that of a single pair by 0.2 %; the model's distribution "
        "is float32"
    ]

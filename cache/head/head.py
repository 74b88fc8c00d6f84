"""`Head`: final norm, unembedding, bias, scale and softcap of a model, kept as data in `head/`.

    z = norm(h) * weight + norm_bias            h, z (..., d_model)
    logits = softcap(scale * (z Wᵀ + bias))     (..., vocab);  softcap(x) = c tanh(x / c)

`norm` is `layernorm` (subtract the mean, divide by sqrt(variance + eps)), `rmsnorm` (divide by
sqrt(mean square + eps)) or `none`. Evaluated in float32 by numpy or torch; never by model code.
Heads are read off a model by `identify_head.py` and loaded from disk by `load_head.py`; models with
another formula have a `ProgramHead` (`program_head.py`).
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..function_above import call_above
from .head_files import save_head
from .row_buffers import reused_rows

if TYPE_CHECKING:
    import torch


ROUNDED_BYTES = 1 << 20
"""Size of the rows of an unembedding that are rounded at a time, in float32."""
NORMS = ("layernorm", "rmsnorm", "none")
"""Kinds of the final norm."""
TENSORS = ("norm_weight", "norm_bias", "unembedding", "bias")
"""Fields of `Head` that are arrays, and their names in `head.safetensors`."""


@dataclass(frozen=True)
class Head:
    """A head by formula: maps residuals of layer L, `(..., d_model)`, to logits `(..., vocab)`."""

    norm: str
    """One of `NORMS`."""
    eps: float
    """Added to the variance or mean square before the root."""
    norm_weight: np.ndarray
    """Gain after the norm, `(d_model,)` float32; ones for a model without a gain."""
    norm_bias: np.ndarray
    """Bias after the gain, `(d_model,)` float32; zeros for a model without this bias."""
    unembedding: np.ndarray
    """Unembedding matrix W, `(vocab, d_model)` float32."""
    bias: np.ndarray
    """Bias of the unembedding, `(vocab,)` float32; zeros for a model without this bias."""
    scale: float = 1.0
    """Factor of the logits before the softcap."""
    softcap: float | None = None
    """Bound c of the logits, c tanh(x / c); None for a model without a softcap."""

    kind = "explicit"
    """`explicit`, or `program` in the subclass `ProgramHead`."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.unembedding.shape[1]

    @property
    def nbytes(self) -> int:
        """Size of the tensors in float32, in bytes."""
        return sum(getattr(self, name).nbytes for name in TENSORS)

    @property
    def vocab(self) -> int:
        """Number of logits."""
        return self.unembedding.shape[0]

    @cached_property
    def rounded_on_cpu(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Factors of products in bfloat16 on the CPU, see `round_unembedding`.

        Made once for all fits and evaluations with the head, and kept as long: half the size of the
        unembedding. A `TorchHead` would have to make them anew in every call.
        """
        return round_unembedding(as_head_tensor(self.unembedding, "cpu"))

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but what `rounded_on_cpu` keeps."""
        return {name: value for name, value in vars(self).items() if name != "rounded_on_cpu"}

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of formula and tensors: heads of one digest give the same logits."""
        hasher = hashlib.sha256(json.dumps(self._spec(), sort_keys=True, allow_nan=False).encode())
        for name in TENSORS:
            hasher.update(np.ascontiguousarray(getattr(self, name), np.float32).tobytes())
        return hasher.hexdigest()

    def __dask_tokenize__(self) -> str:
        """Name of the head for dask, which would otherwise hash the pickled tensors."""
        return self.digest

    def normalize(self, hidden: np.ndarray) -> np.ndarray:
        """Apply the final norm with gain and bias to `hidden`, `(..., d_model)`, in float32."""
        hidden = np.asarray(hidden, np.float32)
        if self.norm == "layernorm":
            hidden = hidden - hidden.mean(-1, keepdims=True, dtype=np.float32)
        if self.norm != "none":
            width = np.float32(self.d_model)
            mean_square = np.einsum("...i,...i->...", hidden, hidden)[..., None] / width
            hidden = hidden / np.sqrt(mean_square + np.float32(self.eps))
        return hidden * self.norm_weight + self.norm_bias

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits `(..., vocab)` in float32 of residuals `hidden`, `(..., d_model)`."""
        out = self.normalize(hidden) @ self.unembedding.T
        out += self.bias
        if self.scale != 1.0:
            out *= np.float32(self.scale)
        if self.softcap is not None:
            np.tanh(out / np.float32(self.softcap), out=out)
            out *= np.float32(self.softcap)
        return out

    def torch(self, device: "str | torch.device" = "cpu") -> "TorchHead":
        """The head on torch tensors of `device`, differentiable in the hidden states.

        On the CPU the tensors are the head's own arrays: nothing may write to them.
        """
        return TorchHead(self, device)

    def __repr__(self) -> str:
        return f"<Head {self.norm}: {self.d_model} -> {self.vocab} logits>"

    def _repr_html_(self) -> str:
        """Formula and shape, for notebooks."""
        return call_above("analysis.display.object_html", "head_html", self)

    def describe(self) -> dict[str, Any]:
        """Kind, norm, eps, scale and softcap, for reports."""
        return {"kind": self.kind, **self._spec()}

    def _spec(self) -> dict[str, Any]:
        """Fields of `head.json` that determine the computation, next to the tensors."""
        return {"norm": self.norm, "eps": self.eps, "scale": self.scale, "softcap": self.softcap}

    def save(self, folder: Path, tensors: dict[str, "torch.Tensor"] | None = None) -> None:
        """Write `head.safetensors`, then `head.json`.

        If `tensors` are given, these (in the model's dtype) are written instead of the float32
        arrays.
        """
        arrays = {name: getattr(self, name) for name in TENSORS}
        save_head(folder, {"kind": self.kind, **self._spec()}, arrays, tensors)

    def with_vocab(self, vocab: int) -> "Head":
        """Keep the first `vocab` rows of the unembedding: models may drop padding rows."""
        return replace(self, unembedding=self.unembedding[:vocab], bias=self.bias[:vocab])


def as_head_tensor(array: np.ndarray, device: "str | torch.device") -> "torch.Tensor":
    """The array of a head as a float32 tensor on `device`; on the CPU without a copy.

    The unembedding of a large model takes gigabytes. Read-only arrays are copied: torch knows no
    tensor that may not be written.
    """
    import torch

    if array.dtype == np.float32 and array.flags.c_contiguous and array.flags.writeable:
        return torch.from_numpy(array).to(device)
    return torch.tensor(array, dtype=torch.float32, device=device)


def round_unembedding(unembedding: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """The unembedding less its mean over the vocabulary, `(vocab, d_model)` bfloat16, and the mean,
    `(d_model,)` float32."""
    import torch

    mean = unembedding.mean(0)
    rounded = torch.empty_like(unembedding, dtype=torch.bfloat16)
    # In blocks: a difference of all rows would take as much memory as the unembedding.
    rows = max(1, ROUNDED_BYTES // (4 * unembedding.shape[1]))
    difference = torch.empty_like(unembedding[:rows])
    for block, out in zip(unembedding.split(rows), rounded.split(rows), strict=True):
        out.copy_(torch.sub(block, mean, out=difference[: len(block)]))
    return rounded, mean


class TorchHead:
    """A `Head` on torch tensors; gradients flow to the hidden states."""

    def __init__(self, head: Head, device: "str | torch.device" = "cpu") -> None:
        self.head = head
        self.norm_weight: torch.Tensor = as_head_tensor(head.norm_weight, device)
        self.norm_bias: torch.Tensor = as_head_tensor(head.norm_bias, device)
        self.unembedding: torch.Tensor = as_head_tensor(head.unembedding, device)
        self.bias: torch.Tensor = as_head_tensor(head.bias, device)

    def normalize(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Apply the final norm with gain and bias: `(..., d_model)` of any dtype to float32."""
        hidden = hidden.float()
        if self.head.norm == "layernorm":
            hidden = hidden - hidden.mean(-1, keepdim=True)
        if self.head.norm != "none":
            hidden = hidden * (hidden.square().mean(-1, keepdim=True) + self.head.eps).rsqrt()
        return hidden * self.norm_weight + self.norm_bias

    def norm_gradient(self, hidden: "torch.Tensor", gradient: "torch.Tensor") -> "torch.Tensor":
        """Gradient in `hidden` `(n, d_model)` of the `gradient` in `normalize(hidden)`; float32.

        With x, the rows (less their means), r = 1 / sqrt(mean x^2 + eps), y = x r and g, the
        gradient in y: r (g - y mean(g y)), less its mean where the rows lost theirs. autograd would
        import sympy, which takes longer than a short fit's steps.
        """
        import torch

        with torch.no_grad():
            gradient = gradient * self.norm_weight
            if self.head.norm == "none":
                return gradient
            x = hidden.float()
            if self.head.norm == "layernorm":
                x = x - x.mean(-1, keepdim=True)
            scale = (x.square().mean(-1, keepdim=True) + self.head.eps).rsqrt()
            y = x * scale
            gradient.addcmul_(y, (gradient * y).mean(-1, keepdim=True), value=-1).mul_(scale)
            if self.head.norm == "layernorm":
                gradient.sub_(gradient.mean(-1, keepdim=True))
            return gradient

    def write_logits(
        self, hidden: "torch.Tensor", out: "torch.Tensor", products: str = "float32"
    ) -> "torch.Tensor":
        """Write the logits of `hidden` `(n, d_model)` into `out` `(n, vocab)` float32; gives `out`.

        In float32 they equal a call of the head bit for bit. No gradients. `products` is the dtype
        of the factors of the head's product, see `write_linear`.
        """
        import torch

        with torch.no_grad():
            self.write_linear(self.normalize(hidden), out, products)
            if self.head.softcap is not None:
                out.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return out

    def write_linear(
        self, normed: "torch.Tensor", out: "torch.Tensor", products: str = "float32"
    ) -> None:
        """Write scale (normed unembedding' + bias) into `out` `(n, vocab)`, float32; no gradients.

        With `bfloat16`, normed rows and unembedding are rounded to bfloat16, and so is their
        product. A mean over the vocabulary, which a softmax would not see, is taken from the
        unembedding before and added to the logits after: many models have logits far from 0, which
        would lose most by rounding.
        """
        import torch

        with torch.no_grad():
            if products == "bfloat16":
                product = reused_rows("product", *out.shape, like=out, dtype=torch.bfloat16)
                torch.mm(normed.bfloat16(), self.rounded_unembedding.T, out=product)
                torch.add(product, self.bias, out=out)
                out.add_((normed @ self.mean_unembedding)[:, None])
            else:
                torch.addmm(self.bias, normed, self.unembedding.T, out=out)
            if self.head.scale != 1.0:
                out.mul_(self.head.scale)

    @property
    def rounded_unembedding(self) -> "torch.Tensor":
        """The unembedding less its mean over the vocabulary, `(vocab, d_model)` bfloat16."""
        return self._rounded[0]

    @property
    def mean_unembedding(self) -> "torch.Tensor":
        """Mean of the unembedding over the vocabulary, `(d_model,)`."""
        return self._rounded[1]

    @cached_property
    def _rounded(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Both of these: of the CPU, those that the head keeps."""
        if self.unembedding.device.type == "cpu":
            return self.head.rounded_on_cpu
        return round_unembedding(self.unembedding)

    def __call__(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits `(..., vocab)` in float32 of residuals `hidden`, `(..., d_model)`."""
        import torch

        out = torch.nn.functional.linear(self.normalize(hidden), self.unembedding, self.bias)
        if self.head.scale != 1.0:
            out = out * self.head.scale
        if self.head.softcap is not None:
            out = torch.tanh(out / self.head.softcap) * self.head.softcap
        return out

"""The head: final norm, unembedding, bias, scale and softcap, kept as data in `head/`.

    z = norm(h) * weight + norm_bias            h, z (..., d_model)
    logits = softcap(scale * (z Wᵀ + bias))     (..., vocab);  softcap(x) = c tanh(x / c)

`norm` is `layernorm` (subtract the mean, divide by sqrt(variance + eps)), `rmsnorm` (divide by
sqrt(mean square + eps)) or `none`. Evaluated in float32 by numpy or torch; never by model code.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .head_files import save_head

if TYPE_CHECKING:
    import torch


NORMS = ("layernorm", "rmsnorm", "none")
TENSORS = ("norm_weight", "norm_bias", "unembedding", "bias")
"""Fields of `Head` that are arrays, and their names in `head.safetensors`."""


@dataclass(frozen=True)
class Head:
    """Maps the residual stream of layer L to logits; `(..., d_model)` -> `(..., vocab)`."""

    norm: str
    """One of `NORMS`."""
    eps: float
    """Added to the variance or mean square before the root."""
    norm_weight: np.ndarray
    """`(d_model,)` float32, the gain after the norm (ones if there is none)."""
    norm_bias: np.ndarray
    """`(d_model,)` float32 (zeros if there is none)."""
    unembedding: np.ndarray
    """`(vocab, d_model)` float32."""
    bias: np.ndarray
    """`(vocab,)` float32 (zeros if there is none)."""
    scale: float = 1.0
    softcap: float | None = None

    kind = "explicit"
    """`explicit` here; `program` for heads that are kept as operations (`programhead`)."""

    @property
    def d_model(self) -> int:
        return self.unembedding.shape[1]

    @property
    def nbytes(self) -> int:
        """Size of the tensors in float32."""
        return sum(getattr(self, name).nbytes for name in TENSORS)

    @property
    def vocab(self) -> int:
        return self.unembedding.shape[0]

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of everything that the head computes with: equal heads read equal streams."""
        hasher = hashlib.sha256(json.dumps(self._spec(), sort_keys=True, allow_nan=False).encode())
        for name in TENSORS:
            hasher.update(np.ascontiguousarray(getattr(self, name), np.float32).tobytes())
        return hasher.hexdigest()

    def __dask_tokenize__(self) -> str:
        return self.digest

    def normalize(self, hidden: np.ndarray) -> np.ndarray:
        """The final norm with its gain and bias, in float32; `(..., d_model)`."""
        hidden = np.asarray(hidden, np.float32)
        if self.norm == "layernorm":
            hidden = hidden - hidden.mean(-1, keepdims=True, dtype=np.float32)
        if self.norm != "none":
            square = np.einsum("...i,...i->...", hidden, hidden)[..., None] / np.float32(
                self.d_model
            )
            hidden = hidden / np.sqrt(square + np.float32(self.eps))
        return hidden * self.norm_weight + self.norm_bias

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits in float32, `(..., vocab)`."""
        out = self.normalize(hidden) @ self.unembedding.T
        out += self.bias
        if self.scale != 1.0:
            out *= np.float32(self.scale)
        if self.softcap is not None:
            np.tanh(out / np.float32(self.softcap), out=out)
            out *= np.float32(self.softcap)
        return out

    def torch(self, device: str = "cpu") -> "TorchHead":
        """The same head for torch tensors, differentiable."""
        return TorchHead(self, device)

    def describe(self) -> dict[str, Any]:
        """The head in a few words."""
        return {"kind": self.kind, **self._spec()}

    def _spec(self) -> dict[str, Any]:
        return {"norm": self.norm, "eps": self.eps, "scale": self.scale, "softcap": self.softcap}

    def save(self, folder: Path, tensors: dict[str, "torch.Tensor"] | None = None) -> None:
        """Write `head.safetensors`, then `head.json`; `tensors` in the model's own dtype win."""
        arrays = {name: getattr(self, name) for name in TENSORS}
        save_head(folder, {"kind": self.kind, **self._spec()}, arrays, tensors)

    def with_vocab(self, vocab: int) -> "Head":
        """The first `vocab` rows of the unembedding, where a model drops padding rows."""
        return replace(self, unembedding=self.unembedding[:vocab], bias=self.bias[:vocab])


class TorchHead:
    """`Head` on torch tensors; gradients flow to the hidden states."""

    def __init__(self, head: Head, device: str = "cpu") -> None:
        import torch

        def move(array: np.ndarray) -> torch.Tensor:
            # A copy: tensors must not be writable views of the head's read-only arrays.
            return torch.tensor(array, dtype=torch.float32, device=device)

        self.head = head
        self.norm_weight = move(head.norm_weight)
        self.norm_bias = move(head.norm_bias)
        self.unembedding = move(head.unembedding)
        self.bias = move(head.bias)

    def normalize(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """The final norm with its gain and bias of rows of any dtype; `(..., d_model)` float32."""
        hidden = hidden.float()
        if self.head.norm == "layernorm":
            hidden = hidden - hidden.mean(-1, keepdim=True)
        if self.head.norm != "none":
            hidden = hidden * (hidden.square().mean(-1, keepdim=True) + self.head.eps).rsqrt()
        return hidden * self.norm_weight + self.norm_bias

    def __call__(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits, `(..., vocab)`."""
        import torch

        out = torch.nn.functional.linear(self.normalize(hidden), self.unembedding, self.bias)
        if self.head.scale != 1.0:
            out = out * self.head.scale
        if self.head.softcap is not None:
            out = torch.tanh(out / self.head.softcap) * self.head.softcap
        return out

"""`ProgramHead`: a model's head kept as a program of array operations and its tensors.

For models whose tail is not norm, linear map, scale, softcap (`head.py`). Programs are recorded by
`record_head.py`, read from disk by `load_head.py`, and run here by numpy or torch.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..files.json_fields import FieldError, integer_field
from ..format.manifest import MAX_VOCAB, MAX_WIDTH
from .head import Head, TorchHead, as_head_tensor
from .head_files import save_head
from .operations import NumpyOperations, TorchOperations
from .program import Program
from .program_bounds import check_bounds

if TYPE_CHECKING:
    import torch


class _ExplicitOnly:
    """An attribute of explicit heads alone: reading it raises `UsageError`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        raise UsageError(
            f"this model's head is an op program and has no {self.name}; only its logits can be "
            "computed, with head.logits(hidden) or head.torch()(hidden)"
        )


class ProgramHead(Head):
    """A head as operations and tensors; maps `(..., d_model)` to logits `(..., vocab)`."""

    kind = "program"
    if not TYPE_CHECKING:  # type checkers see the attributes of `Head`
        norm, eps, norm_weight, norm_bias, unembedding, bias, scale, softcap = (
            _ExplicitOnly() for _ in range(8)
        )
        normalize, with_vocab = _ExplicitOnly(), _ExplicitOnly()
    d_model: int = 0  # pyright: ignore[reportIncompatibleMethodOverride]
    vocab: int = 0  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(
        self, program: Program, tensors: Mapping[str, np.ndarray], d_model: int, vocab: int
    ) -> None:
        # Frozen like every head: attributes are set once, here.
        vars(self).update(program=program, tensors=dict(tensors), d_model=d_model, vocab=vocab)

    program: Program
    tensors: dict[str, np.ndarray]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProgramHead) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        count = len(self.program.nodes)
        return f"<ProgramHead of {count} operations: {self.d_model} -> {self.vocab} logits>"

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(array.nbytes for array in self.tensors.values())

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of program and tensors: heads of one digest give the same logits."""
        hasher = hashlib.sha256(json.dumps(self._spec(), sort_keys=True, allow_nan=False).encode())
        for name in sorted(self.tensors):
            array = np.ascontiguousarray(self.tensors[name], np.float32)
            hasher.update(f"{name}{array.shape}".encode())
            hasher.update(array.tobytes())
        return hasher.hexdigest()

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits `(..., vocab)` in float32 of residuals `hidden`, `(..., d_model)`."""
        hidden = np.asarray(hidden, np.float32)
        rows = hidden.reshape(1, -1, self.d_model)
        out = self.program.run(rows, self.tensors, NumpyOperations())
        return np.asarray(out, np.float32).reshape(*hidden.shape[:-1], self.vocab)

    def torch(self, device: "str | torch.device" = "cpu") -> "TorchHead":
        """The head on torch tensors of `device`; on the CPU, nothing may write to them."""
        return TorchProgramHead(self, device)

    def describe(self) -> dict[str, Any]:
        """Kind and number of operations, for reports."""
        return {"kind": self.kind, "operations": len(self.program.nodes)}

    def _spec(self) -> dict[str, Any]:
        """Fields of `head.json` that determine the computation, next to the tensors."""
        return {"d_model": self.d_model, "vocab": self.vocab, "nodes": self.program.to_json()}

    def save(self, folder: Path, tensors: "dict[str, torch.Tensor] | None" = None) -> None:
        """Write `head.safetensors`, then `head.json`.

        If `tensors` are given, these (in the model's dtype) are written instead of the float32
        arrays.
        """
        save_head(folder, {"kind": self.kind, **self._spec()}, self.tensors, tensors)

    def check_bounds(self) -> None:
        """Raise `FieldError` if the program needs more memory or work than a head."""
        shapes = {name: array.shape for name, array in self.tensors.items()}
        check_bounds(self.program, shapes, self.d_model, self.vocab)

    @classmethod
    def from_parts(cls, spec: dict[str, Any], tensors: dict[str, np.ndarray]) -> "ProgramHead":
        """Build the head of a `head.json` and its tensors.

        Raises `FieldError` if the program is malformed, fails, gives another shape, or needs more
        memory or work than a head (`program_bounds.py`).
        """
        program = Program.from_json(spec.get("nodes"), set(tensors))
        d_model = integer_field(spec, "d_model", 1, MAX_WIDTH)
        vocab = integer_field(spec, "vocab", 1, MAX_VOCAB)
        head = cls(program, tensors, d_model, vocab)
        head.check_bounds()
        # Try the program on two positions, which the bounds make cheap.
        try:
            with np.errstate(all="ignore"):
                x = np.ones((1, 2, d_model), np.float32)
                out = program.run(x, tensors, NumpyOperations())
        except Exception as error:  # a damaged program can raise any error
            raise FieldError(f"the head program does not run: {error}") from None
        if np.shape(out) != (1, 2, vocab):
            raise FieldError(f"the head program gives {np.shape(out)}, not (1, 2, {vocab})")
        return head


class TorchProgramHead(TorchHead):
    """A `ProgramHead` on torch tensors; gradients flow to the hidden states."""

    if not TYPE_CHECKING:  # type checkers see the attributes of `TorchHead`
        norm_weight, norm_bias, unembedding, bias, normalize, norm_gradient, write_linear = (
            _ExplicitOnly() for _ in range(7)
        )

    def __init__(self, head: ProgramHead, device: "str | torch.device" = "cpu") -> None:
        self.head = head
        self._program = head.program
        self._tensors = {
            name: as_head_tensor(array, device) for name, array in head.tensors.items()
        }

    def __call__(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits `(..., vocab)` of residuals `hidden`, `(..., d_model)`."""
        rows = hidden.float().reshape(1, -1, hidden.shape[-1])
        out = self._program.run(rows, self._tensors, TorchOperations())
        return out.reshape(*hidden.shape[:-1], -1)

    def write_logits(
        self, hidden: "torch.Tensor", out: "torch.Tensor", products: str = "float32"
    ) -> "torch.Tensor":
        """Write the logits of `hidden` into `out` `(n, vocab)`; always in float32; gives `out`."""
        import torch

        with torch.no_grad():
            return out.copy_(self(hidden))

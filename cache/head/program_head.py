"""A head that is an op program: for models whose tail is more than norm, linear, scale, softcap."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CorruptError, UsageError
from .head import Head, TorchHead
from .head_files import save_head
from .operations import NumpyOperations, TorchOperations
from .program import Program

if TYPE_CHECKING:
    import torch


class _ExplicitOnly:
    """An attribute that only an explicit head has."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        raise UsageError(
            f"this model's head is an op program and has no {self.name}; only its logits can be "
            "computed, with head.logits(hidden) or head.torch()(hidden)"
        )


class ProgramHead(Head):
    """A head kept as operations and tensors; `(..., d_model)` -> `(..., vocab)`."""

    kind = "program"
    norm, eps, norm_weight, norm_bias, unembedding, bias, scale, softcap, normalize, with_vocab = (  # pyright: ignore[reportAssignmentType]
        _ExplicitOnly() for _ in range(10)
    )
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
        return f"ProgramHead({self.d_model} -> {self.vocab}, {len(self.program.nodes)} operations)"

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of everything that the head computes with: equal heads read equal streams."""
        hasher = hashlib.sha256(json.dumps(self._spec(), sort_keys=True, allow_nan=False).encode())
        for name in sorted(self.tensors):
            array = np.ascontiguousarray(self.tensors[name], np.float32)
            hasher.update(f"{name}{array.shape}".encode())
            hasher.update(array.tobytes())
        return hasher.hexdigest()

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits in float32, `(..., vocab)`."""
        hidden = np.asarray(hidden, np.float32)
        rows = hidden.reshape(1, -1, self.d_model)
        out = self.program.run(rows, self.tensors, NumpyOperations())
        return np.asarray(out, np.float32).reshape(*hidden.shape[:-1], self.vocab)

    def torch(self, device: str = "cpu") -> "TorchHead":
        """The same head for torch tensors, differentiable."""
        return TorchProgramHead(self, device)

    def describe(self) -> dict[str, Any]:
        """The head in a few words."""
        return {"kind": self.kind, "operations": len(self.program.nodes)}

    def _spec(self) -> dict[str, Any]:
        return {"d_model": self.d_model, "vocab": self.vocab, "nodes": self.program.to_json()}

    def save(self, folder: Path, tensors: "dict[str, torch.Tensor] | None" = None) -> None:
        """Write `head.safetensors`, then `head.json`; `tensors` in the model's own dtype win."""
        save_head(folder, {"kind": self.kind, **self._spec()}, self.tensors, tensors)

    @classmethod
    def from_parts(cls, spec: dict[str, Any], tensors: dict[str, np.ndarray]) -> "ProgramHead":
        """The head of a checked `head.json`; raises `CorruptError` on anything that cannot run."""
        program = Program.from_json(spec.get("nodes"), set(tensors))
        d_model, vocab = spec.get("d_model"), spec.get("vocab")
        if type(d_model) is not int or type(vocab) is not int or d_model < 1 or vocab < 1:
            raise CorruptError("a head program needs d_model and vocab")
        head = cls(program, tensors, d_model, vocab)
        # A forged program must not fill the memory: no model's tail grows its values this much.
        limit = 64 * (2 * max(d_model, vocab) + max((a.size for a in tensors.values()), default=0))
        try:
            with np.errstate(all="ignore"):
                out = program.run(
                    np.ones((1, 2, d_model), np.float32), tensors, NumpyOperations(), limit
                )
        except Exception as error:  # whatever a damaged program does, it is damage
            raise CorruptError(f"the head program does not run: {error}") from None
        if np.shape(out) != (1, 2, vocab):
            raise CorruptError(f"the head program gives {np.shape(out)}, not (1, 2, {vocab})")
        return head


class TorchProgramHead(TorchHead):
    """`ProgramHead` on torch tensors; gradients flow to the hidden states."""

    norm_weight, norm_bias, unembedding, bias, normalize = (  # pyright: ignore[reportAssignmentType]
        _ExplicitOnly() for _ in range(5)
    )

    def __init__(self, head: ProgramHead, device: str = "cpu") -> None:
        import torch

        self.head = head
        self._program = head.program
        self._tensors = {
            name: torch.tensor(array, dtype=torch.float32, device=device)
            for name, array in head.tensors.items()
        }

    def __call__(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits, `(..., vocab)`."""
        rows = hidden.float().reshape(1, -1, hidden.shape[-1])
        out = self._program.run(rows, self._tensors, TorchOperations())
        return out.reshape(*hidden.shape[:-1], -1)

"""`SavedTensors`: the tensors of a saved probe, each read with the shape that its kind needs.

Files come from strangers: `probes/saved/save.py` parses `probe.safetensors` into this mapping, and
`restore` of every kind takes arrays from it before it computes with them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ...cache.errors import CorruptError
from ...cache.files.json_fields import shown

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "<u1",
    "BOOL": "|b1",
}
"""dtype of safetensors -> numpy dtype of the tensors that probes have."""


class SavedTensors(Mapping[str, np.ndarray]):
    """Tensors by name; `array` checks shape and kind. `where` is named in errors."""

    def __init__(self, tensors: Mapping[str, np.ndarray], where: Path | str) -> None:
        self._tensors = dict(tensors)
        self._where = where

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> "SavedTensors":
        """`tensors` themselves, or a mapping of a probe's `state` as such tensors."""
        return tensors if isinstance(tensors, SavedTensors) else cls(tensors, "the probe")

    @classmethod
    def parse(cls, data: bytes, where: Path | str) -> "SavedTensors":
        """The tensors in the bytes of a safetensors file, as arrays of their own.

        Raises `CorruptError` for other bytes, and for a dtype that no probe has.
        """
        from safetensors import SafetensorError, deserialize

        tensors = {}
        try:
            for name, entry in deserialize(data):
                if entry["dtype"] not in DTYPES:
                    raise CorruptError(f"{where}: tensor {shown(name)} has dtype {entry['dtype']}")
                # Copies: aligned as numpy and torch align the arrays of a fit.
                array = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
                tensors[name] = array.reshape(entry["shape"]).copy()
        except (SafetensorError, ValueError) as error:
            raise CorruptError(f"{where} is no file of tensors: {error}") from None
        return cls(tensors, where)

    def array(self, name: str, shape: tuple[int | None, ...], kinds: str = "f") -> np.ndarray:
        """The tensor `name` of `shape`, where None is any length.

        `kinds` are the letters of numpy's dtypes that it may have, `f` or `iu`. Raises
        `CorruptError` if it is missing or another.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CorruptError(f"{self._where}: tensor {shown(name)} is missing")
        fits = len(shape) == tensor.ndim and all(
            length in (None, size) for length, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype.kind not in kinds:
            expected = ", ".join("any" if length is None else str(length) for length in shape)
            raise CorruptError(
                f"{self._where}: tensor {shown(name)} has shape {tensor.shape} and dtype "
                f"{tensor.dtype}; expected ({expected}) of {'floats' if kinds == 'f' else 'ints'}"
            )
        return tensor

    def refuse(self, name: str, reason: str) -> CorruptError:
        """The error for a tensor whose values no fit gives."""
        return CorruptError(f"{self._where}: tensor {shown(name)} {reason}")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

"""Files of a head, `head.json` and `head.safetensors`: writing both, reading the tensors.

Used by `Head.save`, `ProgramHead.save` and `load_head`. `head.json` carries the sha256 of
`head.safetensors`.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CorruptError
from ..files.json_fields import shown
from ..files.json_files import write_json
from ..files.read_errors import read_file
from ..format.dtypes import decode_rows_into

if TYPE_CHECKING:
    import torch


_SAFETENSORS_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
"""dtype of safetensors -> numpy dtype of the bytes; numpy has no bfloat16."""


def save_head(
    folder: Path,
    spec: dict[str, Any],
    arrays: Mapping[str, np.ndarray],
    tensors: "dict[str, torch.Tensor] | None",
) -> None:
    """Write `head.safetensors`, then `head.json` with the fields of `spec` and the digest.

    `arrays` are written, or, if given, `tensors` of the same names in the model's dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "head.safetensors"
    if tensors is None:
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    else:
        from safetensors.torch import save_file as save_torch_file

        # Clones: safetensors refuses tensors that share memory.
        copies = {name: tensors[name].detach().cpu().contiguous().clone() for name in arrays}
        save_torch_file(copies, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(folder / "head.json", {**spec, "tensors": digest})


def read_head_tensors(folder: Path, digest: Any) -> dict[str, np.ndarray]:
    """Read `head.safetensors` in `folder`, with the sha256 `digest`, as float32 arrays by name.

    The arrays are writable and share no memory. Peak: the float32 arrays, and the stored bytes once
    or, before any array is made, twice. Raises `CorruptError` for a file that is missing, changed
    or malformed, and for another dtype.
    """
    entries = _read_entries(folder / "head.safetensors", digest)
    tensors = {}
    while entries:
        name, entry = entries.pop(0)
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CorruptError(f"{folder}: tensor {shown(name)} has dtype {entry['dtype']}")
        try:
            stored = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
        except ValueError as error:
            raise CorruptError(f"{folder}: tensor {shown(name)}: {error}") from None
        logical = "bfloat16" if entry["dtype"] == "BF16" else stored.dtype.name
        tensors[name] = np.empty(stored.shape, np.float32)
        with np.errstate(all="ignore"):  # a float64 may be beyond float32
            decode_rows_into(stored, logical, tensors[name])
    return tensors


def _read_entries(path: Path, digest: Any) -> list[tuple[str, dict[str, Any]]]:
    """Names of the tensors of a safetensors file with their dtype, shape and bytes."""
    from safetensors import SafetensorError, deserialize

    try:
        raw = read_file(path)
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    if hashlib.sha256(raw).hexdigest() != digest:
        raise CorruptError(f"{path} was changed after it was written")
    try:
        return deserialize(raw)
    except SafetensorError as error:
        raise CorruptError(f"{path}: {error}") from None

"""Reading of safetensors headers: names, dtypes, shapes and byte ranges of the tensors.

`read_header` is called before weights are hashed (`weight_digests.py`) or loaded (`load_model.py`),
and reports damaged files. Layout of a file: 8 bytes with the length n of the header (uint64,
little-endian), n bytes of JSON, then the tensors' bytes
(https://github.com/huggingface/safetensors#format). The module needs neither torch nor the
safetensors library, and reads no weights.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ModelError

HEADER_BYTES = 100_000_000
"""Longest header that the safetensors library reads."""
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one number, by safetensors' name of the dtype."""
FLOATING_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}
"""safetensors' name -> torch's name of floating-point dtypes."""
RUNNING_DTYPES = {
    name: dtype for name, dtype in FLOATING_DTYPES.items() if name in ("F64", "F32", "F16", "BF16")
}
"""Floating-point dtypes for running a whole model; other dtypes are unpacked first."""
_LFS_POINTER = b"version https://git-lfs"


class TensorEntry(NamedTuple):
    """One tensor of a safetensors file."""

    dtype: str
    """safetensors' name of the dtype, such as `BF16`."""
    shape: tuple[int, ...]
    span: tuple[int, int]
    """First byte and end, counted from the beginning of the file."""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensor name -> `TensorEntry`, in the order of the header.

    Raises `ModelError` if the file cannot be read or is not a whole safetensors file: a git-lfs
    pointer, an empty or shortened file, a broken link, tensors that overlap or leave a gap.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(max(8, len(_LFS_POINTER)))
            if head.startswith(_LFS_POINTER):
                raise ModelError(
                    f"{path} is a git-lfs pointer, not the weights; fetch them with "
                    "'git lfs pull', or download the model again"
                )
            if size < 8:
                raise _not_whole(path, f"the file has {size} bytes")
            length = int.from_bytes(head[:8], "little")
            if length > min(HEADER_BYTES, size - 8):
                raise _not_whole(path, f"its header of {length} bytes is not all in {size} bytes")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        target = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
        reason = error.strerror or type(error).__name__
        raise ModelError(
            f"{path}{target} cannot be read: {reason}; expected a safetensors file, download or "
            "save the model again"
        ) from None
    return _parse_header(path, raw, data_start=8 + length, file_size=size)


def _parse_header(
    path: Path, raw: bytes, data_start: int, file_size: int
) -> dict[str, TensorEntry]:
    """The tensors of the header `raw`, which must fill the file from `data_start` to its end."""
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_reject_repeats)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        entries = {
            name: _parse_entry(name, value, data_start)
            for name, value in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _not_whole(path, f"its header cannot be read ({_first_line(error)})") from None
    # The format has no holes: each tensor begins where the one before it ends.
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].span):
        start, stop = entry.span
        if start != end:
            kind = "overlaps the one before it" if start < end else "leaves a gap before it"
            raise _not_whole(path, f"tensor {name!r} {kind}")
        end = stop
    if end != file_size:
        raise _not_whole(path, f"its tensors end at byte {end}, the file has {file_size}")
    return entries


def _parse_entry(name: str, value: Any, data_start: int) -> TensorEntry:
    """One entry of the header; raises `ValueError` if bytes, dtype and shape do not agree."""
    dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    numbers = (*shape, start, stop)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"tensor {name!r} has shape {shape}, offsets {start}, {stop}")
    if dtype not in ITEM_BITS:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if (stop - start) * 8 != math.prod(shape) * ITEM_BITS[dtype]:
        raise ValueError(
            f"tensor {name!r} of shape {shape} in {dtype} does not have {stop - start} bytes"
        )
    return TensorEntry(dtype, tuple(shape), (data_start + start, data_start + stop))


def _reject_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of a JSON object; raises `ValueError` if a name occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is there twice")
    return values


def _first_line(error: Exception) -> str:
    """First line of an error's message, at most 200 characters."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    return text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__


def _not_whole(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"{path} is not a whole safetensors file: {reason}; download or save the model again"
    )

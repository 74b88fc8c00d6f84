"""What a safetensors file holds, by its header alone: names, dtypes, shapes and places of tensors.

The layout: 8 bytes with the length n of the header (uint64, little-endian), n bytes of JSON, then
the tensors' bytes (https://github.com/huggingface/safetensors#format). Needs no torch and no
safetensors library, and reads no weights.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ModelError

HEADER_BYTES = 100_000_000
"""Longest header that the safetensors library itself reads."""
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one number by the format's name of its dtype."""
FLOATING_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
"""The format's name -> torch's name of floating-point dtypes."""
RUNNING_DTYPES = {
    name: dtype for name, dtype in FLOATING_DTYPES.items() if name in ("F64", "F32", "F16", "BF16")
}
"""Those that a whole model can run in; others are unpacked first."""
_LFS_POINTER = b"version https://git-lfs"


class TensorEntry(NamedTuple):
    """One tensor of a safetensors file."""

    dtype: str
    """The format's name of the dtype, such as `BF16`."""
    shape: tuple[int, ...]
    span: tuple[int, int]
    """First byte and end, counted from the beginning of the file."""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Name -> (dtype, shape, (start, end)) of each tensor, in the order of the header.

    Raises `ModelError` where the file cannot be read or is not a whole safetensors file: a git-lfs
    pointer, an empty or shortened file, a link to nowhere, tensors that overlap or leave a gap.
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
    return _entries(path, raw, 8 + length, size)


def _entries(path: Path, raw: bytes, begin: int, size: int) -> dict[str, TensorEntry]:
    """The tensors of the header `raw`, whose bytes lie from `begin` to the file's `size`."""
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        entries = {n: _entry(n, v, begin) for n, v in header.items() if n != "__metadata__"}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _not_whole(path, f"its header cannot be read ({_first_line(error)})") from None
    # The format has no holes: each tensor begins where the one before it ends.
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: item[1].span):
        start, stop = entry.span
        if start != end:
            kind = "overlaps the one before it" if start < end else "leaves a gap before it"
            raise _not_whole(path, f"tensor {name!r} {kind}")
        end = stop
    if end != size:
        raise _not_whole(path, f"its tensors end at byte {end}, the file has {size}")
    return entries


def _entry(name: str, value: Any, begin: int) -> TensorEntry:
    """One entry of the header; its span in the file is checked against dtype and shape."""
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
    return TensorEntry(dtype, tuple(shape), (begin + start, begin + stop))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is there twice")
    return values


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    return text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__


def _not_whole(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"{path} is not a whole safetensors file: {reason}; download or save the model again"
    )

"""Streams tensors into safetensors or .npy files: headers first, then rows, a block at a time."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import NoSpaceError, ResiduaError, UsageError
from ..format.dtypes import STORED_DTYPES

FORMATS = {"safetensors": "safetensors", "numpy": "npy"}
"""Formats, and how their files' names end."""
SPARE_BYTES = 64 << 20
"""Free space that is left on the disk."""
_SAFETENSORS = {
    "float16": "F16", "bfloat16": "BF16", "float32": "F32",
    "int32": "I32", "int64": "I64", "uint8": "U8", "uint16": "U16", "uint64": "U64",
}  # fmt: skip


@dataclass(frozen=True)
class TensorColumn:
    """One tensor of a file: what it is and where its rows come from."""

    name: str
    dtype: str
    """Logical dtype; bfloat16 comes as the uint16 of its bits."""
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def stored(self) -> np.dtype:
        return np.dtype(STORED_DTYPES.get(self.dtype, self.dtype)).newbyteorder("<")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.stored.itemsize

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "stored": self.stored.name, "shape": list(self.shape)}


def check_space(folder: Path, need: int, advice: str) -> None:
    """Raise `NoSpaceError` unless `need` bytes fit on the disk of `folder`, with some to spare."""
    free = shutil.disk_usage(folder).free
    if need + SPARE_BYTES > free:
        raise NoSpaceError(
            f"this needs {need / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free; {advice}"
        )


@contextmanager
def staged_folder(folder: Path) -> Iterator[None]:
    """Turns errors of the disk that holds `folder` into ours: full, or not writable."""
    try:
        yield
    except ResiduaError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"the disk of {folder} is full") from None
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from None


def write_flat_file(
    path: Path, columns: list[TensorColumn], format: str, wrote: Callable[[int], None]
) -> dict[str, Any]:
    """Write one file, durably; returns its bytes, sha256 and tensors.

    `wrote` is told the rows of every block. A .npy file holds one column.
    """
    with open(path, "wb") as file:
        writer = _Hashed(file)
        writer.write(_npy_header(columns[0]) if format == "numpy" else _header(columns))
        for column in columns:
            for block in column.blocks():
                rows = np.ascontiguousarray(block, column.stored)
                writer.write(rows.reshape(-1).view(np.uint8).data)
                wrote(len(block))
        file.flush()
        os.fsync(file.fileno())
    tensors = {column.name: column.to_json() for column in columns}
    return {"bytes": writer.bytes, "sha256": writer.digest(), "tensors": tensors}


class _Hashed:
    """Writes to a file and keeps the sha256 of what went by."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def digest(self) -> str:
        return self._hash.hexdigest()


def _header(columns: list[TensorColumn]) -> bytes:
    """Length and JSON of a safetensors file whose tensors follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for column in columns:
        stop = start + column.bytes
        header[column.name] = {
            "dtype": _SAFETENSORS[column.dtype],
            "shape": list(column.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _npy_header(column: TensorColumn) -> bytes:
    buffer = BytesIO()
    fields = {"descr": column.stored.str, "fortran_order": False, "shape": column.shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()

"""Writes safetensors and .npy files of any size: the header first, then rows, block by block.

`export` describes the tensors as `TensorColumn`s and writes each file with `write_flat_file`.
"""

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

from ..errors import LimitError, NoSpaceError, ResiduaError, UsageError
from ..files.disk_errors import FULL_DISK, system_error
from ..format.dtypes import STORED_DTYPES

FORMATS = {"safetensors": "safetensors", "numpy": "npy"}
"""Format -> ending of its file names."""
SPARE_BYTES = 64 << 20
"""Free space that must remain on the disk."""
_SAFETENSORS_DTYPES = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint64": "U64",
}
"""Logical dtype -> name of the dtype in a safetensors header."""


@dataclass(frozen=True)
class TensorColumn:
    """One tensor of a file: name, dtype, shape and a function that gives its rows in blocks."""

    name: str
    dtype: str
    """Logical dtype; the rows of bfloat16 are the uint16 of its bits."""
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]
    """Gives the rows in order, as blocks `(rows, ...)` in the stored dtype."""

    @property
    def stored(self) -> np.dtype:
        """numpy dtype of the bytes in the file, little-endian."""
        return np.dtype(STORED_DTYPES.get(self.dtype, self.dtype)).newbyteorder("<")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.stored.itemsize

    def to_json(self) -> dict[str, Any]:
        """The entry of the tensor in `index.json`."""
        return {"dtype": self.dtype, "stored": self.stored.name, "shape": list(self.shape)}


def write_flat_file(
    path: Path,
    columns: list[TensorColumn],
    format: str,
    report_rows: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write `columns` to one file, durably; returns the file's bytes, sha256 and tensors.

    `report_rows` is called with the number of rows of every block. A .npy file has one column.
    """
    with open(path, "wb") as file:
        writer = _HashingWriter(file)
        header = _npy_header(columns[0]) if format == "numpy" else _safetensors_header(columns)
        writer.write(header)
        for column in columns:
            for block in column.blocks():
                rows = np.ascontiguousarray(block, column.stored)
                writer.write(rows.reshape(-1).view(np.uint8).data)
                if report_rows is not None:
                    report_rows(len(block))
        file.flush()
        os.fsync(file.fileno())
    tensors = {column.name: column.to_json() for column in columns}
    return {"bytes": writer.bytes, "sha256": writer.digest(), "tensors": tensors}


class _HashingWriter:
    """Writes to a file; counts the bytes and computes their sha256."""

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


def _safetensors_header(columns: list[TensorColumn]) -> bytes:
    """Header of a safetensors file, length and JSON; tensors follow in the order of `columns`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for column in columns:
        stop = start + column.bytes
        header[column.name] = {
            "dtype": _SAFETENSORS_DTYPES[column.dtype],
            "shape": list(column.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _npy_header(column: TensorColumn) -> bytes:
    """Header of a .npy file, version 1.0."""
    buffer = BytesIO()
    fields = {"descr": column.stored.str, "fortran_order": False, "shape": column.shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def check_space(folder: Path, need: int, advice: str) -> None:
    """Raise `NoSpaceError` unless the disk of `folder` has `need` and `SPARE_BYTES` bytes free.

    `advice` ends the message: the way to need less, or to get more.
    """
    free = shutil.disk_usage(folder).free
    if need + SPARE_BYTES > free:
        raise NoSpaceError(
            f"this needs {need / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free; {advice}"
        )


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turn disk errors of writing into `folder` into errors of this package.

    Raises `NoSpaceError` for a full disk, `LimitError` for a limit of the process and `UsageError`
    for a folder that cannot be written.
    """
    try:
        yield
    except ResiduaError:
        raise
    except OSError as error:
        if error.errno in FULL_DISK:
            raise NoSpaceError(
                f"{FULL_DISK[error.errno].format(folder)}; free some space and give the same "
                "command again"
            ) from None
        if isinstance(translated := system_error(error), NoSpaceError | LimitError):
            raise translated from None
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from None

"""Columns of numbers longer than memory: appended or computed in blocks, read by slices.

Tokenization appends token ids and sequence data to `DiskColumn`s (`cache/tokens`); derived columns
are `ComputedColumn`s; `write_table` stores either in the cache.
"""

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from .disk_errors import translate_disk_errors
from .paths import is_remote

BLOCK = 1 << 18
"""Numbers of one read or write, and of the part of a column in memory."""


class NumberColumn(Protocol):
    """Numbers, `(n,)`, that are read by slices.

    A numpy array, a `DiskColumn`, a `ComputedColumn`, or a `CacheArray`.
    """

    @property
    def dtype(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


class DiskColumn:
    """Numbers of one dtype, `(n,)`, appended in order; beyond `BLOCK` numbers they lie in a file.

    The temporary file is in `folder`, by default the system's folder for such files. The file has
    no name, and disappears with the column or the process, even a killed process. A full disk
    raises `NoSpaceError`.
    """

    def __init__(self, dtype: Any, folder: Path | None = None) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._file: BinaryIO | None = None
        # The column is `_file_length` numbers in the file, then `_buffer[:_buffer_length]`.
        self._file_length = 0
        self._buffer = np.empty(BLOCK, self.dtype)
        self._buffer_length = 0

    def __len__(self) -> int:
        return self._file_length + self._buffer_length

    def append(self, values: np.ndarray) -> None:
        """Append `values`, `(n,)`."""
        done = 0
        while done < len(values):
            count = min(len(values) - done, BLOCK - self._buffer_length)
            end = self._buffer_length + count
            self._buffer[self._buffer_length : end] = values[done : done + count]
            self._buffer_length = end
            done += count
            if self._buffer_length == BLOCK:
                self._write_buffer()

    def _write_buffer(self) -> None:
        """Move the full buffer to the file."""
        with translate_disk_errors(self._folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (next line)
                weakref.finalize(self, self._file.close)
            self._file.write(self._buffer.data)
            self._file.flush()
        self._file_length += self._buffer_length
        self._buffer_length = 0

    def shorten(self, count: int) -> None:
        """Remove all numbers but the first `count`."""
        # Whole blocks stay in the file, the remaining numbers move to the buffer.
        file_length = min(self._file_length, count // BLOCK * BLOCK)
        remaining = self[file_length:count]
        self._buffer[: len(remaining)] = remaining
        self._file_length, self._buffer_length = file_length, len(remaining)
        if self._file is not None:
            self._file.seek(file_length * self.dtype.itemsize)

    def __getitem__(self, key: slice) -> np.ndarray:
        """Read a slice, from the file and then from the buffer."""
        start, stop, step = key.indices(len(self))
        out = np.empty(max(0, stop - start), self.dtype)
        from_file = max(0, min(stop, self._file_length) - start)
        if from_file:
            self._read_file(out[:from_file], start)
        if from_file < len(out):
            first = start + from_file - self._file_length
            out[from_file:] = self._buffer[first : first + len(out) - from_file]
        return out[::step]

    def _read_file(self, out: np.ndarray, start: int) -> None:
        """Fill `out` with the numbers of the file from number `start` on."""
        assert self._file is not None
        data, done = out.data.cast("B"), 0
        while done < len(data):
            offset = start * self.dtype.itemsize + done
            done += os.preadv(self._file.fileno(), [data[done:]], offset)


@dataclass(frozen=True)
class ComputedColumn:
    """Numbers, `(n,)`, that are computed when a slice of them is read."""

    length: int
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]
    """`read(start, stop)` computes the numbers `start:stop`."""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, step = key.indices(self.length)
        return self.read(start, max(start, stop)).astype(self.dtype, copy=False)[::step]


def row_blocks(
    values: NumberColumn, start: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """Yield `values[start:stop]` in blocks of at most `BLOCK` numbers."""
    stop = len(values) if stop is None else stop
    for first in range(start, stop, BLOCK):
        yield values[first : min(first + BLOCK, stop)]


def take_rows(values: NumberColumn, indices: np.ndarray) -> np.ndarray:
    """Read `values[indices]` for ascending `indices`, in blocks of at most `BLOCK` numbers."""
    out = np.empty(len(indices), values.dtype)
    done = 0
    while done < len(indices):
        # One block covers all indices less than `BLOCK` beyond the next one.
        first = int(indices[done])
        stop = int(np.searchsorted(indices, first + BLOCK))
        block = values[first : int(indices[stop - 1]) + 1]
        out[done:stop] = block[indices[done:stop] - first]
        done = stop
    return out


def scratch_folder(root: Path) -> Path | None:
    """The folder for temporary files of caches under `root`, on the same disk.

    None, for the system's folder for temporary files, if `root` is in an object store or no folder
    of that disk is writable.
    """
    if is_remote(root):
        return None
    existing = next((f for f in (root, *root.absolute().parents) if f.is_dir()), None)
    is_writable = existing is not None and os.access(existing, os.W_OK | os.X_OK)
    return existing if is_writable else None

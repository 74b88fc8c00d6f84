"""Columns of numbers that do not stay in memory: written in blocks, read on slicing."""

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from .disk_errors import disk_errors
from .paths import is_remote

BLOCK = 1 << 18
"""Numbers that one read or write moves, and that a column keeps in memory."""


class NumberColumn(Protocol):
    """What is read by slices: an array, a `Column`, a `ComputedColumn` one or one of a cache."""

    @property
    def dtype(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


class DiskColumn:
    """Numbers of one dtype, `(n,)`, appended in order; beyond `BLOCK` they lie in a file.

    The file is in `folder`, by default the system's for temporary files. It has no name and ends
    with the column or the process, even a killed one. A full disk raises `NoSpaceError`.
    """

    def __init__(self, dtype: Any, folder: Path | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._file: BinaryIO | None = None
        self._filed = 0
        self._tail = np.empty(BLOCK, self.dtype)
        self._held = 0

    def __len__(self) -> int:
        return self._filed + self._held

    def append(self, values: np.ndarray) -> None:
        """Put `values`, `(n,)`, at the end."""
        done = 0
        while done < len(values):
            take = min(len(values) - done, BLOCK - self._held)
            self._tail[self._held : self._held + take] = values[done : done + take]
            self._held += take
            done += take
            if self._held == BLOCK:
                self._spill()

    def _spill(self) -> None:
        with disk_errors(self._folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (next line)
                weakref.finalize(self, self._file.close)
            self._file.write(self._tail.data)
            self._file.flush()
        self._filed += self._held
        self._held = 0

    def shorten(self, count: int) -> None:
        """Keep the first `count` numbers."""
        filed = min(self._filed, count // BLOCK * BLOCK)
        rest = self[filed:count]
        self._tail[: len(rest)] = rest
        self._filed, self._held = filed, len(rest)
        if self._file is not None:
            self._file.seek(filed * self.dtype.itemsize)

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, step = key.indices(len(self))
        out = np.empty(max(0, stop - start), self.dtype)
        filed = max(0, min(stop, self._filed) - start)
        if filed:
            self._read(out[:filed], start)
        if filed < len(out):
            first = start + filed - self._filed
            out[filed:] = self._tail[first : first + len(out) - filed]
        return out[::step]

    def _read(self, out: np.ndarray, start: int) -> None:
        assert self._file is not None
        data, done = out.data.cast("B"), 0
        while done < len(data):
            place = start * self.dtype.itemsize + done
            done += os.preadv(self._file.fileno(), [data[done:]], place)


@dataclass(frozen=True)
class ComputedColumn:
    """Numbers, `(n,)`, that are worked out when a slice of them is read."""

    length: int
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]
    """Gives the numbers from a start to an end."""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, step = key.indices(self.length)
        return self.read(start, max(start, stop)).astype(self.dtype, copy=False)[::step]


def row_blocks(
    values: NumberColumn, start: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """`values[start:stop]` in blocks of at most `BLOCK`."""
    stop = len(values) if stop is None else stop
    for first in range(start, stop, BLOCK):
        yield values[first : min(first + BLOCK, stop)]


def take_rows(values: NumberColumn, places: np.ndarray) -> np.ndarray:
    """The numbers at `places`, which ascend; reads blocks of at most `BLOCK`."""
    out = np.empty(len(places), values.dtype)
    done = 0
    while done < len(places):
        first = int(places[done])
        stop = int(np.searchsorted(places, first + BLOCK))
        block = values[first : int(places[stop - 1]) + 1]
        out[done:stop] = block[places[done:stop] - first]
        done = stop
    return out


def scratch_folder(root: Path) -> Path | None:
    """Where temporary files go: beside the caches under `root`, where there is a disk for them.

    None, the system's folder for temporary files, where nothing there can be written, or where
    they lie in an object store.
    """
    if is_remote(root):
        return None
    existing = next((f for f in (root, *root.absolute().parents) if f.is_dir()), None)
    usable = existing is not None and os.access(existing, os.W_OK | os.X_OK)
    return existing if usable else None

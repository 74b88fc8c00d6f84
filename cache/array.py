"""Reads one array of a cache: memory-mapped shards, raw or compact; other codecs through zarr."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from .decode import decode
from .errors import CorruptError
from .half import decode_into
from .layout import ArrayLayout
from .packed import gather, shard_reader
from .shard import ShardReader
from .window import Window

OPEN_SHARDS = 64
"""Memory maps kept open per array."""


class CacheArray:
    """A stored array with float rows decoded to float32; slicing along the first axis reads it.

    Looks enough like an array for dask (`shape`, `dtype`, `ndim`, `__getitem__`), is safe to
    pickle (only its path travels), and keeps no rows in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            meta = json.loads((self.path / "zarr.json").read_bytes())
        except FileNotFoundError:
            raise CorruptError(f"{self.path} has no zarr.json") from None
        except ValueError as error:
            raise CorruptError(f"{self.path}/zarr.json is not JSON: {error}") from None
        self.layout = ArrayLayout.from_zarr_json(meta, str(self.path))
        self.attributes: dict[str, Any] = meta.get("attributes") or {}
        self.shape = self.layout.shape
        self.ndim = len(self.shape)
        stored = np.dtype(self.layout.stored_dtype)
        is_float = stored.kind == "f" or self.layout.logical_dtype == "bfloat16"
        self.dtype = np.dtype(np.float32) if is_float else stored
        self._stored = stored
        self._shards: dict[int, ShardReader] = {}
        self._checked: dict[int, np.ndarray] = {}
        self._window: Window | None = None
        self._lock = threading.Lock()
        self._zarr: Any = None

    def __reduce__(self) -> tuple[type["CacheArray"], tuple[Path]]:
        return CacheArray, (self.path,)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"CacheArray({self.path.name}, shape={self.shape}, {self.layout.logical_dtype})"

    def __getitem__(self, key: Any) -> np.ndarray:
        """Rows `start:stop`, or any index of numpy's on the rows that the first axis selects."""
        first, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(first, slice):
            start, stop, step = first.indices(self.shape[0])
            if step == 1:
                rows = self.read(start, max(start, stop))
                return rows[(slice(None), *rest)] if rest else rows
            first = np.arange(start, stop, step)
        if isinstance(first, int | np.integer):
            row = int(first) + (self.shape[0] if first < 0 else 0)
            if not 0 <= row < self.shape[0]:
                raise IndexError(f"row {first} is out of range for {self.shape[0]} rows")
            return self.read(row, row + 1)[(0, *rest)]
        rows = self.take(np.asarray(first))
        return rows[(slice(None), *rest)] if rest else rows

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop`; floats come as float32."""
        if not self.layout.ours:
            return decode(self.read_stored(start, stop), self.layout.logical_dtype)
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self._read(start, stop, out)
        return out

    def read_stored(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `start:stop` as they are stored (bfloat16 as uint16), into `out` if given."""
        if out is None:
            out = np.empty((stop - start, *self.shape[1:]), self._stored)
        if self.layout.ours:
            self._read(start, stop, out)
        else:
            out[...] = self._open_zarr()[start:stop]
        return out

    def _read(self, start: int, stop: int, out: np.ndarray) -> None:
        layout = self.layout
        done = 0
        while start < stop:
            shard, inside = divmod(start, layout.shard_rows)
            end = min(inside + stop - start, layout.shard_rows)
            for piece in self._shard(shard).pieces(inside, end):
                decode_into(piece, layout.logical_dtype, out[done : done + len(piece)])
                done += len(piece)
            start += end - inside

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Any rows, in any order; floats come as float32."""
        stored = self.take_stored(rows)
        out = np.empty(stored.shape, self.dtype)
        decode_into(stored, self.layout.logical_dtype, out)
        return out

    def take_stored(self, rows: np.ndarray) -> np.ndarray:
        """Any rows, in any order, as they are stored."""
        if rows.dtype == bool:
            if rows.shape != self.shape[:1]:
                raise IndexError(
                    f"a boolean index must have shape {self.shape[:1]}, got {rows.shape}"
                )
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise IndexError(f"rows must be a list of integers, got {rows.dtype} {rows.shape}")
        rows = rows.astype(np.int64)
        rows = np.where(rows < 0, rows + self.shape[0], rows)
        if rows.size and (rows.min() < 0 or rows.max() >= self.shape[0]):
            raise IndexError(f"rows must lie in 0..{self.shape[0] - 1}")
        if not rows.size:
            return np.empty((0, *self.shape[1:]), self._stored)
        if self.layout.raw:
            return self._gather(rows)
        if not self.layout.compact:
            return np.asarray(self._open_zarr().oindex[rows])
        out = np.empty((len(rows), *self.shape[1:]), self._stored)
        gather(rows, self.layout, self._chunk, out)
        return out

    def _chunk(self, chunk: int) -> np.ndarray:
        """The rows of a chunk of the array."""
        shard, number = divmod(chunk, self.layout.shard_rows // self.layout.chunk_rows)
        return self._shard(shard).chunk(number)

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        chunks, inside = np.divmod(rows, self.layout.chunk_rows)
        window = self._window
        found = window.take(chunks, inside) if window else None
        if found is not None:
            return found
        touched = np.unique(chunks)
        shards = np.unique(touched * self.layout.chunk_rows // self.layout.shard_rows)
        if len(shards) <= OPEN_SHARDS:
            window = self._cover(shards.tolist())
            window.check(touched)
            found = window.take(chunks, inside)
            assert found is not None
            return found
        out = np.empty((len(rows), *self.shape[1:]), self._stored)
        middle = int(shards[len(shards) // 2]) * self.layout.shard_rows
        for half in (np.flatnonzero(rows < middle), np.flatnonzero(rows >= middle)):
            out[half] = self._gather(rows[half])
        return out

    def _cover(self, shards: list[int]) -> Window:
        """A window with all `shards`."""
        window = self._window
        if window is None or window.missing(shards):
            needed = {shard: self._shard(shard) for shard in shards}
            with self._lock:
                window = self._window = Window({**self._shards, **needed}, self.layout)
        return window

    def _shard(self, shard: int) -> ShardReader:
        with self._lock:
            reader = self._shards.get(shard)
            if reader is None:
                while len(self._shards) >= OPEN_SHARDS:
                    self._shards.pop(next(iter(self._shards)))
                path = self.path / self.layout.shard_key(shard)
                reader = shard_reader(path, self.layout, self._checked.get(shard))
                self._checked[shard] = reader.checked
                self._shards[shard] = reader
            return reader

    def _open_zarr(self) -> Any:
        if self._zarr is None:
            import zarr

            self._zarr = zarr.open_array(self.path, mode="r")
        return self._zarr

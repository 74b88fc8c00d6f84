"""Reads one array of a cache: memory-mapped shards, raw or compact; other codecs through zarr.

Shards in an object store are read by ranged requests.
"""

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptError, IncompleteError
from ..files.paths import as_path, is_remote, store_of
from .compressed_shard import CompressedShardReader
from .dtypes import decode_rows, decode_rows_into
from .journal import Journal
from .layout import ArrayLayout
from .remote_shard import RemoteShard
from .row_gather import MappedRows
from .shard import ShardReader

OPEN_SHARDS = 64
"""Memory maps kept open per array."""


class CacheArray:
    """A stored array with float rows decoded to float32; slicing along the first axis reads it.

    Looks enough like an array for dask (`shape`, `dtype`, `ndim`, `__getitem__`), is safe to
    pickle (only its path travels), and keeps no rows in memory. With a `journal`, rows of parts
    whose records do not name the array raise `IncompleteError`.
    """

    def __init__(self, path: Path, journal: Journal | None = None) -> None:
        self.path = as_path(path)
        self._journal = journal
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
        self._remote = is_remote(self.path)
        self._shards: dict[int, Any] = {}
        self._checked: dict[int, np.ndarray] = {}
        self._window: MappedRows | None = None
        self._lock = threading.Lock()
        self._zarr: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.path, self._journal and self._journal.folder)

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
            return decode_rows(self.read_stored(start, stop), self.layout.logical_dtype)
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
            rows = self.layout.shard_rows
            self._check(range(start // rows, -(-stop // rows)))
            out[...] = self._open_zarr()[start:stop]
        return out

    def _read(self, start: int, stop: int, out: np.ndarray) -> None:
        layout = self.layout
        done = 0
        while start < stop:
            shard, inside = divmod(start, layout.shard_rows)
            end = min(inside + stop - start, layout.shard_rows)
            for piece in self.shard(shard).pieces(inside, end):
                decode_rows_into(piece, layout.logical_dtype, out[done : done + len(piece)])
                done += len(piece)
            start += end - inside

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Any rows, in any order; floats come as float32."""
        stored = self.take_stored(rows)
        out = np.empty(stored.shape, self.dtype)
        decode_rows_into(stored, self.layout.logical_dtype, out)
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
        if not self.layout.ours:
            self._check(np.unique(rows // self.layout.shard_rows).tolist())
            return np.asarray(self._open_zarr().oindex[rows])
        own = self.layout.raw and not self._remote
        return self._gather(rows) if own else self._collect(rows)

    def _collect(self, rows: np.ndarray) -> np.ndarray:
        """Rows of chunks that are fetched or decoded, each once."""
        out = np.empty((len(rows), *self.shape[1:]), self._stored)
        chunks, inside = np.divmod(rows, self.layout.chunk_rows)
        order = np.argsort(chunks, kind="stable")
        touched, first = np.unique(chunks[order], return_index=True)
        places = dict(zip(touched.tolist(), np.split(order, first[1:]), strict=True))
        per_shard = self.layout.shard_rows // self.layout.chunk_rows
        for shard in np.unique(touched // per_shard).tolist():
            base = shard * per_shard
            numbers = touched[(touched >= base) & (touched < base + per_shard)] - base
            for number, values in self.shard(shard).chunks(numbers.tolist()):
                place = places[base + number]
                out[place] = values[inside[place]]
        return out

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

    def _cover(self, shards: list[int]) -> MappedRows:
        """A window with all `shards`."""
        window = self._window
        if window is None or window.missing(shards):
            needed = {shard: self.shard(shard) for shard in shards}
            with self._lock:
                window = self._window = MappedRows({**self._shards, **needed}, self.layout)
        return window

    def shard(self, shard: int) -> Any:
        """The `ShardReader` of a shard, or its `RemoteShard`."""
        with self._lock:
            reader = self._shards.get(shard)
            if reader is None:
                while len(self._shards) >= OPEN_SHARDS:
                    self._shards.pop(next(iter(self._shards)))
                reader = self._shards[shard] = self._open_shard(shard)
            return reader

    def _check(self, shards: Iterable[int]) -> None:
        """Raise `IncompleteError` for the first of `shards` that is not committed."""
        if self._journal is None:
            return
        name = f"{self.path.parent.name}/{self.path.name}"
        for shard in shards:
            if name not in self._journal.arrays_of(shard):
                size = self.layout.shard_rows
                last = min((shard + 1) * size, self.shape[0]) - 1
                raise IncompleteError(
                    f"rows {shard * size}-{last} of {name} are not committed (part {shard}); run "
                    "the same `residua extract` again to finish this cache"
                )

    def _open_shard(self, shard: int) -> ShardReader | RemoteShard:
        self._check([shard])
        path = self.path / self.layout.shard_key(shard)
        if self._remote:
            return RemoteShard(path, self.layout)
        kind = CompressedShardReader if self.layout.compact else ShardReader
        reader = kind(path, self.layout, self._checked.get(shard))
        self._checked[shard] = reader.checked
        return reader

    def _open_zarr(self) -> Any:
        if self._zarr is None:
            import zarr
            from zarr.storage import FsspecStore

            found: Any = self.path
            if self._remote:
                store, key = store_of(self.path)
                found = FsspecStore.from_mapper(store.get_mapper(key))
            self._zarr = zarr.open_array(found, mode="r")
        return self._zarr


def _again(path: Path, journal: Path | None) -> CacheArray:
    """The array that was pickled."""
    return CacheArray(path, None if journal is None else Journal(journal))

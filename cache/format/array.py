"""`CacheArray`: reader of one array of a cache, by slices or by random rows.

Shards on disk are memory-mapped (`shard.py`, `compressed_shard.py`), shards in an object store read
by ranged requests (`remote_shard.py`); arrays with other codecs go through zarr. `ActivationCache`
gives these arrays; `RowLoader`, fits and exports read from them.
"""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptError, IncompleteError
from ..files.confined_files import read_confined
from ..files.json_fields import MAX_JSON_BYTES, parse_json_object
from ..files.paths import as_path, is_remote, store_of
from .compressed_shard import CompressedShardReader
from .dtypes import decode_rows, decode_rows_into, decoded_copy
from .journal import Journal
from .layout import ArrayLayout
from .remote_shard import RemoteShard
from .row_gather import MappedRows
from .shard import ShardReader

OPEN_SHARDS = 64
"""Memory maps kept open per array."""


class CacheArray:
    """A stored array, read by slicing along the first axis; float rows come as float32.

    Has `shape`, `dtype`, `ndim` and `__getitem__`, enough for dask; pickles as its path. With a
    `journal`, rows of parts whose records do not name the array raise `IncompleteError`. Raises
    `CorruptError` if `zarr.json` is missing or not of this format.
    """

    is_finite = False
    """Whether the journal says that no number is infinite or NaN; False where nobody asked."""

    def __init__(self, path: Path, journal: Journal | None = None) -> None:
        self.path: Path = as_path(path)
        self._journal = journal
        raw = self._read_metadata()
        meta = parse_json_object(raw, self.path / "zarr.json")
        self.layout: ArrayLayout = ArrayLayout.from_zarr_json(meta, str(self.path / "zarr.json"))
        self._check_layout()
        self.attributes: dict[str, Any] = meta.get("attributes") or {}
        self.shape: tuple[int, ...] = self.layout.shape
        self.ndim: int = len(self.shape)
        stored = np.dtype(self.layout.stored_dtype)
        is_float = stored.kind == "f" or self.layout.logical_dtype == "bfloat16"
        self.dtype: np.dtype[Any] = np.dtype(np.float32) if is_float else stored
        self._stored = stored
        self._remote = is_remote(self.path)
        self.is_mapped: bool = self.layout.raw and not self._remote
        """Whether rows are read through memory maps of the files, as they are stored."""
        self._shard_rows = self.layout.shard_rows
        self._shards: dict[int, Any] = {}
        self._checked: dict[int, np.ndarray] = {}
        self._mapped_rows: MappedRows | None = None
        self._lock = threading.Lock()
        self._zarr: Any = None

    def _read_metadata(self) -> bytes:
        """The bytes of `zarr.json`."""
        try:
            return read_confined(self.path, "zarr.json", MAX_JSON_BYTES)
        except FileNotFoundError:
            raise CorruptError(f"{self.path} has no zarr.json") from None

    def _check_layout(self) -> None:
        """Check the parsed metadata; an array outside a cache has no check."""

    def _check_shard(self, shard: int) -> None:
        """Check the file of a shard before it is opened; a lone array has no check."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.path, self._journal and self._journal.folder)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"CacheArray({self.path.name}, shape={self.shape}, {self.layout.logical_dtype})"

    def __getitem__(self, key: Any) -> np.ndarray:
        """Read rows by a number, slice, list or mask; further indices select within the rows."""
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
        """Read rows `start:stop`, `(stop - start, ...)`; floats come as float32."""
        if not self.layout.is_native:
            return decode_rows(self.read_stored(start, stop), self.layout.logical_dtype)
        view = self._view_of(start, stop)
        if view is not None:
            return decoded_copy(view, self.layout.logical_dtype, self.is_finite)
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self._read_into(start, stop, out)
        return out

    def read_stored(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read rows `start:stop` in the stored dtype (bfloat16 as uint16), into `out` if given."""
        if out is None:
            view = self._view_of(start, stop)
            if view is not None:
                return view.copy()
            out = np.empty((stop - start, *self.shape[1:]), self._stored)
        if self.layout.is_native:
            self._read_into(start, stop, out)
        else:
            rows = self.layout.shard_rows
            self._check_committed(range(start // rows, -(-stop // rows)))
            out[...] = self._open_zarr()[start:stop]
        return out

    def _view_of(self, start: int, stop: int) -> np.ndarray | None:
        """Rows `start:stop` as `ShardReader.view` gives them; None if they have no such view."""
        if not self.is_mapped:
            return None
        shard, first = divmod(start, self._shard_rows)
        reader = self._shards.get(shard) or self.shard(shard)
        return reader.view(first, stop - start)

    def _read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out`, of the stored dtype or float32, with rows `start:stop`, shard by shard."""
        layout = self.layout
        done = 0
        while start < stop:
            shard, first = divmod(start, layout.shard_rows)
            end = min(first + stop - start, layout.shard_rows)
            for piece in self.shard(shard).pieces(first, end):
                rows = out[done : done + len(piece)]
                decode_rows_into(piece, layout.logical_dtype, rows, self.is_finite)
                done += len(piece)
            start += end - first

    def load(self, start: int, stop: int) -> None:
        """Bring rows `start:stop` of mapped files into memory, and check chunks not checked yet.

        Rows that `take_stored` gathers next are then read from the disk in order, and a disk that
        fails raises `CorruptError`.
        """
        size = self._shard_rows
        while start < stop:
            shard, first = divmod(start, size)
            end = min(first + stop - start, size)
            for _ in self.shard(shard).pieces(first, end):
                pass
            start += end - first

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Read the rows `rows` (numbers in any order, or a mask); floats come as float32."""
        stored = self.take_stored(rows)
        if stored.dtype == self.dtype:
            return stored
        return decoded_copy(stored, self.layout.logical_dtype, self.is_finite)

    def take_stored(self, rows: np.ndarray) -> np.ndarray:
        """Read the rows `rows` (numbers in any order, or a mask) in the stored dtype."""
        # Bring a mask or negative numbers to row numbers, and refuse others.
        if rows.dtype == bool:
            if rows.shape != self.shape[:1]:
                raise IndexError(
                    f"a boolean index must have shape {self.shape[:1]}, got {rows.shape}"
                )
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise IndexError(f"rows must be a list of integers, got {rows.dtype} {rows.shape}")
        rows = rows.astype(np.int64, copy=False)
        if not rows.size:
            return np.empty((0, *self.shape[1:]), self._stored)
        # Of few numbers, argmin and argmax take half the time of min and max.
        lowest, highest = rows.item(rows.argmin()), rows.item(rows.argmax())
        if lowest < -self.shape[0] or highest >= self.shape[0]:
            raise IndexError(f"rows must lie in 0..{self.shape[0] - 1}")
        if lowest < 0:
            rows = np.where(rows < 0, rows + self.shape[0], rows)
        # Raw chunks on disk are indexed through their maps, others decoded or fetched whole.
        if not self.layout.is_native:
            self._check_committed(np.unique(rows // self.layout.shard_rows).tolist())
            return np.asarray(self._open_zarr().oindex[rows])
        return self._gather_mapped(rows) if self.is_mapped else self._gather_chunks(rows)

    def _gather_chunks(self, rows: np.ndarray) -> np.ndarray:
        """Random rows of compressed or remote chunks: every chunk is decoded once."""
        out = np.empty((len(rows), *self.shape[1:]), self._stored)
        chunks, offsets = np.divmod(rows, self.layout.chunk_rows)
        # Group the rows by chunk: chunk number -> indices into `rows`.
        order = np.argsort(chunks, kind="stable")
        touched, first = np.unique(chunks[order], return_index=True)
        indices_of = dict(zip(touched.tolist(), np.split(order, first[1:]), strict=True))
        # Read the chunks shard by shard, as many at a time as the shard's reader likes.
        per_shard = self.layout.shard_rows // self.layout.chunk_rows
        for shard in np.unique(touched // per_shard).tolist():
            base = shard * per_shard
            numbers = touched[(touched >= base) & (touched < base + per_shard)] - base
            for number, values in self.shard(shard).chunks(numbers.tolist()):
                indices = indices_of[base + number]
                out[indices] = values[offsets[indices]]
        return out

    def _gather_mapped(self, rows: np.ndarray) -> np.ndarray:
        """Random rows of raw chunks on disk, through `MappedRows`."""
        size = self.layout.chunk_rows
        is_power = size & (size - 1) == 0
        chunks = rows >> (size.bit_length() - 1) if is_power else rows // size
        # Usually all chunks are open and checked already.
        mapped = self._mapped_rows
        taken = mapped.take(rows, chunks) if mapped else None
        if taken is not None:
            return taken
        # Else open and check what is missing.
        touched = np.unique(chunks)
        shards = np.unique(touched * self.layout.chunk_rows // self.layout.shard_rows)
        if len(shards) <= OPEN_SHARDS:
            mapped = self._map_shards(shards.tolist())
            mapped.check(touched)
            taken = mapped.take(rows, chunks)
            assert taken is not None
            return taken
        # Rows of more shards than may be open are gathered in two halves.
        out = np.empty((len(rows), *self.shape[1:]), self._stored)
        middle = int(shards[len(shards) // 2]) * self.layout.shard_rows
        for half in (np.flatnonzero(rows < middle), np.flatnonzero(rows >= middle)):
            out[half] = self._gather_mapped(rows[half])
        return out

    def _map_shards(self, shards: list[int]) -> MappedRows:
        """`MappedRows` that cover at least `shards`."""
        mapped = self._mapped_rows
        if mapped is None or mapped.lacks_any(shards):
            readers = {shard: self.shard(shard) for shard in shards}
            with self._lock:
                mapped = MappedRows({**self._shards, **readers}, self.layout)
                self._mapped_rows = mapped
        return mapped

    def shard(self, shard: int) -> Any:
        """The reader of one shard, a `ShardReader` or `RemoteShard`, opened on first use."""
        with self._lock:
            reader = self._shards.get(shard)
            if reader is None:
                # Close the shards that were opened first.
                while len(self._shards) >= OPEN_SHARDS:
                    self._shards.pop(next(iter(self._shards)))
                reader = self._shards[shard] = self._open_shard(shard)
            return reader

    def close_shard(self, shard: int) -> None:
        """Forget the reader of a shard: its file is closed when no row refers to it any more."""
        with self._lock:
            self._shards.pop(shard, None)
            self._checked.pop(shard, None)

    def _check_committed(self, shards: Iterable[int]) -> None:
        """Raise `IncompleteError` for the first of `shards` without a record in the journal."""
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
        self._check_committed([shard])
        self._check_shard(shard)
        path = self.path / self.layout.shard_key(shard)
        if self._remote:
            return RemoteShard(path, self.layout)
        # Flags of checked chunks outlive the reader: a shard that is opened again is not checked
        # again.
        reader_class = CompressedShardReader if self.layout.compact else ShardReader
        reader = reader_class(path, self.layout, self._checked.get(shard))
        self._checked[shard] = reader.checked
        return reader

    def _open_zarr(self) -> Any:
        """The array through zarr, for codecs that residua does not read by itself."""
        if self._zarr is None:
            import zarr
            from zarr.storage import FsspecStore

            location: Any = self.path
            if self._remote:
                store, key = store_of(self.path)
                location = FsspecStore.from_mapper(store.get_mapper(key))
            self._zarr = zarr.open_array(location, mode="r")
        return self._zarr


def _unpickle(path: Path, journal: Path | None) -> CacheArray:
    """Rebuild a pickled array from its path and the folder of its journal."""
    return CacheArray(path, None if journal is None else Journal(journal))

"""Arrays of a cache, opened only if their metadata are those that were written.

The `zarr.json` of an array says where its rows lie; one wrong digit gives other rows, or fewer. So
its sha256 must be that of the base records, and shape, dtype, chunks and codecs those of the
manifest: `ArrayMetadata` of a cache knows both. `ActivationCache.array` and `PartWriter` open all
arrays through `CheckedArray`.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptError, NotFoundError
from ..files.confined_files import check_regular, confined_path, read_confined
from ..files.json_fields import MAX_JSON_BYTES
from ..files.paths import as_path, is_remote
from ..format.array import CacheArray
from ..format.dtypes import STORED_DTYPES
from ..format.journal import Journal
from ..format.layout import TABLE_CHUNK_ROWS, TABLE_CHUNKS_PER_SHARD, ArrayLayout
from ..format.logits_arrays import list_logits_arrays
from ..format.manifest import Manifest
from ..tokens.table_checks import TOKEN_IDS, check_numbers

GROUP = "arrays.zarr"
"""Folder of all arrays."""
TABLE_DTYPES = {
    "tokens/ids": ("int32",),
    "tokens/sequence": ("int32",),
    "tokens/index": ("int32",),
    "tokens/row_id": ("int64",),
    "tokens/char_start": ("int32",),
    "tokens/char_stop": ("int32",),
    "sequences/start": ("int64",),
    "sequences/length": ("int32",),
    "sequences/row_id": ("int64",),
    "sequences/split": ("uint8",),
    "sequences/hash": ("uint64",),
    "sequences/document": ("uint64",),
    "sequences/context": ("int32",),
    "context/ids": ("int32",),
    "context/row_id": ("int64",),
    "contexts/start": ("int64",),
    "contexts/length": ("int32",),
}
"""One-dimensional array -> dtypes that it may have."""
LABELS = "sequences/labels/"
LABEL_DTYPES = ("int64", "float64", "uint8", "int32")
_LAYER = re.compile(r"residual/(0|[1-9]\d{0,8})", re.ASCII)


class ArrayMetadata:
    """What manifest and base records of the cache in the folder `path` say of its arrays.

    With `files`, name -> sha256, these are the digests, and an array without one passes by the
    manifest alone: for caches whose base records are damaged.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest | None = None,
        journal: Journal | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        if manifest is None:
            check_regular(path, "manifest.json")
            manifest = Manifest.read(path / "manifest.json")
        self.manifest = manifest
        self.journal: Journal = journal or Journal(path / "journal", manifest)
        self._files = files
        self._base_files: dict[str, str] | None = None

    def digest_of(self, name: str) -> str | None:
        """Recorded sha256 of the `zarr.json` of the array `name`; None without a record.

        Raises `CorruptError` or `NotFoundError` if a base record is damaged or missing.
        """
        file = metadata_file(name)
        if self._files is not None:
            return self._files.get(file)
        # Layers alone are added later: then the base records are listed again.
        files = self._base_files
        if files is None or (file not in files and name.startswith("residual/")):
            files = self._base_files = self.journal.base()[1]
        return files.get(file)

    def check_digest(self, name: str, raw: bytes) -> None:
        """Raise `CorruptError` unless `raw` is what was written as `zarr.json` of `name`."""
        where = self.path / metadata_file(name)
        digest = self.digest_of(name)
        if digest is None and self._files is None:
            raise CorruptError(f"{where}: no base record names this array; run `residua repair`")
        if digest is not None and hashlib.sha256(raw).hexdigest() != digest:
            raise CorruptError(
                f"{where} is not what was written (sha256 differs); run `residua repair`"
            )

    def check_layout(self, name: str, layout: ArrayLayout) -> None:
        """Raise `CorruptError` unless the manifest allows the array `name` to have `layout`."""
        if reason := metadata_misfit(name, layout, self.manifest):
            where = self.path / metadata_file(name)
            raise CorruptError(f"{where} is not the metadata of an array of this cache: {reason}")


class CheckedArray(CacheArray):
    """An array of a cache whose `zarr.json` agrees with manifest and base records.

    Raises `CorruptError` otherwise. With a `journal`, rows that are not committed raise
    `IncompleteError`. Pickles as the path of the cache and the name of the array.
    """

    def __init__(
        self,
        metadata: ArrayMetadata,
        name: str,
        journal: Journal | None = None,
        is_finite: bool = False,
    ) -> None:
        self.is_finite = is_finite
        self._cache = metadata.path
        self._name = name
        self._metadata: ArrayMetadata | None = metadata
        # Token ids choose rows of matrices of this length; of images they number the positions.
        grid = metadata.manifest.image_grid
        most = metadata.manifest.vocab if grid is None else grid.tokens
        self._vocab = most if name in TOKEN_IDS else None
        super().__init__(metadata.path / GROUP / name, journal)
        # From here on, the array stands for itself; the metadata would be pickled and kept alive.
        self._metadata = None

    def _read_metadata(self) -> bytes:
        assert self._metadata is not None
        raw = read_metadata(self._cache, self._name)
        self._metadata.check_digest(self._name, raw)
        return raw

    def _check_layout(self) -> None:
        assert self._metadata is not None
        self._metadata.check_layout(self._name, self.layout)

    def read(self, start: int, stop: int) -> np.ndarray:
        rows = super().read(start, stop)
        if self._vocab is not None:
            check_numbers(rows, self._vocab, f"{self._cache}: {self._name}")
        return rows

    def take_stored(self, rows: np.ndarray) -> np.ndarray:
        stored = super().take_stored(rows)
        if self._vocab is not None:
            check_numbers(stored, self._vocab, f"{self._cache}: {self._name}")
        return stored

    def _check_shard(self, shard: int) -> None:
        if not self._remote:
            name = f"{GROUP}/{self._name}/{self.layout.shard_key(shard)}"
            try:
                check_regular(self._cache, name)
            except FileNotFoundError:
                return  # the reader says it

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._cache, self._name, self._journal is not None, self.is_finite)


def read_metadata(cache: Path, name: str) -> bytes:
    """The bytes of `zarr.json` of the array `name`; raises `CorruptError` if there is no file."""
    try:
        return read_confined(cache, metadata_file(name), MAX_JSON_BYTES)
    except FileNotFoundError:
        raise CorruptError(f"{cache / GROUP / name} has no zarr.json; run `residua repair`") from (
            None
        )


def writable_array(metadata: ArrayMetadata, name: str, shard: int) -> CheckedArray:
    """The array `name`, to write `shard` of it: all folders above the shard are real ones."""
    array = CheckedArray(metadata, name)
    confined_path(metadata.path, f"{GROUP}/{name}/{array.layout.shard_key(shard)}")
    return array


def metadata_file(name: str) -> str:
    """Name inside the cache of the metadata of the array `name`."""
    return f"{GROUP}/{name}/zarr.json"


def array_of_metadata(file: str) -> str | None:
    """Inverse of `metadata_file`; None for any other file, and for the metadata of a group."""
    name = file.removeprefix(f"{GROUP}/").removesuffix("/zarr.json")
    is_group = "/" not in name or f"{name}/" == LABELS
    return name if metadata_file(name) == file and not is_group else None


def named_layers(files: Iterable[str], depth: int) -> tuple[int, ...]:
    """Layers up to `depth` whose metadata are among the names `files`, ascending."""
    matches = [_LAYER.fullmatch(array_of_metadata(file) or "") for file in files]
    layers = {int(match[1]) for match in matches if match}
    return tuple(sorted(layer for layer in layers if layer <= depth))


def metadata_misfit(name: str, layout: ArrayLayout, manifest: Manifest) -> str | None:
    """Why the array `name` of the cache of `manifest` cannot have `layout`; None if it can."""
    if match := _LAYER.fullmatch(name):
        if int(match[1]) > manifest.depth:
            return f"layer {int(match[1])}, but the last layer is {manifest.depth}"
        return _part_array_misfit(
            layout,
            manifest,
            shape=(manifest.tokens.positions, manifest.d_model),
            dtypes=tuple(STORED_DTYPES),
            chunk_rows=manifest.layout.chunk_rows,
        )
    for dtype in STORED_DTYPES:
        for array in list_logits_arrays(manifest.capture.logits, manifest.vocab, dtype):
            if array.name == name and array.dtype == layout.logical_dtype:
                width = () if array.width is None else (array.width,)
                return _part_array_misfit(
                    layout,
                    manifest,
                    shape=(manifest.tokens.positions, *width),
                    dtypes=(array.dtype,),
                    chunk_rows=manifest.layout.chunk_of(array.row_bytes),
                )
    return _table_misfit(name, layout, manifest)


def _part_array_misfit(
    layout: ArrayLayout,
    manifest: Manifest,
    *,
    shape: tuple[int, ...],
    dtypes: tuple[str, ...],
    chunk_rows: int,
) -> str | None:
    """Why `layout` is not that of an array that is stored part by part."""
    if layout.shape != shape:
        return f"shape {layout.shape}, expected {shape}"
    rows = layout.chunk_rows, layout.shard_rows
    if rows != (expected := (chunk_rows, manifest.layout.part_rows)):
        return f"chunks of {rows[0]} rows in shards of {rows[1]}, expected {expected}"
    logical = layout.logical_dtype
    if logical not in dtypes or layout.stored_dtype != stored_dtype(logical):
        return f"dtype {logical} stored as {layout.stored_dtype}"
    if not (layout.compact if manifest.codec == "compact" else layout.raw):
        return f"codecs other than those of the manifest, {manifest.codec}"
    return None


def _table_misfit(name: str, layout: ArrayLayout, manifest: Manifest) -> str | None:
    """Why `layout` is not that of the one-dimensional array `name`."""
    dtypes = LABEL_DTYPES if name.startswith(LABELS) else TABLE_DTYPES.get(name)
    if dtypes is None:
        return f"no array of the format has the name {name[:80]!r}"
    lengths = {"tokens": manifest.tokens.positions, "sequences": manifest.tokens.sequences}
    length = lengths.get(name.partition("/")[0])
    if len(layout.shape) != 1:
        return f"shape {layout.shape}"
    if length is not None and layout.shape != (length,):
        return f"shape {layout.shape}, expected {(length,)}"
    chunk_rows = min(TABLE_CHUNK_ROWS, 1 << max(0, layout.shape[0] - 1).bit_length())
    rows = layout.chunk_rows, layout.shard_rows
    if rows != (expected := (chunk_rows, chunk_rows * TABLE_CHUNKS_PER_SHARD)):
        return f"chunks of {rows[0]} rows in shards of {rows[1]}, expected {expected}"
    logical = layout.logical_dtype
    if logical not in dtypes or layout.stored_dtype != stored_dtype(logical):
        return f"dtype {logical} stored as {layout.stored_dtype}, expected {' or '.join(dtypes)}"
    return None if layout.raw else "codecs other than bytes and crc32c"


def stored_dtype(logical: str) -> str:
    """numpy dtype string of the stored bytes of a logical dtype: little-endian."""
    return np.dtype(STORED_DTYPES.get(logical, logical)).newbyteorder("<").str


@lru_cache(maxsize=16)
def _metadata_of(path: Path) -> ArrayMetadata:
    """Metadata of the cache at `path`, read once by a process for all arrays that it unpickles."""
    return ArrayMetadata(path)


def _reopen(path: Path, name: str, by_parts: bool, is_finite: bool = False) -> CheckedArray:
    """Rebuild a pickled array; what the process knows of the cache is read again if it differs."""
    path = as_path(path)
    journal = Journal(path / "journal") if by_parts else None
    if is_remote(path):
        return CheckedArray(ArrayMetadata(path), name, journal, is_finite)
    try:
        return CheckedArray(_metadata_of(path), name, journal, is_finite)
    except (CorruptError, NotFoundError):
        _metadata_of.cache_clear()
        return CheckedArray(_metadata_of(path), name, journal, is_finite)

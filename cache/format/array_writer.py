"""Creation of the arrays of a cache: zarr writes the metadata, `ShardWriter` the rows.

`create_residual` and `create_logits` make empty arrays, whose shards `PartWriter` fills part by
part; `write_table` writes a one-dimensional array (tokens, sequences) whole. Called by
`cache/store/cache_creation.py`, `extend_cache.py` and repair.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files.disk_columns import NumberColumn
from ..files.json_fields import parse_json_object
from ..files.paths import is_remote, write_object
from ..files.staging import temporary_folder
from .compression import LEVEL
from .dtypes import STORED_DTYPES
from .layout import TABLE_CHUNK_ROWS, TABLE_CHUNKS_PER_SHARD, ArrayLayout, Layout, array_key
from .logits_arrays import LogitsArray, list_logits_arrays
from .manifest import Manifest
from .shard import ShardWriter

AXES = {
    "tokens": "positions",
    "sequences": "sequences",
    "context": "tokens",
    "contexts": "contexts",
}
"""Axis of the one-dimensional arrays, by the first part of their name."""


def create_residual(
    store: Path,
    layer: int,
    positions: int,
    d_model: int,
    logical_dtype: str,
    layout: Layout,
    codec: str = "raw",
) -> ArrayLayout:
    """Create the empty array `residual/<layer>`, `(positions, d_model)`, in the group `store`."""
    spec = _ArraySpec(
        name=f"residual/{layer}",
        shape=(positions, d_model),
        dtype=STORED_DTYPES[logical_dtype],
        chunk_rows=layout.chunk_rows,
        shard_rows=layout.part_rows,
        axes=("positions", "d_model"),
        attributes={"logical_dtype": logical_dtype},
        codec=codec,
    )
    if not is_remote(store):
        return _create_array(store, spec)
    # zarr makes many small requests, which are slow in an object store: send one file instead.
    with temporary_folder() as folder:
        array = _create_array(folder, spec)
        name = f"{spec.name}/zarr.json"
        write_object(store / name, (folder / name).read_bytes())
    return array


def create_logits(
    store: Path, array: LogitsArray, positions: int, layout: Layout, codec: str = "raw"
) -> ArrayLayout:
    """Create an empty array of logits in the group `store`, one shard per part."""
    spec = _ArraySpec(
        name=array.name,
        shape=(positions,) if array.width is None else (positions, array.width),
        dtype=STORED_DTYPES.get(array.dtype, array.dtype),
        chunk_rows=layout.chunk_of(array.row_bytes),
        shard_rows=layout.part_rows,
        axes=array.axes,
        attributes={"logical_dtype": array.dtype},
        codec=codec,
    )
    return _create_array(store, spec)


def create_part_array(store: Path, manifest: Manifest, name: str, dtype: str) -> None:
    """Create the empty array `name` of the cache of `manifest` in the logical `dtype`.

    Residual and logits arrays; any other name does nothing.
    """
    positions, layout, codec = manifest.tokens.positions, manifest.layout, manifest.codec
    if isinstance(layer := array_key(name), int):
        create_residual(
            store,
            layer,
            positions=positions,
            d_model=manifest.d_model,
            logical_dtype=dtype,
            layout=layout,
            codec=codec,
        )
    for array in list_logits_arrays(manifest.capture.logits, manifest.vocab, dtype):
        if array.name == name:
            create_logits(store, array, positions, layout, codec)


def write_table(
    store: Path, name: str, values: NumberColumn, attributes: dict[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Create and fill the one-dimensional array `name`, such as `tokens/ids`, in `store`.

    Returns shard number -> `bytes` and `crc32c` of the shard, for the journal.
    """
    array = create_table(store, name, len(values), values.dtype.str, attributes)
    chunk_rows, shard_rows = array.chunk_rows, array.shard_rows
    record = {}
    for shard in range(array.shards):
        start, stop = shard * shard_rows, min((shard + 1) * shard_rows, len(values))
        writer = ShardWriter(store / name / array.shard_key(shard), array, stop - start)
        for first in range(start, stop, chunk_rows):
            writer.write(first - start, values[first : min(first + chunk_rows, stop)])
        record[str(shard)] = writer.commit()
    return record


def create_table(
    store: Path, name: str, length: int, dtype: str, attributes: dict[str, Any] | None = None
) -> ArrayLayout:
    """Create the empty one-dimensional array `name`, `(length,)` of `dtype`, in `store`."""
    chunk_rows = min(TABLE_CHUNK_ROWS, 1 << max(0, length - 1).bit_length())
    spec = _ArraySpec(
        name=name,
        shape=(length,),
        dtype=dtype,
        chunk_rows=chunk_rows,
        shard_rows=chunk_rows * TABLE_CHUNKS_PER_SHARD,
        axes=(AXES[name.split("/")[0]],),
        attributes=attributes or {},
    )
    return _create_array(store, spec)


@dataclass(frozen=True)
class _ArraySpec:
    """A new array as its `zarr.json` will describe it."""

    name: str
    """Path inside the group."""
    shape: tuple[int, ...]
    dtype: str
    """Stored dtype, as a numpy dtype string."""
    chunk_rows: int
    shard_rows: int
    axes: tuple[str, ...]
    """Names of the axes."""
    attributes: dict[str, Any] = field(default_factory=dict)
    codec: str = "raw"
    """One of `compression.CODECS`."""


def _create_array(store: Path, spec: _ArraySpec) -> ArrayLayout:
    """Write the metadata of an array, and of the group if it is new, through zarr."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    compression = (
        _zarr_compression(np.dtype(spec.dtype).itemsize) if spec.codec == "compact" else ()
    )
    group = zarr.open_group(store, mode="a", zarr_format=3)
    group.create_array(
        spec.name,
        shape=spec.shape,
        chunks=(spec.chunk_rows, *spec.shape[1:]),
        shards=(spec.shard_rows, *spec.shape[1:]),
        dtype=np.dtype(spec.dtype),
        serializer=BytesCodec(endian="little"),
        compressors=(*compression, Crc32cCodec()),
        dimension_names=spec.axes,
        attributes={**spec.attributes},
        fill_value=0,
    )
    file = store / spec.name / "zarr.json"
    return ArrayLayout.from_zarr_json(parse_json_object(file.read_bytes(), file), spec.name)


def _zarr_compression(itemsize: int) -> tuple[Any, ...]:
    """The codecs of zarr that `compression.compress_chunk` stands for."""
    from zarr.codecs import ZstdCodec
    from zarr.codecs.numcodecs import Shuffle
    from zarr.errors import ZarrUserWarning

    with warnings.catch_warnings():
        # The format page (cache/README.md) says that numcodecs' shuffle is no standard codec.
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in", ZarrUserWarning)
        return Shuffle(elementsize=itemsize), ZstdCodec(level=LEVEL)

"""Writes arrays of a cache: zarr makes the metadata, our shard writer the data."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..files.disk_columns import NumberColumn
from ..files.paths import is_remote, write_object
from .compression import LEVEL
from .dtypes import STORED_DTYPES
from .layout import TABLE_CHUNK_ROWS, TABLE_CHUNKS_PER_SHARD, ArrayLayout, Layout, array_key
from .logits_arrays import LogitsArray, logits_arrays
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
    store: Path, layer: int, positions: int, d_model: int, logical_dtype: str, layout: Layout,
    codec: str = "raw",
) -> ArrayLayout:  # fmt: skip
    """Create the empty array `residual/<layer>`, `(positions, d_model)`."""
    if is_remote(store):  # where zarr's many small requests would be slow
        name = f"residual/{layer}/zarr.json"
        with tempfile.TemporaryDirectory(prefix="residua-") as folder:
            made = create_residual(
                Path(folder), layer, positions, d_model, logical_dtype, layout, codec
            )
            write_object(store / name, (Path(folder) / name).read_bytes())
        return made
    return _create(
        store,
        f"residual/{layer}",
        (positions, d_model),
        STORED_DTYPES[logical_dtype],
        layout.chunk_rows,
        layout.part_rows,
        ("positions", "d_model"),
        {"logical_dtype": logical_dtype},
        codec,
    )


def create_logits(
    store: Path, array: LogitsArray, positions: int, layout: Layout, codec: str = "raw"
) -> ArrayLayout:
    """Create an empty array of logits, one shard per part."""
    return _create(
        store,
        array.name,
        (positions,) if array.width is None else (positions, array.width),
        STORED_DTYPES.get(array.dtype, array.dtype),
        layout.chunk_of(array.row_bytes),
        layout.part_rows,
        array.axes,
        {"logical_dtype": array.dtype},
        codec,
    )


def create_part_array(store: Path, manifest: Manifest, name: str, dtype: str) -> None:
    """Create the empty array `name` of the parts in a logical dtype; nothing for another name."""
    positions, layout, codec = manifest.tokens.positions, manifest.layout, manifest.codec
    if isinstance(key := array_key(name), int):
        create_residual(store, key, positions, manifest.d_model, dtype, layout, codec)
    for array in logits_arrays(manifest.capture.logits, manifest.vocab, dtype):
        if array.name == name:
            create_logits(store, array, positions, layout, codec)


def write_table(
    store: Path, name: str, values: NumberColumn, attributes: dict[str, Any] | None = None
) -> dict[str, dict]:
    """Create and fill the one-dimensional array `name`; returns the record of its shards."""
    axis = AXES[name.split("/")[0]]
    chunk = min(TABLE_CHUNK_ROWS, 1 << max(0, len(values) - 1).bit_length())
    shard_rows = chunk * TABLE_CHUNKS_PER_SHARD
    array = _create(
        store, name, (len(values),), values.dtype.str, chunk, shard_rows, (axis,), attributes or {}
    )
    record = {}
    for shard in range(array.shards):
        start, stop = shard * shard_rows, min((shard + 1) * shard_rows, len(values))
        writer = ShardWriter(store / name / array.shard_key(shard), array, stop - start)
        for first in range(start, stop, chunk):
            writer.write(first - start, values[first : min(first + chunk, stop)])
        record[str(shard)] = writer.commit()
    return record


def _create(
    store: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    chunk_rows: int,
    shard_rows: int,
    axes: tuple[str, ...],
    attributes: dict[str, Any],
    codec: str = "raw",
) -> ArrayLayout:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    packing = _packing(np.dtype(dtype).itemsize) if codec == "compact" else ()
    group = zarr.open_group(store, mode="a", zarr_format=3)
    array = group.create_array(
        name,
        shape=shape,
        chunks=(chunk_rows, *shape[1:]),
        shards=(shard_rows, *shape[1:]),
        dtype=np.dtype(dtype),
        serializer=BytesCodec(endian="little"),
        compressors=(*packing, Crc32cCodec()),
        dimension_names=axes,
        attributes={**attributes},
        fill_value=0,
    )
    return ArrayLayout.from_zarr_json(array.metadata.to_dict(), name)


def _packing(itemsize: int) -> tuple[Any, ...]:
    """What `codec.pack` does, as codecs of zarr."""
    from zarr.codecs import ZstdCodec
    from zarr.codecs.numcodecs import Shuffle
    from zarr.errors import ZarrUserWarning

    with warnings.catch_warnings():
        # That numcodecs' are no codecs of the specification is for the format page to say.
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in", ZarrUserWarning)
        return Shuffle(elementsize=itemsize), ZstdCodec(level=LEVEL)

"""Sizes of chunks, shards and parts, and the stored layout of one array.

`Layout` is chosen before extraction and recorded in the manifest; `ArrayLayout` is parsed from the
`zarr.json` of an array and tells readers and writers of shards (`shard.py`) where rows lie.
"""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import UsageError
from ..files.json_fields import (
    FieldError,
    JsonObject,
    as_integer,
    as_list,
    as_object,
    as_text,
    checking_fields,
    object_field,
    required_field,
    shown,
    text_field,
)
from .compression import is_compact

CHUNK_BYTES = 3 << 20
"""A residual chunk holds the largest power of two of rows that fits in this many bytes."""
CHUNK_ROWS_MAX = 16384
"""Most rows of a residual chunk."""
MAX_CHUNK_ROWS = 1 << 20
"""Most rows of a chunk that is read; writers make smaller ones."""
MAX_PARTS = 1 << 20
"""Most parts of a cache."""
CHUNKS_PER_SHARD = 16
"""Chunks of a residual shard, unless `SHARD_ROWS_MAX` or a requested part size is less."""
SHARD_ROWS_MAX = 65536
"""Most rows of a residual shard."""
TABLE_CHUNK_ROWS = 1 << 18
"""Rows of a chunk in the one-dimensional arrays (tokens and sequences)."""
TABLE_CHUNKS_PER_SHARD = 16
"""Chunks of a shard of the one-dimensional arrays."""
CHECKSUM_BYTES = 4
"""Size of a crc32c."""
WIDE_SHARD_BYTES = 512 << 20
"""Most bytes of a shard whose rows are much wider than the residual stream: full logits."""
MAX_ROWS = 1 << 48
"""Most rows, or numbers of a row, of an array."""
MAX_AXES = 64
"""Most axes, and codecs, of an array."""
ArrayKey = int | str
"""An array that is stored part by part: a layer's number, or a name such as `logits/ids`."""


def array_name(key: ArrayKey) -> str:
    """Name of an array inside `arrays.zarr`."""
    return key if isinstance(key, str) else f"residual/{key}"


def array_key(name: str) -> ArrayKey:
    """Inverse of `array_name`: the layer's number of `residual/<layer>`, else the name."""
    group, _, layer = name.partition("/")
    return int(layer) if group == "residual" else name


@dataclass(frozen=True)
class Layout:
    """Rows of a chunk of the residual arrays, and rows of a shard of all arrays stored by parts."""

    chunk_rows: int
    """Positions of one chunk, a power of two."""
    part_rows: int
    """Positions of one shard and of one part, a multiple of `chunk_rows`."""

    @classmethod
    def choose(
        cls, d_model: int, itemsize: int, part_positions: int | None = None, widest: int = 0
    ) -> "Layout":
        """Choose chunks of 1.5-3 MiB and shards of 24-48 MiB, smaller for narrow rows.

        `itemsize` is the bytes of a residual value, `part_positions` the requested size of a part
        in positions. If an array beside the residual stream has rows of `widest` bytes, parts are
        so small that its shards have at most `WIDE_SHARD_BYTES`.
        """
        chunk = chunk_rows(d_model * itemsize)
        if part_positions is None:
            part = min(chunk * CHUNKS_PER_SHARD, SHARD_ROWS_MAX)
            while part > chunk and part * widest > WIDE_SHARD_BYTES:
                part //= 2
            return cls(chunk, part)
        # Chunks no larger than the requested part, and a part of whole chunks.
        chunk = min(chunk, 1 << (max(1, part_positions).bit_length() - 1))
        return cls(chunk, max(1, part_positions // chunk) * chunk)

    def shrunk(self, positions: int) -> "Layout":
        """The layout for a cache of `positions` rows: one small chunk if they do not fill a chunk.

        A chunk is padded with zeros to its full size, in every layer.
        """
        if positions >= self.chunk_rows:
            return self
        rows = 1 << max(0, positions - 1).bit_length()
        return Layout(rows, rows)

    def chunk_of(self, row_bytes: int) -> int:
        """Rows of a chunk in an array with rows of `row_bytes`; divides the rows of a part."""
        return math.gcd(chunk_rows(row_bytes), self.part_rows)

    def parts(self, positions: int) -> int:
        """Number of parts that hold `positions` rows."""
        return -(-positions // self.part_rows)

    def check_parts(self, positions: int) -> None:
        """Raise `UsageError` if `positions` rows make more parts than a cache may have."""
        if self.parts(positions) > MAX_PARTS:
            raise UsageError(
                f"{positions} positions in parts of {self.part_rows} are {self.parts(positions)} "
                f"parts; a cache has at most {MAX_PARTS}: give part_positions (--part-positions) "
                f"of at least {-(-positions // MAX_PARTS)}"
            )

    def rows(self, part: int, positions: int) -> tuple[int, int]:
        """First row of `part`, and the row after its last, in a cache of `positions` rows."""
        return part * self.part_rows, min((part + 1) * self.part_rows, positions)

    def to_json(self) -> dict[str, int]:
        """The value of `layout` in `manifest.json`."""
        return asdict(self)


def chunk_rows(row_bytes: int) -> int:
    """Largest power of two of rows in `CHUNK_BYTES`, at least 1, at most `CHUNK_ROWS_MAX`."""
    return min(1 << (max(1, CHUNK_BYTES // row_bytes).bit_length() - 1), CHUNK_ROWS_MAX)


@dataclass(frozen=True)
class ArrayLayout:
    """Shape, dtype, chunks and codecs of one stored array: enough to read shards without zarr."""

    shape: tuple[int, ...]
    stored_dtype: str
    """numpy dtype string of the bytes, little-endian."""
    logical_dtype: str
    """dtype of the values: `bfloat16` for residuals stored as uint16, else the stored dtype."""
    chunk_rows: int
    shard_rows: int
    raw: bool
    """True if chunks are uncompressed with a crc32c, so that shards can be memory-mapped."""
    compact: bool = False
    """True if chunks are those of `compression.compress_chunk` with a crc32c."""

    @property
    def is_native(self) -> bool:
        """Whether residua reads the shards without zarr."""
        return self.raw or self.compact

    @property
    def row_items(self) -> int:
        """Values of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.row_items * np.dtype(self.stored_dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one raw chunk, its checksum included."""
        return self.chunk_rows * self.row_bytes + CHECKSUM_BYTES

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.shape[0] // self.shard_rows)

    def shard_key(self, shard: int) -> str:
        """Path of a shard inside the array's folder, such as `c/3/0`."""
        return "/".join(["c", str(shard)] + ["0"] * (len(self.shape) - 1))

    @classmethod
    def from_zarr_json(cls, meta: dict[str, Any], where: str) -> "ArrayLayout":
        """Parse the `zarr.json` of an array; `where` is named in errors.

        Raises `CorruptError` unless the array is one of zarr v3 whose chunks divide its shards.
        """
        with checking_fields(where, "the metadata of an array of this format"):
            shape = tuple(as_integer(n, "shape", 0, MAX_ROWS) for n in _items(meta, "shape"))
            dtype = _stored_dtype(required_field(meta, "data_type"))
            attributes = meta.get("attributes")
            attributes = {} if attributes is None else as_object(attributes, "attributes")
            logical = as_text(attributes.get("logical_dtype", dtype.name), "logical_dtype")

            # The outer grid is that of shards, the inner one that of their chunks.
            grid = object_field(object_field(meta, "chunk_grid"), "configuration")
            shard = _grid_shape(grid, shape)
            codecs = [as_object(codec, "codecs") for codec in _items(meta, "codecs")]
            is_sharded = text_field(codecs[0], "name") == "sharding_indexed"
            sharding = object_field(codecs[0], "configuration") if is_sharded else grid
            chunk = _grid_shape(sharding, shape)

            # Shards that our readers know: nothing around them, and an index as in `shard.py`.
            is_readable = is_sharded and len(codecs) == 1 and _has_plain_index(sharding)
            inner = _inner_codecs(sharding, "codecs") if is_readable else []
            raw, compact = _is_raw(inner), is_compact(inner, dtype.itemsize)
            if shard % chunk:
                raise FieldError(f"shape {shape}, chunks of {chunk} rows, shards of {shard}")
            return cls(shape, dtype.str, logical, chunk, shard, raw=raw, compact=compact)


def _stored_dtype(name: Any) -> np.dtype:
    """The numpy dtype of the `data_type` of an array: numbers, little-endian."""
    if not (isinstance(name, str) and re.fullmatch(r"(float|uint|int)(8|16|32|64)|bool", name)):
        raise FieldError(f"data_type is {shown(name)}; expected that of numbers")
    try:
        return np.dtype(name).newbyteorder("<")
    except TypeError:
        raise FieldError(f"data_type is {shown(name)}; expected that of numbers") from None


def _grid_shape(configuration: JsonObject, shape: tuple[int, ...]) -> int:
    """Rows of the `chunk_shape` of a grid for an array of `shape`; other axes are not divided."""
    lengths = _items(configuration, "chunk_shape")
    rows, *others = [as_integer(length, "chunk_shape", 1, MAX_ROWS) for length in lengths]
    if len(lengths) != len(shape) or tuple(others) != tuple(max(n, 1) for n in shape[1:]):
        raise FieldError(f"chunk_shape is {lengths} for an array of shape {list(shape)}")
    return rows


def _items(parent: JsonObject, name: str) -> list[Any]:
    """The list `name`, not empty; zarr gives tuples where a file has lists."""
    value = required_field(parent, name)
    return as_list(list(value) if isinstance(value, tuple) else value, name, 1, MAX_AXES)


def _inner_codecs(configuration: JsonObject, name: str) -> list[dict[str, Any]]:
    """The list of codecs `name`, each an object whose `name` and `configuration` are such."""
    codecs = [as_object(codec, name) for codec in _items(configuration, name)]
    for codec in codecs:
        text_field(codec, "name")
        as_object(codec.get("configuration", {}), "configuration")
    return codecs


def _has_plain_index(sharding: JsonObject) -> bool:
    """Whether the index of a shard lies at the end, uncompressed, with a crc32c."""
    index_codecs = _inner_codecs(sharding, "index_codecs")
    return _is_raw(index_codecs) and sharding.get("index_location", "end") == "end"


def _is_raw(codecs: list[dict[str, Any]]) -> bool:
    """Whether bytes are little-endian and uncompressed, with a crc32c."""
    return [codec["name"] for codec in codecs] == ["bytes", "crc32c"] and (
        codecs[0].get("configuration", {}).get("endian", "little") == "little"
    )

"""How positions are cut into chunks, shards and parts, and how each array is stored."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import CorruptError
from .compression import is_compact

CHUNK_BYTES = 3 << 20
"""A residual chunk holds the largest power of two of rows that fits in this many bytes."""
CHUNK_ROWS_MAX = 16384
CHUNKS_PER_SHARD = 16
SHARD_ROWS_MAX = 65536
TABLE_CHUNK_ROWS = 1 << 18
"""Rows of a chunk in the one-dimensional arrays (tokens and sequences)."""
TABLE_CHUNKS_PER_SHARD = 16
CHECKSUM_BYTES = 4
WIDE_SHARD_BYTES = 512 << 20
"""Most bytes of a shard whose rows are much wider than the residual stream: all logits."""
ArrayKey = int | str
"""An array of the parts: the number of a layer, or a name such as `logits/ids`."""


def array_name(key: ArrayKey) -> str:
    """Name of an array inside `arrays.zarr`."""
    return key if isinstance(key, str) else f"residual/{key}"


def array_key(name: str) -> ArrayKey:
    """The key that `array_name` names."""
    folder, _, rest = name.partition("/")
    return int(rest) if folder == "residual" else name


@dataclass(frozen=True)
class Layout:
    """Rows per chunk of the residual arrays of all layers, and per shard of all parts' arrays."""

    chunk_rows: int
    """Positions of one chunk, a power of two."""
    part_rows: int
    """Positions of one shard and of one part, a multiple of `chunk_rows`."""

    @classmethod
    def choose(
        cls, d_model: int, itemsize: int, part_positions: int | None = None, widest: int = 0
    ) -> "Layout":
        """Chunks of 1.5-3 MiB and shards of 24-48 MiB, smaller where rows are narrow.

        Arrays with rows of `widest` bytes beside the residual stream make parts smaller, so that
        their shards have at most `WIDE_SHARD_BYTES`.
        """
        chunk = chunk_rows(d_model * itemsize)
        if part_positions is None:
            part = min(chunk * CHUNKS_PER_SHARD, SHARD_ROWS_MAX)
            while part > chunk and part * widest > WIDE_SHARD_BYTES:
                part //= 2
            return cls(chunk, part)
        chunk = min(chunk, 1 << (max(1, part_positions).bit_length() - 1))
        return cls(chunk, max(1, part_positions // chunk) * chunk)

    def shrunk(self, positions: int) -> "Layout":
        """The layout of a cache of `positions` rows: smaller where they do not fill a chunk.

        A chunk is padded with zeros, and there is one in every layer.
        """
        if positions >= self.chunk_rows:
            return self
        rows = 1 << max(0, positions - 1).bit_length()
        return Layout(rows, rows)

    def chunk_of(self, row_bytes: int) -> int:
        """Rows of a chunk of an array of other rows: by the same rule, and a divisor of a part."""
        return math.gcd(chunk_rows(row_bytes), self.part_rows)

    def parts(self, positions: int) -> int:
        """Number of parts that hold `positions` rows."""
        return -(-positions // self.part_rows)

    def rows(self, part: int, positions: int) -> tuple[int, int]:
        """First row and end of `part`."""
        return part * self.part_rows, min((part + 1) * self.part_rows, positions)

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def chunk_rows(row_bytes: int) -> int:
    """The largest power of two of rows in `CHUNK_BYTES`, at least 1, at most `CHUNK_ROWS_MAX`."""
    return min(1 << (max(1, CHUNK_BYTES // row_bytes).bit_length() - 1), CHUNK_ROWS_MAX)


@dataclass(frozen=True)
class ArrayLayout:
    """What `zarr.json` says of one array: enough to read its shards without zarr."""

    shape: tuple[int, ...]
    stored_dtype: str
    """numpy dtype string of the bytes, little-endian."""
    logical_dtype: str
    """What the bytes mean: equal to the stored dtype, but `bfloat16` is kept as uint16."""
    chunk_rows: int
    shard_rows: int
    raw: bool
    """True if chunks are uncompressed with a crc32c, so that shards can be memory-mapped."""
    compact: bool = False
    """True if chunks are those of `codec.pack` with a crc32c."""

    @property
    def ours(self) -> bool:
        """Whether shards are read without zarr."""
        return self.raw or self.compact

    @property
    def row_items(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        return self.row_items * np.dtype(self.stored_dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one encoded chunk, its checksum included."""
        return self.chunk_rows * self.row_bytes + CHECKSUM_BYTES

    @property
    def shards(self) -> int:
        return -(-self.shape[0] // self.shard_rows)

    def shard_key(self, shard: int) -> str:
        """Path of a shard inside its array."""
        return "/".join(["c", str(shard)] + ["0"] * (len(self.shape) - 1))

    @classmethod
    def from_zarr_json(cls, meta: dict[str, Any], where: str) -> "ArrayLayout":
        """Parse the metadata of a zarr v3 array that was written by this package."""
        try:
            shape = tuple(int(n) for n in meta["shape"])
            outer = meta["chunk_grid"]["configuration"]["chunk_shape"]
            dtype = np.dtype(meta["data_type"]).newbyteorder("<")
            codec = meta["codecs"][0]
            sharded = codec["name"] == "sharding_indexed"
            inner = codec["configuration"]["chunk_shape"] if sharded else outer
            known = sharded and len(meta["codecs"]) == 1 and _is_indexed(codec["configuration"])
            codecs = codec["configuration"]["codecs"] if known else []
            raw, compact = _is_raw(codecs), is_compact(codecs, dtype.itemsize)
            logical = meta.get("attributes", {}).get("logical_dtype", dtype.name)
            chunk, shard = int(inner[0]), int(outer[0])
            if not shape or min(shape) < 0 or chunk < 1 or shard < 1 or shard % chunk:
                raise ValueError(f"shape {shape}, chunks of {chunk} rows, shards of {shard}")
            return cls(shape, dtype.str, logical, chunk, shard, raw, compact)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise CorruptError(
                f"{where} is not the metadata of an array of this format: {error}"
            ) from None


def _is_indexed(sharding: dict[str, Any]) -> bool:
    """Whether the index of a shard is what our readers expect."""
    return _is_raw(sharding["index_codecs"]) and sharding.get("index_location", "end") == "end"


def _is_raw(codecs: list[dict[str, Any]]) -> bool:
    return [codec["name"] for codec in codecs] == ["bytes", "crc32c"] and (
        codecs[0].get("configuration", {}).get("endian", "little") == "little"
    )

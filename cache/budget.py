"""Bytes of a cache before it is made: per array, to the byte, and whether they fit."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import NoSpaceError, UsageError
from .layout import (
    CHECKSUM_BYTES,
    STORED_DTYPES,
    TABLE_CHUNK_ROWS,
    TABLE_CHUNKS_PER_SHARD,
    Layout,
)
from .logits import LogitsArray
from .place import is_remote
from .tables import SPAN_DTYPES, TABLE_DTYPES
from .tokens import TokenStream

SPARE_BYTES = 64 << 20
"""Free space that is left on the disk."""
SMALL_FILES = 1 << 18
"""Allowance for JSON files and array metadata."""
RATIO_SLACK = 0.15
"""Share by which compressed bytes may exceed what the first rows promise."""


@dataclass(frozen=True)
class Estimate:
    """What a cache will take."""

    positions: int
    sequences: int
    arrays: dict[str, int]
    """Bytes per array and of the head."""
    files: int
    """Number of shard files."""
    free: int | None
    """Free bytes at the root; None in an object store, which has no end."""
    slack: int = 0
    """Bytes by which a compact cache may be larger than was measured on its first rows."""
    cut: dict[str, int] = field(default_factory=dict)
    """How many `sequences` would lose how many `tokens` to the context."""

    @property
    def bytes(self) -> int:
        return sum(self.arrays.values())

    @property
    def most(self) -> int:
        """Bytes that are reckoned with."""
        return self.bytes + self.slack

    @property
    def largest(self) -> str:
        return max(self.arrays, key=lambda name: self.arrays[name])

    @property
    def fits(self) -> bool:
        return self.free is None or self.most + SPARE_BYTES <= self.free

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua extract --dry-run`."""
        shown = {"bytes": self.bytes, "largest": self.largest, "fits": self.fits}
        return {**asdict(self), **shown}

    def check(self, root: Path) -> None:
        """Raise `NoSpaceError` if the cache does not fit, before anything is written."""
        if self.free is not None and not self.fits:
            raise NoSpaceError(
                f"this cache needs {self.bytes / 1e9:.2f} GB, {root} has {self.free / 1e9:.2f} GB "
                f"free; the largest array is {self.largest}; use --max-bytes, --max-tokens, "
                "fewer --layers, or another --root"
            )


def estimate(
    root: Path, layout: Layout, d_model: int, dtypes: dict[int, str], positions: int,
    sequences: int, head_bytes: int, context_tokens: int = 0, logits: Sequence[LogitsArray] = (),
    ratios: Mapping[str, float] | None = None,
) -> Estimate:  # fmt: skip
    """What `positions` rows of the layers in `dtypes` and of `logits` take, with tokens and head.

    `context_tokens` are those of whole sequences, where only some positions are kept; `ratios` are
    compressed over raw bytes by array, empty for raw caches.
    """
    ratios, slack = ratios or {}, 0.0
    layout = layout.shrunk(positions)
    arrays = {"head": head_bytes + SMALL_FILES}
    if context_tokens:
        arrays["context/ids"], arrays["context/row_id"] = 4 * context_tokens, 8 * context_tokens
    rows: dict[str, tuple[int, int]] = {}
    for layer, dtype in dtypes.items():
        row = np.dtype(STORED_DTYPES[dtype]).itemsize * d_model
        rows[f"residual/{layer}"] = layout.chunk_rows, row
    for array in logits:
        rows[array.name] = layout.chunk_of(array.row_bytes), array.row_bytes
    for name, (chunk, row) in rows.items():
        raw = arrays[name] = _array(positions, chunk, layout.part_rows, row)
        if name in ratios:
            # The zeros after the last row compress to nothing.
            padding, saved = -positions % chunk * row, (1 - ratios[name]) * positions * row
            arrays[name] = raw - padding - round(saved)
            slack += min(RATIO_SLACK * arrays[name], max(0.0, saved))
    for name, dtype in (TABLE_DTYPES | SPAN_DTYPES).items():
        count = positions if name.startswith("tokens/") else sequences
        chunk = min(TABLE_CHUNK_ROWS, 1 << max(0, count - 1).bit_length())
        shard = chunk * TABLE_CHUNKS_PER_SHARD
        arrays[name] = _array(count, chunk, shard, np.dtype(dtype).itemsize)
    files = layout.parts(positions) * (len(dtypes) + len(logits))
    return Estimate(positions, sequences, arrays, files, _free(root), round(slack))


def _free(root: Path) -> int | None:
    return None if is_remote(root) else shutil.disk_usage(_existing(root)).free


def _existing(path: Path) -> Path:
    """The nearest folder above `path`, or itself, that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _array(rows: int, chunk_rows: int, shard_rows: int, row_bytes: int) -> int:
    """Bytes of all shards of an array: chunks with their checksums, and the indices."""
    chunks, shards = -(-rows // chunk_rows), -(-rows // shard_rows)
    index = shard_rows // chunk_rows * 16 + CHECKSUM_BYTES
    return chunks * (chunk_rows * row_bytes + CHECKSUM_BYTES) + shards * index


def shorten(
    stream: TokenStream, limit: int, root: Path, layout: Layout, d_model: int,
    dtypes: dict[int, str], head_bytes: int, logits: Sequence[LogitsArray] = (),
    ratios: Mapping[str, float] | None = None,
) -> TokenStream:  # fmt: skip
    """The longest beginning of `stream`, in whole sequences, whose cache has `limit` bytes."""
    ends = np.cumsum(stream.kept)

    def size(sequences: int) -> int:
        positions = int(ends[sequences - 1])
        tokens = 0 if stream.runs is None else int(stream.lengths[:sequences].sum())
        return estimate(
            root, layout, d_model, dtypes, positions, sequences, head_bytes, tokens, logits, ratios
        ).most

    low, high = 0, len(ends)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle - 1)
    if low == 0:
        raise UsageError(
            f"max_bytes {limit:,} is less than the cache of one sequence needs, {size(1):,} bytes; "
            "allow more, or take fewer layers or smaller parts (--part-positions)"
        )
    return stream if low == len(ends) else stream.select(np.arange(low))

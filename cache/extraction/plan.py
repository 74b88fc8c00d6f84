"""Bytes of a cache before it is made: per array, to the byte, and whether they fit."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..documents.documents import Reading
from ..errors import NoSpaceError, UsageError
from ..files.paths import is_remote
from ..format.dtypes import STORED_DTYPES
from ..format.layout import CHECKSUM_BYTES, TABLE_CHUNK_ROWS, TABLE_CHUNKS_PER_SHARD, Layout
from ..format.logits_arrays import LogitsArray, logits_arrays
from ..forward.batches import choose_batch_tokens
from ..store.activation_cache import ActivationCache
from ..tokens.index_arrays import CONTEXT_DTYPES, SPAN_DTYPES, TABLE_DTYPES
from ..tokens.token_stream import TokenStream
from .request import ExtractionRequest

if TYPE_CHECKING:
    from ..checks.model_checks import ModelReport


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
    reading: Reading = field(default_factory=Reading)
    """How the texts were read, and which documents would be left out."""

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
        return {**asdict(self), **shown, "reading": self.reading.to_dict()}

    def check(self, root: Path) -> None:
        """Raise `NoSpaceError` if the cache does not fit, before anything is written."""
        if self.free is not None and not self.fits:
            raise NoSpaceError(
                f"this cache needs {self.bytes / 1e9:.2f} GB, {root} has {self.free / 1e9:.2f} GB "
                f"free; the largest array is {self.largest}; use --max-bytes, --max-tokens, "
                "fewer --layers, or another --root"
            )


def estimate_bytes(
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
        for name in ("context/ids", "context/row_id"):
            arrays[name] = np.dtype(CONTEXT_DTYPES[name]).itemsize * context_tokens
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


def shorten_to_fit(
    stream: TokenStream, limit: int, root: Path, layout: Layout, d_model: int,
    dtypes: dict[int, str], head_bytes: int, logits: Sequence[LogitsArray] = (),
    ratios: Mapping[str, float] | None = None,
) -> TokenStream:  # fmt: skip
    """The longest beginning of `stream`, in whole sequences, whose cache has `limit` bytes."""
    ends = np.cumsum(stream.row_counts)

    def size(sequences: int) -> int:
        positions = int(ends[sequences - 1])
        tokens = 0 if stream.runs is None else int(stream.lengths[:sequences].sum())
        return estimate_bytes(
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
    return stream if low == len(ends) else stream.first_sequences(low)


LOGITS_BATCH_BYTES = 128 << 20
"""Most bytes of the kept logits of a batch, a few of which are in memory at a time."""


def kept_layers(layers: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """The layers to keep: those asked for, and layer L."""
    if layers is None:
        return tuple(range(depth + 1))
    if max(layers) > depth:
        raise UsageError(f"layer {max(layers)} is not in this model; it has layers 0-{depth}")
    return tuple(sorted({*layers, depth}))


def _layout(request: ExtractionRequest, canary: "ModelReport") -> Layout:
    widest = max((array.row_bytes for array in _logits(request, canary)), default=0)
    return Layout.choose(canary.head.d_model, _itemsize(canary), request.part_positions, widest)


def layout_like(request: ExtractionRequest, cache: ActivationCache) -> Layout:
    """The layout that `request` gives arrays like those of a complete `cache`."""
    names = {name for record in cache.committed.values() for name in record.arrays}
    arrays = {name: cache.array(name).layout for name in names}
    items = [np.dtype(a.stored_dtype).itemsize for n, a in arrays.items() if n[:9] == "residual/"]
    widest = max((a.row_bytes for n, a in arrays.items() if n[:7] == "logits/"), default=0)
    return Layout.choose(cache.d_model, max(items), request.part_positions, widest)


def _logits(request: ExtractionRequest, canary: "ModelReport") -> tuple[LogitsArray, ...]:
    """The arrays of logits that the request keeps."""
    return logits_arrays(request.logits, canary.head.vocab, canary.logits.dtype)


def _batch_tokens(request: ExtractionRequest, canary: "ModelReport", stream: TokenStream) -> int:
    """Tokens of a batch; fewer where a batch's logits would fill the memory."""
    if request.batch_tokens is not None:
        return request.batch_tokens
    row = sum(array.row_bytes for array in _logits(request, canary))
    limit = max(1, LOGITS_BATCH_BYTES // row) if row else None
    found = choose_batch_tokens(canary.stack, stream, _itemsize(canary))
    return found if limit is None else min(found, limit)


def _itemsize(canary: "ModelReport") -> int:
    return max(np.dtype(STORED_DTYPES[dtype]).itemsize for dtype in canary.dtypes.values())


def _head_bytes(canary: "ModelReport") -> int:
    return sum(tensor.nbytes for tensor in canary.tensors.values())


def estimate_of(
    request: ExtractionRequest, canary: "ModelReport", stream: TokenStream, root: Path
) -> Estimate:
    return estimate_bytes(
        root, _layout(request, canary), canary.head.d_model, canary.dtypes, stream.positions,
        stream.sequences, _head_bytes(canary), 0 if stream.runs is None else len(stream.ids),
        _logits(request, canary), canary.ratios,
    )  # fmt: skip

"""What the new cache of a request will hold, and its bytes on the disk before a row is written.

`prepare.py` makes the plan after the checks of the model; the dry run prints `plan.estimate(root)`.
"""

import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..documents.documents import Reading
from ..errors import NoSpaceError, UsageError
from ..files.paths import is_remote
from ..format.dtypes import STORED_DTYPES
from ..format.layout import CHECKSUM_BYTES, TABLE_CHUNK_ROWS, TABLE_CHUNKS_PER_SHARD, Layout
from ..format.logits_arrays import LogitsArray, list_logits_arrays
from ..forward.batches import choose_batch_tokens
from ..number_ranges import absolute_numbers
from ..store.activation_cache import ActivationCache
from ..tokens.index_arrays import CONTEXT_DTYPES, SPAN_DTYPES, TABLE_DTYPES
from ..tokens.splits import SPLITS
from ..tokens.token_stream import TokenStream
from .request import ExtractionRequest

if TYPE_CHECKING:
    from ..checks.model_checks import ModelReport


SPARE_BYTES = 64 << 20
"""Free space that an extraction leaves on the disk."""
METADATA_BYTES = 1 << 18
"""Allowance for JSON files and array metadata."""
RATIO_SLACK = 0.15
"""Share by which compressed bytes may exceed the measurement on the first rows."""
LOGITS_BATCH_BYTES = 128 << 20
"""Most bytes of stored logits per batch; a few batches are in memory at a time."""
SHOWN_SEQUENCES, SHOWN_TOKENS = 3, 24
"""Sequences whose first tokens a dry run shows, and how many of each."""
INDEX_ENTRY_BYTES = 16
"""Bytes of a chunk's entry (offset, length) in the index of its shard."""


@dataclass(frozen=True)
class ExtractionPlan:
    """The content of a new cache: layers, arrays, layout and batches of a request.

    Size, width and dtypes come from the checks of the model, so a plan needs the loaded model.
    """

    request: ExtractionRequest
    model_report: "ModelReport"
    """Checks of the model; `dtypes` has the layers of the cache only."""
    stream: TokenStream
    """Tokens that the model will read."""

    @cached_property
    def stored_logits(self) -> tuple[LogitsArray, ...]:
        """Arrays of logits in the cache; none where logits are recomputed."""
        report = self.model_report
        return list_logits_arrays(self.request.logits, report.head.vocab, report.logits.dtype)

    @cached_property
    def layout(self) -> Layout:
        """Rows of a chunk and of a part, before the layout shrinks to a short stream."""
        widest = max((array.row_bytes for array in self.stored_logits), default=0)
        d_model = self.model_report.head.d_model
        layout = Layout.choose(d_model, self.itemsize, self.request.part_positions, widest)
        layout.check_parts(self.stream.positions)
        return layout

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the widest stored dtype among the layers."""
        dtypes = self.model_report.dtypes.values()
        return max(np.dtype(STORED_DTYPES[dtype]).itemsize for dtype in dtypes)

    @property
    def head_bytes(self) -> int:
        """Bytes of the head's tensors in the model's own dtype."""
        return sum(tensor.nbytes for tensor in self.model_report.tensors.values())

    @cached_property
    def batch_tokens(self) -> int:
        """Tokens of a forward batch; on a GPU found by trial runs, unless the request says.

        Fewer where the stored logits of a batch would exceed `LOGITS_BATCH_BYTES`.
        """
        if self.request.batch_tokens is not None:
            return self.request.batch_tokens
        tokens = choose_batch_tokens(self.model_report.stack, self.stream, self.itemsize)
        logits_row_bytes = sum(array.row_bytes for array in self.stored_logits)
        if not logits_row_bytes:
            return tokens
        return min(tokens, max(1, LOGITS_BATCH_BYTES // logits_row_bytes))

    def estimate(self, root: Path) -> "Estimate":
        """Bytes of the cache per array, beside the free bytes at `root`."""
        stream = self.stream
        context_tokens = 0 if stream.runs is None else len(stream.ids)
        estimate = self._estimate(stream.positions, stream.sequences, context_tokens)
        shown = np.unique(np.linspace(0, len(stream.lengths) - 1, SHOWN_SEQUENCES).astype(int))
        counts = np.bincount(stream.sequence_splits, minlength=len(SPLITS)).tolist()
        return replace(
            estimate,
            free=free_bytes(root),
            cut=stream.cut_counts,
            reading=stream.reading,
            splits=dict(zip(SPLITS, counts, strict=True)),
            beginnings=tuple(SequenceBeginning.of(stream, number) for number in shown),
        )

    def shortened(self, max_bytes: int) -> "ExtractionPlan":
        """The plan with the longest beginning of the stream that fits into `max_bytes`.

        The beginning ends with a whole sequence. Raises `UsageError` if even the first sequence
        takes more.
        """
        stream = self.stream
        ends = np.cumsum(stream.row_counts)

        def bytes_of_first(sequences: int) -> int:
            context_tokens = 0 if stream.runs is None else int(stream.lengths[:sequences].sum())
            return self._estimate(int(ends[sequences - 1]), sequences, context_tokens).most

        # Bisection: `low` sequences fit, more than `high` do not.
        low, high = 0, len(ends)
        while low < high:
            middle = (low + high + 1) // 2
            if bytes_of_first(middle) <= max_bytes:
                low = middle
            else:
                high = middle - 1
        if low == 0:
            raise UsageError(
                f"max_bytes {max_bytes:,} is less than the cache of one sequence needs, "
                f"{bytes_of_first(1):,} bytes; allow more, or take fewer layers or smaller parts "
                "(--part-positions)"
            )
        return self if low == len(ends) else replace(self, stream=stream.first_sequences(low))

    def _estimate(self, positions: int, sequences: int, context_tokens: int) -> "Estimate":
        """Estimate for a beginning of the stream, without the free bytes.

        `context_tokens`: tokens of whole sequences that are stored where only some positions are
        kept; 0 where all positions are.
        """
        layout = self.layout.shrunk(positions)
        arrays = {"head": self.head_bytes + METADATA_BYTES}
        if context_tokens:
            for name in ("context/ids", "context/row_id"):
                arrays[name] = np.dtype(CONTEXT_DTYPES[name]).itemsize * context_tokens

        # Arrays of the parts: rows of a chunk and bytes of a row, by array.
        shapes: dict[str, tuple[int, int]] = {}
        for layer, dtype in self.model_report.dtypes.items():
            itemsize = np.dtype(STORED_DTYPES[dtype]).itemsize
            row_bytes = itemsize * self.model_report.head.d_model
            shapes[f"residual/{layer}"] = layout.chunk_rows, row_bytes
        for array in self.stored_logits:
            shapes[array.name] = layout.chunk_of(array.row_bytes), array.row_bytes

        # Raw bytes, less the share that compression saved on the first rows.
        slack, ratios = 0.0, self.model_report.ratios
        for name, (chunk_rows, row_bytes) in shapes.items():
            raw_bytes = _shards_bytes(positions, chunk_rows, layout.part_rows, row_bytes)
            arrays[name] = raw_bytes
            if name in ratios:
                # The zeros after the last row compress to nothing.
                padding_bytes = -positions % chunk_rows * row_bytes
                saved_bytes = (1 - ratios[name]) * positions * row_bytes
                arrays[name] = raw_bytes - padding_bytes - round(saved_bytes)
                slack += min(RATIO_SLACK * arrays[name], max(0.0, saved_bytes))

        # Tables with one number per token or per sequence.
        for name, dtype in (TABLE_DTYPES | SPAN_DTYPES).items():
            rows = positions if name.startswith("tokens/") else sequences
            chunk_rows = min(TABLE_CHUNK_ROWS, 1 << max(0, rows - 1).bit_length())
            shard_rows = chunk_rows * TABLE_CHUNKS_PER_SHARD
            arrays[name] = _shards_bytes(rows, chunk_rows, shard_rows, np.dtype(dtype).itemsize)

        files = layout.parts(positions) * len(shapes)
        return Estimate(positions, sequences, arrays, files, free=None, slack=round(slack))


@dataclass(frozen=True)
class SequenceBeginning:
    """The first tokens of a sequence that the model will read."""

    sequence: int
    """Number of the sequence, from 0."""
    split: str
    document: int
    """Number of the document in which the sequence begins."""
    length: int
    """Tokens of the whole sequence."""
    ids: tuple[int, ...]
    """Ids of the first tokens, at most `SHOWN_TOKENS`."""

    @classmethod
    def of(cls, stream: TokenStream, number: int) -> "SequenceBeginning":
        """The beginning of the sequence `number` of `stream`."""
        start, length = int(stream.starts[number]), int(stream.lengths[number])
        return cls(
            sequence=int(number),
            split=SPLITS[stream.sequence_splits[number]],
            document=int(stream.row_ids[number]),
            length=length,
            ids=tuple(stream.ids[start : start + min(SHOWN_TOKENS, length)].tolist()),
        )


@dataclass(frozen=True)
class Estimate:
    """Bytes and files of a cache before extraction."""

    positions: int
    sequences: int
    arrays: dict[str, int]
    """Bytes per array, and of the head under `head`."""
    files: int
    """Number of shard files."""
    free: int | None
    """Free bytes at the root; None in an object store, which has no end."""
    slack: int = 0
    """Bytes by which a compact cache may exceed the measurement on its first rows."""
    cut: dict[str, int] = field(default_factory=dict)
    """How many `sequences` would lose how many `tokens` to the context."""
    reading: Reading = field(default_factory=Reading)
    """How the texts were read, and which documents would be left out."""
    splits: dict[str, int] = field(default_factory=dict)
    """Sequences that the model reads, by split."""
    beginnings: tuple[SequenceBeginning, ...] = ()
    """The first tokens of `SHOWN_SEQUENCES` sequences: of the first, the last and between."""

    @property
    def bytes(self) -> int:
        """Bytes of all arrays and of the head."""
        return sum(self.arrays.values())

    @property
    def most(self) -> int:
        """Most bytes that the cache may take: `bytes` and `slack`."""
        return self.bytes + self.slack

    @property
    def largest(self) -> str:
        """Name of the array with the most bytes."""
        return max(self.arrays, key=lambda name: self.arrays[name])

    @property
    def fits(self) -> bool:
        """Whether the disk has room for the cache and `SPARE_BYTES` more."""
        return self.free is None or self.most + SPARE_BYTES <= self.free

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua extract --dry-run`."""
        summary = {"bytes": self.bytes, "largest": self.largest, "fits": self.fits}
        return {**asdict(self), **summary, "reading": self.reading.to_dict()}

    def check(self, root: Path) -> None:
        """Raise `NoSpaceError` if the cache does not fit, before anything is written."""
        if self.free is not None and not self.fits:
            raise NoSpaceError(
                f"this cache needs {self.bytes / 1e9:.2f} GB, {root} has {self.free / 1e9:.2f} GB "
                f"free; the largest array is {self.largest}; use --max-bytes, --max-tokens, "
                "fewer --layers, or another --root"
            )


def _shards_bytes(rows: int, chunk_rows: int, shard_rows: int, row_bytes: int) -> int:
    """Bytes of all shards of an array: chunks with their checksums, and one index per shard."""
    chunks, shards = -(-rows // chunk_rows), -(-rows // shard_rows)
    index_bytes = shard_rows // chunk_rows * INDEX_ENTRY_BYTES + CHECKSUM_BYTES
    return chunks * (chunk_rows * row_bytes + CHECKSUM_BYTES) + shards * index_bytes


def free_bytes(root: Path) -> int | None:
    """Free bytes on the disk of `root`, which may not exist yet; None for an object store."""
    if is_remote(root):
        return None
    folder = next(path for path in (root, *root.absolute().parents) if path.exists())
    return shutil.disk_usage(folder).free


def kept_layers(layers: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """Layers of a cache, ascending: the requested ones (None: all) and layer L = `depth`.

    Negative numbers count from the end: -1 is layer L. Raises `UsageError` for a layer that the
    model does not have.
    """
    if layers is None:
        return tuple(range(depth + 1))
    layers = absolute_numbers(layers, depth) or ()
    if absent := [layer for layer in layers if not 0 <= layer <= depth]:
        raise UsageError(f"layer {absent[-1]} is not in this model; it has layers 0-{depth}")
    return tuple(sorted({*layers, depth}))


def layout_like(request: ExtractionRequest, cache: ActivationCache) -> Layout:
    """The layout that a new cache of `request` with the arrays of a complete `cache` would get."""
    names = {name for record in cache.committed.values() for name in record.arrays}
    layouts = {name: cache.array(name).layout for name in names}
    itemsizes = [
        np.dtype(layout.stored_dtype).itemsize
        for name, layout in layouts.items()
        if name.startswith("residual/")
    ]
    logits_row_bytes = [
        layout.row_bytes for name, layout in layouts.items() if name.startswith("logits/")
    ]
    return Layout.choose(
        cache.d_model,
        max(itemsizes),
        request.part_positions,
        max(logits_row_bytes, default=0),
    )

"""`TokenStream`: token ids of all sequences of a cache, hashes, splits, labels, kept positions.

`tokenize` makes a stream of documents, `from_sequences` of token ids, `keep_positions` reduces
its positions; `index_arrays` turns it into the one-dimensional arrays of a cache, and the forward
passes read `sequence(number)`. Terms (document, sequence, context, position): `tokenization.py`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ..documents.documents import Reading
from ..documents.labels import LABEL_PREFIX, join_labels
from ..files.disk_columns import BLOCK, DiskColumn, NumberColumn, row_blocks
from ..format.manifest import DOCUMENT, FORMAT, SEQUENCE
from .splits import assign_splits, split_in_order

DOCUMENT_OF_TOKENS = "tokens/row_id"
"""Array of the document number of each token."""


@dataclass(frozen=True)
class KeptRuns:
    """Runs of consecutive kept positions, in the order of their sequences."""

    sequence: np.ndarray
    """Sequence number of each run, `(runs,)` int64, not decreasing."""
    first: np.ndarray
    """Index of the run's first token in its sequence, `(runs,)` int64."""
    length: np.ndarray
    """Tokens of each run, `(runs,)` int64."""


@dataclass(frozen=True)
class TokenStream:
    """Sequences of token ids in the order of the cache, and which of their positions are kept.

    Columns of one number per token may lie on the disk and are read by slices; arrays of one
    number per sequence are in memory.
    """

    ids: NumberColumn
    """Token ids of all sequences, concatenated, `(tokens,)` int32."""
    lengths: np.ndarray
    """Tokens of each sequence, `(sequences,)` int64."""
    row_ids: np.ndarray
    """Document number of the first token of each sequence, `(sequences,)` int64."""
    token_arrays: dict[str, NumberColumn] = field(default_factory=dict)
    """Further arrays of one number per token: array name -> `(tokens,)`."""
    sequence_arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Further arrays of one number per sequence, the labels: array name -> `(sequences,)`."""
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Words that the codes of a label stand for: array name -> words."""
    runs: KeptRuns | None = None
    """Kept positions; None if all positions are kept."""
    cut_tokens: np.ndarray | None = None
    """Tokens cut off from the end of each sequence, `(sequences,)` int64; None if packed."""
    scratch: Path | None = None
    """Folder of temporary files; None for the system's."""
    splits: np.ndarray | None = None
    """Split of each sequence, index into `SPLITS`, `(sequences,)` uint8; None to derive splits from
    `documents`."""
    documents: np.ndarray | None = None
    """`text_hash` of the document of the first token of each sequence, `(sequences,)` uint64; None
    if every sequence is a document by itself."""
    split_by: str = DOCUMENT
    """Unit that is never divided between splits: `document`; or `sequence`, for data of one or two
    documents."""
    format: int = FORMAT
    """Format of the cache; decides what `digests` covers and how splits are derived."""
    reading: Reading = field(default_factory=Reading)
    """Report on reading the texts: columns, dropped documents."""
    chat_template: str | None = None
    """Digest of the template that rendered conversations; None for other texts."""

    @property
    def positions(self) -> int:
        """Number of rows of the cache: kept tokens."""
        return int((self.lengths if self.runs is None else self.runs.length).sum())

    @property
    def sequences(self) -> int:
        """Number of sequences of the cache: runs, if only some positions are kept."""
        return len(self.lengths if self.runs is None else self.runs.length)

    @property
    def row_counts(self) -> np.ndarray:
        """Number of kept positions of each sequence, `(sequences,)` int64."""
        if self.runs is None:
            return self.lengths
        rows = np.zeros(len(self.lengths), np.int64)
        np.add.at(rows, self.runs.sequence, self.runs.length)
        return rows

    @property
    def cut_counts(self) -> dict[str, int]:
        """Number of `sequences` longer than the context, and number of `tokens` cut off."""
        cut = np.zeros(0, np.int64) if self.cut_tokens is None else self.cut_tokens
        return {"sequences": int((cut > 0).sum()), "tokens": int(cut.sum())}

    def with_runs(self, runs: KeptRuns) -> "TokenStream":
        """The same stream with only the positions `runs` kept."""
        return replace(self, runs=runs)

    @cached_property
    def starts(self) -> np.ndarray:
        """Index in `ids` of the first token of each sequence, `(sequences,)` int64."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)

    def sequence(self, number: int) -> np.ndarray:
        """Token ids of one sequence, `(tokens,)` int32."""
        start = int(self.starts[number])
        return self.ids[start : start + int(self.lengths[number])]

    def beginning(self, count: int) -> np.ndarray:
        """The first tokens for trial runs: `count` rows of the longest length, int64."""
        length = int(self.lengths.max())
        return np.resize(self.ids[: count * length], (count, length)).astype(np.int64)

    def select(self, numbers: np.ndarray) -> "TokenStream":
        """A stream of the sequences `numbers`, in this order."""
        # Consecutive sequence numbers are copied together: token ranges of these groups.
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        firsts = numbers[np.concatenate([[0], breaks])] if len(numbers) else numbers
        lasts = numbers[np.concatenate([breaks, [len(numbers)]]) - 1] if len(numbers) else numbers
        ranges = np.stack([self.starts[firsts], self.starts[lasts] + self.lengths[lasts]], -1)
        sources = {"ids": self.ids, **self.token_arrays}
        columns = {name: DiskColumn(values.dtype, self.scratch) for name, values in sources.items()}
        for name, column in columns.items():
            for start, stop in ranges.tolist():
                for block in row_blocks(sources[name], start, stop):
                    column.append(block)
        return replace(
            self,
            ids=columns.pop("ids"),
            lengths=self.lengths[numbers],
            row_ids=self.row_ids[numbers],
            token_arrays={**columns},
            sequence_arrays={
                name: values[numbers] for name, values in self.sequence_arrays.items()
            },
            runs=self._select_runs(numbers),
            cut_tokens=None if self.cut_tokens is None else self.cut_tokens[numbers],
            splits=None if self.splits is None else self.splits[numbers],
            documents=None if self.documents is None else self.documents[numbers],
        )

    def first_sequences(self, count: int) -> "TokenStream":
        """A stream of the first `count` sequences.

        If sequences were split in order (data of one or two documents), they are split again.
        """
        stream = self.select(np.arange(count))
        if stream.split_by == SEQUENCE and stream.format > 1:
            return replace(stream, splits=split_in_order(count))
        return stream

    def _select_runs(self, numbers: np.ndarray) -> KeptRuns | None:
        """The runs of the sequences `numbers`, numbered by their place in `numbers`."""
        if self.runs is None:
            return None
        first = np.searchsorted(self.runs.sequence, numbers)
        counts = np.searchsorted(self.runs.sequence, numbers, side="right") - first
        sequence = np.repeat(np.arange(len(numbers)), counts)
        # Run numbers: first, first+1, ... for each sequence.
        ends = np.cumsum(counts)
        run = np.arange(len(sequence)) + np.repeat(first - ends + counts, counts)
        return KeptRuns(sequence, self.runs.first[run], self.runs.length[run])

    def _sequence_blocks(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (first, last, ids): whole sequences first..last-1 of at most `BLOCK` tokens.

        A longer sequence is a block by itself.
        """
        ends = self.starts + self.lengths
        first = 0
        while first < len(ends):
            start = int(self.starts[first])
            last = max(first + 1, int(np.searchsorted(ends, start + BLOCK, side="right")))
            yield first, last, self.ids[start : int(ends[last - 1])]
            first = last

    def digests(self) -> tuple[str, np.ndarray]:
        """Hex sha256 of the stream, and 64 bits of the sha256 of each sequence, uint64.

        A sequence's hash covers its length, split, document, document borders, kept runs and
        token ids; the bytes are specified in cache/README.md, *Tokens*.
        """
        return self._digests

    @cached_property
    def _digests(self) -> tuple[str, np.ndarray]:
        if self.format == 1:
            return self._format1_digests()
        stream_hash = hashlib.sha256()
        hashes = np.empty(len(self.lengths), np.uint64)
        splits, documents = self.sequence_splits, self.sequence_documents
        borders, kept_runs = self._document_borders(), self._kept_run_bytes()
        for first, last, ids in self._sequence_blocks():
            id_bytes = np.ascontiguousarray(ids, "<i4").data.cast("B")
            start = 0
            for number in range(first, last):
                stop = start + 4 * int(self.lengths[number])
                border = next(borders)
                header = [self.lengths[number], splits[number], documents[number], len(border)]
                sequence_hash = hashlib.sha256(
                    np.array(header, "<u8").tobytes() + border.tobytes() + next(kept_runs)
                )
                sequence_hash.update(id_bytes[start:stop])
                digest = sequence_hash.digest()
                stream_hash.update(digest)
                hashes[number] = int.from_bytes(digest[:8], "little")
                start = stop
        return stream_hash.hexdigest(), hashes

    def _document_borders(self) -> Iterator[np.ndarray]:
        """Yield, per sequence, the indices at which another document begins, `(borders,)` int64."""
        rows = self.token_arrays.get(DOCUMENT_OF_TOKENS)
        no_borders = np.zeros(0, "<i8")
        for first, last, _ in self._sequence_blocks():
            # Changes of the document number in the tokens of the block.
            start = int(self.starts[first])
            stop = int(self.starts[last - 1] + self.lengths[last - 1])
            changes = no_borders if rows is None else np.flatnonzero(np.diff(rows[start:stop])) + 1
            # Changes inside each sequence; its first token is no border.
            offsets = self.starts[first:last] - start
            ends = np.searchsorted(changes, offsets + self.lengths[first:last])
            begins = np.searchsorted(changes, offsets, side="right")
            for offset, begin, end in zip(offsets, begins, ends, strict=True):
                yield (changes[begin:end] - offset).astype("<i8")

    def _kept_run_bytes(self) -> Iterator[bytes]:
        """Yield the bytes hashed for the kept runs of each sequence; none if all are kept."""
        if self.runs is None:
            yield from (b"" for _ in self.lengths)
            return
        numbers = np.arange(len(self.lengths))
        first = np.searchsorted(self.runs.sequence, numbers)
        last = np.searchsorted(self.runs.sequence, numbers, side="right")
        for begin, end in zip(first, last, strict=True):
            runs = np.stack([self.runs.first[begin:end], self.runs.length[begin:end]], -1)
            yield np.array([end - begin], "<i8").tobytes() + runs.astype("<i8").tobytes()

    def _format1_digests(self) -> tuple[str, np.ndarray]:
        """`digests` of format 1: a sequence's hash covers its token ids only."""
        stream_hash = hashlib.sha256()
        hashes = np.empty(len(self.lengths), np.uint64)
        for first, last, ids in self._sequence_blocks():
            id_bytes = np.ascontiguousarray(ids, "<i4").data.cast("B")
            start = 0
            for number in range(first, last):
                length = int(self.lengths[number])
                sequence = id_bytes[start : start + 4 * length]
                stream_hash.update(length.to_bytes(8, "little"))
                stream_hash.update(sequence)
                hashes[number] = int.from_bytes(hashlib.sha256(sequence).digest()[:8], "little")
                start += 4 * length
        if self.runs is not None:
            for values in (self.runs.sequence, self.runs.first, self.runs.length):
                stream_hash.update(values.astype("<i8").tobytes())
        return stream_hash.hexdigest(), hashes

    @cached_property
    def sequence_documents(self) -> np.ndarray:
        """`documents`; if None, the hash of each sequence's token ids, `(sequences,)` uint64."""
        if self.documents is not None:
            return self.documents
        return replace(self, format=1).digests()[1]

    @cached_property
    def sequence_splits(self) -> np.ndarray:
        """`splits`; if None, splits derived from the document hashes, `(sequences,)` uint8."""
        if self.format == 1:
            return assign_splits(self.digests()[1])
        return assign_splits(self.sequence_documents) if self.splits is None else self.splits


def concatenate(*streams: TokenStream) -> TokenStream:
    """One stream of the sequences of all `streams`, in their order.

    A label of any stream is kept, missing where a stream lacks the label; other arrays are kept if
    all streams have them. Format, scratch folder and report are those of the last stream.
    """
    # Arrays of one number per sequence: labels are recoded, the others concatenated.
    sequence_arrays, categories = _join_stream_labels(streams)
    for name in streams[0].sequence_arrays:
        if name not in sequence_arrays and all(name in s.sequence_arrays for s in streams):
            sequence_arrays[name] = np.concatenate([s.sequence_arrays[name] for s in streams])

    # Columns of one number per token.
    last = streams[-1]
    token_arrays: dict[str, NumberColumn] = {}
    for name in streams[0].token_arrays:
        if all(name in stream.token_arrays for stream in streams):
            columns = [stream.token_arrays[name] for stream in streams]
            token_arrays[name] = _concatenate_columns(columns, last.scratch)

    return TokenStream(
        ids=_concatenate_columns([stream.ids for stream in streams], last.scratch),
        lengths=np.concatenate([stream.lengths for stream in streams]),
        row_ids=np.concatenate([stream.row_ids for stream in streams]),
        token_arrays=token_arrays,
        sequence_arrays=sequence_arrays,
        categories=categories,
        cut_tokens=_concatenate_arrays([stream.cut_tokens for stream in streams]),
        scratch=last.scratch,
        splits=_concatenate_arrays([stream.splits for stream in streams]),
        documents=_concatenate_arrays([stream.documents for stream in streams]),
        split_by=last.split_by,
        format=last.format,
        reading=last.reading,
    )


def _concatenate_arrays(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The concatenated arrays; None if any of them is None."""
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if len(present) == len(arrays) else None


def _concatenate_columns(columns: Sequence[NumberColumn], scratch: Path | None) -> DiskColumn:
    """The concatenated columns, as a temporary file in `scratch`."""
    joined = DiskColumn(columns[0].dtype, scratch)
    for column in columns:
        for block in row_blocks(column):
            joined.append(block)
    return joined


def _join_stream_labels(
    streams: tuple[TokenStream, ...],
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    """The labels of all streams by array name, and the words of the coded labels."""
    names = dict.fromkeys(name for stream in streams for name in stream.sequence_arrays)
    values: dict[str, np.ndarray] = {}
    categories: dict[str, tuple[str, ...]] = {}
    for name in (name for name in names if name.startswith(LABEL_PREFIX)):
        parts = [
            (len(stream.lengths), stream.sequence_arrays.get(name), stream.categories.get(name))
            for stream in streams
        ]
        values[name], words = join_labels(parts)
        if words is not None:
            categories[name] = words
    return values, categories


def from_sequences(sequences: Sequence[Sequence[int] | np.ndarray]) -> TokenStream:
    """A stream of given token ids; each sequence is a document by itself, numbered from 0."""
    lengths = np.array([len(ids) for ids in sequences], np.int64)
    ids = np.concatenate([np.asarray(ids, np.int32) for ids in sequences])
    return TokenStream(ids, lengths, np.arange(len(lengths)))

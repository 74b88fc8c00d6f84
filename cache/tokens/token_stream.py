"""The token stream of a cache: sequences of token ids, their hashes and their splits."""

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
"""Array of the number of each token's document; where it changes, another document begins."""


@dataclass(frozen=True)
class KeptRuns:
    """Runs of consecutive positions that are kept, in the order of their sequences."""

    sequence: np.ndarray
    """Number of the sequence, `(runs,)` int64, not decreasing."""
    first: np.ndarray
    """Index in the sequence of the run's first token, `(runs,)` int64."""
    length: np.ndarray
    """Tokens, `(runs,)` int64."""


@dataclass(frozen=True)
class TokenStream:
    """Sequences in the order of the cache, and which of their positions are kept.

    What has one number per token may lie on the disk and is read by slices; what has one per
    sequence is in memory.
    """

    ids: NumberColumn
    """Token ids of all sequences, one after the other, `(tokens,)` int32."""
    lengths: np.ndarray
    """Tokens of each sequence, `(sequences,)` int64."""
    row_ids: np.ndarray
    """Number of the source document in which each sequence starts, `(sequences,)` int64."""
    token_arrays: dict[str, NumberColumn] = field(default_factory=dict)
    """Further arrays of one number per token: array name -> `(tokens,)`."""
    sequence_arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Further arrays of one number per sequence, the labels: array name -> `(sequences,)`."""
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What the codes of a label stand for: array name -> words."""
    runs: KeptRuns | None = None
    """Kept positions; None if all are."""
    cut_tokens: np.ndarray | None = None
    """Tokens that each sequence lost at its end to the context, `(sequences,)`; None if packed."""
    scratch: Path | None = None
    """Folder of temporary files; None for the system's."""
    splits: np.ndarray | None = None
    """Split of each sequence, index into `SPLITS`, `(sequences,)` uint8; None: by `documents`."""
    documents: np.ndarray | None = None
    """64 bits of the sha256 of the text of the document in which each sequence begins,
    `(sequences,)` uint64; None where each sequence is a document of its own."""
    split_by: str = DOCUMENT
    """What lies in one split as a whole: `document`, or `sequence` of one or two documents."""
    format: int = FORMAT
    """Format of the cache that the stream is for: what `digests` covers, and how splits follow."""
    reading: Reading = field(default_factory=Reading)
    """How the texts were read, and which documents were left out."""

    @property
    def positions(self) -> int:
        """Rows of the cache: tokens that are kept."""
        return int((self.lengths if self.runs is None else self.runs.length).sum())

    @property
    def sequences(self) -> int:
        """Sequences of the cache: runs, where not all positions are kept."""
        return len(self.lengths if self.runs is None else self.runs.length)

    @property
    def row_counts(self) -> np.ndarray:
        """Rows of the cache that each sequence that the model reads gives, `(sequences,)`."""
        if self.runs is None:
            return self.lengths
        rows = np.zeros(len(self.lengths), np.int64)
        np.add.at(rows, self.runs.sequence, self.runs.length)
        return rows

    @property
    def cut_counts(self) -> dict[str, int]:
        """How many `sequences` were longer than the context, and `tokens` that were cut off."""
        cut = np.zeros(0, np.int64) if self.cut_tokens is None else self.cut_tokens
        return {"sequences": int((cut > 0).sum()), "tokens": int(cut.sum())}

    def with_runs(self, runs: KeptRuns) -> "TokenStream":
        """The same stream with only `runs` kept."""
        return replace(self, runs=runs)

    @cached_property
    def starts(self) -> np.ndarray:
        """First token of each sequence, `(sequences,)` int64."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)

    def sequence(self, number: int) -> np.ndarray:
        start = int(self.starts[number])
        return self.ids[start : start + int(self.lengths[number])]

    def select(self, numbers: np.ndarray) -> "TokenStream":
        """The sequences `numbers`, in that order."""
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        firsts = numbers[np.concatenate([[0], breaks])] if len(numbers) else numbers
        lasts = numbers[np.concatenate([breaks, [len(numbers)]]) - 1] if len(numbers) else numbers
        ranges = np.stack([self.starts[firsts], self.starts[lasts] + self.lengths[lasts]], -1)
        names = {"ids": self.ids, **self.token_arrays}
        columns = {name: DiskColumn(values.dtype, self.scratch) for name, values in names.items()}
        for name, column in columns.items():
            for start, stop in ranges.tolist():
                for block in row_blocks(names[name], start, stop):
                    column.append(block)
        return replace(
            self,
            ids=columns.pop("ids"),
            lengths=self.lengths[numbers],
            row_ids=self.row_ids[numbers],
            of_tokens={**columns},
            of_sequences={name: values[numbers] for name, values in self.sequence_arrays.items()},
            runs=self._runs_of(numbers),
            cut_tokens=None if self.cut_tokens is None else self.cut_tokens[numbers],
            splits=None if self.splits is None else self.splits[numbers],
            documents=None if self.documents is None else self.documents[numbers],
        )

    def first_sequences(self, count: int) -> "TokenStream":
        """The first `count` sequences; those of fewer than three documents are split anew."""
        stream = self.select(np.arange(count))
        if stream.split_by == SEQUENCE and stream.format > 1:
            return replace(stream, splits=split_in_order(count))
        return stream

    def _runs_of(self, numbers: np.ndarray) -> KeptRuns | None:
        if self.runs is None:
            return None
        first = np.searchsorted(self.runs.sequence, numbers)
        counts = np.searchsorted(self.runs.sequence, numbers, side="right") - first
        sequence = np.repeat(np.arange(len(numbers)), counts)
        ends = np.cumsum(counts)
        chosen = np.arange(len(sequence)) + np.repeat(first - ends + counts, counts)
        return KeptRuns(sequence, self.runs.first[chosen], self.runs.length[chosen])

    def _groups(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Whole sequences, `BLOCK` tokens at a time if they are not longer: range, their ids."""
        ends = self.starts + self.lengths
        first = 0
        while first < len(ends):
            start = int(self.starts[first])
            last = max(first + 1, int(np.searchsorted(ends, start + BLOCK, side="right")))
            yield first, last, self.ids[start : int(ends[last - 1])]
            first = last

    def digests(self) -> tuple[str, np.ndarray]:
        """Hex sha256 of the whole stream, and 64 bits of the sha256 of each sequence.

        What is hashed of a sequence is in cache/README.md, *Tokens*.
        """
        return self._digests

    @cached_property
    def _digests(self) -> tuple[str, np.ndarray]:
        if self.format == 1:
            return self._digests_of_ids()
        whole = hashlib.sha256()
        hashes = np.empty(len(self.lengths), np.uint64)
        splits, documents = self.sequence_splits, self.sequence_documents
        borders, runs = self._borders(), self._kept_runs()
        for first, last, ids in self._groups():
            data = np.ascontiguousarray(ids, "<i4").data.cast("B")
            start = 0
            for number in range(first, last):
                stop = start + 4 * int(self.lengths[number])
                inside = next(borders)
                record = [self.lengths[number], splits[number], documents[number], len(inside)]
                about = np.array(record, "<u8").tobytes() + inside.tobytes() + next(runs)
                sequence = hashlib.sha256(about)
                sequence.update(data[start:stop])
                digest = sequence.digest()
                whole.update(digest)
                hashes[number] = int.from_bytes(digest[:8], "little")
                start = stop
        return whole.hexdigest(), hashes

    def _borders(self) -> Iterator[np.ndarray]:
        """Where another document begins inside each sequence: indices, `(borders,)` int64."""
        rows = self.token_arrays.get(DOCUMENT_OF_TOKENS)
        none = np.zeros(0, "<i8")
        for first, last, _ in self._groups():
            start = int(self.starts[first])
            stop = int(self.starts[last - 1] + self.lengths[last - 1])
            changes = none if rows is None else np.flatnonzero(np.diff(rows[start:stop])) + 1
            offsets = self.starts[first:last] - start
            ends = np.searchsorted(changes, offsets + self.lengths[first:last])
            begins = np.searchsorted(changes, offsets, side="right")
            for offset, begin, end in zip(offsets, begins, ends, strict=True):
                yield (changes[begin:end] - offset).astype("<i8")

    def _kept_runs(self) -> Iterator[bytes]:
        """What is hashed of the kept positions of each sequence; nothing where all are kept."""
        if self.runs is None:
            yield from (b"" for _ in self.lengths)
            return
        numbers = np.arange(len(self.lengths))
        first = np.searchsorted(self.runs.sequence, numbers)
        last = np.searchsorted(self.runs.sequence, numbers, side="right")
        for begin, end in zip(first, last, strict=True):
            runs = np.stack([self.runs.first[begin:end], self.runs.length[begin:end]], -1)
            yield np.array([end - begin], "<i8").tobytes() + runs.astype("<i8").tobytes()

    def _digests_of_ids(self) -> tuple[str, np.ndarray]:
        """As format 1 has them: the stream's, and that of the ids of each sequence."""
        whole = hashlib.sha256()
        hashes = np.empty(len(self.lengths), np.uint64)
        for first, last, ids in self._groups():
            data = np.ascontiguousarray(ids, "<i4").data.cast("B")
            start = 0
            for number in range(first, last):
                length = int(self.lengths[number])
                sequence = data[start : start + 4 * length]
                whole.update(length.to_bytes(8, "little"))
                whole.update(sequence)
                hashes[number] = int.from_bytes(hashlib.sha256(sequence).digest()[:8], "little")
                start += 4 * length
        if self.runs is not None:
            for values in (self.runs.sequence, self.runs.first, self.runs.length):
                whole.update(values.astype("<i8").tobytes())
        return whole.hexdigest(), hashes

    @cached_property
    def sequence_documents(self) -> np.ndarray:
        """`documents`, or the same of the ids of each sequence that is a document of its own."""
        if self.documents is not None:
            return self.documents
        return replace(self, format=1).digests()[1]

    @cached_property
    def sequence_splits(self) -> np.ndarray:
        """`splits`, or what follows from `documents`, `(sequences,)` uint8."""
        if self.format == 1:
            return assign_splits(self.digests()[1])
        return assign_splits(self.sequence_documents) if self.splits is None else self.splits


def concatenate(*streams: TokenStream) -> TokenStream:
    """One stream after the other, with the labels of any and the further arrays of all."""
    of_sequences, categories = _labels(streams)
    common = [
        name
        for name in streams[0].sequence_arrays
        if name not in of_sequences and all(name in stream.sequence_arrays for stream in streams)
    ]
    scratch = streams[-1].scratch
    cuts = [stream.cut_tokens for stream in streams if stream.cut_tokens is not None]
    names = [
        n for n in streams[0].token_arrays if all(n in stream.token_arrays for stream in streams)
    ]
    lengths, rows = (
        np.concatenate([getattr(s, n) for s in streams]) for n in ("lengths", "row_ids")
    )
    return TokenStream(
        _chain([stream.ids for stream in streams], scratch),
        lengths,
        rows,
        {n: _chain([stream.token_arrays[n] for stream in streams], scratch) for n in names},
        {
            **of_sequences,
            **{
                n: np.concatenate([stream.sequence_arrays[n] for stream in streams]) for n in common
            },
        },
        categories,
        cut_tokens=np.concatenate(cuts) if len(cuts) == len(streams) else None,
        scratch=scratch,
        splits=_joined([stream.splits for stream in streams]),
        documents=_joined([stream.documents for stream in streams]),
        split_by=streams[-1].split_by,
        format=streams[-1].format,
        reading=streams[-1].reading,
    )


def _joined(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """One array after the other; None if one is None."""
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if len(there) == len(arrays) else None


def _chain(columns: Sequence[NumberColumn], scratch: Path | None) -> DiskColumn:
    """The numbers of one column after those of the other."""
    found = DiskColumn(columns[0].dtype, scratch)
    for column in columns:
        for block in row_blocks(column):
            found.append(block)
    return found


def _labels(
    streams: tuple[TokenStream, ...],
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    """The labels of all streams by the names of their arrays, and the words of coded ones."""
    names = dict.fromkeys(name for stream in streams for name in stream.sequence_arrays)
    values: dict[str, np.ndarray] = {}
    categories: dict[str, tuple[str, ...]] = {}
    for name in (name for name in names if name.startswith(LABEL_PREFIX)):
        values[name], words = join_labels(
            [(len(s.lengths), s.sequence_arrays.get(name), s.categories.get(name)) for s in streams]
        )
        if words is not None:
            categories[name] = words
    return values, categories


def from_sequences(sequences: Sequence[Sequence[int] | np.ndarray]) -> TokenStream:
    """A stream of the given token ids, one row id per sequence."""
    lengths = np.array([len(ids) for ids in sequences], np.int64)
    ids = np.concatenate([np.asarray(ids, np.int32) for ids in sequences])
    return TokenStream(ids, lengths, np.arange(len(lengths)))

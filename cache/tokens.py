"""The token stream of a cache: sequences of token ids, their hashes and their splits."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from .columns import BLOCK, Column, Numbers, blocks
from .documents import Reading
from .labels import LABELS, join_labels
from .store import SPLITS

TEST_SHARE = 0.1
VALIDATION_SHARE = 0.1
_DENOMINATOR = 1 << 32


@dataclass(frozen=True)
class Runs:
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

    ids: Numbers
    """Token ids of all sequences, one after the other, `(tokens,)` int32."""
    lengths: np.ndarray
    """Tokens of each sequence, `(sequences,)` int64."""
    row_ids: np.ndarray
    """Number of the source document in which each sequence starts, `(sequences,)` int64."""
    of_tokens: dict[str, Numbers] = field(default_factory=dict)
    """Further arrays of one number per token: array name -> `(tokens,)`."""
    of_sequences: dict[str, np.ndarray] = field(default_factory=dict)
    """Further arrays of one number per sequence, the labels: array name -> `(sequences,)`."""
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What the codes of a label stand for: array name -> words."""
    runs: Runs | None = None
    """Kept positions; None if all are."""
    cut: np.ndarray | None = None
    """Tokens that each sequence lost at its end to the context, `(sequences,)`; None if packed."""
    scratch: Path | None = None
    """Folder of temporary files; None for the system's."""
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
    def kept(self) -> np.ndarray:
        """Rows of the cache that each sequence that the model reads gives, `(sequences,)`."""
        if self.runs is None:
            return self.lengths
        rows = np.zeros(len(self.lengths), np.int64)
        np.add.at(rows, self.runs.sequence, self.runs.length)
        return rows

    @property
    def cut_counts(self) -> dict[str, int]:
        """How many `sequences` were longer than the context, and `tokens` that were cut off."""
        cut = np.zeros(0, np.int64) if self.cut is None else self.cut
        return {"sequences": int((cut > 0).sum()), "tokens": int(cut.sum())}

    def with_runs(self, runs: Runs) -> "TokenStream":
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
        names = {"ids": self.ids, **self.of_tokens}
        columns = {name: Column(values.dtype, self.scratch) for name, values in names.items()}
        for name, column in columns.items():
            for start, stop in ranges.tolist():
                for block in blocks(names[name], start, stop):
                    column.append(block)
        return TokenStream(
            columns.pop("ids"),
            self.lengths[numbers],
            self.row_ids[numbers],
            {**columns},
            {name: values[numbers] for name, values in self.of_sequences.items()},
            self.categories,
            self._runs_of(numbers),
            None if self.cut is None else self.cut[numbers],
            self.scratch,
            self.reading,
        )

    def _runs_of(self, numbers: np.ndarray) -> Runs | None:
        if self.runs is None:
            return None
        first = np.searchsorted(self.runs.sequence, numbers)
        counts = np.searchsorted(self.runs.sequence, numbers, side="right") - first
        sequence = np.repeat(np.arange(len(numbers)), counts)
        ends = np.cumsum(counts)
        chosen = np.arange(len(sequence)) + np.repeat(first - ends + counts, counts)
        return Runs(sequence, self.runs.first[chosen], self.runs.length[chosen])

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
        """Hex sha256 of the whole stream, and 64 bits of the sha256 of each sequence's ids."""
        return self._digests

    @cached_property
    def _digests(self) -> tuple[str, np.ndarray]:
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


def concatenate(*streams: TokenStream) -> TokenStream:
    """One stream after the other, with the labels of any and the further arrays of all."""
    of_sequences, categories = _labels(streams)
    common = [
        name
        for name in streams[0].of_sequences
        if name not in of_sequences and all(name in stream.of_sequences for stream in streams)
    ]
    scratch = streams[-1].scratch
    cuts = [stream.cut for stream in streams if stream.cut is not None]
    names = [n for n in streams[0].of_tokens if all(n in stream.of_tokens for stream in streams)]
    lengths, rows = (
        np.concatenate([getattr(s, n) for s in streams]) for n in ("lengths", "row_ids")
    )
    return TokenStream(
        _chain([stream.ids for stream in streams], scratch),
        lengths,
        rows,
        {n: _chain([stream.of_tokens[n] for stream in streams], scratch) for n in names},
        {
            **of_sequences,
            **{n: np.concatenate([stream.of_sequences[n] for stream in streams]) for n in common},
        },
        categories,
        cut=np.concatenate(cuts) if len(cuts) == len(streams) else None,
        scratch=scratch,
        reading=streams[-1].reading,
    )


def _chain(columns: Sequence[Numbers], scratch: Path | None) -> Column:
    """The numbers of one column after those of the other."""
    found = Column(columns[0].dtype, scratch)
    for column in columns:
        for block in blocks(column):
            found.append(block)
    return found


def _labels(
    streams: tuple[TokenStream, ...],
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    """The labels of all streams by the names of their arrays, and the words of coded ones."""
    names = dict.fromkeys(name for stream in streams for name in stream.of_sequences)
    values: dict[str, np.ndarray] = {}
    categories: dict[str, tuple[str, ...]] = {}
    for name in (name for name in names if name.startswith(LABELS)):
        values[name], words = join_labels(
            [(len(s.lengths), s.of_sequences.get(name), s.categories.get(name)) for s in streams]
        )
        if words is not None:
            categories[name] = words
    return values, categories


def from_sequences(sequences: Sequence[Sequence[int] | np.ndarray]) -> TokenStream:
    """A stream of the given token ids, one row id per sequence."""
    lengths = np.array([len(ids) for ids in sequences], np.int64)
    ids = np.concatenate([np.asarray(ids, np.int32) for ids in sequences])
    return TokenStream(ids, lengths, np.arange(len(lengths)))


def assign_splits(hashes: np.ndarray) -> np.ndarray:
    """Split of each sequence by its hash, `(sequences,)` uint8 index into `SPLITS`.

    A tenth goes to `test`, a tenth to `validation`. Equal sequences share a split. Where chance
    leaves a split of a small set empty, the sequences nearest to its threshold fill it.
    """
    share = (hashes >> np.uint64(32)).astype(np.float64) / _DENOMINATOR
    splits = np.full(len(hashes), SPLITS.index("train"), np.uint8)
    splits[share < TEST_SHARE + VALIDATION_SHARE] = SPLITS.index("validation")
    splits[share < TEST_SHARE] = SPLITS.index("test")
    distinct, first = np.unique(hashes, return_index=True)
    count = len(distinct)
    if count < len(SPLITS) or len(np.unique(splits)) == len(SPLITS):
        return splits
    # Hashes in ascending order are test, validation, train: only the two borders may have to move.
    kinds = splits[first]
    test = min(max(int((kinds == SPLITS.index("test")).sum()), 1), count - 2)
    known = int((kinds != SPLITS.index("train")).sum())
    validation = min(max(known, test + 1), count - 1)
    rank = np.searchsorted(distinct, hashes)
    splits[:] = SPLITS.index("train")
    splits[rank < validation] = SPLITS.index("validation")
    splits[rank < test] = SPLITS.index("test")
    return splits


def folds_of(hashes: np.ndarray, folds: int) -> np.ndarray:
    """Fold of each sequence for cross-validation, from bits that do not decide its split."""
    return ((hashes & np.uint64(0xFFFF_FFFF)) % np.uint64(folds)).astype(np.int64)

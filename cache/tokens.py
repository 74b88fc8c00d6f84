"""The token stream of a cache: sequences of token ids, their hashes and their splits."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .store import SPLITS

TEST_SHARE = 0.1
VALIDATION_SHARE = 0.1
_DENOMINATOR = 1 << 32


TABLE_DTYPES = {
    "tokens/ids": "<i4",
    "tokens/sequence": "<i4",
    "tokens/index": "<i4",
    "sequences/row_id": "<i8",
    "sequences/start": "<i8",
    "sequences/length": "<i4",
    "sequences/split": "u1",
    "sequences/hash": "<u8",
}
"""The one-dimensional arrays of every cache; the part before the slash names their axis."""
SPAN_DTYPES = {"tokens/row_id": "<i8", "tokens/char_start": "<i4", "tokens/char_stop": "<i4"}
"""Where each token came from, in caches that were made from texts."""

CONTEXT_DTYPES = {
    "sequences/context": "<i4",
    "context/ids": "<i4",
    "contexts/start": "<i8",
    "contexts/length": "<i4",
}
"""Whole sequences that went through the model, where not all their positions are kept."""
_DTYPES = TABLE_DTYPES | SPAN_DTYPES | CONTEXT_DTYPES


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
    """Sequences in the order of the cache, and which of their positions are kept."""

    ids: np.ndarray
    """Token ids of all sequences, one after the other, `(positions,)` int32."""
    lengths: np.ndarray
    """Tokens of each sequence, `(sequences,)` int64."""
    row_ids: np.ndarray
    """Number of the source document in which each sequence starts, `(sequences,)` int64."""
    of_tokens: dict[str, np.ndarray] = field(default_factory=dict)
    """Further arrays of one number per position: array name -> `(positions,)`."""
    of_sequences: dict[str, np.ndarray] = field(default_factory=dict)
    """Further arrays of one number per sequence, the labels: array name -> `(sequences,)`."""
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What the codes of a label stand for: array name -> words."""
    runs: Runs | None = None
    """Kept positions; None if all are."""

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

    def with_runs(self, runs: Runs) -> "TokenStream":
        """The same stream with only `runs` kept."""
        return replace(self, runs=runs)

    @property
    def starts(self) -> np.ndarray:
        """First position of each sequence, `(sequences,)` int64."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)

    def sequence(self, number: int) -> np.ndarray:
        start = int(self.starts[number])
        return self.ids[start : start + int(self.lengths[number])]

    def select(self, numbers: np.ndarray) -> "TokenStream":
        """The sequences `numbers`, in that order."""
        lengths = self.lengths[numbers]
        ends = np.cumsum(lengths)
        rows = np.arange(ends[-1] if len(ends) else 0)
        rows += np.repeat(self.starts[numbers] - ends + lengths, lengths)
        return TokenStream(
            self.ids[rows],
            lengths,
            self.row_ids[numbers],
            {name: values[rows] for name, values in self.of_tokens.items()},
            {name: values[numbers] for name, values in self.of_sequences.items()},
            self.categories,
            self._runs_of(numbers),
        )

    def _runs_of(self, numbers: np.ndarray) -> Runs | None:
        if self.runs is None:
            return None
        kept = [np.flatnonzero(self.runs.sequence == number) for number in numbers]
        chosen = np.concatenate(kept)
        sequence = np.repeat(np.arange(len(numbers)), [len(run) for run in kept])
        return Runs(sequence, self.runs.first[chosen], self.runs.length[chosen])

    def digests(self) -> tuple[str, np.ndarray]:
        """Hex sha256 of the whole stream, and 64 bits of the sha256 of each sequence's ids."""
        whole = hashlib.sha256()
        hashes = np.empty(len(self.lengths), np.uint64)
        start = 0
        for number, length in enumerate(self.lengths):
            data = self.ids[start : start + length].astype("<i4").tobytes()
            whole.update(int(length).to_bytes(8, "little"))
            whole.update(data)
            hashes[number] = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
            start += int(length)
        if self.runs is not None:
            for values in (self.runs.sequence, self.runs.first, self.runs.length):
                whole.update(values.astype("<i8").tobytes())
        return whole.hexdigest(), hashes

    def tables(self, hashes: np.ndarray) -> dict[str, np.ndarray]:
        """The one-dimensional arrays of the cache by name, in their stored dtypes."""
        runs = self.runs or Runs(
            np.arange(len(self.lengths)), np.zeros(len(self.lengths), np.int64), self.lengths
        )
        ends = np.cumsum(runs.length)
        index = np.arange(self.positions) + np.repeat(runs.first - ends + runs.length, runs.length)
        token = index + np.repeat(self.starts[runs.sequence], runs.length)
        values = {
            "tokens/ids": self.ids[token],
            "tokens/sequence": np.repeat(np.arange(self.sequences), runs.length),
            "tokens/index": index,
            "sequences/row_id": self.row_ids[runs.sequence],
            "sequences/start": ends - runs.length,
            "sequences/length": runs.length,
            "sequences/split": assign_splits(hashes)[runs.sequence],
            "sequences/hash": hashes[runs.sequence],
        }
        values |= {name: found[token] for name, found in self.of_tokens.items()}
        values |= {name: found[runs.sequence] for name, found in self.of_sequences.items()}
        if self.runs is not None:
            values |= {
                "sequences/context": runs.sequence,
                "context/ids": self.ids,
                "contexts/start": self.starts,
                "contexts/length": self.lengths,
            }
        return {n: v.astype(_DTYPES.get(n, v.dtype.str)) for n, v in values.items()}


def concatenate(*streams: TokenStream) -> TokenStream:
    """One stream after the other, with the further arrays that all of them have alike."""
    names = ("ids", "lengths", "row_ids")
    further = []
    for kind in ("of_tokens", "of_sequences"):
        tables = [getattr(stream, kind) for stream in streams]
        common = [n for n in tables[0] if all(n in t and _alike(n, streams) for t in tables)]
        further.append({n: np.concatenate([table[n] for table in tables]) for n in common})
    ids, lengths, rows = (np.concatenate([getattr(s, n) for s in streams]) for n in names)
    categories = {n: v for n, v in streams[0].categories.items() if n in further[1]}
    return TokenStream(ids, lengths, rows, further[0], further[1], categories)


def _alike(name: str, streams: tuple[TokenStream, ...]) -> bool:
    """Whether the codes of a label mean the same in all streams."""
    return len({stream.categories.get(name) for stream in streams}) == 1


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

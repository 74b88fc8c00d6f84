"""The token stream of a cache: sequences of token ids, their hashes and their splits."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

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

_DTYPES = TABLE_DTYPES | SPAN_DTYPES


@dataclass(frozen=True)
class TokenStream:
    """Sequences in the order of the cache."""

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

    @property
    def positions(self) -> int:
        return int(self.lengths.sum())

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
        )

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
        return whole.hexdigest(), hashes

    def tables(self, hashes: np.ndarray) -> dict[str, np.ndarray]:
        """The one-dimensional arrays of the cache by name, in their stored dtypes."""
        number = np.arange(len(self.lengths))
        values = {
            "tokens/ids": self.ids,
            "tokens/sequence": np.repeat(number, self.lengths),
            "tokens/index": np.arange(self.positions) - np.repeat(self.starts, self.lengths),
            "sequences/row_id": self.row_ids,
            "sequences/start": self.starts,
            "sequences/length": self.lengths,
            "sequences/split": assign_splits(hashes),
            "sequences/hash": hashes,
        }
        values |= self.of_tokens | self.of_sequences
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

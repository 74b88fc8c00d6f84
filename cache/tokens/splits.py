"""Splits train, validation and test, and folds, by hash."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


TEST_SHARE = 0.1
VALIDATION_SHARE = 0.1
_DENOMINATOR = 1 << 32


def assign_splits(hashes: np.ndarray) -> np.ndarray:
    """Split of each document by its hash, `(documents,)` uint8 index into `SPLITS`.

    A tenth goes to `test`, a tenth to `validation`. Equal documents share a split. Where chance
    leaves a split of a small set empty, the documents nearest to its threshold fill it.
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


def split_in_order(sequences: int) -> np.ndarray:
    """Splits of packed sequences of one or two documents, `(sequences,)` uint8.

    The last tenth is test, the tenth before it validation, each at least one sequence; fewer than
    three sequences are all train.
    """
    splits = np.full(sequences, SPLITS.index("train"), np.uint8)
    if sequences >= len(SPLITS):
        tenth = max(1, round(sequences * TEST_SHARE))
        splits[-2 * tenth : -tenth] = SPLITS.index("validation")
        splits[-tenth:] = SPLITS.index("test")
    return splits


def text_hash(text: str) -> int:
    """64 bits of the sha256 of a document's text in UTF-8, which decide its split."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def assign_folds(hashes: np.ndarray, folds: int) -> np.ndarray:
    """Fold of each document for cross-validation, from bits that do not decide its split."""
    return ((hashes & np.uint64(0xFFFF_FFFF)) % np.uint64(folds)).astype(np.int64)


SPLITS = ("train", "validation", "test")
"""Names of the splits; `sequences/split` holds the index into this tuple."""

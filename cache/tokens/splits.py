"""Splits (train, validation, test) and folds of documents, decided by the hash of their text.

Except in small data sets, a document's split depends on its text alone: the document lies in the
same split in every cache.
`tokenization.py` and `token_stream.py` assign splits; `ActivationCache` reads folds.
"""

import hashlib

import numpy as np

from ..documents.documents import Text
from ..documents.long_text import LongText

SPLITS = ("train", "validation", "test")
"""Names of the splits; `sequences/split` holds the index into this tuple."""
HASHED_CHARACTERS = 1 << 20
"""Characters of a text that are hashed at once."""
TEST_SHARE = 0.1
VALIDATION_SHARE = 0.1


def assign_splits(hashes: np.ndarray) -> np.ndarray:
    """Split of each document by its hash, `(documents,)` uint8 index into `SPLITS`.

    A tenth goes to `test`, a tenth to `validation`. Equal documents share a split. If chance
    leaves a split of a small set empty, the documents nearest to its threshold fill the split.
    """
    # The upper 32 bits as a number in [0, 1) are compared with the shares.
    share = (hashes >> np.uint64(32)).astype(np.float64) / (1 << 32)
    splits = np.full(len(hashes), SPLITS.index("train"), np.uint8)
    splits[share < TEST_SHARE + VALIDATION_SHARE] = SPLITS.index("validation")
    splits[share < TEST_SHARE] = SPLITS.index("test")
    distinct, first = np.unique(hashes, return_index=True)
    count = len(distinct)
    if count < len(SPLITS) or len(np.unique(splits)) == len(SPLITS):
        return splits
    # Some split is empty. In ascending order of hashes the splits are test, validation, train, so
    # it suffices to move the two borders, given as counts of distinct hashes below them.
    distinct_splits = splits[first]
    test_count = int((distinct_splits == SPLITS.index("test")).sum())
    test_border = min(max(test_count, 1), count - 2)
    held_out_count = int((distinct_splits != SPLITS.index("train")).sum())
    validation_border = min(max(held_out_count, test_border + 1), count - 1)
    rank = np.searchsorted(distinct, hashes)
    splits[:] = SPLITS.index("train")
    splits[rank < validation_border] = SPLITS.index("validation")
    splits[rank < test_border] = SPLITS.index("test")
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


def text_hash(text: Text) -> int:
    """First 64 bits of the sha256 of a document's text in UTF-8; they decide its split and fold."""
    sha256 = hashlib.sha256()
    if isinstance(text, LongText):
        for block in text.encoded_blocks():
            sha256.update(block)
    else:
        for start in range(0, len(text), HASHED_CHARACTERS):  # no second copy of a long text
            block = text[start : start + HASHED_CHARACTERS]
            sha256.update(block.encode("utf-8", "surrogatepass"))
    return int.from_bytes(sha256.digest()[:8], "little")


def ids_hash(ids: np.ndarray) -> int:
    """First 64 bits of the sha256 of a document that is token ids, as int32 bytes."""
    digest = hashlib.sha256(np.ascontiguousarray(ids, "<i4").data).digest()
    return int.from_bytes(digest[:8], "little")


def assign_folds(hashes: np.ndarray, folds: int) -> np.ndarray:
    """Fold of each document, `(documents,)` int64; from the lower 32 bits, which no split uses."""
    return ((hashes & np.uint64(0xFFFF_FFFF)) % np.uint64(folds)).astype(np.int64)

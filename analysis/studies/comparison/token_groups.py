"""Groups of tokens: classes by their text, and bands by how often they occur in a cache."""

import unicodedata
from typing import TYPE_CHECKING

import numpy as np

from ...token_texts.token_text import plain_texts

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

CLASSES = ("begins a word", "inside a word", "number", "punctuation", "space", "other")
"""Classes of a token's text."""
BANDS = (10, 100, 1000)
"""Ends of the bands of frequency ranks."""
BAND_NAMES = ("10 most frequent", "rank 11-100", "rank 101-1,000", "rank above 1,000", "unseen")
COUNT_BLOCK = 1 << 20
"""Token ids that are counted at once."""


def token_class(text: str) -> int:
    """Index in `CLASSES` of a token's text.

    A word's token is letters behind a space, or with a word mark; without the space it lies inside
    a word (or begins a line). Marks and symbols are punctuation, a control token is `other`.
    """
    core = text.strip()
    if not core:
        return CLASSES.index("space" if text else "other")
    if all(letter.isalpha() or letter in "'’-_" for letter in core) and core.strip("'’-_"):
        return CLASSES.index("begins a word" if text[0].isspace() else "inside a word")
    if all(letter.isnumeric() or letter in ".," for letter in core) and core.strip(".,"):
        return CLASSES.index("number")
    if all(unicodedata.category(letter)[0] in "PS" for letter in core):
        return CLASSES.index("punctuation")
    return CLASSES.index("other")


def class_of_token(cache: "ActivationCache") -> np.ndarray | None:
    """Class of each token id, `(vocab,)` int64; None for a cache without a tokenizer."""
    if not (cache.path / "head" / "tokenizer.json").is_file():
        return None
    texts = plain_texts(cache.tokenizer(), cache.vocab)
    return np.array([token_class(text) for text in texts], np.int64)


def band_of_token(cache: "ActivationCache", split: str = "train") -> np.ndarray:
    """Band of each token id by its rank among the tokens of a split, `(vocab,)` int64.

    The split `train` is taken, or all where it is empty. Ranks of equal counts follow the ids.
    """
    sequences = cache.sequences(split)
    if not len(sequences):
        sequences = cache.sequences("all")
    counts = np.zeros(cache.vocab, np.int64)
    for block in cache.blocks(sequences, COUNT_BLOCK):
        ids = cache.tokens.take(cache.positions_of(block))
        counts += np.bincount(ids, minlength=cache.vocab)[: cache.vocab]
    ranks = np.empty(cache.vocab, np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, cache.vocab + 1)
    bands = np.searchsorted(BANDS, ranks, side="left")
    return np.where(counts > 0, bands, len(BAND_NAMES) - 1)

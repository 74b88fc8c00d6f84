"""Classes of the token that is to be predicted: by its text and place in a word, and by frequency.

The depth of a position is set against the text's next token, which the state at the position has to
predict. Frequencies are those of token ids in the contexts of the cache, over all splits.
"""

from typing import TYPE_CHECKING

import numpy as np

from ...token_texts.position_masks import check_has_words, word_blocks
from ...token_texts.token_text import plain_texts

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

TOKEN_CLASSES = ("word start", "inside word", "name", "digit", "punctuation", "space")
"""Classes of a token, in the order of tables:

- `space`: white space alone, line breaks among it;
- `digit`: begins with a digit (after a space), such as `␣1984`;
- `punctuation`: has no letter and no digit;
- `name`: its last word is capitalised and does not begin a sentence (`name_mask`: a heuristic);
- `inside word`: continues the word of the token before;
- `word start`: all others.
"""
DECILES = 10
BLOCK_TOKENS = 1 << 20


def classify_next_tokens(
    cache: "ActivationCache", positions: np.ndarray, text_tokens: np.ndarray
) -> np.ndarray:
    """Class of the token after each of `positions`, `(n,)` str; empty without a class.

    `text_tokens` `(n,)` are the next tokens, -1 for none. Raises `UsageError` for a cache that
    does not keep all positions, their texts' characters and a tokenizer.
    """
    check_has_words(cache)
    continues, in_name = np.zeros((2, cache.positions), bool)
    for block in word_blocks(cache):
        continues[block.positions] = block.next_continues_word
        in_name[block.positions] = block.in_name
    of_token = np.array(
        [_class_of_text(text) for text in plain_texts(cache.tokenizer(), cache.vocab)]
    )
    classes = np.full(len(positions), "", dtype=f"<U{max(map(len, TOKEN_CLASSES))}")
    known = text_tokens >= 0
    rows = positions[known]
    found = of_token[text_tokens[known]].astype(classes.dtype)
    # The class of a token with letters depends on the text around it. All positions are kept, so
    # that the row after a position is its next token.
    has_letters = found == "word"
    found[has_letters] = "word start"
    found[has_letters & continues[rows]] = "inside word"
    found[has_letters & in_name[rows + 1]] = "name"
    classes[known] = found
    return classes


def _class_of_text(text: str) -> str:
    """Class of a token by its text alone; `word` for one with letters."""
    bare = text.strip()
    if not bare:
        return "space" if text else ""
    if bare[0].isdigit():
        return "digit"
    return (
        "word" if any(letter.isalnum() or letter == "\ufffd" for letter in bare) else "punctuation"
    )


def count_tokens(cache: "ActivationCache") -> np.ndarray:
    """How often each token id stands in the contexts of the cache, `(vocab,)` int64."""
    ids, counts = cache.contexts.ids, np.zeros(cache.vocab, np.int64)
    for start in range(0, len(ids), BLOCK_TOKENS):
        counts += np.bincount(ids[start : start + BLOCK_TOKENS], minlength=cache.vocab)
    return counts


def frequency_deciles(counts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Decile of the frequency of each of `tokens` among them, 1 (rare) to 10, `(n,)` int64.

    0 for the token -1. Tokens of one frequency share a decile, that of the middle of their ranks:
    where few ids make most of a text, deciles differ in size.
    """
    deciles = np.zeros(len(tokens), np.int64)
    known = tokens >= 0
    if not known.any():
        return deciles
    _, codes, sizes = np.unique(counts[tokens[known]], return_inverse=True, return_counts=True)
    middle = (np.cumsum(sizes) - sizes / 2) / known.sum()
    deciles[known] = np.minimum((DECILES * middle).astype(np.int64) + 1, DECILES)[codes.ravel()]
    return deciles

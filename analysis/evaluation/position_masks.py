"""Masks of positions for `evaluate(..., where=mask)`: where the model is inside a word or a name.

A mask is over target positions: the state there predicts the *next* token, so that a position
is in the mask if its next token is of the kind. Words are found in what the cache keeps: token
ids, its tokenizer, and the characters that each token came from.
"""

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...cache.errors import UsageError
from ...cache.format.manifest import DOCUMENT
from .token_text import plain_texts

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

BLOCK_ROWS = 1 << 18
"""Positions that are looked at at once."""
ENDS = frozenset(".!?…:。！？\n\r")
"""After one of these, a sentence (or line) begins."""
OPENING = frozenset("\"'“”‘’«»([{*#>-–—")
"""Marks that may stand before a sentence's first word."""
WORD = frozenset("_\ufffd")
"""Word characters beside letters and digits; U+FFFD is a character that is cut by a sequence."""
SPANS = ("tokens/row_id", "tokens/char_start", "tokens/char_stop")
UNKNOWN, START, INSIDE = 0, 1, 2
"""What a token's text says of where it ends: nothing, at a sentence's start, in a sentence."""


def word_continuation_mask(cache: "ActivationCache") -> np.ndarray:
    """Positions whose next token goes on with a word, `(positions,)` bool.

    That is where two tokens of a document touch between two word characters (letters, digits,
    `_` and combining marks), or share one. In a script without spaces, nearly all tokens go on
    with a word. Raises `UsageError` if the cache does not keep all positions with their texts'
    characters and a tokenizer.
    """
    return _mask(cache, lambda block: block.goes_on)


def name_mask(cache: "ActivationCache") -> np.ndarray:
    """Positions whose next token goes on with a capitalised word, `(positions,)` bool.

    A heuristic for named entities of several tokens, for scripts with capitals: words that begin
    with a capital letter and do not begin a sentence or a line. It finds `GPT` and `MyClass` too,
    and misses names after a full stop, as in `Dr. Smith`. A part of `continued_words`, with
    the same errors.
    """
    return _mask(cache, lambda block: block.goes_on & block.named)


SLICES = {"continued": word_continuation_mask, "names": name_mask}
"""Slices by name."""


@dataclass(frozen=True)
class _Block:
    """Some whole sequences."""

    goes_on: np.ndarray
    """Whether the next token goes on with the word, `(n,)` bool."""
    named: np.ndarray
    """Whether the token's last word is capitalised inside a sentence, `(n,)` bool."""


def _mask(cache: "ActivationCache", of: Callable[[_Block], np.ndarray]) -> np.ndarray:
    _check(cache)
    mask = np.zeros(cache.positions, bool)
    for rows, block in _blocks(cache):
        mask[rows] = of(block)
    return mask


def _text_order(cache: "ActivationCache") -> np.ndarray:
    """Numbers of the sequences in the order in which documents go on from one to the next.

    Each split is packed by itself, and its sequences lie between those of the others.
    """
    if cache.manifest.tokens.split_by == DOCUMENT:
        return np.argsort(cache.sequence_split, kind="stable")
    return np.arange(len(cache.sequence_length))


def _check(cache: "ActivationCache") -> None:
    """Raise `UsageError` if words cannot be found in what the cache keeps."""
    missing = []
    if cache.has("context/ids"):
        missing.append("all positions")
    if not all(cache.has(name) for name in SPANS):
        missing.append("the characters that tokens came from")
    if not (cache.path / "head" / "tokenizer.json").is_file():
        missing.append("a tokenizer")
    if missing:
        raise UsageError(
            f"words can only be found in a cache that keeps {' and '.join(missing)}; "
            "extract texts with --positions all, or use a mask of your own"
        )


def _blocks(cache: "ActivationCache") -> Iterator[tuple[np.ndarray, _Block]]:
    """All positions, in blocks; what one must know of those before it is carried along."""
    words = _WordKinds(cache)
    named, state, before = False, START, np.full((1, 3), -1)
    ended = False
    for sequences in cache.blocks(_text_order(cache), BLOCK_ROWS):
        rows = cache.positions_of(sequences)
        first = np.isin(rows, cache.sequence_start[sequences])
        spans = cache.spans(rows)
        kind = words.kinds(cache.tokens[rows], spans, first)
        former = np.concatenate([before, spans[:-1]])
        fresh = spans[:, 0] != former[:, 0]
        touch = ~fresh & (spans[:, 1] <= former[:, 2])
        more = touch & np.append(ended, kind[:-1, ENDING] > 0) & (kind[:, BEGINNING] > 0)
        outside, state = _states(kind, fresh, state)
        # A token that is nothing but more of a word begins none.
        inner = (kind[:, WHOLE] > 0) & more
        capital = (kind[:, CAPITAL] > 0) & (outside == INSIDE)
        of_word = _latest(np.append(named, capital), np.append(True, ~inner))[1:]
        # The model sees no next token at the end of a sequence, though the text may go on.
        yield rows, _Block(np.append(more[1:] & ~first[1:], False), of_word)
        named, before, ended = of_word[-1], spans[-1:], kind[-1, ENDING] > 0


def _states(kind: np.ndarray, fresh: np.ndarray, state: int) -> tuple[np.ndarray, int]:
    """State before the last word of each token, `(n,)`, and after all; `fresh` is a new text."""
    said = np.column_stack([np.where(fresh, START, UNKNOWN), kind[:, BEFORE], kind[:, AFTER]])
    flat = np.append(state, said.ravel())
    known = _latest(flat, flat != UNKNOWN)
    return known[2::3], int(known[-1])


def _latest(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The last known value up to each place; the first must be known."""
    return values[np.maximum.accumulate(np.where(known, np.arange(len(values)), 0))]


class _WordKinds:
    """What the tokens of a cache say of words."""

    def __init__(self, cache: "ActivationCache") -> None:
        self.tokenizer = cache.tokenizer()
        texts = plain_texts(self.tokenizer, cache.vocab)
        self.table = np.array([_kind(text) for text in texts], np.int8)
        self._shared: dict[tuple[int, ...], np.ndarray] = {}

    def kinds(self, ids: np.ndarray, spans: np.ndarray, first: np.ndarray) -> np.ndarray:
        """The kind of each token, `(n, 6)` int8; tokens that share a character get its kind.

        `first` are those that begin a sequence, `(n,)` bool: nothing is shared across.
        """
        found = self.table[ids]
        shares = (spans[1:, 0] == spans[:-1, 0]) & (spans[1:, 1] < spans[:-1, 2]) & ~first[1:]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], shares, [False]]).astype(np.int8)))
        for start, stop in edges.reshape(-1, 2):
            found[start : stop + 1] = self._kinds_of(tuple(ids[start : stop + 1].tolist()))
        return found

    def _kinds_of(self, ids: tuple[int, ...]) -> np.ndarray:
        """Kinds of tokens that are one text only together: the first has that of the text."""
        if ids not in self._shared:
            kind = _kind(self.tokenizer.decode(list(ids)))
            inner, after = kind[ENDING], kind[AFTER]
            rest = (inner, inner, inner, False, after, after)
            self._shared[ids] = np.array([kind, *[rest] * (len(ids) - 1)], np.int8)
        return self._shared[ids]


BEGINNING, ENDING, WHOLE, CAPITAL, BEFORE, AFTER = range(6)
"""Columns of a kind: begins, ends with a word character; has no others; its last word, at its end,
begins with a capital letter; states before that word and after the token."""


def _kind(text: str) -> tuple[bool, bool, bool, bool, int, int]:
    start = len(text)
    while start and _in_word(text[start - 1]):
        start -= 1
    word, before = text[start:], _state(text[:start])
    begins, whole = bool(text) and _in_word(text[0]), bool(word) and not start
    return begins, bool(word), whole, word[:1].isupper(), before, INSIDE if word else before


def _state(text: str) -> int:
    """Whether a sentence begins after `text`, as its last marks say."""
    for letter in reversed(text):
        if letter in ENDS:
            return START
        if not (letter.isspace() or letter in OPENING):
            return INSIDE
    return UNKNOWN


def _in_word(letter: str) -> bool:
    return letter.isalnum() or letter in WORD or unicodedata.category(letter)[0] == "M"

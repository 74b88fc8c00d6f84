"""Masks of positions inside words or names, for `evaluate(..., where=mask)`.

A mask is over target positions. The state at a position predicts the *next* token, so a position is
in the mask if its next token continues a word (`word_continuation_mask`) or a capitalised word
(`name_mask`). Words are found in what the cache keeps: token ids, the tokenizer, and the characters
that each token came from. On the command line: `residua evaluate --where continued | names`.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...cache.errors import UsageError
from ...cache.format.manifest import DOCUMENT
from .token_text import plain_texts

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

BLOCK_ROWS = 1 << 18
"""Positions of one block of whole sequences."""
SENTENCE_ENDS = frozenset(".!?…:。！？\n\r")
"""Letters after which a sentence (or line) begins."""
OPENING_MARKS = frozenset("\"'“”‘’«»([{*#>-–—")
"""Marks that may stand before a sentence's first word."""
WORD_MARKS = frozenset("_\ufffd")
"""Word characters beside letters and digits; U+FFFD is a character cut by a sequence's end."""
SPANS = ("tokens/row_id", "tokens/char_start", "tokens/char_stop")
UNKNOWN, SENTENCE_START, IN_SENTENCE = 0, 1, 2
"""What a token's text says about the place where the text ends: nothing, before the first word of a
sentence, or inside a sentence."""


def word_continuation_mask(cache: "ActivationCache") -> np.ndarray:
    """Positions whose next token continues a word, `(positions,)` bool.

    That is where two tokens of a document touch between two word characters (letters, digits,
    `_` and combining marks), or share a character. In a script without spaces, nearly all tokens
    continue a word. Raises `UsageError` if the cache does not keep all positions with their texts'
    characters and a tokenizer.
    """
    check_has_words(cache)
    mask = np.zeros(cache.positions, bool)
    for block in word_blocks(cache):
        mask[block.positions] = block.next_continues_word
    return mask


def name_mask(cache: "ActivationCache") -> np.ndarray:
    """Positions whose next token continues a capitalised word, `(positions,)` bool.

    A heuristic for named entities of several tokens, for scripts with capitals: words that begin
    with a capital letter and do not begin a sentence or a line. The mask has `GPT` and `MyClass`
    too, and lacks names after a full stop, as in `Dr. Smith`. A part of `word_continuation_mask`,
    with the same errors.
    """
    check_has_words(cache)
    mask = np.zeros(cache.positions, bool)
    for block in word_blocks(cache):
        mask[block.positions] = block.next_continues_word & block.in_name
    return mask


def patch_mask(cache: "ActivationCache") -> np.ndarray:
    """Positions of a cache of images that are no class token, `(positions,)` bool.

    Raises `UsageError` for a cache of texts.
    """
    if cache.manifest.image_grid is None:
        raise UsageError("only a cache of images has patches; choose another mask")
    return cache.tokens[:] != 0


MASKS = {"continued": word_continuation_mask, "names": name_mask, "patches": patch_mask}
"""Functions that make a mask, by their names on the command line (`--where`)."""


def check_has_words(cache: "ActivationCache") -> None:
    """Raise `UsageError` if words cannot be found in what the cache keeps."""
    cache.check_texts("it has no words")
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


@dataclass(frozen=True)
class WordBlock:
    """Words at the positions of some whole sequences; arrays `(n,)`."""

    positions: np.ndarray
    """Positions in the cache."""
    next_continues_word: np.ndarray
    """Whether the next token continues the word at the end of the token."""
    in_name: np.ndarray
    """Whether the last word up to the token's end is capitalised inside a sentence."""


def word_blocks(cache: "ActivationCache") -> Iterator[WordBlock]:
    """All positions in the order of the text, in blocks of whole sequences.

    A word may begin in an earlier block, so the end of each block is carried to the next one.
    """
    words = _TokenWords(cache)
    # Carried along: whether the last word is a name, the state of the text, the last token's span
    # (document, first character, end), and whether that token ends inside a word.
    in_name, state, last_span, ends_in_word = False, SENTENCE_START, np.full((1, 3), -1), False
    for sequences in cache.blocks(_text_order(cache), BLOCK_ROWS):
        positions = cache.positions_of(sequences)
        starts_sequence = np.isin(positions, cache.sequence_start[sequences])
        spans = cache.spans(positions)
        token_words = words.of_tokens(cache.tokens[positions], spans, starts_sequence)

        # Which tokens continue the word of the token before: same document, touching, no border.
        previous_spans = np.concatenate([last_span, spans[:-1]])
        new_document = spans[:, 0] != previous_spans[:, 0]
        touches = ~new_document & (spans[:, 1] <= previous_spans[:, 2])
        previous_ends_in_word = np.append(ends_in_word, token_words[:-1, ENDS_IN_WORD] > 0)
        continues_word = touches & previous_ends_in_word & (token_words[:, BEGINS_IN_WORD] > 0)

        # Which words are names: capitalised, and not the first of a sentence. A token that lies
        # inside a word says nothing about how the word begins: the token before it decides.
        states, state = _states_before_words(token_words, new_document, state)
        inside_word = (token_words[:, IS_WORD] > 0) & continues_word
        is_name = (token_words[:, CAPITALISED] > 0) & (states == IN_SENTENCE)
        in_names = _fill_forward(np.append(in_name, is_name), np.append(True, ~inside_word))[1:]

        # The model sees no next token at the end of a sequence, though the text may go on.
        next_continues = np.append(continues_word[1:] & ~starts_sequence[1:], False)
        yield WordBlock(positions, next_continues, in_names)
        in_name, last_span = in_names[-1], spans[-1:]
        ends_in_word = token_words[-1, ENDS_IN_WORD] > 0


def _text_order(cache: "ActivationCache") -> np.ndarray:
    """Numbers of the sequences in the order of the text.

    Where splits are by document, each split is packed by itself, and its sequences lie between
    those of the other splits.
    """
    if cache.manifest.tokens.split_by == DOCUMENT:
        return np.argsort(cache.sequence_split, kind="stable")
    return np.arange(len(cache.sequence_length))


def _states_before_words(
    token_words: np.ndarray, new_document: np.ndarray, state: int
) -> tuple[np.ndarray, int]:
    """State of the text before the last word of each token, `(n,)`, and after the last token.

    `state` is the state before the first token; a `new_document` begins a sentence.
    """
    # Three states per token in the order of the text: at its start, before its last word, after it.
    start = np.where(new_document, SENTENCE_START, UNKNOWN)
    per_token = np.column_stack(
        [start, token_words[:, STATE_BEFORE_WORD], token_words[:, STATE_AFTER]]
    )
    in_order = np.append(state, per_token.ravel())
    states = _fill_forward(in_order, in_order != UNKNOWN)
    return states[2::3], int(states[-1])


def _fill_forward(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The last known value up to each index; the first value must be known."""
    return values[np.maximum.accumulate(np.where(known, np.arange(len(values)), 0))]


class TextWords(NamedTuple):
    """What a text says about words at its beginning and end."""

    begins_in_word: bool
    """Whether the first character is a word character."""
    ends_in_word: bool
    """Whether the last character is a word character."""
    is_word: bool
    """Whether all characters are word characters."""
    capitalised: bool
    """Whether the word at the end of the text begins with a capital letter."""
    state_before_word: int
    """State of the text before the word at its end."""
    state_after: int
    """State of the text at its end."""


BEGINS_IN_WORD, ENDS_IN_WORD, IS_WORD, CAPITALISED, STATE_BEFORE_WORD, STATE_AFTER = range(6)
"""Columns of arrays of `TextWords`."""


class _TokenWords:
    """`TextWords` of the tokens of a cache, as arrays `(n, 6)` int8."""

    def __init__(self, cache: "ActivationCache") -> None:
        self.tokenizer = cache.tokenizer()
        texts = plain_texts(self.tokenizer, cache.vocab)
        self.table = np.array([words_of(text) for text in texts], np.int8)
        self._joined: dict[tuple[int, ...], np.ndarray] = {}

    def of_tokens(
        self, ids: np.ndarray, spans: np.ndarray, starts_sequence: np.ndarray
    ) -> np.ndarray:
        """`TextWords` of each token, `(n, 6)`; tokens that share a character are read together.

        Tokens of two sequences (`starts_sequence`, `(n,)` bool) are never read together.
        """
        token_words = self.table[ids]
        # Runs of neighbours with a common character, such as the bytes of one letter.
        same_document, overlap = spans[1:, 0] == spans[:-1, 0], spans[1:, 1] < spans[:-1, 2]
        shares = same_document & overlap & ~starts_sequence[1:]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], shares, [False]]).astype(np.int8)))
        for start, last in edges.reshape(-1, 2):
            run = slice(start, last + 1)
            token_words[run] = self._of_joined_tokens(tuple(ids[run].tolist()))
        return token_words

    def _of_joined_tokens(self, ids: tuple[int, ...]) -> np.ndarray:
        """`TextWords` of tokens that are one text only together: the first token has the text's.

        The other tokens lie inside the text's last word, if the text ends in a word.
        """
        if ids not in self._joined:
            words = words_of(self.tokenizer.decode(list(ids)))
            other = TextWords(
                begins_in_word=words.ends_in_word,
                ends_in_word=words.ends_in_word,
                is_word=words.ends_in_word,
                capitalised=False,
                state_before_word=words.state_after,
                state_after=words.state_after,
            )
            self._joined[ids] = np.array([words, *[other] * (len(ids) - 1)], np.int8)
        return self._joined[ids]


def words_of(text: str) -> TextWords:
    """What `text` says about words at its beginning and end."""
    start = len(text)
    while start and _is_word_character(text[start - 1]):
        start -= 1
    last_word, state = text[start:], _state_after(text[:start])
    return TextWords(
        begins_in_word=bool(text) and _is_word_character(text[0]),
        ends_in_word=bool(last_word),
        is_word=bool(last_word) and not start,
        capitalised=last_word[:1].isupper(),
        state_before_word=state,
        state_after=IN_SENTENCE if last_word else state,
    )


def _state_after(text: str) -> int:
    """Whether a sentence begins after `text`, by the last marks of `text`."""
    for letter in reversed(text):
        if letter in SENTENCE_ENDS:
            return SENTENCE_START
        if not (letter.isspace() or letter in OPENING_MARKS):
            return IN_SENTENCE
    return UNKNOWN


def _is_word_character(letter: str) -> bool:
    return letter.isalnum() or letter in WORD_MARKS or unicodedata.category(letter)[0] == "M"

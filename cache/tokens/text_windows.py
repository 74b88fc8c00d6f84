"""Tokens of a long text, window by window: `encode_in_windows` gives what `encode` gives at once.

The tokenizers library takes some 200 bytes of memory per character. A long text is therefore read
in overlapping windows. A window begins at a token of the window before; where both give the same
tokens in the middle half of their overlap, the text is cut. Byte-pair merges and the splits before
them are local: if two neighbouring tokens follow each other in one text, and each of their
neighbours in another, the joined tokens are those of the joined text (a sequence of tokens is the
encoding of its text if every two neighbours are). Where windows disagree they are made longer, up
to the whole text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..documents.documents import Text
from ..errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WINDOW = 1 << 16
"""Characters of a window."""
OVERLAP_SHARE = 8
"""A window shares one character of so many with the window before."""
MOST_CHARACTERS = 2**31 - 1
"""Characters of the longest document: characters of tokens are stored as int32."""
AGREEING_TOKENS = 8
"""Smallest number of equal tokens in the middle of an overlap."""


@dataclass(frozen=True)
class _Window:
    """Tokens of the characters `start` to `stop` of a text, without added special tokens."""

    start: int
    stop: int
    ids: np.ndarray
    """`(tokens,)` int32."""
    chars: np.ndarray
    """First character in the text and end of each token, `(tokens, 2)` int32."""


def encode_in_windows(
    tokenizer: "Tokenizer", text: Text, window: int = WINDOW
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids `(n,)` and characters `(n, 2)` of the tokens of `text`, both int32, part by part.

    No special tokens are added. Together the parts are `tokenizer.encode(text,
    add_special_tokens=False)`; memory is that of a few windows.
    """
    if len(text) > MOST_CHARACTERS:
        raise DataError(
            f"a document has {len(text):,} characters, more than {MOST_CHARACTERS:,}; cut it into "
            "shorter ones"
        )
    current, first = _encode_window(tokenizer, text, 0, window), 0
    while current.stop < len(text):
        length = current.stop - current.start
        following = _following_window(tokenizer, text, current, window)
        cut = None if following is None else _agreed_cut(current, following)
        if following is None or cut is None:
            # Twice as much text from the same beginning.
            longer = _encode_window(tokenizer, text, current.start, 2 * length)
            if not np.array_equal(longer.ids[:first], current.ids[:first]):
                raise DataError(
                    "the tokens at the beginning of a long document depend on text far behind "
                    "them; cut the document into shorter ones"
                )
            current = longer
            continue
        yield current.ids[first : cut[0]], current.chars[first : cut[0]]
        current, first = following, cut[1]
    yield current.ids[first:], current.chars[first:]


def _encode_window(tokenizer: "Tokenizer", text: Text, start: int, length: int) -> _Window:
    stop = min(start + length, len(text))
    encoding = tokenizer.encode(text[start:stop], add_special_tokens=False)
    chars = np.array(encoding.offsets, np.int32).reshape(-1, 2) + np.int32(start)
    return _Window(start, stop, np.array(encoding.ids, np.int32), chars)


def _following_window(
    tokenizer: "Tokenizer", text: Text, current: _Window, window: int
) -> _Window | None:
    """The next window, from a token near the end of `current`; None without such a token."""
    overlap = (current.stop - current.start) // OVERLAP_SHARE
    overlap_start = current.stop - overlap
    candidates = np.flatnonzero(current.chars[:, 0] >= overlap_start)
    if not len(candidates):
        return None
    start = int(current.chars[candidates[0], 0])
    if start <= current.start:
        return None
    return _encode_window(tokenizer, text, start, max(window, 2 * overlap))


def _agreed_cut(current: _Window, following: _Window) -> tuple[int, int] | None:
    """Index of the same token in both windows, in the middle of their overlap; None without it.

    All tokens of the middle half of the overlap must be the same in both. The token begins behind
    the end of the token before: bytes of one character are not cut.
    """
    margin = (current.stop - following.start) // 4
    low, high = following.start + margin, current.stop - margin
    ranges: list[slice] = []
    for window in (current, following):
        inside = np.flatnonzero((window.chars[:, 0] >= low) & (window.chars[:, 1] <= high))
        if len(inside) < AGREEING_TOKENS or inside[-1] - inside[0] != len(inside) - 1:
            return None
        ranges.append(slice(int(inside[0]), int(inside[-1]) + 1))
    here, there = ranges
    chars = current.chars[here]
    if not (
        np.array_equal(current.ids[here], following.ids[there])
        and np.array_equal(chars, following.chars[there])
    ):
        return None
    is_cut = (chars[1:, 0] >= chars[:-1, 1]) & (chars[1:, 0] > chars[:-1, 0])
    cuts = np.flatnonzero(is_cut) + 1
    if not len(cuts):
        return None
    cut = int(cuts[len(cuts) // 2])
    return here.start + cut, there.start + cut

"""Finds passages of a cache by their text, and reads the text of one sequence.

`search_passages` scans the tokens of a cache, not its residual streams; lens_maps.py reads what it
finds. A token's text may be a part of a character, so that the text of a sequence is joined from
the texts of its tokens.
"""

import re
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.splits import SPLITS
from ..token_texts.token_names import TokenNames, visible
from ..token_texts.token_text import token_text

MAX_LETTERS = 200
"""Longest text to search."""
AROUND = 40
"""Letters of text before and after a match."""
BLOCK_TOKENS = 1 << 16
"""Tokens that are read at once."""


@dataclass(frozen=True)
class PassageMatch:
    """A place in a cache where the text that was searched stands."""

    sequence: int
    """Number of the sequence."""
    first: int
    """Index in the sequence of the first token of the match."""
    tokens: int
    """Number of tokens that the match touches."""
    split: str
    before: str
    """Text before the match, printable; as `matched` and `after`."""
    matched: str
    after: str


@dataclass(frozen=True)
class PassageMatches:
    """What a search found, and how far it went."""

    matches: tuple[PassageMatch, ...]
    """By sequence, then token."""
    searched: int
    """Sequences that were searched, from the first one."""
    sequences: int
    """Sequences of the cache."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON."""
        return asdict(self)


def search_passages(
    cache: ActivationCache, text: str, *, most: int = 50, seconds: float = 5.0
) -> PassageMatches:
    """Places whose text contains `text`, in any case: at most `most`, found in about `seconds`.

    The search ends in the first sequence after `most` matches or `seconds`; `searched` says where.
    Raises `UsageError` for an empty or long text, and for a cache without a tokenizer.
    """
    if not text.strip() or len(text) > MAX_LETTERS:
        raise UsageError(f"give a text of 1 to {MAX_LETTERS} letters to search, not {len(text)}")
    if TokenNames(cache).tokenizer is None:
        raise UsageError("this cache has no tokenizer: its tokens have no text to search")
    pattern = re.compile(re.escape(text), re.IGNORECASE)
    deadline = time.monotonic() + seconds
    text_of: dict[int, str] = {}
    tokenizer = cache.tokenizer()
    matches: list[PassageMatch] = []
    searched = 0
    for sequence, tokens in _sequences_of_tokens(cache):
        for token in set(tokens) - text_of.keys():
            text_of[token] = token_text(tokenizer, token) or ""
        texts = [text_of[token] for token in tokens]
        joined = "".join(texts)
        starts = [0, *accumulate(map(len, texts))]
        for match in pattern.finditer(joined):
            first = bisect_right(starts, match.start()) - 1
            stop = bisect_right(starts, match.end() - 1)
            matches.append(
                PassageMatch(
                    sequence=sequence,
                    first=first,
                    tokens=stop - first,
                    split=SPLITS[int(cache.sequence_split[sequence])],
                    before=_printable(joined[max(0, match.start() - AROUND) : match.start()]),
                    matched=_printable(match[0]),
                    after=_printable(joined[match.end() : match.end() + AROUND]),
                )
            )
            if len(matches) == most:
                break
        searched = sequence + 1
        if len(matches) == most or time.monotonic() > deadline:
            break
    return PassageMatches(tuple(matches), searched, len(cache.sequence_length))


def read_sequence_text(cache: ActivationCache, sequence: int, most: int = 4096) -> dict[str, Any]:
    """Split, length and token labels of one sequence as a JSON object; at most `most` labels.

    Raises `UsageError` for a sequence that the cache lacks.
    """
    count = len(cache.sequence_length)
    if not 0 <= sequence < count:
        raise UsageError(f"sequence must lie in 0-{count - 1}, not {sequence}")
    start, length = int(cache.sequence_start[sequence]), int(cache.sequence_length[sequence])
    names = TokenNames(cache)
    tokens = np.asarray(cache.tokens[start : start + min(length, most)])
    return {
        "sequence": sequence,
        "sequences": count,
        "split": SPLITS[int(cache.sequence_split[sequence])],
        "length": length,
        "tokens": [names(int(token)) for token in tokens],
    }


def _sequences_of_tokens(cache: ActivationCache) -> Iterator[tuple[int, list[int]]]:
    """Number and token ids of every sequence, in order; neighbours are read together."""
    starts, lengths = cache.sequence_start, cache.sequence_length
    sequence = 0
    while sequence < len(lengths):
        stop = sequence + 1
        while stop < len(lengths) and starts[stop] + lengths[stop] - starts[sequence] <= (
            BLOCK_TOKENS
        ):
            stop += 1
        offset = int(starts[sequence])
        block = np.asarray(cache.tokens[offset : int(starts[stop - 1] + lengths[stop - 1])])
        for number in range(sequence, stop):
            begin = int(starts[number]) - offset
            yield number, block[begin : begin + int(lengths[number])].tolist()
        sequence = stop


def _printable(text: str) -> str:
    """`text` with spaces as they are, and invisible letters escaped."""
    return visible(text).replace("␣", " ")

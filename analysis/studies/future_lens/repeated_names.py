"""Names of several tokens that occur more than once: a mask of the positions inside them.

A name is a run of capitalised words that do not begin a sentence (the words of
`token_texts/position_masks.py`), such as `Anna Karenina`; it counts if it has two tokens or more
and occurs again in the same document, or in another one.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ....cache.errors import DataError, NotFoundError, UsageError
from ....cache.tokens.segments import document_of
from ...token_texts.position_masks import check_has_words, word_blocks, words_of
from ...token_texts.token_text import plain_texts
from .pair_filters import all_of_run

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

REPEATS = ("document", "data", "any")
"""Where a name must occur again: in its document, in another document of the sampled sequences,
or nowhere."""


def read_names_mask(path: Path) -> np.ndarray:
    """The array in the .npy file `path`; no object is unpickled.

    Raises `NotFoundError` and `DataError` for a file that is missing or no array.
    """
    try:
        # A map of the file: what its header claims beyond the end of it takes no memory.
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist; save the mask with numpy.save") from None
    except (OSError, ValueError, EOFError, OverflowError, MemoryError):
        raise DataError(
            f"{path} is no array of numpy (a .npy file of plain values); save the mask with "
            "numpy.save"
        ) from None
    if not isinstance(found, np.ndarray):
        raise DataError(f"{path} holds several arrays; save one with numpy.save")
    return np.array(found)


@dataclass(frozen=True, eq=False)
class NameMask:
    """Positions whose next token continues a name."""

    mask: np.ndarray
    """`(positions,)` bool."""
    names: int
    """Number of distinct names."""
    occurrences: int
    examples: tuple[str, ...]
    """The most frequent names."""


def find_repeated_names(
    cache: "ActivationCache", sequences: np.ndarray, repeats: str = "document"
) -> NameMask:
    """Names of several tokens in `sequences` that occur again, see `REPEATS`.

    Raises `UsageError` for a cache without words (only some positions, token ids alone), or an
    unknown `repeats`.
    """
    if repeats not in REPEATS:
        raise UsageError(f"names must repeat in one of {', '.join(REPEATS)}, not {repeats!r}")
    check_has_words(cache)
    continues = find_name_continuations(cache)
    positions = cache.positions_of(sequences)
    inside = np.zeros(cache.positions, bool)
    inside[positions] = continues[positions]
    # Runs of continued positions s..e: the name's tokens are s..e+1.
    edges = np.diff(np.concatenate([[False], inside, [False]]).astype(np.int8))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    tokenizer, documents = cache.tokenizer(), document_of(cache, starts)
    tokens = cache.tokens[:] if len(starts) else np.zeros(0, np.int64)
    texts = [
        tokenizer.decode(tokens[start : stop + 1].tolist()).strip()
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
    ]

    # Count each name in its document, and the documents that have it.
    in_document = Counter(zip(documents.tolist(), texts, strict=True))
    documents_of = Counter(text for _, text in in_document)
    mask = np.zeros(cache.positions, bool)
    kept: Counter[str] = Counter()
    for start, stop, document, text in zip(starts, stops, documents.tolist(), texts, strict=True):
        is_repeated = {
            "document": in_document[document, text] > 1,
            "data": documents_of[text] > 1,
            "any": True,
        }[repeats]
        if is_repeated:
            mask[start:stop] = True
            kept[text] += 1
    examples = tuple(text for text, _ in kept.most_common(8))
    return NameMask(mask, len(kept), sum(kept.values()), examples)


def find_name_continuations(cache: "ActivationCache") -> np.ndarray:
    """Whether the next token continues a run of capitalised words, `(positions,)` bool.

    Of a word as in `name_mask`; and a capitalised word, with one space before it, that follows such
    a word.
    """
    mask = np.zeros(cache.positions, bool)
    texts = plain_texts(cache.tokenizer(), cache.vocab)
    ends_in_word = np.array([words_of(text).ends_in_word for text in texts], bool)
    is_space = np.array([text == " " for text in texts], bool)
    is_capital, is_spaced_capital = (
        np.array([_begins_capital(text, space) for text in texts], bool) for space in ("", " ")
    )
    ids = cache.tokens[:]
    for block in word_blocks(cache):
        positions = block.positions
        tokens, in_name = ids[positions], block.in_name
        mask[positions] = block.next_continues_word & in_name
        # A name, then a token of a space and a capitalised word, or two tokens for these.
        ends_name = in_name & ends_in_word[tokens]
        is_next = positions[1:] == positions[:-1] + 1
        at_once = ends_name[:-1] & is_next & (in_name & is_spaced_capital[tokens])[1:]
        mask[positions[:-1][at_once]] = True
        apart = ends_name[:-2] & is_next[:-1] & is_space[tokens[1:-1]] & is_next[1:]
        apart = np.flatnonzero(apart & (in_name & is_capital[tokens])[2:])
        mask[positions[apart]] = mask[positions[apart + 1]] = True
    # No name joins two sequences or documents.
    stops = cache.sequence_start[:] + cache.sequence_length[:] - 1
    mask[stops[cache.sequence_length[:] > 0]] = False
    documents = cache.document_numbers
    if documents is not None and cache.positions > 1:
        numbers = documents.take(np.arange(cache.positions))
        mask[:-1] &= numbers[1:] == numbers[:-1]
    return mask


def _begins_capital(text: str, space: str) -> bool:
    """Whether a token is `space` and a capitalised word, or the beginning of one."""
    word = text.removeprefix(space)
    return text.startswith(space) and word[:1].isupper() and words_of(word).is_word


def masks_inside_names(mask: np.ndarray, offsets: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Targets t+N of pairs inside one name, for each offset N; `mask` is that of `NameMask`.

    The token to predict, x[t+N+1], continues a name, and for N > 0 the token x[t+1] belongs to the
    same name: all of x[t+1..t+N+1] is one name or a part of it.
    """
    return {offset: all_of_run(mask, max(1, offset)) for offset in offsets}

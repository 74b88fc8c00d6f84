"""Documents -> token stream: tokens, where each came from, and cutting into sequences."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .documents import Documents
from .errors import DataError
from .tokens import TokenStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Progress = Callable[[int, int], None]
READ_ROWS = 256


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens with the document and the characters that each came from."""

    ids: np.ndarray
    """`(tokens,)` int32."""
    rows: np.ndarray
    """Number of the document, `(tokens,)` int64."""
    chars: np.ndarray
    """First character and end in the document, `(tokens, 2)` int32; equal for added marks."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Piece":
        return Piece(self.ids[part], self.rows[part], self.chars[part])


def join(pieces: list[Piece]) -> Piece:
    """One piece after the other."""
    return Piece(
        *(np.concatenate([getattr(p, n) for p in pieces]) for n in ("ids", "rows", "chars"))
    )


def tokenize(
    documents: Documents,
    tokenizer: "Tokenizer",
    *,
    context: int,
    pack: bool,
    separator: int | None,
    seed: int,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenStream:
    """Token stream of `documents` in an order permuted by `seed`.

    Packed: documents, each begun by the tokenizer's own mark or else by `separator`, are cut
    into sequences of `context` tokens; the last may be shorter. Not packed: one sequence per
    document, cut at `context`, with the document's labels. `max_tokens` ends the stream after
    the last whole sequence.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    marked = (
        tokenizer.encode("a").ids[:1] != tokenizer.encode("a", add_special_tokens=False).ids[:1]
    )
    prefix = [] if marked or separator is None or not pack else [separator]
    pieces: list[Piece] = []
    total = 0
    for piece in _cut(_encode(documents, order, tokenizer, prefix, progress), context, pack):
        if max_tokens is not None and total + len(piece) > max_tokens:
            break
        pieces.append(piece)
        total += len(piece)
    if not total:
        least = (
            f"; max_tokens={max_tokens} is less than one sequence" if max_tokens is not None else ""
        )
        raise DataError(f"the data hold no text ({len(documents)} documents){least}")
    whole = join(pieces)
    row_ids = np.array([piece.rows[0] for piece in pieces], np.int64)
    labels, categories = ({}, {}) if pack else documents.labels(row_ids)
    return TokenStream(
        whole.ids,
        np.array([len(piece) for piece in pieces], np.int64),
        row_ids,
        {
            "tokens/row_id": whole.rows,
            "tokens/char_start": whole.chars[:, 0],
            "tokens/char_stop": whole.chars[:, 1],
        },
        {f"sequences/labels/{name}": values for name, values in labels.items()},
        {f"sequences/labels/{name}": names for name, names in categories.items()},
    )


def _encode(
    documents: Documents,
    order: np.ndarray,
    tokenizer: "Tokenizer",
    prefix: list[int],
    progress: Progress | None,
) -> Iterator[Piece]:
    """Tokens of each document, in `order`; empty documents are left out."""
    for start in range(0, len(order), READ_ROWS):
        numbers = [int(number) for number in order[start : start + READ_ROWS]]
        texts = documents.texts(numbers)
        kept = [(n, text) for n, text in zip(numbers, texts, strict=True) if text and text.strip()]
        encodings = tokenizer.encode_batch([text for _, text in kept])
        for (number, _), encoding in zip(kept, encodings, strict=True):
            ids = np.array(prefix + encoding.ids, np.int32)
            if len(ids):
                chars = np.zeros((len(ids), 2), np.int32)
                chars[len(prefix) :] = np.array(encoding.offsets, np.int32).reshape(-1, 2)
                yield Piece(ids, np.full(len(ids), number, np.int64), chars)
        if progress is not None:
            progress(min(start + READ_ROWS, len(order)), len(order))


def _cut(encoded: Iterator[Piece], context: int, pack: bool) -> Iterator[Piece]:
    """Sequences of at most `context` tokens."""
    if not pack:
        for piece in encoded:
            yield piece[:context]
        return
    held: list[Piece] = []
    size = 0
    for piece in encoded:
        start = 0
        while start < len(piece):
            take = min(context - size, len(piece) - start)
            held.append(piece[start : start + take])
            size, start = size + take, start + take
            if size == context:
                yield join(held)
                held, size = [], 0
    if size:
        yield join(held)

"""Documents -> token stream: tokens, where each came from, and cutting into sequences."""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .columns import Column, take
from .documents import Documents, reason_against
from .errors import DataError
from .labels import LABELS
from .tokens import TokenStream

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one document, and the characters that each came from."""

    row: int
    """Number of the document."""
    ids: np.ndarray
    """`(tokens,)` int32."""
    chars: np.ndarray
    """First character and end in the document, `(tokens, 2)` int32; equal for added marks."""


class Written:
    """The columns of a stream that grows document by document, on the disk."""

    def __init__(self, scratch: Path | None) -> None:
        self.ids, self.start, self.stop = (Column("<i4", scratch) for _ in range(3))
        self.row = Column("<i8", scratch)
        self._scratch = scratch

    def append(self, tokens: Tokens, count: int | None = None) -> None:
        """Put the first `count` (default all) tokens of a document at the end."""
        ids, chars = tokens.ids[:count], tokens.chars[:count]
        self.ids.append(ids)
        self.row.append(np.broadcast_to(np.int64(tokens.row), ids.shape))
        self.start.append(chars[:, 0])
        self.stop.append(chars[:, 1])

    def shorten(self, count: int) -> None:
        """Keep the first `count` tokens."""
        for column in (self.ids, self.row, self.start, self.stop):
            column.shorten(count)

    def stream(
        self, lengths: np.ndarray, rows: np.ndarray, cut: np.ndarray | None = None
    ) -> TokenStream:
        """The stream of sequences of `lengths`, which begin in the documents `rows`."""
        spans = {"row_id": self.row, "char_start": self.start, "char_stop": self.stop}
        further = {f"tokens/{name}": column for name, column in spans.items()}
        return TokenStream(self.ids, lengths, rows, {**further}, cut=cut, scratch=self._scratch)


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
    scratch: Path | None = None,
) -> TokenStream:
    """Token stream of `documents` in an order permuted by `seed`.

    Packed: documents, each begun by the tokenizer's own mark or else by `separator`, are cut
    into sequences of `context` tokens; the last may be shorter. Not packed: one sequence per
    document, cut at `context`, with the document's labels. `max_tokens` ends the stream after
    the last whole sequence. Its columns lie in files without a name in the folder `scratch`.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    marked = (
        tokenizer.encode("a").ids[:1] != tokenizer.encode("a", add_special_tokens=False).ids[:1]
    )
    prefix = [] if marked or separator is None or not pack else [separator]
    encoded = _encode(documents, order, tokenizer, prefix, progress)
    join = _packed if pack else _one_by_one
    stream = join(encoded, Written(scratch), context, max_tokens)
    stream = replace(stream, reading=documents.reading)
    if not stream.sequences:
        least = (
            f"; max_tokens={max_tokens} is less than one sequence" if max_tokens is not None else ""
        )
        dropped = documents.reading.dropped
        least += "".join(f"; {found.documents} {reason}" for reason, found in dropped.items())
        raise DataError(f"the data hold no text ({len(documents)} documents){least}")
    if pack:
        return stream
    labels = documents.labels(stream.row_ids)
    stream.of_sequences.update({LABELS + n: values for n, values in labels.values.items()})
    stream.categories.update({LABELS + n: words for n, words in labels.categories.items()})
    documents.reading.notes += labels.notes
    return stream


def _encode(
    documents: Documents,
    order: np.ndarray,
    tokenizer: "Tokenizer",
    prefix: list[int],
    progress: Progress | None,
) -> Iterator[Tokens]:
    """Tokens of each document, in `order`; empty documents are left out and counted."""
    done = 0
    for numbers in documents.batches(order):
        kept: list[tuple[int, str]] = []
        for number, text in zip(numbers, documents.texts(numbers), strict=True):
            reason = reason_against(text)
            if text is None or reason is not None:
                documents.reading.drop(reason or "missing", number)
            else:
                kept.append((number, text))
        encodings = tokenizer.encode_batch([text for _, text in kept])
        for (number, _), encoding in zip(kept, encodings, strict=True):
            tokens = _tokens(number, encoding, prefix)
            if len(tokens.ids):
                yield tokens
            else:
                documents.reading.drop("without tokens", number)
        done += len(numbers)
        if progress is not None:
            progress(done, len(order))


def _tokens(number: int, encoding: "Encoding", prefix: list[int]) -> Tokens:
    ids = np.array(prefix + encoding.ids, np.int32)
    chars = np.zeros((len(ids), 2), np.int32)
    chars[len(prefix) :] = np.array(encoding.offsets, np.int32).reshape(-1, 2)
    return Tokens(number, ids, chars)


def _packed(
    encoded: Iterator[Tokens], written: Written, context: int, max_tokens: int | None
) -> TokenStream:
    """Sequences of `context` tokens across documents, the last of the data may be shorter."""
    limit = None if max_tokens is None else max_tokens // context * context
    total = 0
    for tokens in encoded:
        total += len(tokens.ids)
        written.append(tokens)
        if max_tokens is not None and total > max_tokens:
            break  # so the last sequence that fits is a whole one
    else:
        limit = None
    kept = total if limit is None else limit
    lengths = np.full(-(-kept // context), context, np.int64)
    if kept % context:
        lengths[-1] = kept % context
    written.shorten(kept)
    return written.stream(lengths, take(written.row, np.arange(0, kept, context)))


def _one_by_one(
    encoded: Iterator[Tokens], written: Written, context: int, max_tokens: int | None
) -> TokenStream:
    """One sequence per document, cut at `context`."""
    lengths, rows, cut = array("q"), array("q"), array("q")
    total = 0
    for tokens in encoded:
        length = min(len(tokens.ids), context)
        if max_tokens is not None and total + length > max_tokens:
            break
        written.append(tokens, length)
        lengths.append(length)
        rows.append(tokens.row)
        cut.append(len(tokens.ids) - length)
        total += length
    return written.stream(*(np.array(values, np.int64) for values in (lengths, rows, cut)))

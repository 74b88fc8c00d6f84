"""Documents -> token stream: tokens, where each came from, and cutting into sequences."""

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..documents.documents import Documents, reason_to_drop
from ..documents.labels import LABEL_PREFIX
from ..errors import DataError
from ..files.disk_columns import DiskColumn
from ..format.manifest import FORMAT, SEQUENCE
from ..progress import Progress
from .splits import SPLITS, TEST_SHARE, assign_splits, split_in_order, text_hash
from .token_stream import TokenStream

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

SMALL_SET = 400
"""Documents up to which all are hashed first, so that chance leaves no split empty: among more, a
split is empty once in 10^18."""


@dataclass(frozen=True)
class TokenizedDocument:
    """Tokens of one document, all or some in a row, and the characters that each came from."""

    row: int
    """Number of the document."""
    ids: np.ndarray
    """`(tokens,)` int32."""
    chars: np.ndarray
    """First character and end in the document, `(tokens, 2)` int32; equal for added marks."""
    hash: int
    """`text_hash` of the document."""

    def part(self, start: int, stop: int | None) -> "TokenizedDocument":
        """The tokens from `start` to `stop`."""
        return replace(self, ids=self.ids[start:stop], chars=self.chars[start:stop])


class TokenStreamBuilder:
    """Writes a token stream sequence by sequence.

    What has one number per token goes to files without a name in the folder `scratch`.
    """

    def __init__(self, scratch: Path | None) -> None:
        self._ids, self._start, self._stop = (DiskColumn("<i4", scratch) for _ in range(3))
        self._row = DiskColumn("<i8", scratch)
        self._lengths, self._rows, self._cut = array("q"), array("q"), array("q")
        self._documents, self._splits = array("Q"), array("B")
        self._scratch = scratch
        self.tokens = 0

    @property
    def sequences(self) -> int:
        return len(self._lengths)

    def append(self, pieces: Sequence[TokenizedDocument], split: int = 0, cut: int = 0) -> None:
        """Put one sequence at the end: tokens of one or several documents, in their order."""
        length = 0
        for piece in pieces:
            self._ids.append(piece.ids)
            self._row.append(np.broadcast_to(np.int64(piece.row), piece.ids.shape))
            self._start.append(piece.chars[:, 0])
            self._stop.append(piece.chars[:, 1])
            length += len(piece.ids)
        self._lengths.append(length)
        self._rows.append(pieces[0].row)
        self._documents.append(pieces[0].hash)
        self._splits.append(split)
        self._cut.append(cut)
        self.tokens += length

    def stream(self) -> TokenStream:
        """All sequences, with the splits that they were put with."""
        spans = {"row_id": self._row, "char_start": self._start, "char_stop": self._stop}
        return TokenStream(
            self._ids,
            np.array(self._lengths, np.int64),
            np.array(self._rows, np.int64),
            {f"tokens/{name}": column for name, column in spans.items()},
            cut_tokens=np.array(self._cut, np.int64),
            scratch=self._scratch,
            splits=np.array(self._splits, np.uint8),
            documents=np.array(self._documents, np.uint64),
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
    scratch: Path | None = None,
    version: int = FORMAT,
) -> TokenStream:
    """Token stream of `documents` in an order permuted by `seed`.

    A document lies in one split, by the hash of its text. Packed: the documents of each split,
    each begun by the tokenizer's own mark or else by `separator`, are cut into sequences of
    `context` tokens; the last of a split may be shorter. Not packed: one sequence per document,
    cut at `context`, with the document's labels. `max_tokens` ends the stream after the last
    whole sequence; where documents are packed, a tenth of it is kept for test and for validation.
    Its columns lie in files without a name in the folder `scratch`. `version` 1 packs all
    documents together, as format 1 did.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    marked = (
        tokenizer.encode("a").ids[:1] != tokenizer.encode("a", add_special_tokens=False).ids[:1]
    )
    prefix = [] if marked or separator is None or not pack else [separator]
    encoder = Encoder(documents, tokenizer, prefix, progress)
    written = TokenStreamBuilder(scratch)
    if not pack:
        stream = _one_by_one(encoder.tokens(order), written, context, max_tokens)
    elif version == 1:
        stream = _pack_together(encoder.tokens(order), written, context, max_tokens)
    else:
        stream = _pack_by_split(encoder, order, written, context, max_tokens)
    stream = replace(stream, format=version, reading=documents.reading)
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
    stream.sequence_arrays.update({LABEL_PREFIX + n: values for n, values in labels.values.items()})
    stream.categories.update({LABEL_PREFIX + n: words for n, words in labels.categories.items()})
    documents.reading.notes += labels.notes
    return stream


class Encoder:
    """Gives the tokens of documents by number; those without text are left out and counted."""

    def __init__(
        self,
        documents: Documents,
        tokenizer: "Tokenizer",
        prefix: list[int],
        progress: Progress | None = None,
    ) -> None:
        self.documents = documents
        self._tokenizer = tokenizer
        self._prefix = prefix
        self._progress = progress
        self._done = 0

    def hashes(self, numbers: np.ndarray) -> np.ndarray:
        """`text_hash` of those documents among `numbers` that hold text, uint64."""
        found = (
            text_hash(text)
            for some in self.documents.batches(numbers)
            for text in self.documents.texts(some)
            if text is not None and reason_to_drop(text) is None
        )
        return np.fromiter(found, np.uint64)

    def tokens(
        self, numbers: np.ndarray, wanted: Callable[[int, int], bool] = lambda number, hash: True
    ) -> Iterator[TokenizedDocument]:
        """Tokens of each document of `numbers`, in that order, as far as it is `wanted`.

        `wanted(number, hash)` is asked right before a document is tokenized with its neighbours.
        """
        for some in self.documents.batches(numbers):
            texts = [(n, t, text_hash(t)) for n, t in self._texts(some)]
            texts = [(n, t, h) for n, t, h in texts if wanted(n, h)]
            encodings = self._tokenizer.encode_batch([text for _, text, _ in texts])
            for (number, _, hash), encoding in zip(texts, encodings, strict=True):
                tokens = _tokens(number, hash, encoding, self._prefix)
                if len(tokens.ids):
                    yield tokens
                else:
                    self.documents.reading.drop("without tokens", number)
            self._done = min(self._done + len(some), len(self.documents))
            if self._progress is not None:
                self._progress(self._done, len(self.documents))

    def _texts(self, numbers: list[int]) -> Iterator[tuple[int, str]]:
        """Those documents of `numbers` that hold text; the others are counted as left out."""
        for number, text in zip(numbers, self.documents.texts(numbers), strict=True):
            reason = reason_to_drop(text)
            if text is None or reason is not None:
                self.documents.reading.drop(reason or "missing", number)
            else:
                yield number, text


def _tokens(number: int, hash: int, encoding: "Encoding", prefix: list[int]) -> TokenizedDocument:
    ids = np.array(prefix + encoding.ids, np.int32)
    chars = np.zeros((len(ids), 2), np.int32)
    chars[len(prefix) :] = np.array(encoding.offsets, np.int32).reshape(-1, 2)
    return TokenizedDocument(number, ids, chars, hash)


class Packer:
    """Joins the tokens of documents and cuts them into sequences of `context` tokens."""

    def __init__(self, context: int) -> None:
        self.context = context
        self._pieces: deque[TokenizedDocument] = deque()
        self.waiting = 0
        """Tokens that are in no sequence yet."""

    def add(self, tokens: TokenizedDocument) -> None:
        self._pieces.append(tokens)
        self.waiting += len(tokens.ids)

    @property
    def full(self) -> bool:
        """Whether a whole sequence waits."""
        return self.waiting >= self.context

    def take(self) -> list[TokenizedDocument]:
        """The next sequence: `context` tokens, or all that are left."""
        taken, room = [], self.context
        while room and self._pieces:
            piece = self._pieces.popleft()
            if len(piece.ids) > room:
                self._pieces.appendleft(piece.part(room, None))
                piece = piece.part(0, room)
            taken.append(piece)
            room -= len(piece.ids)
        self.waiting -= self.context - room
        return taken


class Allowance:
    """How many tokens each split may still have, where `max_tokens` bounds them all.

    A tenth is kept for test and a tenth for validation, in whole sequences of `context` tokens, at
    least one each, until it turns out that there is no more text of theirs.
    """

    def __init__(self, max_tokens: int | None, context: int) -> None:
        self._context = context
        self.left = max_tokens
        whole = 0 if max_tokens is None else max_tokens // context
        tenth = max(1, round(whole * TEST_SHARE)) * context if whole >= len(SPLITS) else 0
        self._kept = [0 if name == "train" else tenth for name in SPLITS]

    def allows(self, split: int, tokens: int) -> bool:
        """Whether `split` may have another sequence of so many tokens."""
        return self.left is None or self.left - tokens >= sum(self._kept) - self._kept[split]

    @property
    def spent(self) -> bool:
        """Whether no split may have another whole sequence."""
        return self.left is not None and self.left < self._context

    def spend(self, split: int, tokens: int) -> None:
        """Count a sequence of `split`."""
        if self.left is not None:
            self.left -= tokens
            self._kept[split] = max(0, self._kept[split] - tokens)

    def release(self) -> None:
        """What was kept for some splits is there for all."""
        self._kept = [0] * len(SPLITS)


class SplitPacker:
    """Packs the documents of each split by themselves: no sequence mixes splits.

    Sequences are written in the order in which they get full. For each split they are a beginning
    of those that there would be without `max_tokens`: a cache of more tokens begins with them.
    """

    def __init__(
        self,
        encoder: Encoder,
        split_of: Callable[[int], int],
        written: TokenStreamBuilder,
        context: int,
        max_tokens: int | None,
    ) -> None:
        self._encoder = encoder
        self._split_of = split_of
        self._written = written
        self._allowance = Allowance(max_tokens, context)
        self._packers = [Packer(context) for _ in SPLITS]
        self._behind: set[int] = set()
        """Splits of which documents wait."""

    def pack(self, order: np.ndarray) -> None:
        """Write the sequences of the documents `order`."""
        # Once a split has its share, its further documents wait: tokens may be left in the end.
        waiting: set[int] = set()
        finished = self._add(order, waiting)
        if finished:
            for split, packer in enumerate(self._packers):
                if split not in self._behind and not packer.full:
                    self._write_rest(split)
        self._allowance.release()
        for split in range(len(SPLITS)):
            self._write_full(split)
        if waiting:
            rest = order[np.isin(order, np.fromiter(waiting, np.int64))]
            finished = not self._allowance.spent and self._add(rest, set()) and finished
        if finished:
            for split in range(len(SPLITS)):
                self._write_rest(split)

    def _add(self, numbers: np.ndarray, waiting: set[int]) -> bool:
        """Pack documents; False if tokens ran out before the documents did."""

        def has_room(number: int, hash: int) -> bool:
            split = self._split_of(hash)
            if self._packers[split].full:
                waiting.add(number)
                self._behind.add(split)
            return not self._packers[split].full

        for tokens in self._encoder.tokens(numbers, has_room):
            if self._allowance.spent:
                return False
            split = self._split_of(tokens.hash)
            if has_room(tokens.row, tokens.hash):
                self._packers[split].add(tokens)
                self._write_full(split)
        return True

    def _write_full(self, split: int) -> None:
        """Write the whole sequences of `split` as far as they are allowed."""
        packer, size = self._packers[split], self._packers[split].context
        while packer.full and self._allowance.allows(split, size):
            self._write(split, size)

    def _write_rest(self, split: int) -> None:
        """Write what is left of `split`, less than a whole sequence, if it is allowed."""
        size = self._packers[split].waiting
        if size and not self._packers[split].full and self._allowance.allows(split, size):
            self._write(split, size)

    def _write(self, split: int, tokens: int) -> None:
        self._written.append(self._packers[split].take(), split)
        self._allowance.spend(split, tokens)


def _pack_by_split(
    encoder: Encoder,
    order: np.ndarray,
    written: TokenStreamBuilder,
    context: int,
    max_tokens: int | None,
) -> TokenStream:
    """Sequences of `context` tokens of documents of one split; the last of each may be shorter."""
    splits: dict[int, int] = {}
    if len(order) <= SMALL_SET:
        hashes = np.unique(encoder.hashes(order))
        if len(hashes) < len(SPLITS):
            stream = _pack_together(encoder.tokens(order), written, context, max_tokens)
            return replace(stream, splits=split_in_order(stream.sequences), split_by=SEQUENCE)
        splits = dict(zip(hashes.tolist(), assign_splits(hashes).tolist(), strict=True))

    def split_of(hash: int) -> int:
        if hash not in splits:
            return int(assign_splits(np.array([hash], np.uint64))[0])
        return splits[hash]

    SplitPacker(encoder, split_of, written, context, max_tokens).pack(order)
    return replace(written.stream(), cut_tokens=None)


def _pack_together(
    encoded: Iterator[TokenizedDocument],
    written: TokenStreamBuilder,
    context: int,
    max_tokens: int | None,
) -> TokenStream:
    """Sequences of `context` tokens across all documents, the last of the data may be shorter."""
    packer = Packer(context)

    def fits(tokens: int) -> bool:
        return max_tokens is None or written.tokens + tokens <= max_tokens

    for tokens in encoded:
        packer.add(tokens)
        while packer.full and fits(context):
            written.append(packer.take())
        if packer.full:
            break
    if packer.waiting and fits(packer.waiting):
        written.append(packer.take())
    return replace(written.stream(), splits=None, cut_tokens=None)


def _one_by_one(
    encoded: Iterator[TokenizedDocument],
    written: TokenStreamBuilder,
    context: int,
    max_tokens: int | None,
) -> TokenStream:
    """One sequence per document, cut at `context`."""
    for tokens in encoded:
        kept = tokens.part(0, context)
        if max_tokens is not None and written.tokens + len(kept.ids) > max_tokens:
            break
        written.append([kept], cut=len(tokens.ids) - len(kept.ids))
    return replace(written.stream(), splits=None)

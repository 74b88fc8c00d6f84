"""Tokenization of documents into a `TokenStream`: encoding, packing, cutting at the context length.

`tokenize` is called by `extraction/resolve.py`: `Encoder` reads batches of `Documents` and gives
the tokens of each, a long document part by part (`text_windows.py`); `Packer` joins and cuts them;
`TokenStreamBuilder` writes the sequences.

Terms, used alike in this folder:

document  one text of the data; `row` is its number
sequence  consecutive tokens that the model reads in one forward pass, at most `context` of them:
          one document, or with packing the end of a document, the next ones, a beginning
segment   the part of a sequence that comes from one document (`segments.py`)
position  a kept token and so a row of the cache; by default every token (`positions.py`)
context   as a number: the largest length of a sequence. In a cache that keeps only some positions,
          each run of kept positions is called a sequence; the context is the model's sequence.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..documents.documents import Documents, Text, reason_to_drop
from ..documents.labels import LABEL_PREFIX
from ..errors import DataError, UsageError
from ..files.disk_columns import DiskColumn
from ..format.manifest import FORMAT, SEQUENCE
from ..progress import Progress
from .document_marks import DocumentMarks, choose_marks
from .splits import SPLITS, TEST_SHARE, assign_splits, ids_hash, split_in_order, text_hash
from .text_windows import WINDOW, encode_in_windows
from .token_stream import TokenStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SMALL_SET = 400
"""Largest data set (in documents) that is hashed as a whole first, so that no split is empty; in a
larger one chance leaves a split empty once in 10^18."""
LONG_DOCUMENT = 2 * WINDOW
"""Characters from which on a document is tokenized in windows."""
ENCODED_CHARACTERS = 4 * WINDOW
"""Characters of documents that are tokenized at once: some 200 bytes of memory each."""


@dataclass(frozen=True)
class TokenizedDocument:
    """Consecutive tokens of one document, with the range of characters of each token."""

    row: int
    """Number of the document."""
    ids: np.ndarray
    """`(tokens,)` int32."""
    chars: np.ndarray
    """First character and end of each token, `(tokens, 2)` int32; equal for special tokens."""
    hash: int
    """`text_hash` of the document."""

    def part(self, start: int, stop: int | None) -> "TokenizedDocument":
        """The same document with only the tokens from `start` to `stop`."""
        return replace(self, ids=self.ids[start:stop], chars=self.chars[start:stop])


@dataclass(frozen=True)
class DocumentParts:
    """The tokens of one document, tokenized while the parts are read."""

    row: int
    """Number of the document."""
    hash: int
    """`text_hash` of the document."""
    parts: Iterator[TokenizedDocument]
    """Its tokens in order; none of the parts is empty, and there is at least one."""


class TokenStreamBuilder:
    """Writes a token stream sequence by sequence.

    Columns of one number per token go to unnamed temporary files in the folder `scratch` (None:
    the system's); columns of one number per sequence stay in memory.
    """

    def __init__(self, scratch: Path | None) -> None:
        self._ids, self._char_start, self._char_stop = (
            DiskColumn("<i4", scratch) for _ in range(3)
        )
        self._row = DiskColumn("<i8", scratch)
        self._lengths, self._first_rows, self._cut_tokens = array("q"), array("q"), array("q")
        self._document_hashes, self._splits = array("Q"), array("B")
        self._scratch = scratch
        self.tokens: int = 0
        """Tokens of all sequences so far."""

    @property
    def sequences(self) -> int:
        return len(self._lengths)

    def append(self, pieces: Sequence[TokenizedDocument], split: int = 0, cut: int = 0) -> None:
        """Append a sequence: the joined tokens of `pieces`, after `cut` tokens were cut off."""
        length = 0
        for piece in pieces:
            self._ids.append(piece.ids)
            self._row.append(np.broadcast_to(np.int64(piece.row), piece.ids.shape))
            self._char_start.append(piece.chars[:, 0])
            self._char_stop.append(piece.chars[:, 1])
            length += len(piece.ids)
        self._lengths.append(length)
        self._first_rows.append(pieces[0].row)
        self._document_hashes.append(pieces[0].hash)
        self._splits.append(split)
        self._cut_tokens.append(cut)
        self.tokens += length

    def stream(self) -> TokenStream:
        """The token stream of all appended sequences."""
        spans = {"row_id": self._row, "char_start": self._char_start, "char_stop": self._char_stop}
        return TokenStream(
            self._ids,
            np.array(self._lengths, np.int64),
            np.array(self._first_rows, np.int64),
            {f"tokens/{name}": column for name, column in spans.items()},
            cut_tokens=np.array(self._cut_tokens, np.int64),
            scratch=self._scratch,
            splits=np.array(self._splits, np.uint8),
            documents=np.array(self._document_hashes, np.uint64),
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
    bos: str = "auto",
    eos: int | None = None,
) -> TokenStream:
    """Tokenize `documents`, in an order permuted by `seed`, into sequences of `context` tokens.

    With `pack` the documents of each split are joined and cut into sequences of exactly `context`
    tokens; the last sequence of a split may be shorter. Each document begins with the mark that
    the tokenizer adds, or else with the token `separator`, unless the policy `bos` is another
    (`document_marks.py`; `eos` is the EOS token). Without `pack` each document is one sequence, cut
    at `context`, and has the document's labels.

    A document lies in one split, by the hash of its text. `max_tokens` ends the stream after the
    last whole sequence; with `pack` a tenth of these tokens is reserved for test and a tenth for
    validation. `version` is the format of the cache; format 1 packs all documents together.

    Columns of one number per token lie in unnamed temporary files in the folder `scratch`.
    `progress` gets the numbers of tokenized and of all documents. Raises `DataError` if the data
    hold no text.
    """
    order = np.random.default_rng(seed).permutation(len(documents))

    marks = choose_marks(bos, documents, tokenizer, pack=pack, separator=separator, eos=eos)
    if marks.context is not None and context < 2:
        raise UsageError(f"bos {bos!r} leaves no room for text in a context of {context} token")
    encoder = Encoder(documents, tokenizer, marks, progress)

    # Cut into sequences.
    builder = TokenStreamBuilder(scratch)
    if not pack:
        stream = _cut_documents(encoder.documents_with_tokens(order), builder, context, max_tokens)
    elif version == 1:
        documents_with_tokens = encoder.documents_with_tokens(order)
        packer = Packer(context, marks.context)
        stream = _pack_together(documents_with_tokens, builder, packer, max_tokens)
    else:
        stream = _pack_by_split(encoder, order, builder, context, max_tokens)
    stream = replace(stream, format=version, reading=documents.reading)
    if not stream.sequences:
        dropped = documents.reading.dropped
        has_text = len(documents) > sum(entry.documents for entry in dropped.values())
        if max_tokens is not None and has_text:
            raise DataError(
                f"max_tokens={max_tokens} is less than one sequence ({context} tokens, or a "
                "shorter document); allow more, or take a shorter context"
            )
        details = "".join(f"; {entry.documents} {reason}" for reason, entry in dropped.items())
        raise DataError(f"the data hold no text ({len(documents)} documents){details}")

    # A sequence that is one document has the document's labels.
    if not pack:
        labels = documents.labels(stream.row_ids)
        for name, values in labels.values.items():
            stream.sequence_arrays[LABEL_PREFIX + name] = values
        for name, words in labels.categories.items():
            stream.categories[LABEL_PREFIX + name] = words
        documents.reading.notes += labels.notes
    return stream


class Encoder:
    """Tokenizes documents by number; documents without text are left out and counted.

    The tokens `marks` are put around each document.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: "Tokenizer",
        marks: DocumentMarks,
        progress: Progress | None = None,
    ) -> None:
        self.documents = documents
        self._tokenizer = tokenizer
        self.marks = marks
        self._progress = progress
        self._documents_read = 0

    def hashes(self, numbers: np.ndarray) -> np.ndarray:
        """`text_hash` of each non-empty document among `numbers`, uint64."""
        hashes = (
            hash
            for batch in self.documents.batches(numbers)
            for _, _, hash in self._valid_documents(batch, count=False)
        )
        return np.fromiter(hashes, np.uint64)

    def documents_with_tokens(
        self,
        numbers: np.ndarray,
        is_needed: Callable[[int, int], bool] = lambda number, hash: True,
    ) -> Iterator[DocumentParts]:
        """Yield the tokens of the documents `numbers`, in this order.

        `is_needed(number, hash)` is called right before some documents are tokenized; a document
        for which it returns False is skipped. A long document is tokenized as far as its parts
        are read. Documents without tokens are counted.
        """
        for batch in self.documents.batches(numbers):
            for group in _groups_of_documents(list(self._valid_documents(batch))):
                needed = [entry for entry in group if is_needed(entry[0], entry[2])]
                for document in self._tokenized(needed):
                    if (first := next(document.parts, None)) is None:
                        self.documents.reading.drop("without tokens", document.row)
                    else:
                        yield replace(document, parts=chain([first], document.parts))
            # A document may be read twice (see SplitPacker.pack), so the count has a bound.
            self._documents_read = min(self._documents_read + len(batch), len(self.documents))
            if self._progress is not None:
                self._progress(self._documents_read, len(self.documents))

    def _tokenized(self, group: "list[NumberedDocument]") -> Iterator[DocumentParts]:
        """The documents of one group, tokenized."""
        if self.documents.holds_token_ids:
            for number, ids, hash in group:
                assert isinstance(ids, np.ndarray)
                document = self._with_marks(number, hash, ids, np.zeros((len(ids), 2), np.int32))
                yield DocumentParts(number, hash, iter([document]))
            return
        if (
            len(group) == 1
            and len(group[0][1]) > LONG_DOCUMENT
            and self._special_tokens is not None
        ):
            number, text, hash = group[0]
            assert not isinstance(text, np.ndarray)
            yield DocumentParts(number, hash, self._parts_of_long_document(number, text, hash))
            return
        encodings = self._tokenizer.encode_batch(
            [str(text) for _, text, _ in group], add_special_tokens=self.marks.adds_own
        )
        for (number, _, hash), encoding in zip(group, encodings, strict=True):
            ids = np.array(encoding.ids, np.int32)
            chars = np.array(encoding.offsets, np.int32).reshape(-1, 2)
            document = self._with_marks(number, hash, ids, chars)
            yield DocumentParts(number, hash, iter([document] if len(document.ids) else []))

    def _with_marks(
        self, number: int, hash: int, ids: np.ndarray, chars: np.ndarray
    ) -> TokenizedDocument:
        """A whole document with the tokens `marks` around it; they span no characters."""
        before, after = self.marks.before, self.marks.after
        if before or after:
            ids = np.concatenate([before, ids, after]).astype(np.int32)
            chars = np.pad(chars, ((len(before), len(after)), (0, 0)))
        return TokenizedDocument(number, ids, chars, hash)

    @cached_property
    def _special_tokens(self) -> tuple[list[int], list[int]] | None:
        """Tokens that the tokenizer adds before and after a text; None if that is unclear."""
        if not self.marks.adds_own:
            return [], []
        added = self._tokenizer.encode("a")
        ids = self._tokenizer.encode("a", add_special_tokens=False).ids
        before = next((i for i, mask in enumerate(added.special_tokens_mask) if not mask), 0)
        if not ids or added.ids[before : before + len(ids)] != ids:
            return None
        return added.ids[:before], added.ids[before + len(ids) :]

    def _parts_of_long_document(
        self, number: int, text: Text, hash: int
    ) -> Iterator[TokenizedDocument]:
        """The tokens of one document, window by window; added tokens span no characters."""
        assert self._special_tokens is not None
        before, after = (
            (np.array(ids, np.int32), np.zeros((len(ids), 2), np.int32))
            for ids in (
                [*self.marks.before, *self._special_tokens[0]],
                [*self._special_tokens[1], *self.marks.after],
            )
        )
        for ids, chars in chain([before], encode_in_windows(self._tokenizer, text), [after]):
            if len(ids):
                yield TokenizedDocument(number, ids, chars, hash)

    def _valid_documents(
        self, numbers: list[int], count: bool = True
    ) -> "Iterator[NumberedDocument]":
        """Yield each non-empty document; `count` the others as dropped."""
        if self.documents.holds_token_ids:
            documents, hash_of = self.documents.token_ids(numbers), ids_hash
        else:
            documents, hash_of = self.documents.texts(numbers), text_hash
        for number, document in zip(numbers, documents, strict=True):
            if isinstance(document, np.ndarray):
                reason = None if len(document) else "empty"
            else:
                reason = reason_to_drop(document)
            if document is not None and reason is None:
                yield number, document, hash_of(document)  # pyright: ignore[reportArgumentType]
            elif count:
                self.documents.reading.drop(reason or "missing", number)


NumberedDocument = tuple[int, Text | np.ndarray, int]
"""Number of a document, its text or token ids, and its hash."""


def _groups_of_documents(documents: list[NumberedDocument]) -> Iterator[list[NumberedDocument]]:
    """Consecutive documents of at most `ENCODED_CHARACTERS`, or a longer one alone."""
    group, characters = [], 0
    for entry in documents:
        if group and characters + len(entry[1]) > ENCODED_CHARACTERS:
            yield group
            group, characters = [], 0
        group.append(entry)
        characters += len(entry[1])
        if len(entry[1]) > LONG_DOCUMENT:
            *shorter, long = group
            if shorter:
                yield shorter
            yield [long]
            group, characters = [], 0
    if group:
        yield group


class Packer:
    """Joins the tokens of documents and cuts them into sequences of `context` tokens.

    Every sequence begins with the token `mark`, if it is not None: the token is added where no
    document begins with it there.
    """

    def __init__(self, context: int, mark: int | None = None) -> None:
        self.context = context
        self._mark = mark
        self._pieces: deque[TokenizedDocument] = deque()
        self._tokens = 0

    def add(self, document: TokenizedDocument) -> None:
        """Append the tokens of `document` to the pending ones."""
        self._pieces.append(document)
        self._tokens += len(document.ids)

    @property
    def _needs_mark(self) -> bool:
        """Whether the next sequence begins with a token that no document has there."""
        return bool(self._mark is not None and self._pieces) and (
            int(self._pieces[0].ids[0]) != self._mark
        )

    @property
    def pending_tokens(self) -> int:
        """Number of added tokens not yet in a sequence, with the mark of the next sequence."""
        return self._tokens + self._needs_mark

    @property
    def has_whole_sequence(self) -> bool:
        """Whether `context` tokens or more are pending."""
        return self.pending_tokens >= self.context

    def pop_sequence(self) -> list[TokenizedDocument]:
        """Remove and return the next sequence: `context` tokens, or all pending if fewer."""
        pieces, room = [], self.context
        if self._needs_mark:
            first = self._pieces[0]
            mark = np.array([self._mark], np.int32)
            pieces.append(replace(first, ids=mark, chars=np.zeros((1, 2), np.int32)))
            room -= 1
        while room and self._pieces:
            piece = self._pieces.popleft()
            if len(piece.ids) > room:
                self._pieces.appendleft(piece.part(room, None))
                piece = piece.part(0, room)
            pieces.append(piece)
            room -= len(piece.ids)
            self._tokens -= len(piece.ids)
        return pieces


class Allowance:
    """Numbers of tokens still allowed per split, where `max_tokens` bounds all splits together.

    A tenth of the whole sequences is reserved for test and a tenth for validation, at least one
    sequence each, until `release` says that these splits have no more text.
    """

    def __init__(self, max_tokens: int | None, context: int) -> None:
        self._context = context
        self.remaining = max_tokens
        sequences = 0 if max_tokens is None else max_tokens // context
        tenth = max(1, round(sequences * TEST_SHARE)) * context if sequences >= len(SPLITS) else 0
        self._reserved = [0 if name == "train" else tenth for name in SPLITS]

    def allows(self, split: int, tokens: int) -> bool:
        """Return whether `split` may get another sequence of `tokens` tokens."""
        if self.remaining is None:
            return True
        reserved_for_others = sum(self._reserved) - self._reserved[split]
        return self.remaining - tokens >= reserved_for_others

    @property
    def is_spent(self) -> bool:
        """Whether no split may get another whole sequence."""
        return self.remaining is not None and self.remaining < self._context

    def spend(self, split: int, tokens: int) -> None:
        """Count a written sequence of `split`."""
        if self.remaining is not None:
            self.remaining -= tokens
            self._reserved[split] = max(0, self._reserved[split] - tokens)

    def release(self) -> None:
        """Give the reserved tokens to all splits."""
        self._reserved = [0] * len(SPLITS)


class SplitPacker:
    """Packs the documents of each split separately: no sequence mixes splits.

    A sequence is written as soon as it is full and allowed. The sequences of a split are the first
    ones of the packing without `max_tokens`, so a cache of more tokens begins with them.
    """

    def __init__(
        self,
        encoder: Encoder,
        split_of: Callable[[int], int],
        builder: TokenStreamBuilder,
        context: int,
        max_tokens: int | None,
    ) -> None:
        self._encoder = encoder
        self._split_of = split_of
        """Document hash -> split, index into `SPLITS`."""
        self._builder = builder
        self._allowance = Allowance(max_tokens, context)
        self._packers = [Packer(context, encoder.marks.context) for _ in SPLITS]
        self._splits_with_postponed: set[int] = set()
        """Splits of which some documents were postponed."""

    def pack(self, order: np.ndarray) -> None:
        """Write the sequences of the documents `order`."""
        # First pass: a split that has used up its share postpones its further documents.
        postponed: set[int] = set()
        all_read = self._add_documents(order, postponed)

        # Splits whose documents were all packed write their last, shorter sequence.
        if all_read:
            for split, packer in enumerate(self._packers):
                if split not in self._splits_with_postponed and not packer.has_whole_sequence:
                    self._write_last_sequence(split)

        # Tokens that the reserve did not need go to the postponed documents.
        self._allowance.release()
        for split in range(len(SPLITS)):
            self._write_whole_sequences(split)
        if postponed:
            numbers = order[np.isin(order, np.fromiter(postponed, np.int64))]
            all_read = (
                not self._allowance.is_spent and self._add_documents(numbers, set()) and all_read
            )
        if all_read:
            for split in range(len(SPLITS)):
                self._write_last_sequence(split)

    def _add_documents(self, numbers: np.ndarray, postponed: set[int]) -> bool:
        """Pack documents; return False if the allowed tokens ran out before the documents did.

        Numbers of documents whose split has a whole sequence that is not allowed yet are added to
        `postponed`.
        """

        def can_add(number: int, hash: int) -> bool:
            split = self._split_of(hash)
            if self._packers[split].has_whole_sequence:
                postponed.add(number)
                self._splits_with_postponed.add(split)
                return False
            return True

        for document in self._encoder.documents_with_tokens(numbers, can_add):
            if self._allowance.is_spent:
                return False
            # Asked again: documents of the same batch may have filled the sequence meanwhile.
            if can_add(document.row, document.hash):
                split = self._split_of(document.hash)
                for part in document.parts:
                    self._packers[split].add(part)
                    self._write_whole_sequences(split)
                    if self._has_more_than_allowed(split):
                        break  # the rest of the document is never written
        return True

    def _has_more_than_allowed(self, split: int) -> bool:
        """Whether a whole sequence stays pending in `split`, even if it gets all that is left."""
        packer, remaining = self._packers[split], self._allowance.remaining
        return remaining is not None and packer.pending_tokens >= remaining + packer.context

    def _write_whole_sequences(self, split: int) -> None:
        """Write the pending whole sequences of `split` as far as the allowance permits."""
        packer = self._packers[split]
        while packer.has_whole_sequence and self._allowance.allows(split, packer.context):
            self._write_sequence(split, packer.context)

    def _write_last_sequence(self, split: int) -> None:
        """Write the pending tokens of `split`, less than a whole sequence, if they are allowed."""
        packer = self._packers[split]
        tokens = packer.pending_tokens
        if tokens and not packer.has_whole_sequence and self._allowance.allows(split, tokens):
            self._write_sequence(split, tokens)

    def _write_sequence(self, split: int, tokens: int) -> None:
        self._builder.append(self._packers[split].pop_sequence(), split)
        self._allowance.spend(split, tokens)


def _pack_by_split(
    encoder: Encoder,
    order: np.ndarray,
    builder: TokenStreamBuilder,
    context: int,
    max_tokens: int | None,
) -> TokenStream:
    """Pack the documents of each split; the last sequence of a split may be shorter."""
    split_of_hash: dict[int, int] = {}
    if len(order) <= SMALL_SET:
        hashes = np.unique(encoder.hashes(order))
        # Fewer documents than splits: pack all together, and split the sequences instead.
        if len(hashes) < len(SPLITS):
            documents = encoder.documents_with_tokens(order)
            packer = Packer(context, encoder.marks.context)
            stream = _pack_together(documents, builder, packer, max_tokens)
            return replace(stream, splits=split_in_order(stream.sequences), split_by=SEQUENCE)
        split_of_hash = dict(zip(hashes.tolist(), assign_splits(hashes).tolist(), strict=True))

    def split_of(hash: int) -> int:
        if hash not in split_of_hash:
            return int(assign_splits(np.array([hash], np.uint64))[0])
        return split_of_hash[hash]

    SplitPacker(encoder, split_of, builder, context, max_tokens).pack(order)
    return replace(builder.stream(), cut_tokens=None)


def _pack_together(
    documents: Iterator[DocumentParts],
    builder: TokenStreamBuilder,
    packer: Packer,
    max_tokens: int | None,
) -> TokenStream:
    """Pack all documents regardless of splits; the last sequence of the stream may be shorter."""

    def is_allowed(tokens: int) -> bool:
        return max_tokens is None or builder.tokens + tokens <= max_tokens

    for part in chain.from_iterable(document.parts for document in documents):
        packer.add(part)
        while packer.has_whole_sequence and is_allowed(packer.context):
            builder.append(packer.pop_sequence())
        if packer.has_whole_sequence:
            break
    if packer.pending_tokens and is_allowed(packer.pending_tokens):
        builder.append(packer.pop_sequence())
    return replace(builder.stream(), splits=None, cut_tokens=None)


def _cut_documents(
    documents: Iterator[DocumentParts],
    builder: TokenStreamBuilder,
    context: int,
    max_tokens: int | None,
) -> TokenStream:
    """Write one sequence per document, cut at `context`."""
    for document in documents:
        # The first parts, up to `context` tokens.
        packer = Packer(context)
        while not packer.has_whole_sequence and (part := next(document.parts, None)) is not None:
            packer.add(part)
        sequence = packer.pop_sequence()
        tokens = sum(len(piece.ids) for piece in sequence)
        if max_tokens is not None and builder.tokens + tokens > max_tokens:
            break

        # The others are only counted.
        cut = packer.pending_tokens + sum(len(part.ids) for part in document.parts)
        builder.append(sequence, cut=cut)
    return replace(builder.stream(), splits=None)

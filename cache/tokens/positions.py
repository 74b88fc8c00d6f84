"""Position policies: which positions of each sequence become rows of the cache.

`all` keeps every position, `last` the last one, `sample:K` K random ones, `answer` those that
predict the tokens of the document's answer (columns `answer`, `answer_start`), `explicit` those
that the column `positions` lists, `cls` the first of each image. `keep_positions` takes the token
stream of `tokenize`, or of images, and returns a stream with `KeptRuns`; `extraction/resolve.py`
calls it.
"""

import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from ..documents.documents import Documents
from ..documents.labels import ANSWER, ANSWER_START, EXPLICIT
from ..errors import DataError, UsageError
from .token_stream import KeptRuns, TokenStream

CLASS_TOKEN = "cls"
"""Policy of caches of images: the class token of each image."""
POLICIES = ("all", "last", "sample:K", "answer", "explicit", CLASS_TOKEN)


def check_positions(policy: str, pack: bool) -> None:
    """Raise `UsageError` unless `policy` is one of `POLICIES` and goes with `pack`."""
    if policy not in ("all", "last", "answer", "explicit", CLASS_TOKEN) and not sample_size(policy):
        known = ", ".join(POLICIES)
        raise UsageError(f"positions {policy!r} is unknown; choose one of {known}")
    if pack and policy in ("answer", "explicit"):
        raise UsageError(f"positions {policy} needs one sequence per document: add --no-pack")


def sample_size(policy: str) -> int:
    """K of `sample:K`, 0 for another policy."""
    match = re.fullmatch(r"sample:([0-9]{1,9})", policy)
    return int(match[1]) if match else 0


def keep_positions(
    policy: str, stream: TokenStream, documents: Documents, seed: int
) -> TokenStream:
    """`stream` with the positions of `policy` kept; sequences without a kept position are dropped.

    `documents` supplies the columns of `answer` and `explicit`, and counts the dropped documents.
    Raises `DataError` if no position is kept.
    """
    if policy == "all":
        return stream
    runs = runs_of_indices(_kept_indices(policy, stream, documents, seed))
    sequences = np.unique(runs.sequence)
    if not len(sequences):
        raise DataError(f"positions {policy} keeps nothing of the {len(stream.lengths)} sequences")
    if len(sequences) < len(stream.lengths):
        for row in np.delete(stream.row_ids, sequences).tolist():
            documents.reading.drop(f"no position for {policy}", row)
        stream = stream.select(sequences)
    return stream.with_runs(replace(runs, sequence=np.searchsorted(sequences, runs.sequence)))


def _kept_indices(
    policy: str, stream: TokenStream, documents: Documents, seed: int
) -> Iterator[np.ndarray]:
    """Yield the kept token indices of each sequence, ascending."""
    if policy == "last":
        yield from (np.array([length - 1]) for length in stream.lengths)
    elif policy == CLASS_TOKEN:
        yield from (np.zeros(1, np.int64) for _ in stream.lengths)
    elif size := sample_size(policy):
        _, hashes = stream.digests()
        for length, sequence_hash in zip(stream.lengths, hashes, strict=True):
            yield _sampled_indices(int(length), size, int(sequence_hash), seed)
    elif policy == "answer":
        for rows, sequences in _document_batches(stream, documents):
            yield from _answer_indices(stream, documents, rows, sequences)
    else:
        for rows, sequences in _document_batches(stream, documents):
            lists, lengths = documents.column_values(rows, EXPLICIT), stream.lengths[sequences]
            for indices, length in zip(lists, lengths, strict=True):
                yield _explicit_indices(indices, int(length))


def _document_batches(
    stream: TokenStream, documents: Documents
) -> Iterator[tuple[list[int], slice]]:
    """Yield batches of document numbers with the slice of their sequences, one per document."""
    start = 0
    for rows in documents.batches(stream.row_ids):
        yield rows, slice(start, start + len(rows))
        start += len(rows)


def _sampled_indices(length: int, size: int, sequence_hash: int, seed: int) -> np.ndarray:
    """`size` random indices; equal for equal sequences, wherever they stand in the stream."""
    rng = np.random.default_rng([seed, sequence_hash])
    return np.sort(rng.choice(length, min(size, length), replace=False))


def _explicit_indices(indices: object, length: int) -> np.ndarray:
    """The `indices` inside a sequence of `length` tokens, ascending; negative ones count back."""
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise DataError(f"column {EXPLICIT!r} must hold lists of whole numbers, found {indices!r}")
    counted = {index + length if index < 0 else index for index in indices}
    return np.array(sorted(index for index in counted if 0 <= index < length), np.int64)


def _answer_indices(
    stream: TokenStream, documents: Documents, rows: list[int], sequences: slice
) -> Iterator[np.ndarray]:
    """Yield, for each document of `rows`, the indices before a token of the answer."""
    # The answer's first character: given in a column, else the last occurrence in the text.
    answers = [_answer_text(answer) for answer in documents.column_values(rows, ANSWER)]
    characters = (
        [_character_number(value) for value in documents.column_values(rows, ANSWER_START)]
        if documents.has_column(ANSWER_START)
        else [
            str(text or "").rfind(answer)
            for text, answer in zip(documents.texts(rows), answers, strict=True)
        ]
    )
    char_start = stream.token_arrays["tokens/char_start"]
    char_stop = stream.token_arrays["tokens/char_stop"]
    starts, lengths = stream.starts[sequences].tolist(), stream.lengths[sequences].tolist()
    for start, length, answer, character in zip(starts, lengths, answers, characters, strict=True):
        if not answer or character is None or character < 0:
            yield np.zeros(0, np.int64)
            continue
        # Tokens that overlap the answer's characters; the position before each predicts it.
        tokens = slice(start, start + length)
        overlaps = (char_start[tokens] < character + len(answer)) & (char_stop[tokens] > character)
        indices = np.flatnonzero(overlaps) - 1
        yield indices[indices >= 0]


def _answer_text(value: object) -> str:
    """The answer as text; empty for a missing value, while 0 and False are answers."""
    if value is None:
        return ""
    if isinstance(value, list | dict):
        raise DataError(f"column {ANSWER!r} must hold the answer as text, found {value!r}")
    return str(value)


def _character_number(value: object) -> int | None:
    """An integer of `answer_start`, which .csv files hold as text; None for a missing value."""
    if value is None or value == "":
        return None
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():  # a column with missing values is float
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        return int(value)
    raise DataError(f"column {ANSWER_START!r} must hold whole numbers, found {value!r}")


def runs_of_indices(sequence_indices: Iterable[np.ndarray]) -> KeptRuns:
    """The runs of consecutive numbers in the ascending indices of each sequence."""
    sequence, first, length = array("q"), array("q"), array("q")
    for number, indices in enumerate(sequence_indices):
        if not len(indices):
            continue
        breaks = np.flatnonzero(np.diff(indices) != 1) + 1
        for run in np.split(indices, breaks):
            sequence.append(number)
            first.append(int(run[0]))
            length.append(len(run))
    return KeptRuns(*(np.array(values, np.int64) for values in (sequence, first, length)))

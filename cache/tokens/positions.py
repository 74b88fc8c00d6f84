"""Which positions of a sequence are kept: all, the last, a sample, the answer's, or named ones."""

import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from ..documents.documents import Documents
from ..documents.labels import ANSWER, ANSWER_START, EXPLICIT
from ..errors import DataError, UsageError
from .token_stream import KeptRuns, TokenStream

POLICIES = ("all", "last", "sample:K", "answer", "explicit")


def check_positions(policy: str, pack: bool) -> None:
    """Raise `UsageError` unless `policy` is one of `POLICIES` and goes with `pack`."""
    if policy not in ("all", "last", "answer", "explicit") and not sample_size(policy):
        known = ", ".join(POLICIES)
        raise UsageError(f"positions {policy!r} is unknown; choose one of {known}")
    if pack and policy in ("answer", "explicit"):
        raise UsageError(f"positions {policy} needs one sequence per document: add --no-pack")


def sample_size(policy: str) -> int:
    """K of `sample:K`, 0 for another policy."""
    match = re.fullmatch(r"sample:(\d+)", policy)
    return int(match[1]) if match else 0


def keep_positions(
    policy: str, stream: TokenStream, documents: Documents, seed: int
) -> TokenStream:
    """`stream` with the positions of `policy` kept; sequences without any are left out."""
    if policy == "all":
        return stream
    runs = runs_of(_choose(policy, stream, documents, seed))
    held = np.unique(runs.sequence)
    if not len(held):
        raise DataError(f"positions {policy} keeps nothing of the {len(stream.lengths)} sequences")
    if len(held) < len(stream.lengths):
        for row in np.delete(stream.row_ids, held).tolist():
            documents.reading.drop(f"no position for {policy}", row)
        stream = stream.select(held)
    return stream.with_runs(replace(runs, sequence=np.searchsorted(held, runs.sequence)))


def _choose(
    policy: str, stream: TokenStream, documents: Documents, seed: int
) -> Iterator[np.ndarray]:
    """Kept indices of each sequence, sorted."""
    if policy == "last":
        yield from (np.array([length - 1]) for length in stream.lengths)
    elif size := sample_size(policy):
        _, hashes = stream.digests()
        for length, found in zip(stream.lengths, hashes, strict=True):
            yield _sample(int(length), size, int(found), seed)
    elif policy == "answer":
        for rows, sequences in _batches(stream, documents):
            yield from _answers(stream, documents, rows, sequences)
    else:
        for rows, sequences in _batches(stream, documents):
            wanted, lengths = documents.column_values(rows, EXPLICIT), stream.lengths[sequences]
            yield from (_named(w, int(n)) for w, n in zip(wanted, lengths, strict=True))


def _batches(stream: TokenStream, documents: Documents) -> Iterator[tuple[list[int], slice]]:
    """Documents of some sequences at a time, which have one each, and those sequences."""
    start = 0
    for rows in documents.batches(stream.row_ids):
        yield rows, slice(start, start + len(rows))
        start += len(rows)


def _sample(length: int, size: int, sequence_hash: int, seed: int) -> np.ndarray:
    """The same positions for a sequence wherever it stands."""
    rng = np.random.default_rng([seed, sequence_hash])
    return np.sort(rng.choice(length, min(size, length), replace=False))


def _named(wanted: object, length: int) -> np.ndarray:
    if not isinstance(wanted, list) or not all(type(place) is int for place in wanted):
        raise DataError(f"column {EXPLICIT!r} must hold lists of whole numbers, found {wanted!r}")
    places = {place + length if place < 0 else place for place in wanted}
    return np.array(sorted(place for place in places if 0 <= place < length), np.int64)


def _answers(
    stream: TokenStream, documents: Documents, rows: list[int], sequences: slice
) -> Iterator[np.ndarray]:
    """Positions that predict the tokens of each row's answer."""
    answers = [_answer(answer) for answer in documents.column_values(rows, ANSWER)]
    places = (
        [_character(place) for place in documents.column_values(rows, ANSWER_START)]
        if documents.has_column(ANSWER_START)
        else [
            (text or "").rfind(answer)
            for text, answer in zip(documents.texts(rows), answers, strict=True)
        ]
    )
    first, stop = stream.token_arrays["tokens/char_start"], stream.token_arrays["tokens/char_stop"]
    starts, lengths = stream.starts[sequences].tolist(), stream.lengths[sequences].tolist()
    for start, length, answer, place in zip(starts, lengths, answers, places, strict=True):
        inside = slice(start, start + length)
        if not answer or place is None or place < 0:
            yield np.zeros(0, np.int64)
            continue
        within = (first[inside] < place + len(answer)) & (stop[inside] > place)
        indices = np.flatnonzero(within) - 1
        yield indices[indices >= 0]


def _answer(value: object) -> str:
    """The answer as it stands in the text, empty where there is none: 0 and False are answers."""
    if value is None:
        return ""
    if isinstance(value, list | dict):
        raise DataError(f"column {ANSWER!r} must hold the answer as text, found {value!r}")
    return str(value)


def _character(value: object) -> int | None:
    """A number of a character, which .csv files write as text; None where there is none."""
    if value is None or value == "":
        return None
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():  # beside missing ones
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        return int(value)
    raise DataError(f"column {ANSWER_START!r} must hold whole numbers, found {value!r}")


def runs_of(chosen: Iterable[np.ndarray]) -> KeptRuns:
    """Consecutive indices of each sequence as runs."""
    sequence, first, length = array("q"), array("q"), array("q")
    for number, indices in enumerate(chosen):
        if not len(indices):
            continue
        breaks = np.flatnonzero(np.diff(indices) != 1) + 1
        for run in np.split(indices, breaks):
            sequence.append(number)
            first.append(int(run[0]))
            length.append(len(run))
    return KeptRuns(*(np.array(values, np.int64) for values in (sequence, first, length)))

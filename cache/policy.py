"""Which positions of a sequence are kept: all, the last, a sample, the answer's, or named ones."""

import re
from typing import TYPE_CHECKING

import numpy as np

from .documents import Documents
from .errors import DataError, UsageError
from .tokens import Runs, TokenStream

if TYPE_CHECKING:
    from collections.abc import Sequence

POLICIES = ("all", "last", "sample:K", "answer", "explicit")
ANSWER, ANSWER_START, EXPLICIT = "answer", "answer_start", "positions"
"""Columns of the data that `answer` and `explicit` read."""


def check(policy: str, pack: bool) -> None:
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


def keep(policy: str, stream: TokenStream, documents: Documents, seed: int) -> TokenStream:
    """`stream` with the positions of `policy` kept; sequences without any are left out."""
    if policy == "all":
        return stream
    chosen = _choose(policy, stream, documents, seed)
    held = np.flatnonzero([len(indices) for indices in chosen])
    if not len(held):
        raise DataError(f"positions {policy} keeps nothing of the {len(chosen)} sequences")
    return stream.select(held).with_runs(runs_of([chosen[int(number)] for number in held]))


def _choose(
    policy: str, stream: TokenStream, documents: Documents, seed: int
) -> "Sequence[np.ndarray]":
    """Kept indices of each sequence, sorted."""
    if policy == "last":
        return [np.array([length - 1]) for length in stream.lengths]
    if size := sample_size(policy):
        _, hashes = stream.digests()
        return [
            _sample(int(n), size, int(h), seed) for n, h in zip(stream.lengths, hashes, strict=True)
        ]
    rows = [int(number) for number in stream.row_ids]
    if policy == "answer":
        return _answers(stream, documents, rows)
    wanted = documents.column(rows, EXPLICIT)
    return [_named(w, int(n)) for w, n in zip(wanted, stream.lengths, strict=True)]


def _sample(length: int, size: int, sequence_hash: int, seed: int) -> np.ndarray:
    """The same positions for a sequence wherever it stands."""
    rng = np.random.default_rng([seed, sequence_hash])
    return np.sort(rng.choice(length, min(size, length), replace=False))


def _named(wanted: object, length: int) -> np.ndarray:
    if not isinstance(wanted, list) or not all(isinstance(place, int) for place in wanted):
        raise DataError(f"column {EXPLICIT!r} must hold lists of whole numbers, found {wanted!r}")
    places = {place + length if place < 0 else place for place in wanted}
    return np.array(sorted(place for place in places if 0 <= place < length), np.int64)


def _answers(stream: TokenStream, documents: Documents, rows: list[int]) -> list[np.ndarray]:
    """Positions that predict the tokens of each row's answer."""
    answers, texts = documents.column(rows, ANSWER), documents.texts(rows)
    starts = (
        documents.column(rows, ANSWER_START)
        if documents.has(ANSWER_START)
        else [text.rfind(str(answer)) for text, answer in zip(texts, answers, strict=True)]
    )
    first, stop = stream.of_tokens["tokens/char_start"], stream.of_tokens["tokens/char_stop"]
    found = []
    ends = np.cumsum(stream.lengths)
    for end, length, answer, start in zip(ends, stream.lengths, answers, starts, strict=True):
        inside = slice(end - length, end)
        if not answer or start is None or start < 0:
            found.append(np.zeros(0, np.int64))
            continue
        within = (first[inside] < start + len(str(answer))) & (stop[inside] > start)
        indices = np.flatnonzero(within) - 1
        found.append(indices[indices >= 0])
    return found


def runs_of(chosen: list[np.ndarray]) -> Runs:
    """Consecutive indices of each sequence as runs."""
    sequence, first, length = [], [], []
    for number, indices in enumerate(chosen):
        breaks = np.flatnonzero(np.diff(indices) != 1) + 1
        for run in np.split(indices, breaks):
            sequence.append(number)
            first.append(int(run[0]))
            length.append(len(run))
    return Runs(*(np.array(values, np.int64) for values in (sequence, first, length)))

"""Sequences of two caches that hold the same tokens, joined by digests of their token ids.

Two models that read the same texts with the same tokenizer, context and seed have caches with the
same sequences, in the same order or not. What is equal is joined; the share of it is stated.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from ....cache.errors import UsageError
from ....cache.format.manifest import SHORT_ID
from ....cache.store.sequence_draw import draw_sequences
from ....cache.tokens.segments import context_indices, is_sparse
from ..trajectories.position_sample import PositionSample

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False)
class JoinedSample:
    """Positions of whole sequences that two caches share."""

    first: PositionSample
    """The positions in the first cache; its documents are what intervals resample."""
    other: PositionSample
    """The same tokens in the other cache, whose sequences may have other numbers."""
    other_positions: np.ndarray
    """Position in the other cache of each position of `first`, `(n,)` int64."""
    shares: tuple[float, float]
    """Share of the positions of the split of each cache that the other one has, too."""


def join_caches(
    first: "ActivationCache",
    other: "ActivationCache",
    split: str = "test",
    max_positions: int = 16384,
    seed: int = 0,
) -> JoinedSample:
    """Positions of `split` that both caches hold with the same tokens before and at them.

    Up to `max_positions`, whole sequences drawn by `seed`. Raises `UsageError` for caches that
    share no sequence, or of vocabularies of different size.
    """
    check_same_vocabulary(first, other)
    numbers = [
        found[cache.sequence_length[found] > 0]
        for cache in (first, other)
        for found in [cache.sequences(split)]
    ]
    for cache, found in zip((first, other), numbers, strict=True):
        if not len(found):
            raise UsageError(
                f"the split {split!r} of cache {cache.id[:SHORT_ID]} is empty; use another --split"
            )
    digests = sequence_digests(first, numbers[0]), sequence_digests(other, numbers[1])
    # Equal sequences are joined in their order, the k-th with the k-th.
    number_of = dict(zip(digests[1], numbers[1].tolist(), strict=True))
    pairs = [
        (number, number_of[digest])
        for digest, number in zip(digests[0], numbers[0].tolist(), strict=True)
        if digest in number_of
    ]
    if not pairs:
        raise UsageError(
            f"caches {first.id[:SHORT_ID]} and {other.id[:SHORT_ID]} share no sequence of tokens "
            f"in the split {split!r}; {how_to_read_the_same(first, other)}"
        )
    joined = np.array(pairs, np.int64)
    lengths = first.sequence_length[joined[:, 0]]
    shares = [
        float(lengths.sum() / cache.sequence_length[found].sum())
        for cache, found in zip((first, other), numbers, strict=True)
    ]
    chosen = draw_sequences(first, joined[:, 0], max_positions, seed)
    partner = dict(pairs)
    partners = np.array([partner[number] for number in chosen.tolist()], np.int64)
    return JoinedSample(
        PositionSample(first, split, chosen, seed),
        PositionSample(other, split, np.sort(partners), seed),
        other.positions_of(partners),
        (shares[0], shares[1]),
    )


def sequence_digests(cache: "ActivationCache", sequences: np.ndarray) -> list[tuple[bytes, int]]:
    """Digest of the tokens that the model had read at each sequence, with a count of repetitions.

    A cache of some positions gives the tokens of the context up to the last position, and the
    positions that are kept.
    """
    sparse, contexts = is_sparse(cache), cache.contexts
    seen: dict[bytes, int] = {}
    digests: list[tuple[bytes, int]] = []
    for sequence in sequences.tolist():
        start, length = int(cache.sequence_start[sequence]), int(cache.sequence_length[sequence])
        if sparse:
            context = int(cache.sequence_context[sequence])
            index = context_indices(cache, np.arange(start, start + length))
            begin = int(contexts.start[context])
            ids = contexts.ids[begin : begin + (int(index[-1]) + 1 if length else 0)]
            key = blake2b(index.astype("<i8").tobytes(), digest_size=DIGEST_BYTES)
        else:
            ids = cache.tokens[start : start + length]
            key = blake2b(digest_size=DIGEST_BYTES)
        key.update(np.ascontiguousarray(ids, "<i4").tobytes())
        digest = key.digest()
        seen[digest] = seen.get(digest, 0) + 1
        digests.append((digest, seen[digest]))
    return digests


def check_same_vocabulary(first: "ActivationCache", other: "ActivationCache") -> None:
    """Raise `UsageError` unless distributions of both models can be compared token by token."""
    if first.vocab != other.vocab:
        raise UsageError(
            f"the models of caches {first.id[:SHORT_ID]} and {other.id[:SHORT_ID]} have "
            f"{first.vocab:,} and {other.vocab:,} logits: only models of one tokenizer are "
            "compared token by token; models of any tokenizers by depth: --by depth"
        )


def how_to_read_the_same(first: "ActivationCache", other: "ActivationCache") -> str:
    """How to make a cache of the other model on the tokens of `first`."""
    tokens, model = first.manifest.tokens, other.manifest.model_name
    options = [f"--context {tokens.context}", *([] if tokens.packed else ["--no-pack"])]
    options += [f"--seed {tokens.seed}"] * (tokens.seed != 0)
    mode = first.manifest.capture.positions
    options += [f"--positions {mode}"] * (mode != "all")
    return (
        f"make a cache of the other model on the same texts (`residua extract {model} "
        f"{first.manifest.data_name} {' '.join(options)}`), or compare the models by relative "
        "depth alone: --by depth"
    )

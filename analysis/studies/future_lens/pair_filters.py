"""Which pairs (t, t+N) count: all, those that the model predicts right, or those of one source.

A filter is a mask over targets t+N for each offset N (`evaluate(..., where=mask)`), so that a
filter that asks something of the tokens between has another mask at each N.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....cache.devices import copy_to_device
from ....cache.errors import UsageError
from ....cache.tokens.segments import PairScope, segment_indices
from ....probes.base.resampling import (
    Interval,
    ResamplingUnits,
    bootstrap_interval,
)
from ...evaluation.distributions import Reference
from ...evaluation.windows import EvaluationSample, default_window_rows

if TYPE_CHECKING:
    import torch

    from ....cache.store.activation_cache import ActivationCache

KEEPS = ("none", "correct", "agree")
"""Filters: none; the model's top token at t+N is the text's; so at all of t, ..., t+N."""
Masks = Mapping[int, np.ndarray | None]
"""Offset N -> bool mask over the positions of the cache for targets t+N; None keeps all."""


@dataclass(frozen=True)
class KeptRow:
    """How many of the pairs at one offset a filter keeps."""

    offset: int
    keep: str
    """`none`, `correct` or `agree`."""
    pairs: int
    """Pairs (t, t+N) of the sampled sequences."""
    kept: int
    share: float | None
    """kept / pairs; None without a pair."""
    share_interval: Interval


def find_correct_positions(
    cache: "ActivationCache", sequences: np.ndarray, scope: PairScope, device: "torch.device"
) -> np.ndarray:
    """Whether the model's top token at each position is the text's next one, `(positions,)` bool.

    False outside `sequences`, at the end of a text, and where the model's logits are no
    distribution.
    """
    import torch

    correct = np.zeros(cache.positions, bool)
    head, last_layer = cache.head.torch(device), cache.residual_array(cache.n_blocks)
    block = default_window_rows(cache.vocab, device)
    positions = cache.positions_of(sequences)
    with torch.no_grad():
        for start in range(0, len(positions), block):
            rows = positions[start : start + block]
            text = np.asarray(cache.following_tokens(rows, scope.across_documents), np.int64)
            hidden = copy_to_device(torch.from_numpy(last_layer[rows]), device)
            reference = Reference.of(head(hidden), copy_to_device(torch.from_numpy(text), device))
            is_correct = reference.defined & (reference.top == reference.text)
            correct[rows] = is_correct.cpu().numpy()
    return correct


def filter_masks(
    cache: "ActivationCache",
    sequences: np.ndarray,
    scope: PairScope,
    offsets: Iterable[int],
    *,
    keep: str = "none",
    correct: np.ndarray | None = None,
    first_only: bool = False,
    where: np.ndarray | None = None,
) -> dict[int, np.ndarray | None]:
    """The mask of each offset N: targets t+N of the pairs that count.

    `keep` is one of `KEEPS`; all but `none` need `correct` of `find_correct_positions`. With
    `first_only`, t is the first position of its sequence, as where only the positions from the end
    of a context on are kept. `where` is a mask of the user's, over targets.
    """
    if keep not in KEEPS:
        raise UsageError(f"keep must be one of {', '.join(KEEPS)}, not {keep!r}")
    masks: dict[int, np.ndarray | None] = {}
    positions = cache.positions_of(sequences)
    _, remaining = segment_indices(cache, sequences, across_documents=True)
    lengths = cache.sequence_length[sequences]
    index = np.repeat(lengths, lengths) - 1 - remaining
    for offset in offsets:
        mask = where
        if keep != "none":
            assert correct is not None
            of_model = correct if keep == "correct" else all_of_run(correct, offset + 1)
            mask = of_model if mask is None else mask & of_model
        if first_only:
            is_first = np.zeros(cache.positions, bool)
            is_first[positions[index == offset]] = True
            mask = is_first if mask is None else mask & is_first
        masks[offset] = mask
    if keep == "correct" and not first_only:
        # One mask for all offsets: they are read together.
        shared = next(iter(masks.values()), None)
        masks = dict.fromkeys(masks, shared)
    return masks


def all_of_run(mask: np.ndarray, length: int) -> np.ndarray:
    """Whether `mask` `(n,)` is True at each index and the `length` - 1 before it, `(n,)` bool."""
    held = mask.copy()
    for step in range(1, min(length, len(mask))):
        held[step:] &= mask[:-step]
        held[:step] = False
    return held if length <= len(mask) else np.zeros_like(mask)


def kept_rows(
    cache: "ActivationCache",
    sequences: np.ndarray,
    scope: PairScope,
    offsets: Iterable[int],
    *,
    correct: np.ndarray,
    first_only: bool,
    where: np.ndarray | None,
    units: ResamplingUnits,
    weights: np.ndarray,
) -> list[KeptRow]:
    """How many pairs each filter of `KEEPS` keeps at each offset, with intervals over `units`."""
    rows = []
    targets = EvaluationSample(cache, sequences, scope).targets
    for keep in KEEPS:
        masks = filter_masks(
            cache,
            sequences,
            scope,
            offsets,
            keep=keep,
            correct=correct,
            first_only=first_only,
            where=where,
        )
        base = filter_masks(
            cache, sequences, scope, offsets, keep="none", first_only=first_only, where=where
        )
        for offset in offsets:
            is_pair = targets.largest_offset >= offset
            is_pair = is_pair & _values_at(base[offset], targets.positions)
            is_kept = is_pair & _values_at(masks[offset], targets.positions)
            n = np.bincount(units.unit_numbers[is_pair], minlength=units.n_resampled)
            kept = np.bincount(units.unit_numbers[is_kept], minlength=units.n_resampled)
            total = int(n.sum())
            rows.append(
                KeptRow(
                    offset=offset,
                    keep=keep,
                    pairs=total,
                    kept=int(kept.sum()),
                    share=int(kept.sum()) / total if total else None,
                    share_interval=bootstrap_interval(n, kept, weights),
                )
            )
    return rows


def _values_at(mask: np.ndarray | None, positions: np.ndarray) -> np.ndarray:
    """The mask at `positions`; True everywhere for None."""
    return np.ones(len(positions), bool) if mask is None else mask[positions]

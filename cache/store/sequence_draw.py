"""Random draw of whole sequences up to a number of positions, for fits and for evaluations."""

import numpy as np

from ..errors import UsageError
from .activation_cache import ActivationCache


def draw_sequences(
    cache: ActivationCache, sequences: np.ndarray, max_positions: int, seed: int
) -> np.ndarray:
    """Draw whole sequences that have at most `max_positions` positions together, sorted.

    `sequences` are sequence numbers of `cache`. One sequence at least is drawn, even if longer.
    """
    if max_positions < 1:
        raise UsageError(f"max_positions must be 1 or more, not {max_positions}")
    shuffled = np.random.default_rng(seed).permutation(sequences)
    fits = np.cumsum(cache.sequence_length[shuffled]) <= max_positions
    return np.sort(shuffled[: max(1, int(fits.sum()))])

"""What a direction says in tokens: the change of a lens's log-probabilities along the direction.

`read_directions` (direction_readings.py) calls `measure_token_changes`, then `promoted_tokens` and
`suppressed_tokens`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...probes.basis import LayerBasis
from ...probes.ridge import AffineMap

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

LABEL_LETTERS = 48
"""Most letters of a token's label; longer labels end in an ellipsis."""


@dataclass(frozen=True)
class TokenChange:
    """A token, and how much a direction changes the lens's log-probability of this token."""

    token: int
    """Token id."""
    label: str
    """Printable text of the token, `#7` where the tokenizer does not know the token."""
    change: float
    """Mean change in nats from one standard deviation below to one above, by `decoder`."""


def measure_token_changes(
    cache: "ActivationCache",
    basis: LayerBasis,
    affine: AffineMap,
    rows: np.ndarray,
    deviations: np.ndarray,
) -> np.ndarray:
    """Mean change of the lens's log-probabilities along each direction, `(k, vocab)` float64.

    With the lens lens(h) = log softmax(head(affine(h))), the decoder d_i and the standard deviation
    s_i of coordinate i (`deviations`, `(k,)`), the change is the mean over `rows` h,
    `(n, d_model)`, of lens(h + s_i d_i) - lens(h - s_i d_i), in nats. It is NaN for a token whose
    log-probability is not finite at some row. At most one tile of rows times the vocabulary is in
    memory, besides the result.
    """
    import torch

    from ...probes.training import row_tiles

    head = cache.head.torch()
    weight = affine.weight.astype(np.float64)
    centres = torch.from_numpy(rows.astype(np.float64) @ weight + affine.bias)
    steps = torch.from_numpy(deviations[:, None] * basis.decoder.astype(np.float64) @ weight)
    sums = torch.zeros(basis.k, cache.vocab, dtype=torch.float64)
    with torch.inference_mode():
        for tile in row_tiles(len(rows), cache.vocab):
            for direction, step in enumerate(steps):
                above, below = (
                    head((centres[tile] + sign * step).float()).log_softmax(-1) for sign in (1, -1)
                )
                sums[direction] += above.sub_(below).sum(0, dtype=torch.float64)
    changes = sums.numpy() / len(rows)
    changes[~np.isfinite(changes)] = np.nan
    return changes


def promoted_tokens(
    changes: np.ndarray, count: int, label: Callable[[int], str]
) -> tuple[TokenChange, ...]:
    """The `count` tokens with the largest positive change, the largest first.

    `changes` `(vocab,)` comes from `measure_token_changes`; ties go to the lower token id.
    """
    order = np.argsort(-np.nan_to_num(changes), kind="stable")[:count]
    return tuple(
        TokenChange(int(token), shorten_label(label(int(token))), float(changes[token]))
        for token in order
        if changes[token] > 0
    )


def suppressed_tokens(
    changes: np.ndarray, count: int, label: Callable[[int], str]
) -> tuple[TokenChange, ...]:
    """The `count` tokens with the largest negative change, the most negative first."""
    return tuple(
        TokenChange(entry.token, entry.label, -entry.change)
        for entry in promoted_tokens(-changes, count, label)
    )


def shorten_label(label: str) -> str:
    """`label`, cut to `LABEL_LETTERS` letters, the last one an ellipsis."""
    return label if len(label) <= LABEL_LETTERS else label[: LABEL_LETTERS - 1] + "…"

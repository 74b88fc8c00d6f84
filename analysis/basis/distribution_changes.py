"""Changes of predicted distributions in float64: KL divergence and weighted Aitchison cosine.

`model_influence.py` measures ablations with the first, `stimulus_response.py` replacements with the
second. All logits are `(n, vocab)` tensors of one device.
"""

from collections.abc import Iterator

import torch

TILE_BYTES = {"cpu": 1 << 20, "gpu": 64 << 20}
"""Bytes of float64 logits compared at once: on a CPU, intermediate results stay in its cache."""


def kl_divergence(logits: torch.Tensor, changed_logits: torch.Tensor) -> torch.Tensor:
    """KL(softmax(logits) || softmax(changed_logits)) of each row in nats, `(n,)` float64.

    Tokens to which `logits` give no mass do not count. NaN where logits are no distribution.
    """
    parts = []
    for tile in _tiles(logits):
        log_p = _double(logits[tile]).log_softmax(-1)
        log_q = _double(changed_logits[tile]).log_softmax(-1)
        p = log_p.exp()
        parts.append(torch.where(p > 0, p * (log_p - log_q), 0 * p).sum(-1))
    return torch.cat(parts)


def aitchison_cosine(
    stimulus: tuple[torch.Tensor, torch.Tensor], response: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Cosine between two changes of a distribution, of each row, `(n,)` float64.

    `stimulus` and `response` are the logits before and after the change, of the lens and of the
    model. With w = (p_before + p_after) / 2 of the response, the centred log ratio of a change x of
    the logits is clr(x) = x - sum(w x), and <x, y> = sum(w x y) (Belrose et al., 2303.08112,
    section 4.3; Aitchison, 1986). NaN where either distribution does not change.
    """
    parts = []
    for tile in _tiles(response[0]):
        lens, model = (
            [_double(logits[tile]).log_softmax(-1) for logits in pair]
            for pair in (stimulus, response)
        )
        weights = (model[0].exp() + model[1].exp()) / 2
        x, y = (_centred_change(pair, weights) for pair in (lens, model))
        lengths = [(weights * z.square()).sum(-1).sqrt() for z in (x, y)]
        parts.append((weights * x * y).sum(-1) / (lengths[0] * lengths[1]))
    return torch.cat(parts)


def _centred_change(pair: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Change of the log-probabilities `pair`, less its mean by `weights`; 0 without weight."""
    change = torch.where(weights > 0, pair[1] - pair[0], 0 * weights)
    return change - (weights * change).sum(-1, keepdim=True)


def _tiles(logits: torch.Tensor) -> Iterator[slice]:
    """Yield slices of rows, `TILE_BYTES` of float64 each; one empty slice for no row."""
    n, vocab = logits.shape
    kind = "cpu" if logits.device.type == "cpu" else "gpu"
    rows = max(1, TILE_BYTES[kind] // (8 * vocab))
    for start in range(0, max(n, 1), rows):
        yield slice(start, start + rows)


def _double(logits: torch.Tensor) -> torch.Tensor:
    """`logits` in float64, on the CPU where the device has no float64 (Apple's)."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()

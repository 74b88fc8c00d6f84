"""What each logits mode costs in accuracy, measured against the model's own logits on a few rows.

KL divergences are in nats per position, from the model to what the mode gives, in float64.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..format.dtypes import decode_rows, encode_rows
from ..format.logits_arrays import DEFAULT_TOP, FULL, RECOMPUTE, logits_arrays, top_logits, top_size
from ..head.head import Head

ROWS = 96
"""Rows that are measured at most."""
TILE_BYTES = 64 << 20
"""Most bytes of float64 logits at a time."""


@dataclass(frozen=True)
class ModeError:
    """One mode, measured."""

    dtype: str
    """Of the layer or the logits that are stored."""
    bytes: int
    """Per position, beside the layers; 0 for `recompute`."""
    kl_mean: float
    kl_max: float
    flips: int
    """Rows whose likeliest token is another one than the model's."""
    relative_error: float
    """Largest difference of a logit over the largest |logit|; of those kept, for `topk`."""
    tail_mass: float | None = None
    """Mean probability of the tokens that are not kept; `topk` takes it as uniform."""


@dataclass(frozen=True)
class LogitsErrors:
    """All modes, measured on the same rows; None stands for a number that is not finite."""

    rows: int
    dtype: str
    """In which logits are stored, by the range of those that were seen."""
    modes: dict[str, ModeError]

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        modes = {name: _finite(asdict(error)) for name, error in self.modes.items()}
        return {"rows": self.rows, "modes": modes}


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    """The value without numbers that JSON has not."""
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in value.items()}


def error_against(mode: str, vocab: int) -> tuple[str, ...]:
    """The modes that are measured beside the chosen one, and that one."""
    size = top_size(mode) or DEFAULT_TOP
    return (RECOMPUTE, *([f"topk:{size}"] if size < vocab else []), FULL)


def measure_logits_errors(
    head: Head, hidden: np.ndarray, model: np.ndarray, layer_dtype: str,
    choose: Callable[[np.ndarray], str], mode: str = RECOMPUTE,
) -> LogitsErrors:  # fmt: skip
    """Errors of the modes on layer L `hidden`, `(rows, d_model)`, uncast, and the model's logits.

    `choose` gives the stored dtype of logits such as the rows that it is given.
    """
    hidden, model = hidden[:ROWS], model[:ROWS]
    step = max(1, TILE_BYTES // (8 * head.vocab))
    tiles = [slice(start, start + step) for start in range(0, len(hidden), step)]
    dtype = choose(model)
    names = error_against(mode, head.vocab)
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for tile in tiles:
        own = head.logits(hidden[tile])
        want = _log_softmax(model[tile])
        for name in names:
            if name == RECOMPUTE:
                given = head.logits(_stored(hidden[tile], layer_dtype))
                rows = _row_errors(want, model[tile], given)
            elif name == FULL:
                rows = _row_errors(want, model[tile], _stored(own, dtype))
            else:
                rows = _top_errors(want, model[tile], own, top_size(name), dtype)
            found[name].append(rows)
    scale = max(float(np.abs(model).max()), 1e-30)
    modes = {}
    for name, pieces in found.items():
        kl, flips, difference, tail = np.concatenate(pieces, -1)
        size = sum(array.row_bytes for array in logits_arrays(name, head.vocab, dtype))
        modes[name] = ModeError(
            layer_dtype if name == RECOMPUTE else dtype, size, _positive(kl.mean()),
            _positive(kl.max()), int(flips.sum()), float(difference.max()) / scale,
            float(tail.mean()) if top_size(name) else None,
        )  # fmt: skip
    return LogitsErrors(len(hidden), dtype, modes)


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as they come back; a dtype that was asked for may be too narrow for them."""
    with np.errstate(over="ignore"):
        return decode_rows(encode_rows(values, dtype), dtype)


def _positive(number: np.floating) -> float:
    """Rounding may bring a KL below zero; NaN stays."""
    return float(np.maximum(number, 0.0))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _kl(want: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Per row, from log-probabilities."""
    p = np.exp(want)
    with np.errstate(invalid="ignore"):
        return np.where(p > 0, p * (want - given), 0.0).sum(-1)


def _flips(model: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Rows whose chosen token has a smaller logit in the model than its best; ties are no flips."""
    return np.take_along_axis(model, chosen[:, None], -1)[:, 0] < model.max(-1)


def _row_errors(want: np.ndarray, model: np.ndarray, given: np.ndarray) -> np.ndarray:
    """KL, flip, largest difference and an empty tail of each row, `(4, rows)`."""
    flips = _flips(model, given.argmax(-1))
    difference = np.abs(given - model).max(-1)
    return np.stack([_kl(want, _log_softmax(given)), flips, difference, np.zeros(len(model))])


def _top_errors(
    want: np.ndarray, model: np.ndarray, own: np.ndarray, size: int, dtype: str
) -> np.ndarray:
    """The same for the `size` largest as stored, the tail spread over all other tokens."""
    ids, values, logsumexp, tail = top_logits(own, size)
    values = _stored(values, dtype)
    rest = np.log(np.maximum(tail, 1e-300, dtype=np.float64)) - np.log(own.shape[-1] - size)
    given = np.repeat(rest[:, None], own.shape[-1], -1)
    np.put_along_axis(given, ids, values - logsumexp[:, None].astype(np.float64), -1)
    difference = np.abs(values - np.take_along_axis(model, ids, -1)).max(-1)
    return np.stack([_kl(want, _log_softmax(given)), _flips(model, ids[:, 0]), difference, tail])

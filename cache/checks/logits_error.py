"""Accuracy of each way to keep logits, measured against the model's own logits on a few rows.

The modes are those of `format/logits_arrays.py`: `recompute`, `topk:K` and `full`. KL divergences
are in nats per position, from the model to the mode's distribution, in float64. `model_checks.py`
calls `measure_logits_errors`; `residua info` prints the result.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..format.dtypes import decode_rows, encode_rows
from ..format.logits_arrays import (
    DEFAULT_TOP,
    FULL,
    RECOMPUTE,
    list_logits_arrays,
    top_logits,
    top_size,
)
from ..head.head import Head

ROWS = 96
"""Most rows that are measured."""
TILE_BYTES = 64 << 20
"""Most bytes of float64 logits at a time."""


@dataclass(frozen=True)
class ModeError:
    """Measured error of one logits mode."""

    dtype: str
    """Stored dtype of layer L for `recompute`, of the logits otherwise."""
    bytes: int
    """Stored bytes per position beside the layers; 0 for `recompute`."""
    kl_mean: float
    """Mean KL over the rows, in nats."""
    kl_max: float
    """Largest KL of a row, in nats."""
    flips: int
    """Rows whose likeliest token is not the model's."""
    relative_error: float
    """Largest error of a logit over the largest |logit|; of the kept logits, for `topk`."""
    tail_mass: float | None = None
    """Mean probability of the tokens that `topk` drops, and takes as uniform; else None."""


@dataclass(frozen=True)
class LogitsErrors:
    """Errors of all modes, measured on the same rows."""

    rows: int
    dtype: str
    """Stored dtype of logits, by the range of the measured rows."""
    modes: dict[str, ModeError]

    def to_dict(self) -> dict[str, Any]:
        """The errors as a JSON object, with None for numbers that are not finite."""
        return {
            "rows": self.rows,
            "modes": {name: _json_numbers(asdict(error)) for name, error in self.modes.items()},
        }


def _json_numbers(numbers: dict[str, Any]) -> dict[str, Any]:
    """`numbers` with NaN and infinity replaced by None, for JSON."""
    return {
        name: None if isinstance(number, float) and not np.isfinite(number) else number
        for name, number in numbers.items()
    }


def measure_logits_errors(
    head: Head,
    hidden: np.ndarray,
    model_logits: np.ndarray,
    layer_dtype: str,
    choose_logits_dtype: Callable[[np.ndarray], str],
    mode: str = RECOMPUTE,
) -> LogitsErrors:
    """Errors of `recompute`, a `topk` and `full` on rows of layer L.

    `hidden`: layer L before any cast, `(rows, d_model)`. `model_logits`: the model's logits of
    these rows, `(rows, vocab)`. `layer_dtype`: stored dtype of layer L. `choose_logits_dtype`
    gives the stored dtype of logits such as the rows of its argument. K of `topk` is that of
    `mode`, else `DEFAULT_TOP`.
    """
    hidden, model_logits = hidden[:ROWS], model_logits[:ROWS]
    logits_dtype = choose_logits_dtype(model_logits)
    modes = measured_modes(mode, head.vocab)

    # Errors of each row, tile by tile: 4 numbers per row and mode.
    row_errors: dict[str, list[np.ndarray]] = {name: [] for name in modes}
    tile_rows = max(1, TILE_BYTES // (8 * head.vocab))
    for start in range(0, len(hidden), tile_rows):
        tile = slice(start, start + tile_rows)
        tile_logits = model_logits[tile]
        log_p = _log_softmax(tile_logits)
        head_logits = head.logits(hidden[tile])
        for name in modes:
            if name == RECOMPUTE:
                recomputed = head.logits(_round_trip(hidden[tile], layer_dtype))
                errors = _row_errors(log_p, tile_logits, recomputed)
            elif name == FULL:
                stored = _round_trip(head_logits, logits_dtype)
                errors = _row_errors(log_p, tile_logits, stored)
            else:
                size = top_size(name)
                errors = _top_row_errors(log_p, tile_logits, head_logits, size, logits_dtype)
            row_errors[name].append(errors)

    # Over all rows.
    largest_logit = max(float(np.abs(model_logits).max()), 1e-30)
    mode_errors = {}
    for name, tiles in row_errors.items():
        kl, flips, difference, tail = np.concatenate(tiles, -1)
        arrays = list_logits_arrays(name, head.vocab, logits_dtype)
        mode_errors[name] = ModeError(
            dtype=layer_dtype if name == RECOMPUTE else logits_dtype,
            bytes=sum(array.row_bytes for array in arrays),
            kl_mean=_at_least_zero(kl.mean()),
            kl_max=_at_least_zero(kl.max()),
            flips=int(flips.sum()),
            relative_error=float(difference.max()) / largest_logit,
            tail_mass=float(tail.mean()) if top_size(name) else None,
        )
    return LogitsErrors(len(hidden), logits_dtype, mode_errors)


def measured_modes(mode: str, vocab: int) -> tuple[str, ...]:
    """Modes to measure for a request of `mode`: `mode` and its alternatives."""
    size = top_size(mode) or DEFAULT_TOP
    return (RECOMPUTE, *([f"topk:{size}"] if size < vocab else []), FULL)


def _round_trip(values: np.ndarray, dtype: str) -> np.ndarray:
    """`values` written in `dtype` and read back; values beyond the dtype become infinite."""
    with np.errstate(over="ignore"):
        return decode_rows(encode_rows(values, dtype), dtype)


def _row_errors(
    model_log_p: np.ndarray, model_logits: np.ndarray, logits: np.ndarray
) -> np.ndarray:
    """Per row of `logits`: KL, flip, largest difference of a logit, and no tail, `(4, rows)`."""
    return np.stack(
        [
            _kl(model_log_p, _log_softmax(logits)),
            _flips(model_logits, logits.argmax(-1)),
            np.abs(logits - model_logits).max(-1),
            np.zeros(len(model_logits)),
        ]
    )


def _top_row_errors(
    model_log_p: np.ndarray,
    model_logits: np.ndarray,
    head_logits: np.ndarray,
    size: int,
    dtype: str,
) -> np.ndarray:
    """Per row: KL, flip, largest difference of a kept logit, and mass of the tail, `(4, rows)`.

    The `size` largest of `head_logits` are stored in `dtype`; the probability of all other tokens,
    the tail, is spread evenly.
    """
    vocab = head_logits.shape[-1]
    ids, values, logsumexp, tail = top_logits(head_logits, size)
    values = _round_trip(values, dtype)

    # Log-probabilities: tail / (vocab - size) everywhere, then the stored ones at `ids`.
    tail_log_p = np.log(np.maximum(tail, 1e-300, dtype=np.float64)) - np.log(vocab - size)
    log_p = np.repeat(tail_log_p[:, None], vocab, -1)
    np.put_along_axis(log_p, ids, values - logsumexp[:, None].astype(np.float64), -1)

    difference = np.abs(values - np.take_along_axis(model_logits, ids, -1)).max(-1)
    kl = _kl(model_log_p, _log_softmax(log_p))
    return np.stack([kl, _flips(model_logits, ids[:, 0]), difference, tail])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of `logits`, `(rows, vocab)` float64."""
    logits = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p || q) = sum p (log p - log q) of each row, `(rows,)`; terms with p = 0 are 0."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def _flips(model_logits: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """Rows whose token has a smaller logit in the model than the model's best; a tie is no flip."""
    logits = np.take_along_axis(model_logits, token_ids[:, None], -1)[:, 0]
    return logits < model_logits.max(-1)


def _at_least_zero(kl: np.floating) -> float:
    """`kl` without negative rounding; NaN stays."""
    return float(np.maximum(kl, 0.0))

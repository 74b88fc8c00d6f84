"""Proves, before anything is measured, that a model can be resumed from a cache: `check_resume`.

An unchanged residual stream proves nothing, because every way to resume gives the model's logits
again. So the stream is changed, and the resumed logits are compared with those of a full run in
which the layer is overwritten. Then the unchanged rows of the cache must give the model's logits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..devices import is_out_of_memory
from ..errors import MismatchError, ModelError
from ..model.resume import ResumableRun
from .independence import REPEAT_TOLERANCE, lowest_dtype, row_change
from .reference_rows import LIMIT

NOISE = 0.5
"""Standard deviation of the noise that changes a stream, in units of the stream's own."""
SCALE = 1.1
"""Factor that changes a stream, beside the noise."""


@dataclass(frozen=True)
class ResumeReport:
    """Largest relative changes of a row of logits at one layer, of `check_resume`."""

    resume_error: float
    """Of a changed stream: the resumed model against a full run."""
    cache_error: float
    """Of the rows of the cache: the resumed model against its logits on the text."""


def check_resume(
    run: ResumableRun,
    rows: Mapping[int, torch.Tensor],
    stored_dtypes: Mapping[int, str] | None = None,
    seed: int = 0,
) -> dict[int, ResumeReport]:
    """Check that `run` can be resumed at the layers of `rows`, and that `rows` are the model's.

    `rows` are the cached streams of the batch by layer, `(batch, length, d_model)`; positions
    outside the mask are not compared. `stored_dtypes` are the dtypes in which the cache keeps the
    layers (default: that of the model). Call in inference mode.

    Raises `ModelError` with the figures if a resumed run differs from a full one by more than
    rounding, `MismatchError` if the rows of the cache do not give the logits of this model.
    """
    reports = {}
    for layer, cached in rows.items():
        resume_error = _resume_error(run, layer, cached, seed)
        check_resume_error(run.blocks.model, layer, resume_error)
        stored = None if stored_dtypes is None else stored_dtypes[layer]
        cache_error = check_cached_logits(run, layer, run.resume(layer, cached), stored)
        reports[layer] = ResumeReport(resume_error, cache_error)
    return reports


def check_cached_logits(
    run: ResumableRun, layer: int, logits: torch.Tensor, stored_dtype: str | None = None
) -> float:
    """Relative change from the model's logits to `logits`, of the unchanged rows of `layer`.

    `stored_dtype` as in `check_resume`. Raises `MismatchError` if it is more than rounding.
    """
    dtype = lowest_dtype(run.blocks.model)
    if stored_dtype is not None:
        dtype = max(dtype, getattr(torch, stored_dtype), key=lambda kind: torch.finfo(kind).eps)
    in_text = _positions_of_text(run)
    error = row_change(run.logits[in_text], logits[in_text], dtype)
    limit = LIMIT.get(str(dtype).removeprefix("torch."), 1e-3)
    if not error <= limit:
        raise MismatchError(
            f"layer {layer} of the cache does not give the logits of this "
            f"{type(run.blocks.model).__name__}: they differ by {error:.1e}, allowed {limit:.0e}; "
            "give the model that the cache was extracted from"
        )
    return error


def _positions_of_text(run: ResumableRun) -> torch.Tensor:
    """Positions that are no padding, `(batch, length)` bool."""
    return torch.ones_like(run.ids, dtype=torch.bool) if run.mask is None else run.mask.bool()


def _resume_error(run: ResumableRun, layer: int, cached: torch.Tensor, seed: int) -> float:
    """Relative change of the logits between a resumed and a full run, for a changed stream."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(cached.shape, generator=generator).to(cached.device)
    changed = cached.float() * SCALE + NOISE * cached.float().std(-1, keepdim=True) * noise
    in_text = _positions_of_text(run)

    def logits_by(run_layer: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return run_changed(run.blocks.model, layer, lambda: run_layer(layer, changed)[in_text])

    dtype = lowest_dtype(run.blocks.model)
    return row_change(logits_by(run.overwrite), logits_by(run.resume), dtype)


def check_resume_error(model: torch.nn.Module, layer: int, resume_error: float) -> None:
    """Raise `ModelError` if resumed logits differ from those of a full run beyond rounding."""
    limit = REPEAT_TOLERANCE.get(lowest_dtype(model), 1e-5)
    if not resume_error <= limit:
        raise ModelError(
            f"{type(model).__name__} cannot be resumed from layer {layer}: with a changed residual "
            f"stream its logits differ from those of a full run by {resume_error:.1e}, allowed "
            f"{limit:.0e}; the blocks above read what the blocks below compute beside the stream"
        )


def run_changed(
    model: torch.nn.Module, layer: int, logits_of_changed: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """The logits of a run with a changed `layer`; an error of the blocks becomes a `ModelError`."""
    try:
        return logits_of_changed()
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{type(model).__name__} cannot be resumed from layer {layer}: the blocks above it "
            f"need what the blocks below compute ({reason})"
        ) from error

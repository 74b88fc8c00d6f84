"""`StreamBatch`: token ids, attention mask and residual stream as the model's blocks take them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import InputTypeError, UsageError

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


@dataclass(frozen=True, eq=False)
class StreamBatch:
    """Sequences of one length, or padded on the right to one length, on the model's device."""

    ids: torch.Tensor
    """Token ids, `(batch, length)` int64."""
    mask: torch.Tensor | None
    """1 in the text and 0 in the padding, `(batch, length)` int64; None without padding."""
    hidden: torch.Tensor | None
    """One layer of the stream, `(batch, length, d_model)`."""
    is_single: bool
    """Whether one sequence was given without the axis of the batch."""

    @classmethod
    def of(
        cls,
        tokens: Any,
        mask: Any = None,
        residual: Any = None,
        *,
        d_model: int,
        vocab: int,
        device: torch.device,
    ) -> "StreamBatch":
        """Read the arguments of `ResumableModel.resume`.

        Raises `UsageError` for shapes that do not go together, tokens outside the vocabulary, and
        padding that is not on the right; `InputTypeError` for what is no array of numbers.
        """
        ids = _as_tensor(tokens, "tokens", device)
        if ids.dtype not in INTEGERS:
            raise InputTypeError(f"tokens must be whole numbers (token ids), found {ids.dtype}")
        is_single = ids.ndim == 1
        ids = (ids[None] if is_single else ids).long()
        if ids.ndim != 2 or not ids.numel():
            raise UsageError(
                f"expected token ids (length,) or (batch, length), found shape {tuple(ids.shape)}"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            wrong = low if low < 0 else high
            raise UsageError(f"the model reads tokens 0 to {vocab - 1}, there is no token {wrong}")
        hidden = None
        if residual is not None:
            hidden = _as_tensor(residual, "residual", device)
            hidden = hidden[None] if is_single else hidden
            expected = (*ids.shape, d_model)
            if tuple(hidden.shape) != expected:
                raise UsageError(
                    f"expected a residual stream {expected[is_single:]} for these token ids, found "
                    f"{tuple(hidden.shape)[is_single:]}"
                )
            if not hidden.is_floating_point():
                raise InputTypeError(f"residual must be real numbers, found {hidden.dtype}")
        return cls(ids, _read_mask(mask, ids, is_single), hidden, is_single)

    def output(self, values: torch.Tensor) -> torch.Tensor:
        """`values` `(batch, length, n)` in the shape that the caller's tokens have."""
        return values[0] if self.is_single else values

    @property
    def in_text(self) -> torch.Tensor:
        """Positions that are no padding, `(batch, length)` bool."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask > 0


def is_ragged(tokens: Any) -> bool:
    """Whether `tokens` is a list of sequences of different lengths."""
    if not isinstance(tokens, list | tuple) or not tokens:
        return False
    lengths = [len(row) if hasattr(row, "__len__") else -1 for row in tokens]
    return min(lengths) >= 0 and len(set(lengths)) > 1


def _as_tensor(values: Any, name: str, device: torch.device) -> torch.Tensor:
    """`values` as a tensor on `device`; a tensor keeps its gradient."""
    if isinstance(values, torch.Tensor):
        return values.to(device)
    if hasattr(values, "compute"):  # an array of dask
        values = values.compute()
    try:
        if isinstance(values, list | tuple) and any(
            isinstance(row, torch.Tensor) for row in values
        ):
            return torch.stack(list(values)).to(device)
        array = np.asarray(values)
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:
            array = array.astype(np.int64)
        if not array.flags.writeable:
            array = array.copy()
        return torch.from_numpy(array).to(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(
            f"{name} cannot be read as an array of numbers ({str(error).splitlines()[0]}); give a "
            "tensor or a numpy array"
        ) from None


def _read_mask(mask: Any, ids: torch.Tensor, is_single: bool) -> torch.Tensor | None:
    """The attention mask of `ids`, int64; None if it masks nothing."""
    if mask is None:
        return None
    read = _as_tensor(mask, "mask", ids.device)
    read = (read[None] if is_single else read).long()
    if read.shape != ids.shape:
        raise UsageError(
            f"mask has the shape {tuple(read.shape)}, tokens have {tuple(ids.shape)}; both must be "
            "equal"
        )
    is_right_padding = bool((read[:, 1:] <= read[:, :-1]).all() and (read[:, 0] == 1).all())
    if not is_right_padding or int(read.min()) < 0:
        raise UsageError(
            "mask must be 1 in the text and 0 in padding on its right: with padding elsewhere many "
            "models count positions wrongly; put the padding on the right, or leave it out"
        )
    return None if bool((read == 1).all()) else read

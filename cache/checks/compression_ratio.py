"""What compression saves, measured on the first rows of a stream before anything is written."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..format.compression import compress_chunk
from ..format.layout import ArrayKey, Layout, array_name
from ..format.logits_arrays import LogitsArray
from ..forward.device_copies import copy_to_host
from ..forward.kept_logits import KeptLogits

if TYPE_CHECKING:
    from ..tokens.token_stream import TokenStream
    from .model_checks import ModelReport

TOKENS = 4096
"""Most tokens that are run for it."""


def measure_compression_ratio(
    canary: "ModelReport", stream: "TokenStream", layout: Layout, mode: str,
    logits: Sequence[LogitsArray],
) -> dict[str, float]:  # fmt: skip
    """Compressed bytes over raw ones of the first chunk of every array, or of `TOKENS` rows.

    A chunk and not less: common tokens come again and again, and zstd finds what repeats.
    """
    hidden = _residuals(canary, stream, min(TOKENS, layout.chunk_rows))
    arrays: dict[ArrayKey, tuple[torch.Tensor | tuple, str]] = {
        layer: (hidden[layer], dtype) for layer, dtype in canary.dtypes.items()
    }
    if logits:
        device = next(canary.stack.model.parameters()).device
        takes = KeptLogits(canary.head, mode, canary.logits.dtype, device)
        rows = min(max(layout.chunk_of(array.row_bytes) for array in logits), len(hidden[-1]))
        with torch.inference_mode():
            taken = takes(hidden[-1][:rows])
        arrays |= {array.name: (taken[array.name], array.dtype) for array in logits}
    return {array_name(key): _ratio(copy_to_host(*array).stored) for key, array in arrays.items()}


def _residuals(canary: "ModelReport", stream: "TokenStream", limit: int) -> list[torch.Tensor]:
    """Layers of the first sequences, `(limit, d_model)` or fewer rows."""
    device = next(canary.stack.model.parameters()).device
    found: list[list[torch.Tensor]] = [[] for _ in range(canary.stack.depth + 1)]
    rows = 0
    with torch.inference_mode():
        for number in range(len(stream.lengths)):
            if rows >= limit:
                break
            ids = torch.from_numpy(stream.sequence(number).astype(np.int64))[None].to(device)
            for layer, hidden in enumerate(canary.stack.residuals(ids)):
                found[layer].append(hidden[0, : limit - rows])
            rows += ids.shape[1]
        return [torch.cat(pieces) for pieces in found]


def _ratio(stored: np.ndarray) -> float:
    return len(compress_chunk(stored)) / stored.nbytes

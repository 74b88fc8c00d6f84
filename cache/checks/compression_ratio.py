"""Compression ratio of a new compact cache, measured on the first rows before a row is written.

`extraction/prepare.py` calls this for `codec="compact"`; `extraction/plan.py` multiplies the bytes
of each array by its ratio.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..format.compression import compress_chunk
from ..format.layout import ArrayKey, Layout, array_name
from ..format.logits_arrays import LogitsArray
from ..forward.device_copies import copy_to_host
from ..forward.kept_logits import KeptLogits, StoredRows
from ..model.model_devices import input_device

if TYPE_CHECKING:
    from ..tokens.token_stream import TokenStream
    from .model_checks import ModelReport

TOKENS = 4096
"""Most tokens that run through the model for the measurement."""


def measure_compression_ratio(
    report: "ModelReport",
    stream: "TokenStream",
    layout: Layout,
    mode: str,
    logits: Sequence[LogitsArray],
) -> dict[str, float]:
    """Compressed over raw bytes of the first chunk of every array, or of its first `TOKENS` rows.

    `mode` and `logits`: the logits mode and its arrays. A whole chunk is measured, because zstd
    finds repetitions: common tokens return again and again.
    """
    layers = _first_residuals(report, stream, min(TOKENS, layout.chunk_rows))
    arrays: dict[ArrayKey, tuple[torch.Tensor | StoredRows, str]] = {
        layer: (layers[layer], dtype) for layer, dtype in report.dtypes.items()
    }
    if logits:
        kept_logits = KeptLogits(report.head, mode, report.logits.dtype, layers[-1].device)
        chunk_rows = max(layout.chunk_of(array.row_bytes) for array in logits)
        with torch.inference_mode():
            rows = kept_logits(layers[-1][:chunk_rows])
        arrays |= {array.name: (rows[array.name], array.dtype) for array in logits}

    ratios = {}
    for key, (rows, dtype) in arrays.items():
        stored = copy_to_host(rows, dtype).stored
        ratios[array_name(key)] = len(compress_chunk(stored)) / stored.nbytes
    return ratios


def _first_residuals(
    report: "ModelReport", stream: "TokenStream", limit: int
) -> list[torch.Tensor]:
    """Layers 0 to L of the first sequences, each `(rows, d_model)` with at most `limit` rows."""
    device = input_device(report.stack.model)
    pieces: list[list[torch.Tensor]] = [[] for _ in range(report.stack.depth + 1)]
    rows = 0
    with torch.inference_mode():
        for number in range(len(stream.lengths)):
            if rows >= limit:
                break
            ids = torch.from_numpy(stream.sequence(number).astype(np.int64))[None].to(device)
            for layer, hidden in enumerate(report.stack.residuals(ids)):
                pieces[layer].append(hidden[0, : limit - rows])
            rows += ids.shape[1]
        return [torch.cat(layer_pieces) for layer_pieces in pieces]

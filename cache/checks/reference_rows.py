"""Reference rows: residual streams of a few tokens, stored in a cache to be computed again later.

Other hardware, kernels or library versions change the numbers. Before rows are added to a cache,
`check_reference_rows` measures the change. `extraction/prepare.py` saves the rows of a new cache.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import MismatchError
from ..files.confined_files import is_regular, read_confined, read_confined_json
from ..model.model_devices import input_device
from ..tokens.token_stream import TokenStream

if TYPE_CHECKING:
    from ..model.blocks import DecoderBlocks

TOKENS = 16
"""Most reference rows: the first tokens of the first sequence."""
FILE = "canary.safetensors"
"""File of the reference rows in the folder `head/` of a cache."""
LIMIT = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest relative difference that is still rounding, per dtype the model ran in."""


def save_reference_rows(stack: "DecoderBlocks", stream: TokenStream, folder: Path) -> None:
    """Save the first tokens of `stream` and all their layers, each `(tokens, d_model)` float32."""
    from safetensors.numpy import save_file

    ids = stream.sequence(0)[:TOKENS].astype(np.int64)
    tensors = {"ids": ids}
    for layer, rows in enumerate(_compute_layers(stack, ids)):
        tensors[f"residual/{layer}"] = np.ascontiguousarray(rows)
    save_file(tensors, folder / FILE)


def compute_reference_rows(stack: "DecoderBlocks", folder: Path) -> float | None:
    """Compute the reference rows again; largest difference from the stored rows.

    The difference is relative to the largest |value| of the layer. None without stored rows.
    """
    from safetensors.numpy import load

    if not is_regular(folder, FILE):
        return None
    tensors = load(read_confined(folder, FILE))
    largest = 0.0
    for layer, rows in enumerate(_compute_layers(stack, tensors["ids"])):
        stored_rows = np.nan_to_num(tensors[f"residual/{layer}"])
        scale = max(float(np.abs(stored_rows).max()), 1e-30)
        largest = max(largest, float(np.abs(np.nan_to_num(rows) - stored_rows).max()) / scale)
    return largest


def check_reference_rows(stack: "DecoderBlocks", path: Path, compute_dtype: str) -> float | None:
    """Compute the reference rows of the cache at `path` again; their largest relative difference.

    Raises `MismatchError` if the difference is more than rounding. `compute_dtype`: dtype in which
    the model runs.
    """
    difference = compute_reference_rows(stack, path / "head")
    limit = LIMIT.get(compute_dtype, 1e-3)
    if difference is not None and not difference <= limit:
        versions = read_confined_json(path, "provenance.json").get("versions", {})
        version_list = ", ".join(f"{name} {version}" for name, version in versions.items())
        raise MismatchError(
            f"this machine computes other numbers than the one that made the cache: the reference "
            f"rows differ by {difference:.1e} of their largest value, allowed {limit:.0e} (made "
            f"with {version_list}); finish it there, or extract into another root"
        )
    return difference


def _compute_layers(stack: "DecoderBlocks", ids: np.ndarray) -> list[np.ndarray]:
    """Layers 0 to L of one sequence, each `(tokens, d_model)` float32."""
    import torch

    device = input_device(stack.model)
    tokens = torch.from_numpy(ids)[None].to(device)
    with torch.inference_mode():
        return [hidden[0].float().cpu().numpy() for hidden in stack.residuals(tokens)]

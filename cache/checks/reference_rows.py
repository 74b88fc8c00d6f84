"""Canary rows: a few tokens whose residual streams are kept, to be computed again on resume.

Other hardware, kernels or library versions change the numbers; how much is measured before more
rows are added to a cache.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import MismatchError
from ..files.json_files import read_json
from ..tokens.token_stream import TokenStream

if TYPE_CHECKING:
    from ..model.blocks import DecoderBlocks

TOKENS = 16
FILE = "canary.safetensors"
LIMIT = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest relative difference that is still rounding, per dtype the model ran in."""


def save_reference_rows(stack: "DecoderBlocks", stream: TokenStream, folder: Path) -> None:
    """Keep the first tokens of `stream` with all their layers, `(tokens, d_model)` float32."""
    from safetensors.numpy import save_file

    ids = stream.sequence(0)[:TOKENS].astype(np.int64)
    tensors = {"ids": ids}
    for layer, hidden in enumerate(_layers(stack, ids)):
        tensors[f"residual/{layer}"] = np.ascontiguousarray(hidden)
    save_file(tensors, folder / FILE)


def compute_reference_rows(stack: "DecoderBlocks", folder: Path) -> float | None:
    """Largest relative difference of the canary rows now and then; None if none were kept."""
    from safetensors.numpy import load

    if not (folder / FILE).is_file():
        return None
    kept = load((folder / FILE).read_bytes())
    worst = 0.0
    for layer, now in enumerate(_layers(stack, kept["ids"])):
        then = np.nan_to_num(kept[f"residual/{layer}"])
        scale = max(float(np.abs(then).max()), 1e-30)
        worst = max(worst, float(np.abs(np.nan_to_num(now) - then).max()) / scale)
    return worst


def check_reference_rows(stack: "DecoderBlocks", path: Path, compute_dtype: str) -> float | None:
    """Replay the canary of the cache at `path`; raises `MismatchError` beyond rounding."""
    difference = compute_reference_rows(stack, path / "head")
    limit = LIMIT.get(compute_dtype, 1e-3)
    if difference is not None and not difference <= limit:
        versions = read_json(path / "provenance.json").get("versions", {})
        made = ", ".join(f"{name} {version}" for name, version in versions.items())
        raise MismatchError(
            f"this machine computes other numbers than the one that made the cache: the canary "
            f"rows differ by {difference:.1e} of their largest value, allowed {limit:.0e} (made "
            f"with {made}); finish it there, or extract into another root"
        )
    return difference


def _layers(stack: "DecoderBlocks", ids: np.ndarray) -> list[np.ndarray]:
    import torch

    device = next(stack.model.parameters()).device
    tokens = torch.from_numpy(ids)[None].to(device)
    with torch.inference_mode():
        return [hidden[0].float().cpu().numpy() for hidden in stack.residuals(tokens)]

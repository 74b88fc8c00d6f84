"""Loading of a saved head of either kind: a formula (`Head`) or a program (`ProgramHead`).

`ActivationCache.head` calls `load_head` on the cache's folder `head/`.
"""

import hashlib
from pathlib import Path

from ..errors import CorruptError
from ..files.json_files import read_json
from ..files.read_errors import read_file
from .head import NORMS, TENSORS, Head
from .head_files import read_head_tensors
from .program_head import ProgramHead


def load_head(folder: Path) -> Head:
    """Load the head from `head.json` and `head.safetensors` in `folder`.

    Raises `CorruptError` if either file was changed after writing, or has another format.
    """
    spec = read_json(folder / "head.json")
    raw = read_file(folder / "head.safetensors")
    if hashlib.sha256(raw).hexdigest() != spec.get("tensors"):
        raise CorruptError(f"{folder / 'head.safetensors'} was changed after it was written")
    tensors = read_head_tensors(raw, folder)
    if spec.get("kind") == ProgramHead.kind:
        return ProgramHead.from_parts(spec, tensors)
    try:
        if spec["kind"] != Head.kind or spec["norm"] not in NORMS:
            raise CorruptError(f"{folder / 'head.json'}: unknown head {spec['kind']!r}")
        arrays = {name: tensors[name] for name in TENSORS}
        return Head(
            spec["norm"], spec["eps"], **arrays, scale=spec["scale"], softcap=spec["softcap"]
        )
    except (KeyError, TypeError) as error:
        raise CorruptError(f"{folder} is not a head of this format: {error}") from None

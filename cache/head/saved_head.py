"""Loading of a saved head of either kind: a formula (`Head`) or a program (`ProgramHead`).

`ActivationCache.head` calls `load_head` on the cache's folder `head/`.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptError
from ..files.json_fields import (
    FieldError,
    checking_fields,
    choice_field,
    list_field,
    number_field,
    optional_field,
)
from ..files.json_files import read_json
from ..files.read_errors import read_file
from .head import NORMS, TENSORS, Head
from .head_files import read_head_tensors
from .program_head import ProgramHead

LARGEST_FACTOR = 2.0**62
"""Bound of eps, scale and softcap: numbers of float32, and of int64 where they are whole."""
SMALLEST_SOFTCAP = 1e-18
"""Least softcap, by which logits are divided."""


def load_head(folder: Path, d_model: int | None = None, vocab: int | None = None) -> Head:
    """Load the head from `head.json` and `head.safetensors` in `folder`.

    Raises `CorruptError` if either file was changed after writing, has another format, or, where
    `d_model` and `vocab` are given, does not map rows of `d_model` numbers to `vocab` logits.
    """
    spec = read_json(folder / "head.json")
    try:
        raw = read_file(folder / "head.safetensors")
    except FileNotFoundError:
        raise CorruptError(f"{folder / 'head.safetensors'} is missing") from None
    if hashlib.sha256(raw).hexdigest() != spec.get("tensors"):
        raise CorruptError(f"{folder / 'head.safetensors'} was changed after it was written")
    tensors = read_head_tensors(raw, folder)
    with checking_fields(folder, "a head of this format"):
        kind = choice_field(spec, "kind", (Head.kind, ProgramHead.kind))
        if kind == ProgramHead.kind:
            head = ProgramHead.from_parts(spec, tensors)
        else:
            head = _explicit_head(spec, tensors)
        if (d_model, vocab) not in ((None, None), (head.d_model, head.vocab)):
            raise FieldError(
                f"it maps {head.d_model} numbers to {head.vocab} logits; expected {d_model} and "
                f"{vocab}, as in the manifest"
            )
    return head


def describe_head(folder: Path) -> dict[str, Any]:
    """What `Head.describe` gives for the head in `folder`, from `head.json` alone.

    Raises `CorruptError` if `head.json` was changed after writing or is not of this format.
    """
    spec = read_json(folder / "head.json")
    with checking_fields(folder, "a head of this format"):
        kind = choice_field(spec, "kind", (Head.kind, ProgramHead.kind))
        if kind == ProgramHead.kind:
            return {"kind": kind, "operations": len(list_field(spec, "nodes"))}
        return {"kind": kind, **_formula(spec)}


def _formula(spec: dict[str, Any]) -> dict[str, Any]:
    """norm, eps, scale and softcap of `head.json`; raises `FieldError` for other values."""
    return {
        "norm": choice_field(spec, "norm", NORMS),
        "eps": number_field(spec, "eps", 0.0, LARGEST_FACTOR),
        "scale": number_field(spec, "scale", -LARGEST_FACTOR, LARGEST_FACTOR),
        "softcap": optional_field(number_field, spec, "softcap", SMALLEST_SOFTCAP, LARGEST_FACTOR),
    }


def _explicit_head(spec: dict[str, Any], tensors: dict[str, np.ndarray]) -> Head:
    """The head of a formula; raises `FieldError` for values and shapes that do not make one."""
    if missing := set(TENSORS) - set(tensors):
        raise FieldError(f"head.safetensors lacks {', '.join(sorted(missing))}")
    shape = tensors["unembedding"].shape
    vocab, d_model = shape if len(shape) == 2 else (0, 0)
    if not vocab or not d_model:
        raise FieldError(f"the unembedding has shape {shape}; expected (vocab, d_model)")
    expected = {"norm_weight": (d_model,), "norm_bias": (d_model,), "bias": (vocab,)}
    for name, expected_shape in expected.items():
        if tensors[name].shape != expected_shape:
            raise FieldError(f"{name} has shape {tensors[name].shape}; expected {expected_shape}")
    arrays: dict[str, Any] = {name: tensors[name] for name in TENSORS}
    return Head(**_formula(spec), **arrays)

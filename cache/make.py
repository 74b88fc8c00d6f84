"""Examines a model, reckons what its cache takes, and makes the empty cache."""

import json
import platform
import time
from dataclasses import replace
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .budget import Estimate, estimate, shorten
from .create import create_cache
from .errors import UsageError
from .layout import STORED_DTYPES, Layout
from .logits import LogitsArray, arrays_of
from .manifest import ALONE, BATCH, CODEC, Manifest
from .oom import choose_batch_tokens, memory_errors
from .origin import public_name, write_origin
from .replay import record
from .request import Request
from .resolve import Wanted
from .source import ModelSource
from .store import ActivationCache
from .tokens import TokenStream

if TYPE_CHECKING:
    import torch

    from .canary import Canary
    from .stack import Stack

LOGITS_BATCH_BYTES = 128 << 20
"""Most bytes of the kept logits of a batch, a few of which are in memory at a time."""


def load(request: Request, source: ModelSource) -> "torch.nn.Module":
    """The model of the request, on its device."""
    from .model import choose_device, load_model

    device = choose_device(request.device)
    with memory_errors(
        f"{source.name} does not fit into the memory of {device}; take another --device, or a "
        "checkpoint of lower precision"
    ):
        return load_model(source, device, request.attention, request.trust_remote_code)


def with_loaded_dtype(source: ModelSource, model: "torch.nn.Module") -> ModelSource:
    """`source` with the dtype that `model`, loaded from it, really runs in."""
    from .independence import lowest_dtype

    dtype = str(lowest_dtype(model)).removeprefix("torch.")
    return source if dtype == source.compute_dtype else replace(source, loaded_dtype=dtype)


def examine_model(
    request: Request, source: ModelSource, model: "torch.nn.Module", stream: TokenStream
) -> "Canary":
    """What a few sequences show of the model, with the dtypes of the layers that are kept."""
    from .canary import examine

    canary = examine(
        model, stream, source.compute_dtype, request.dtype, request.logits, request.batch_tokens
    )
    kept = kept_layers(request.layers, canary.stack.depth)
    canary = replace(canary, dtypes={layer: canary.dtypes[layer] for layer in kept})
    if request.codec == "raw":
        return canary
    from .ratio import measure

    arrays = _logits(request, canary)
    ratios = measure(canary, stream, _layout(request, canary), request.logits, arrays)
    return replace(canary, ratios=ratios)


def kept_layers(layers: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """The layers to keep: those asked for, and layer L."""
    if layers is None:
        return tuple(range(depth + 1))
    if max(layers) > depth:
        raise UsageError(f"layer {max(layers)} is not in this model; it has layers 0-{depth}")
    return tuple(sorted({*layers, depth}))


def _layout(request: Request, canary: "Canary") -> Layout:
    widest = max((array.row_bytes for array in _logits(request, canary)), default=0)
    return Layout.choose(canary.head.d_model, _itemsize(canary), request.part_positions, widest)


def layout_like(request: Request, cache: ActivationCache) -> Layout:
    """The layout that `request` gives arrays like those of a complete `cache`."""
    names = {name for record in cache.committed.values() for name in record.arrays}
    arrays = {name: cache.array(name).layout for name in names}
    items = [np.dtype(a.stored_dtype).itemsize for n, a in arrays.items() if n[:9] == "residual/"]
    widest = max((a.row_bytes for n, a in arrays.items() if n[:7] == "logits/"), default=0)
    return Layout.choose(cache.d_model, max(items), request.part_positions, widest)


def _logits(request: Request, canary: "Canary") -> tuple[LogitsArray, ...]:
    """The arrays of logits that the request keeps."""
    return arrays_of(request.logits, canary.head.vocab, canary.logits.dtype)


def _batch_tokens(request: Request, canary: "Canary", stream: TokenStream) -> int:
    """Tokens of a batch; fewer where a batch's logits would fill the memory."""
    if request.batch_tokens is not None:
        return request.batch_tokens
    row = sum(array.row_bytes for array in _logits(request, canary))
    limit = max(1, LOGITS_BATCH_BYTES // row) if row else None
    found = choose_batch_tokens(canary.stack, stream, _itemsize(canary))
    return found if limit is None else min(found, limit)


def _itemsize(canary: "Canary") -> int:
    return max(np.dtype(STORED_DTYPES[dtype]).itemsize for dtype in canary.dtypes.values())


def _head_bytes(canary: "Canary") -> int:
    return sum(tensor.nbytes for tensor in canary.tensors.values())


def estimate_of(request: Request, canary: "Canary", stream: TokenStream, root: Path) -> Estimate:
    return estimate(
        root, _layout(request, canary), canary.head.d_model, canary.dtypes, stream.positions,
        stream.sequences, _head_bytes(canary), 0 if stream.runs is None else len(stream.ids),
        _logits(request, canary), canary.ratios,
    )  # fmt: skip


def shorten_stream(
    request: Request, source: ModelSource, model: "torch.nn.Module", stream: TokenStream, root: Path
) -> tuple["Canary", TokenStream]:
    """The model's canary, and the stream cut to `max_bytes`."""
    assert request.max_bytes is not None
    canary = examine_model(request, source, model, stream)
    layout, size = _layout(request, canary), _head_bytes(canary)
    return canary, shorten(
        stream, request.max_bytes, root, layout, canary.head.d_model, canary.dtypes, size,
        _logits(request, canary), canary.ratios,
    )  # fmt: skip


def make_cache(
    request: Request,
    source: ModelSource,
    model: "torch.nn.Module",
    canary: "Canary | None",
    wanted: Wanted,
    stream: TokenStream,
    root: Path,
) -> tuple[Path, "Stack"]:
    """Examine the model, check the space and make the empty cache."""
    canary = canary or examine_model(request, source, model, stream)
    estimate_of(request, canary, stream, root).check(root)
    manifest = Manifest(
        wanted.model,
        wanted.tokens,
        wanted.capture,
        _layout(request, canary).shrunk(stream.positions),
        canary.head.d_model,
        canary.head.vocab,
        canary.stack.depth,
        _batch_tokens(request, canary, stream),
        public_name(request.model),
        public_name(request.data),
        extra={
            "pad": canary.pad,
            "causal": canary.causal,
            "embedding": canary.embedding,
            **({BATCH: ALONE} if canary.alone else {}),
            # Left out where it is raw, as it was before there was a choice.
            **({} if request.codec == "raw" else {CODEC: request.codec}),
        },
        format=request.format,
    )

    def write_head(folder: Path) -> None:
        save_head(folder, source, canary, request.format)
        record(canary.stack, stream, folder)
        write_origin(folder.parent, request.model, request.data)

    provenance = {
        **_provenance(model, canary.report()),
        "revision": source.revision,
        "cut": stream.cut_counts,
        "reading": stream.reading.to_dict(),
    }
    if request.codec != "raw":  # other versions may compress to other bytes
        provenance["versions"]["numcodecs"] = version_of("numcodecs")
    path = create_cache(
        root, manifest, stream, stream.digests()[1], canary.dtypes, write_head, provenance,
        canary.logits.dtype,
    )  # fmt: skip
    return path, canary.stack


def save_head(folder: Path, source: ModelSource, canary: "Canary", version: int) -> None:
    """The head, the tokenizer and copies of the configuration, in the format `version`."""
    canary.head.save(folder, canary.tensors)
    source.tokenizer_in(version).save(str(folder / "tokenizer.json"))
    for name in ("config.json", "tokenizer_config.json"):
        if (source.folder / name).is_file():
            (folder / name).write_bytes(_without_paths((source.folder / name).read_bytes()))


def _without_paths(raw: bytes) -> bytes:
    """A configuration without the place that it was once saved at; unchanged if it has none."""
    value = json.loads(raw)
    kept = _public(value)
    return raw if kept == value else json.dumps(kept, indent=2, ensure_ascii=False).encode() + b"\n"


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        hidden = ("_name_or_path", "name_or_path")
        return {key: _public(found) for key, found in value.items() if key not in hidden}
    return [_public(found) for found in value] if isinstance(value, list) else value


def _provenance(model: "torch.nn.Module", canary: dict[str, object]) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "canary": canary,
        "device": str(next(model.parameters()).device),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        # Tensors that the checkpoint lacks and the class computes, and those that no module reads.
        "checkpoint": getattr(model, "checkpoint_notes", None),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }

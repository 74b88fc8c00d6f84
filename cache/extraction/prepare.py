"""Examines a model, reckons what its cache takes, and makes the empty cache."""

import json
import platform
import time
from dataclasses import replace
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.reference_rows import save_reference_rows
from ..format.manifest import ALONE, BATCH, CODEC, Manifest
from ..model.memory import memory_errors
from ..model.source import ModelSource
from ..store.create_cache import create_cache
from ..store.local_origin import public_name, write_origin
from ..tokens.token_stream import TokenStream
from .plan import (
    _batch_tokens,
    _head_bytes,
    _layout,
    _logits,
    estimate_of,
    kept_layers,
    shorten_to_fit,
)
from .request import ExtractionRequest
from .resolve import WantedCache

if TYPE_CHECKING:
    import torch

    from ..checks.model_checks import ModelReport
    from ..model.blocks import DecoderBlocks


def load_requested_model(request: ExtractionRequest, source: ModelSource) -> "torch.nn.Module":
    """The model of the request, on its device."""
    from ..model.load_model import choose_device, load_model

    device = choose_device(request.device)
    with memory_errors(
        f"{source.name} does not fit into the memory of {device}; take another --device, or a "
        "checkpoint of lower precision"
    ):
        return load_model(source, device, request.attention, request.trust_remote_code)


def with_loaded_dtype(source: ModelSource, model: "torch.nn.Module") -> ModelSource:
    """`source` with the dtype that `model`, loaded from it, really runs in."""
    from ..checks.independence import lowest_dtype

    dtype = str(lowest_dtype(model)).removeprefix("torch.")
    return source if dtype == source.compute_dtype else replace(source, loaded_dtype=dtype)


def examine_model(
    request: ExtractionRequest, source: ModelSource, model: "torch.nn.Module", stream: TokenStream
) -> "ModelReport":
    """What a few sequences show of the model, with the dtypes of the layers that are kept."""
    from ..checks.model_checks import check_model

    canary = check_model(
        model, stream, source.compute_dtype, request.dtype, request.logits, request.batch_tokens
    )
    kept = kept_layers(request.layers, canary.stack.depth)
    canary = replace(canary, dtypes={layer: canary.dtypes[layer] for layer in kept})
    if request.codec == "raw":
        return canary
    from ..checks.compression_ratio import measure_compression_ratio

    arrays = _logits(request, canary)
    ratios = measure_compression_ratio(
        canary, stream, _layout(request, canary), request.logits, arrays
    )
    return replace(canary, ratios=ratios)


def shorten_stream(
    request: ExtractionRequest,
    source: ModelSource,
    model: "torch.nn.Module",
    stream: TokenStream,
    root: Path,
) -> tuple["ModelReport", TokenStream]:
    """The model's canary, and the stream cut to `max_bytes`."""
    assert request.max_bytes is not None
    canary = examine_model(request, source, model, stream)
    layout, size = _layout(request, canary), _head_bytes(canary)
    return canary, shorten_to_fit(
        stream, request.max_bytes, root, layout, canary.head.d_model, canary.dtypes, size,
        _logits(request, canary), canary.ratios,
    )  # fmt: skip


def make_cache(
    request: ExtractionRequest,
    source: ModelSource,
    model: "torch.nn.Module",
    canary: "ModelReport | None",
    wanted: WantedCache,
    stream: TokenStream,
    root: Path,
) -> tuple[Path, "DecoderBlocks"]:
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
        save_head_and_tokenizer(folder, source, canary, request.format)
        save_reference_rows(canary.stack, stream, folder)
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


def save_head_and_tokenizer(
    folder: Path, source: ModelSource, canary: "ModelReport", version: int
) -> None:
    """The head, the tokenizer and copies of the configuration, in the format `version`."""
    canary.head.save(folder, canary.tensors)
    source.tokenizer_for_format(version).save(str(folder / "tokenizer.json"))
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

"""Loads and checks the model of a request, and makes the empty cache of a plan.

`answer_request.py` calls these steps in order: load, plan (`plan.py`), make. The checks of the
model are in `cache/checks`.
"""

import json
import platform
import time
from dataclasses import replace
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.reference_rows import save_reference_rows
from ..devices import choose_device, memory_errors
from ..format.manifest import ALONE, BATCH, CODEC, GRID, Manifest
from ..images.classifier_source import ClassifierSource
from ..images.image_stream import ImageStream
from ..model.loaded_model import LoadedModel
from ..model.model_devices import device_names
from ..model.source import ModelSource
from ..store.cache_creation import create_cache
from ..store.local_origin import public_name, write_origin
from ..tokens.token_stream import TokenStream
from .given_inputs import LOADED
from .image_request import check_requested_classifier, load_requested_classifier
from .plan import ExtractionPlan, kept_layers
from .request import ExtractionRequest
from .resolve import WantedCache

if TYPE_CHECKING:
    import torch

    from ..checks.model_checks import ModelReport


def load_requested_model(request: ExtractionRequest, source: ModelSource) -> "torch.nn.Module":
    """The model of the request, on the requested device.

    Raises `ModelError` if the model does not fit into memory.
    """
    from ..model.model_loading import load_model

    if isinstance(source, LoadedModel):
        return source.module
    device = choose_device(request.device)
    with memory_errors(
        f"{source.name} does not fit into the memory of {device}; take another --device, "
        "--device-map auto (all GPUs, then the host), or a checkpoint of lower precision"
    ):
        if isinstance(source, ClassifierSource):
            return load_requested_classifier(request, source, device)
        return load_model(
            source,
            device,
            request.attention,
            request.trust_remote_code,
            device_map=request.device_map,
        )


def with_loaded_dtype(source: ModelSource, model: "torch.nn.Module") -> ModelSource:
    """`source` with the dtype in which `model`, loaded from this source, runs.

    `source` itself is returned where the configuration names this dtype already.
    """
    from ..checks.independence import lowest_dtype

    dtype = str(lowest_dtype(model)).removeprefix("torch.")
    return source if dtype == source.compute_dtype else replace(source, loaded_dtype=dtype)


def plan_extraction(
    request: ExtractionRequest, source: ModelSource, model: "torch.nn.Module", stream: TokenStream
) -> ExtractionPlan:
    """The plan of a new cache: the model is checked, the stream cut to the request's `max_bytes`.

    Raises `ModelError` or `HeadMismatchError` if a cache cannot hold the model.
    """
    from ..checks.model_checks import check_model

    if isinstance(source, ClassifierSource):
        report = check_requested_classifier(request, source, model, stream)
    else:
        report = check_model(
            model, stream, source.compute_dtype, request.dtype, request.logits, request.batch_tokens
        )
    layers = kept_layers(request.layers, report.stack.depth)
    report = replace(report, dtypes={layer: report.dtypes[layer] for layer in layers})
    plan = ExtractionPlan(request, report, stream)

    if request.codec != "raw":
        from ..checks.compression_ratio import measure_compression_ratio

        ratios = measure_compression_ratio(
            report, stream, plan.layout, request.logits, plan.stored_logits
        )
        plan = replace(plan, model_report=replace(report, ratios=ratios))

    return plan if request.max_bytes is None else plan.shortened(request.max_bytes)


def make_cache(plan: ExtractionPlan, source: ModelSource, wanted: WantedCache, root: Path) -> Path:
    """Make the empty cache of `plan` under `root`, with head, tokenizer, tokens and manifest.

    Raises `NoSpaceError` before anything is written if the cache does not fit on the disk.
    """
    plan.estimate(root).check(root)
    request, report, stream = plan.request, plan.model_report, plan.stream

    def write_head(folder: Path) -> None:
        save_head_and_tokenizer(folder, source, report, request.format)
        if isinstance(stream, ImageStream):
            from ..images.classifier_checks import save_reference_image

            save_reference_image(report.stack, stream, folder)
        else:
            save_reference_rows(report.stack, stream, folder)
        write_origin(folder.parent, request.model, request.data)

    return create_cache(
        root,
        _manifest(plan, source, wanted),
        stream,
        hashes=stream.digests()[1],
        dtypes=report.dtypes,
        write_head=write_head,
        provenance=_provenance(plan, source),
        logits_dtype=report.logits.dtype,
    )


def _manifest(plan: ExtractionPlan, source: ModelSource, wanted: WantedCache) -> Manifest:
    request, report = plan.request, plan.model_report
    extra: dict[str, Any] = {
        "pad": report.pad,
        "causal": report.causal,
        "embedding": report.embedding,
    }
    if report.alone:
        extra[BATCH] = ALONE
    if isinstance(source, ClassifierSource):
        extra[GRID] = source.to_extra()
    if request.codec != "raw":  # absent in raw caches, as in those made before codecs existed
        extra[CODEC] = request.codec
    return Manifest(
        model=wanted.model,
        tokens=wanted.tokens,
        capture=wanted.capture,
        layout=plan.layout.shrunk(plan.stream.positions),
        d_model=report.head.d_model,
        vocab=report.head.vocab,
        depth=report.stack.depth,
        batch_tokens=plan.batch_tokens,
        model_name=public_name(request.model),
        data_name=public_name(request.data),
        extra=extra,
        format=request.format,
    )


def _provenance(plan: ExtractionPlan, source: ModelSource) -> dict[str, Any]:
    """The content of `provenance.json`: measurements, versions, device and reading of the texts."""
    import torch
    import transformers

    model = plan.model_report.stack.model
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if plan.request.codec != "raw":  # another version may compress to other bytes
        versions["numcodecs"] = version_of("numcodecs")
    return {
        "canary": plan.model_report.to_dict(),
        "geometry": plan.model_report.head.digest,
        "device": device_names(model),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        # Tensors that the checkpoint lacks and the class computes, and those that no module reads.
        "checkpoint": getattr(model, "checkpoint_notes", None),
        "versions": versions,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": source.revision,
        "cut": plan.stream.cut_counts,
        "reading": plan.stream.reading.to_dict(),
        # Only a caller that still holds the model can give it to a repair.
        **({LOADED: True} if isinstance(source, LoadedModel) and not source.is_in_folder else {}),
    }


def save_head_and_tokenizer(
    folder: Path, source: ModelSource, report: "ModelReport", format: int
) -> None:
    """Write head, tokenizer and copies of the configuration to `folder`, in the cache's format.

    An image classifier has an image processor in place of the tokenizer.
    """
    report.head.save(folder, report.tensors)
    if isinstance(source, ClassifierSource):
        source.save_processor(folder)
    else:
        source.tokenizer_for_format(format).save(str(folder / "tokenizer.json"))
    for name in ("config.json", "tokenizer_config.json"):
        if (source.folder / name).is_file():
            (folder / name).write_bytes(_without_paths((source.folder / name).read_bytes()))


def _without_paths(config: bytes) -> bytes:
    """A JSON configuration without the paths of its author; unchanged if no path is in it."""
    value = json.loads(config)
    public_value = _drop_path_keys(value)
    if public_value == value:
        return config
    return json.dumps(public_value, indent=2, ensure_ascii=False).encode() + b"\n"


def _drop_path_keys(value: Any) -> Any:
    if isinstance(value, dict):
        path_keys = ("_name_or_path", "name_or_path")
        return {key: _drop_path_keys(item) for key, item in value.items() if key not in path_keys}
    return [_drop_path_keys(item) for item in value] if isinstance(value, list) else value

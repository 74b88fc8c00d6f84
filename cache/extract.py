"""Extraction: a frozen model and texts go in, a cache comes out: hit, extend, resume or extract.

texts -> tokens -> is it there? -> model -> checks -> empty cache -> parts
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .budget import Estimate, estimate, shorten
from .catalog import cache_root
from .columns import blocks, scratch_folder
from .create import choose_dtype, create_cache, sweep_unfinished
from .data import load_documents
from .disk import check_writable, disk_errors
from .encode import tokenize
from .errors import ModelError, UsageError
from .fill import fill
from .grow import add_layers, add_tokens, joined, unnamed_layers
from .jsonfile import read_json
from .layout import STORED_DTYPES, Layout
from .logits import LogitsArray, arrays_of
from .manifest import CODEC, CaptureIdentity, Manifest, TokenIdentity
from .oom import choose_batch_tokens, memory_errors
from .origin import public_name, write_origin
from .place import as_path
from .policy import keep
from .replay import check, record
from .request import Request
from .resolve import Resolution, Wanted, resolve
from .source import ModelSource
from .stages import Stages
from .store import ActivationCache
from .tokens import TokenStream

if TYPE_CHECKING:
    import torch
    from distributed import Client

    from .canary import Canary
    from .stack import Stack

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages are `tokenize` (documents) and `extract` (positions)."""
DEFAULT_CONTEXT = 1024
LOGITS_BATCH_BYTES = 128 << 20
"""Most bytes of the kept logits of a batch, a few of which are in memory at a time."""


@dataclass(frozen=True)
class Extraction:
    """What `run` did."""

    cache: ActivationCache
    status: str
    """`extracted`, `extended`, `resumed` or `hit`."""
    head_error: float
    """Largest |head(layer L) - model's logits| over the largest |logit|, measured on a canary."""
    written: int
    """Positions written by this call."""
    seconds: float
    """Wall time of this call."""
    cut: dict[str, int]
    """How many `sequences` of the request lost how many `tokens` to the context."""
    stages: Stages = field(default_factory=Stages)
    """How busy forward, copy and write were; with a scheduler, of all workers together."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua extract`."""
        return {
            "cache": self.cache.id,
            "path": str(self.cache.path),
            "status": self.status,
            "positions": self.cache.positions,
            "layers": list(self.cache.layers),
            "complete": self.cache.finished,
            "parts": [len(self.cache.committed), self.cache.parts],
            "bytes": self.cache.bytes,
            "head_error": self.head_error,
            "written": self.written,
            "cut": self.cut,
            "seconds": round(self.seconds, 3),
            "stages": self.stages.to_dict(),
        }


def extract(
    model: str | Path,
    data: str | Path,
    *,
    client: "Client | None" = None,
    progress: Progress | None = None,
    **options: Any,
) -> ActivationCache:
    """Run `model` on the texts of `data` once and return the cache of its residual streams.

    A cache that holds what is asked, or more, is returned at once; an unfinished one is finished,
    one that lacks layers or tokens is extended. Options are the fields of `Request`; all workers
    of `client`, of `dask.distributed`, share the work if they see the same files. Raises
    `ModelError`, `DataError`, `HeadMismatchError` or `NoSpaceError` before anything is written.
    """
    if options.get("root") is not None:
        options["root"] = as_path(options["root"])
    if options.get("layers") is not None:
        options["layers"] = tuple(options["layers"])
    request = Request(str(model), str(data), **options)
    if client is not None:
        from .distributed import run_on

        return run_on(client, request, progress).cache
    return run(request, progress).cache


def run(
    request: Request, progress: Progress | None = None, stages: Stages | None = None
) -> Extraction:
    """Answer `request` from an existing cache, or finish or extend one, or make it.

    `stages`, which others may look at meanwhile, books how busy forward, copy and write are.
    """
    began = time.perf_counter()
    stages = Stages() if stages is None else stages
    root = cache_root(request.root)
    source = ModelSource.locate(request.model, request.revision)
    stream = read_stream(request, source, progress)
    model: torch.nn.Module | None = None
    canary: Canary | None = None
    if request.max_bytes is not None:
        model = load(request, source)
        canary, stream = _shortened(request, source, model, stream, root)
    wanted = want(request, source, stream)
    found = resolve(wanted, root)
    path, status = found.path, "hit"
    written = 0
    if path is None or found.answer in ("miss", "partial"):
        check_writable(root)
        sweep_unfinished(root)
        model = model or load(request, source)
        with disk_errors(root):
            if path is None or found.answer == "miss":
                status, (path, stack) = (
                    "extracted",
                    _create(request, source, model, canary, wanted, stream, root),
                )
            else:
                status, path, stack = _extend(
                    request, model, found, wanted, stream, progress, stages
                )
        written = fill(
            ActivationCache(path), stack, progress, request.share, request.on_error, stages
        )
        if unnamed_layers(ActivationCache(path), _kept(request.layers, stack.depth)):
            # Another process, which wants fewer layers, made this cache a moment before.
            done = run(request, progress, stages)
            return replace(done, written=done.written + written)
    cache = ActivationCache(path)
    if request.part is None:
        cache.check_complete()
    error = read_json(cache.path / "provenance.json")["canary"]["head_error"]
    seconds = time.perf_counter() - began
    return Extraction(cache, status, error, written, seconds, stream.cut_counts, stages)


def plan(request: Request, progress: Progress | None = None) -> Estimate:
    """What `request` would take on the disk; loads the model, writes nothing."""
    root = cache_root(request.root)
    source = ModelSource.locate(request.model, request.revision)
    stream = read_stream(request, source, progress)
    model = load(request, source)
    if request.max_bytes is not None:
        canary, stream = _shortened(request, source, model, stream, root)
    else:
        canary = _examine(request, source, model, stream)
    return replace(_estimate(request, canary, stream, root), cut=stream.cut_counts)


def find(request: Request, progress: Progress | None = None) -> Resolution:
    """Which cache answers `request`, if any; loads no weights."""
    source = ModelSource.locate(request.model, request.revision)
    stream = read_stream(request, source, progress)
    return resolve(want(request, source, stream), cache_root(request.root))


def choose_context(request: Request, source: ModelSource) -> int:
    """Context length of the request, checked against the model's."""
    limit = source.context
    if request.context is None:
        return min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if limit is not None and request.context > limit:
        raise UsageError(
            f"context {request.context} is longer than this model's {limit}; choose less"
        )
    return request.context


def read_stream(request: Request, source: ModelSource, progress: Progress | None) -> TokenStream:
    """The token stream of the request."""
    scratch = scratch_folder(cache_root(request.root))
    documents = load_documents(
        request.data, request.text_column, request.split, not request.pack, scratch
    )
    stream = tokenize(
        documents,
        source.tokenizer,
        context=choose_context(request, source),
        pack=request.pack,
        separator=source.separator,
        seed=request.seed,
        max_tokens=request.max_tokens,
        progress=progress and (lambda done, total: progress("tokenize", done, total)),
        scratch=scratch,
    )
    vocab = source.constant("vocab_size")
    largest = max(int(block.max()) for block in blocks(stream.ids))
    if isinstance(vocab, int) and largest >= vocab:
        raise ModelError(
            f"the tokenizer gives token {largest}, but the model's vocabulary has "
            f"{vocab}; the tokenizer files do not belong to this model"
        )
    return keep(request.positions, stream, documents, request.seed)


def want(request: Request, source: ModelSource, stream: TokenStream) -> Wanted:
    """The identity that the request asks for."""
    digest, hashes = stream.digests()
    tokens = TokenIdentity(
        digest,
        stream.positions,
        stream.sequences,
        source.tokenizer_digest,
        choose_context(request, source),
        request.pack,
        request.seed,
    )
    capture = CaptureIdentity(
        source.compute_dtype,
        request.dtype,
        request.attention,
        request.positions,
        logits=request.logits,
    )
    if stream.runs is not None:
        hashes = hashes[stream.runs.sequence]
    return Wanted(source.identity, tokens, capture, hashes, request.layers)


def load(request: Request, source: ModelSource) -> "torch.nn.Module":
    """The model of the request, on its device."""
    from .model import choose_device, load_model

    device = choose_device(request.device)
    with memory_errors(
        f"{source.name} does not fit into the memory of {device}; take another --device, or a "
        "checkpoint of lower precision"
    ):
        return load_model(source, device, request.attention, request.trust_remote_code)


def _examine(
    request: Request, source: ModelSource, model: "torch.nn.Module", stream: TokenStream
) -> "Canary":
    """What a few sequences show of the model, with the dtypes of the layers that are kept."""
    from .canary import examine

    canary = examine(model, stream, source.compute_dtype, request.dtype, request.logits)
    kept = _kept(request.layers, canary.stack.depth)
    canary = replace(canary, dtypes={layer: canary.dtypes[layer] for layer in kept})
    if request.codec == "raw":
        return canary
    from .ratio import measure

    arrays = _logits(request, canary)
    ratios = measure(canary, stream, _layout(request, canary), request.logits, arrays)
    return replace(canary, ratios=ratios)


def _kept(layers: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """The layers to keep: those asked for, and layer L."""
    if layers is None:
        return tuple(range(depth + 1))
    if max(layers) > depth:
        raise UsageError(f"layer {max(layers)} is not in this model; it has layers 0-{depth}")
    return tuple(sorted({*layers, depth}))


def _layout(request: Request, canary: "Canary") -> Layout:
    widest = max((array.row_bytes for array in _logits(request, canary)), default=0)
    return Layout.choose(canary.head.d_model, _itemsize(canary), request.part_positions, widest)


def _layout_of(request: Request, cache: ActivationCache) -> Layout:
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


def _estimate(request: Request, canary: "Canary", stream: TokenStream, root: Path) -> Estimate:
    return estimate(
        root, _layout(request, canary), canary.head.d_model, canary.dtypes, stream.positions,
        stream.sequences, _head_bytes(canary), 0 if stream.runs is None else len(stream.ids),
        _logits(request, canary), canary.ratios,
    )  # fmt: skip


def _shortened(
    request: Request, source: ModelSource, model: "torch.nn.Module", stream: TokenStream, root: Path
) -> tuple["Canary", TokenStream]:
    """The model's canary, and the stream cut to `max_bytes`."""
    assert request.max_bytes is not None
    canary = _examine(request, source, model, stream)
    layout, size = _layout(request, canary), _head_bytes(canary)
    return canary, shorten(
        stream, request.max_bytes, root, layout, canary.head.d_model, canary.dtypes, size,
        _logits(request, canary), canary.ratios,
    )  # fmt: skip


def _create(
    request: Request,
    source: ModelSource,
    model: "torch.nn.Module",
    canary: "Canary | None",
    wanted: Wanted,
    stream: TokenStream,
    root: Path,
) -> tuple[Path, "Stack"]:
    """Examine the model, check the space and make the empty cache."""
    canary = canary or _examine(request, source, model, stream)
    _estimate(request, canary, stream, root).check(root)
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
            # Left out where it is raw, as it was before there was a choice.
            **({} if request.codec == "raw" else {CODEC: request.codec}),
        },
    )

    def write_head(folder: Path) -> None:
        save_head(folder, source, canary)
        record(canary.stack, stream, folder)
        write_origin(folder.parent, request.model, request.data)

    provenance = {
        **_provenance(model, canary.report()),
        "revision": source.revision,
        "cut": stream.cut_counts,
    }
    if request.codec != "raw":  # other versions may compress to other bytes
        provenance["versions"]["numcodecs"] = version("numcodecs")
    path = create_cache(
        root, manifest, stream, stream.digests()[1], canary.dtypes, write_head, provenance,
        canary.logits.dtype,
    )  # fmt: skip
    return path, canary.stack


def save_head(folder: Path, source: ModelSource, canary: "Canary") -> None:
    """The head, the tokenizer and copies of the configuration."""
    canary.head.save(folder, canary.tensors)
    source.tokenizer.save(str(folder / "tokenizer.json"))
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


def _extend(
    request: Request,
    model: "torch.nn.Module",
    found: Resolution,
    wanted: Wanted,
    stream: TokenStream,
    progress: Progress | None,
    stages: Stages,
) -> tuple[str, Path, "Stack"]:
    """Give the cache that was found its missing layers and tokens, still to be filled."""
    from .canary import reexamine

    assert found.path is not None
    cache = ActivationCache(found.path)
    stack = reexamine(model, cache)
    check(stack, cache.path, cache.manifest.capture.compute_dtype)
    kept = _kept(request.layers, cache.depth)
    new = unnamed_layers(cache, kept)
    if new:
        add_layers(cache, _dtypes(stack, stream, cache.manifest.capture, new))
    if not found.missing_sequences:
        return "extended" if new else "resumed", cache.path, stack
    fill(cache, stack, progress, on_error=request.on_error, stages=stages)
    cache = ActivationCache(cache.path)
    longer = joined(cache, stream, found.missing_sequences)
    digest, _ = longer.digests()
    tokens = replace(
        wanted.tokens, digest=digest, positions=longer.positions, sequences=longer.sequences
    )
    layout = cache.manifest.layout
    if cache.positions <= layout.chunk_rows:  # it may be a small cache's
        layout = _layout_of(request, cache).shrunk(longer.positions)
    return "extended", add_tokens(cache, tokens, longer, layout), stack


def _dtypes(
    stack: "Stack", stream: TokenStream, capture: CaptureIdentity, layers: tuple[int, ...]
) -> dict[int, str]:
    """Stored dtypes of further layers, by a calibration pass."""
    import torch

    from .canary import calibrate

    with torch.inference_mode():
        absmax = calibrate(stack, stream, next(stack.model.parameters()).device)
    return {n: choose_dtype(absmax[n], capture.compute_dtype, capture.dtype) for n in layers}


def _provenance(model: "torch.nn.Module", canary: dict[str, object]) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "canary": canary,
        "device": str(next(model.parameters()).device),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }

"""Extraction: a frozen model and texts go in, a cache comes out: hit, extend, resume or extract.

texts -> tokens -> is it there? -> model -> checks -> empty cache -> parts
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.reference_rows import check_reference_rows
from ..documents.documents import Reading
from ..files.disk_errors import check_writable, disk_errors
from ..files.json_files import read_json
from ..format.dtypes import choose_dtype
from ..format.manifest import ALONE, BATCH, CaptureIdentity
from ..forward.stage_times import StageTimes
from ..forward.write_parts import write_missing_parts
from ..model.source import ModelSource
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.catalog import cache_root
from ..store.create_cache import sweep_unfinished
from ..store.extend_cache import add_layers, add_tokens, join_stream, unnamed_layers
from ..tokens.token_stream import TokenStream
from .plan import Estimate, estimate_of, kept_layers, layout_like
from .prepare import (
    examine_model,
    load_requested_model,
    make_cache,
    shorten_stream,
    with_loaded_dtype,
)
from .request import ExtractionRequest
from .resolve import CacheMatch, WantedCache, match_cache, read_stream, wanted_cache

if TYPE_CHECKING:
    import torch

    from ..checks.independence import Independence
    from ..checks.model_checks import ModelReport
    from ..model.blocks import DecoderBlocks


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
    reading: Reading = field(default_factory=Reading)
    """How the texts of the request were read, and which documents were left out."""
    stages: StageTimes = field(default_factory=StageTimes)
    """How busy forward, copy and write were; with a scheduler, of all workers together."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua extract`."""
        with disk_errors(self.cache.path):
            return self._counted()

    def _counted(self) -> dict[str, Any]:
        return {
            "cache": self.cache.id,
            "path": str(self.cache.path),
            "status": self.status,
            "positions": self.cache.positions,
            "layers": list(self.cache.layers),
            "complete": self.cache.finished,
            "parts": [len(self.cache.committed), self.cache.n_parts],
            "bytes": self.cache.bytes,
            "head_error": self.head_error,
            "written": self.written,
            "cut": self.cut,
            "split_by": self.cache.manifest.tokens.split_by,
            "reading": self.reading.to_dict(),
            "quarantined": len(self.cache.quarantined),
            "seconds": round(self.seconds, 3),
            "stages": self.stages.to_dict(),
        }


def answer_request(
    request: ExtractionRequest,
    progress: StageProgress | None = None,
    stages: StageTimes | None = None,
) -> Extraction:
    """Answer `request` from an existing cache, or finish or extend one, or make it.

    `stages`, which others may look at meanwhile, books how busy forward, copy and write are.
    """
    began = time.perf_counter()
    stages = StageTimes() if stages is None else stages
    root = cache_root(request.root)
    source = ModelSource.locate(request.model, request.revision, request.trust_remote_code)
    stream = read_stream(request, source, progress)
    model: torch.nn.Module | None = None
    canary: ModelReport | None = None
    if request.max_bytes is not None:
        model = load_requested_model(request, source)
        source = with_loaded_dtype(source, model)
        canary, stream = shorten_stream(request, source, model, stream, root)
    wanted = wanted_cache(request, source, stream)
    found = match_cache(wanted, root)
    if found.path is None or found.answer in ("miss", "partial"):
        check_writable(root)
        sweep_unfinished(root)
        model = model or load_requested_model(request, source)
        if (loaded := with_loaded_dtype(source, model)) is not source:
            # The files said another dtype than the model has: the model's goes into the identity.
            source, wanted = loaded, wanted_cache(request, loaded, stream)
            found = match_cache(wanted, root)
    path, status = found.path, "hit"
    written = 0
    if path is None or found.answer in ("miss", "partial"):
        assert model is not None
        with disk_errors(root):
            if path is None or found.answer == "miss":
                status, (path, stack) = (
                    "extracted",
                    make_cache(request, source, model, canary, wanted, stream, root),
                )
            else:
                status, path, stack = _extend(
                    request, model, found, wanted, stream, progress, stages
                )
        with disk_errors(path):
            written = write_missing_parts(
                ActivationCache(path), stack, progress, request.share, request.on_error, stages
            )
            lacks = unnamed_layers(ActivationCache(path), kept_layers(request.layers, stack.depth))
        if lacks:
            # Another process, which wants fewer layers, made this cache a moment before.
            done = answer_request(request, progress, stages)
            return replace(done, written=done.written + written)
    with disk_errors(path):
        cache = ActivationCache(path)
        if request.part is None:
            cache.check_complete()
        error = read_json(cache.path / "provenance.json")["canary"]["head_error"]
    seconds = time.perf_counter() - began
    return Extraction(
        cache, status, error, written, seconds, stream.cut_counts, stream.reading, stages
    )


def estimate_request(request: ExtractionRequest, progress: StageProgress | None = None) -> Estimate:
    """What `request` would take on the disk; loads the model, writes nothing."""
    root = cache_root(request.root)
    source = ModelSource.locate(request.model, request.revision, request.trust_remote_code)
    stream = read_stream(request, source, progress)
    model = load_requested_model(request, source)
    source = with_loaded_dtype(source, model)
    if request.max_bytes is not None:
        canary, stream = shorten_stream(request, source, model, stream, root)
    else:
        canary = examine_model(request, source, model, stream)
    return replace(
        estimate_of(request, canary, stream, root), cut=stream.cut_counts, reading=stream.reading
    )


def find_match(request: ExtractionRequest, progress: StageProgress | None = None) -> CacheMatch:
    """Which cache answers `request`, if any; loads no weights."""
    source = ModelSource.locate(request.model, request.revision, request.trust_remote_code)
    stream = read_stream(request, source, progress)
    return match_cache(wanted_cache(request, source, stream), cache_root(request.root))


def _extend(
    request: ExtractionRequest,
    model: "torch.nn.Module",
    found: CacheMatch,
    wanted: WantedCache,
    stream: TokenStream,
    progress: StageProgress | None,
    stages: StageTimes,
) -> tuple[str, Path, "DecoderBlocks"]:
    """Give the cache that was found its missing layers and tokens, still to be filled."""
    from ..checks.model_checks import independence_of, recheck_model

    assert found.path is not None
    cache = ActivationCache(found.path)
    stack = recheck_model(model, cache)
    check_reference_rows(stack, cache.path, cache.manifest.capture.compute_dtype)
    kept = kept_layers(request.layers, cache.n_blocks)
    new = unnamed_layers(cache, kept)
    if new:
        add_layers(cache, _dtypes(stack, stream, cache.manifest.capture, new))
    if not found.missing_sequences:
        return "extended" if new else "resumed", cache.path, stack
    write_missing_parts(cache, stack, progress, on_error=request.on_error, stages=stages)
    cache = ActivationCache(cache.path)
    longer = join_stream(cache, stream, found.missing_sequences)
    digest, _ = longer.digests()
    tokens = replace(
        wanted.tokens, digest=digest, positions=longer.positions, sequences=longer.sequences
    )
    layout = cache.manifest.layout
    if cache.positions <= layout.chunk_rows:  # it may be a small cache's
        layout = layout_like(request, cache).shrunk(longer.positions)
    extra = _sharing(cache, independence_of(stack, longer, cache.manifest.batch_tokens))
    return "extended", add_tokens(cache, tokens, longer, layout, extra), stack


def _sharing(cache: ActivationCache, found: "Independence") -> dict[str, Any]:
    """Keys of `extra` for the sequences that are added: as careful as the cache or `found` asks."""
    kept = cache.manifest.extra
    extra = {"pad": cache.manifest.pad and found.pad}
    for name in ("causal", "embedding"):
        extra[name] = bool(kept.get(name, True)) and getattr(found, name)
    return {**extra, **({BATCH: ALONE} if cache.manifest.alone or found.alone else {})}


def _dtypes(
    stack: "DecoderBlocks", stream: TokenStream, capture: CaptureIdentity, layers: tuple[int, ...]
) -> dict[int, str]:
    """Stored dtypes of further layers, by a calibration pass."""
    import torch

    from ..checks.model_checks import measure_value_ranges

    with torch.inference_mode():
        ranges = measure_value_ranges(stack, stream, next(stack.model.parameters()).device)
    return {n: choose_dtype(ranges[n], capture.compute_dtype, capture.dtype) for n in layers}

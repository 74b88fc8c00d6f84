"""Answers an extraction request: from an existing cache, or by running the model on the texts.

Tokens -> look-up under the root -> model and its checks -> empty or extended cache -> parts.
`extract.py`, the command line and `distributed.py` call `answer_request`; `resolve.py` looks
caches up, `prepare.py` makes them, `forward/write_parts.py` runs the model.
"""

import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks.reference_rows import check_reference_rows
from ..documents.documents import Reading
from ..documents.labels import LABEL_PREFIX
from ..errors import ResiduaWarning
from ..files.confined_files import read_confined_json
from ..files.disk_errors import check_writable, translate_disk_errors
from ..format.dtypes import choose_dtype
from ..format.manifest import ALONE, BATCH, SHORT_ID
from ..forward.stage_times import StageTimes
from ..forward.write_parts import write_missing_parts
from ..images.classifier_source import ClassifierSource
from ..model.model_devices import input_device
from ..model.source import ModelSource
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.cache_creation import sweep_unfinished
from ..store.cache_extension import add_layers, add_tokens, join_stream, unnamed_layers
from ..store.catalog import cache_root
from ..tokens.stream_summary import StreamSummary, label_digest
from ..tokens.token_stream import TokenStream
from .image_request import locate_source, recheck_requested_classifier, request_for
from .plan import Estimate, ExtractionPlan, kept_layers, layout_like
from .prepare import load_requested_model, make_cache, plan_extraction, with_loaded_dtype
from .request import ExtractionRequest
from .resolve import (
    CacheMatch,
    WantedCache,
    match_cache,
    read_stream,
    summarize_stream,
    wanted_cache,
)
from .stream_memo import data_stamps, read_stream_memo, write_stream_memo

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from ..checks.independence import Independence
    from ..model.blocks import DecoderBlocks


@dataclass(frozen=True)
class Extraction:
    """The cache that answers a request, and the work of the call that returned the cache."""

    cache: ActivationCache
    status: str
    """`extracted`, `extended`, `resumed` or `hit`."""
    head_error: float
    """Largest |head(layer L) - model's logits| over the largest |logit|, on checked tokens."""
    written: int
    """Positions written by this call."""
    seconds: float
    """Wall time of this call."""
    cut: dict[str, int]
    """How many `sequences` of the request lost how many `tokens` to the context."""
    reading: Reading = field(default_factory=Reading)
    """How the texts of the request were read, and which documents were left out."""
    stages: StageTimes = field(default_factory=StageTimes)
    """Busy time of forward, copy and write; with a scheduler, of all workers together."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua extract`."""
        with translate_disk_errors(self.cache.path):
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
    """Return the cache of `request`, found under the root or else finished, extended or made.

    `progress` is called for the stages `tokenize` (documents) and `extract` (positions). `stages`
    collects the busy time of forward, copy and write; other threads may read them meanwhile.
    """
    began = time.perf_counter()
    stages = StageTimes() if stages is None else stages
    root = cache_root(request.root)
    lookup = _look_up_or_load(request, root, progress)

    if lookup.match.is_sufficient:
        assert lookup.match.path is not None
        path, status, written = lookup.match.path, "hit", 0
    else:
        # An empty cache, or a cache with empty arrays for what is missing.
        with translate_disk_errors(root):
            if lookup.match.answer == "miss":
                path, status, stack = _create(lookup, root)
            else:
                path, status, stack = _extend(lookup, progress, stages)

        # The forward passes.
        with translate_disk_errors(path):
            written = write_missing_parts(
                ActivationCache(path), stack, progress, request.share, request.on_error, stages
            )
            layers = kept_layers(request.layers, stack.depth)
            absent_layers = unnamed_layers(ActivationCache(path), layers)
        if absent_layers:
            # Another process with a request for fewer layers made the same cache meanwhile;
            # now there is a cache to extend.
            extension = answer_request(request, progress, stages)
            return replace(extension, written=extension.written + written)

    with translate_disk_errors(path):
        cache = ActivationCache(path)
        if request.part is None:
            cache.check_complete()
        head_error = read_confined_json(cache.path, "provenance.json")["canary"]["head_error"]
    return Extraction(
        cache=cache,
        status=status,
        head_error=head_error,
        written=written,
        seconds=time.perf_counter() - began,
        cut=lookup.summary.cut,
        reading=lookup.summary.reading,
        stages=stages,
    )


def estimate_request(request: ExtractionRequest, progress: StageProgress | None = None) -> Estimate:
    """Bytes and files of a new cache for `request`; loads the model, writes nothing."""
    root = cache_root(request.root)
    source = locate_source(request)
    request = request_for(request, source)
    stream = read_stream(request, source, progress)
    model = load_requested_model(request, source)
    source = with_loaded_dtype(source, model)
    return plan_extraction(request, source, model, stream).estimate(root)


def request_tokenizer(request: ExtractionRequest) -> "Tokenizer | None":
    """The tokenizer of the model of `request`, None for an image classifier; loads no weights."""
    source = locate_source(request)
    if isinstance(source, ClassifierSource):
        return None
    return source.tokenizer_for_format(request.format)


def find_match(request: ExtractionRequest, progress: StageProgress | None = None) -> CacheMatch:
    """The cache under the root that answers `request` best; loads no weights."""
    source = locate_source(request)
    request = request_for(request, source)
    summary = read_stream_memo(request, source)
    if summary is None:
        _, summary = _read_and_summarize(request, source, progress)
    return match_cache(wanted_cache(request, source, summary), cache_root(request.root))


@dataclass(frozen=True)
class _Lookup:
    """A request with its tokens, the best cache under the root, and the model if loaded."""

    request: ExtractionRequest
    source: ModelSource
    stream: TokenStream | None
    """None if a cache was sufficient, and the summary of the stream was known."""
    summary: StreamSummary
    wanted: WantedCache
    match: CacheMatch
    model: "torch.nn.Module | None"
    """None if a cache was sufficient and no weights were needed."""
    plan: ExtractionPlan | None
    """Plan of a new cache; None unless `max_bytes` had to be compared with the cache's bytes."""


def _look_up_or_load(
    request: ExtractionRequest, root: Path, progress: StageProgress | None
) -> _Lookup:
    """Look for a cache that answers `request`; load the model if no cache is sufficient."""
    source = locate_source(request)
    request = request_for(request, source)
    stream, summary = None, None
    if request.max_bytes is None:
        summary = read_stream_memo(request, source)
    if summary is None:
        stream, summary = _read_and_summarize(request, source, progress)

    # The bytes of a cache depend on the model's dtypes and head, so `max_bytes` needs the model.
    model = plan = None
    if request.max_bytes is not None:
        assert stream is not None
        model = load_requested_model(request, source)
        source = with_loaded_dtype(source, model)
        plan = plan_extraction(request, source, model, stream)
        stream = plan.stream
        summary = summarize_stream(request, source, stream)

    wanted = wanted_cache(request, source, summary)
    match = match_cache(wanted, root)
    if not match.is_sufficient:
        check_writable(root)
        sweep_unfinished(root)
        texts_are_read_again = stream is None
        if stream is None:
            stream, summary = _read_and_summarize(request, source, progress)
        model = model or load_requested_model(request, source)
        loaded_source = with_loaded_dtype(source, model)
        if loaded_source is not source or texts_are_read_again:
            # The configuration may name another dtype than the weights have, and the dtype of the
            # weights belongs to the identity; the texts may have changed after the first look.
            source = loaded_source
            wanted = wanted_cache(request, source, summary)
            match = match_cache(wanted, root)
    warn_of_other_labels(match, summary)
    return _Lookup(request, source, stream, summary, wanted, match, model=model, plan=plan)


def warn_of_other_labels(match: CacheMatch, summary: StreamSummary) -> None:
    """Warn if the matching cache has the same sequences with other labels: it keeps its own."""
    if match.path is None or match.answer == "miss" or not summary.labels:
        return
    cache = ActivationCache(match.path)
    if not np.array_equal(cache.sequence_hash, summary.hashes):
        return
    other = []
    for name, digest in summary.labels.items():
        array = LABEL_PREFIX + name
        if name not in cache.label_names:
            other.append(name)
            continue
        words = cache.categories(array) if cache.has_categories(array) else None
        if label_digest(cache.array(array)[:], words) != digest:
            other.append(name)
    if other:
        warnings.warn(
            f"the cache {cache.id[:SHORT_ID]} holds the same token sequences with other labels "
            f"({', '.join(sorted(other))}), and keeps its own; for those of these texts remove it "
            f"first (residua rm {cache.id[:SHORT_ID]}), or extract under another root",
            ResiduaWarning,
            stacklevel=2,
        )


def _read_and_summarize(
    request: ExtractionRequest, source: ModelSource, progress: StageProgress | None
) -> tuple[TokenStream, StreamSummary]:
    """The token stream of `request`, read from the texts, and its summary, which is kept."""
    stamps = data_stamps(request.data)
    stream = read_stream(request, source, progress)
    summary = summarize_stream(request, source, stream)
    write_stream_memo(request, source, stamps, summary)
    return stream, summary


def _create(lookup: _Lookup, root: Path) -> tuple[Path, str, "DecoderBlocks"]:
    """Make the empty cache of the request; path, status and the model's decoder blocks."""
    assert lookup.model is not None
    assert lookup.stream is not None
    plan = lookup.plan or plan_extraction(
        lookup.request, lookup.source, lookup.model, lookup.stream
    )
    path = make_cache(plan, lookup.source, lookup.wanted, root)
    return path, "extracted", plan.model_report.stack


def _extend(
    lookup: _Lookup, progress: StageProgress | None, stages: StageTimes
) -> tuple[Path, str, "DecoderBlocks"]:
    """Add empty arrays for missing layers and tokens; path, status and the decoder blocks.

    Layers are added to the matching cache in place. Tokens go into a new cache, which shares the
    full parts of the matching one; these are therefore written first.
    """
    from ..checks.model_checks import independence_of

    request, match = lookup.request, lookup.match
    assert match.path is not None
    assert lookup.model is not None
    assert lookup.stream is not None

    # This machine must compute the rows that the cache has already.
    cache = ActivationCache(match.path)
    stack = _recheck_model(lookup, cache)

    # Missing layers, in place.
    new_layers = unnamed_layers(cache, kept_layers(request.layers, cache.n_blocks))
    if new_layers:
        add_layers(cache, _stored_dtypes(stack, lookup.stream, cache, new_layers))
    if not match.missing_sequences:
        return cache.path, "extended" if new_layers else "resumed", stack

    # Missing sequences, in a new cache that begins with all sequences of the old one.
    write_missing_parts(cache, stack, progress, on_error=request.on_error, stages=stages)
    cache = ActivationCache(cache.path)
    stream = join_stream(cache, lookup.stream, match.missing_sequences)
    digest, _ = stream.digests()
    tokens = replace(
        lookup.wanted.tokens,
        digest=digest,
        positions=stream.positions,
        sequences=stream.sequences,
    )
    layout = cache.manifest.layout
    if cache.positions <= layout.chunk_rows:  # perhaps a layout shrunk to few positions
        layout = layout_like(request, cache).shrunk(stream.positions)
    layout.check_parts(stream.positions)
    independence = independence_of(stack, stream, cache.manifest.batch_tokens)
    extra = _stricter_batching(cache, independence)
    return add_tokens(cache, tokens, stream, layout, extra), "extended", stack


def _recheck_model(lookup: _Lookup, cache: ActivationCache) -> "DecoderBlocks":
    """The blocks of the model, after a check that it gives the rows that `cache` has."""
    from ..checks.model_checks import recheck_model

    assert lookup.model is not None
    assert lookup.stream is not None
    if isinstance(lookup.source, ClassifierSource):
        return recheck_requested_classifier(
            lookup.request, lookup.source, lookup.model, lookup.stream, cache
        )
    stack = recheck_model(lookup.model, cache)
    check_reference_rows(stack, cache.path, cache.manifest.capture.compute_dtype)
    return stack


def _stored_dtypes(
    stack: "DecoderBlocks", stream: TokenStream, cache: ActivationCache, layers: tuple[int, ...]
) -> dict[int, str]:
    """Stored dtype of each of `layers`, from the range of values on a few sequences."""
    import torch

    from ..checks.model_checks import measure_value_ranges

    capture = cache.manifest.capture
    with torch.inference_mode():
        ranges = measure_value_ranges(stack, stream, input_device(stack.model))
    return {
        layer: choose_dtype(ranges[layer], capture.compute_dtype, capture.dtype) for layer in layers
    }


def _stricter_batching(cache: ActivationCache, independence: "Independence") -> dict[str, Any]:
    """Keys of the manifest's `extra` that rule batches, where a cache gets further sequences.

    Each is the stricter of the cache's own rule and of `independence`, measured on all sequences.
    """
    old_extra = cache.manifest.extra
    extra: dict[str, Any] = {
        "pad": cache.manifest.pad and independence.pad,
        "causal": bool(old_extra.get("causal", True)) and independence.causal,
        "embedding": bool(old_extra.get("embedding", True)) and independence.embedding,
    }
    if cache.manifest.alone or independence.alone:
        extra[BATCH] = ALONE
    return extra

"""The identity of a requested cache, and the search for a matching cache under the root.

A cache with more layers or more tokens than requested also answers the request.
`answer.py` calls `read_stream`, `summarize_stream`, `wanted_cache` and `match_cache` in this order;
none of them loads the model's weights.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..documents.document_loading import load_documents, load_given_documents
from ..documents.documents import Documents, RenderConversation
from ..errors import DataError, ModelError, UsageError
from ..files.disk_columns import row_blocks, scratch_folder
from ..files.json_files import json_digest
from ..format.logits_arrays import logits_mode_covers
from ..format.manifest import (
    FORMAT,
    IMAGE,
    SEQUENCE,
    CaptureIdentity,
    ModelIdentity,
    TokenIdentity,
    identity_of,
)
from ..images.classifier_source import ClassifierSource
from ..model.source import ModelSource
from ..model.tokenizer import tokenizer_digest
from ..number_ranges import absolute_numbers
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.catalog import UNREADABLE, cache_root, list_paths
from ..tokens.positions import keep_positions
from ..tokens.stream_summary import StreamSummary
from ..tokens.token_stream import TokenStream
from ..tokens.tokenization import tokenize
from .chat_template import LazyChatTemplate
from .image_request import read_image_stream
from .request import ExtractionRequest

ANSWERS = ("hit", "covers", "partial", "miss")
"""Answers of a cache, best first."""
DEFAULT_CONTEXT = 1024
"""Longest sequence, in tokens, of a request that names none."""
STREAM_FIELDS = frozenset(f"tokens.{name}" for name in ("digest", "positions", "sequences", "seed"))
"""Identity fields that may differ where one token stream contains the other."""
LOGITS_FIELD = "capture.logits"
"""Identity field that may differ where the cache keeps more logits than requested."""
PLACEHOLDERS = tuple(
    f"{kind}_token_{key}" for kind in ("image", "video", "audio") for key in ("id", "index")
)
"""Keys of config.json with the token in whose place a model reads something that is no text."""
Difference = tuple[str, Any, Any]
"""An identity field with its values in the first and in the second identity."""


@dataclass(frozen=True)
class WantedCache:
    """Identity, sequences and layers that a request asks for, known without the model's weights."""

    model: ModelIdentity
    tokens: TokenIdentity
    capture: CaptureIdentity
    hashes: np.ndarray
    """64 bits of the sha256 of each sequence, `(sequences,)` uint64."""
    layers: tuple[int, ...] | None = None
    """Requested layers; None for all."""
    format: int = FORMAT
    """Format of the cache: a cache of another format is a miss."""

    @property
    def identity(self) -> dict[str, Any]:
        """The JSON object whose hash is the id of the cache."""
        return identity_of(self.format, self.model, self.tokens, self.capture)


@dataclass(frozen=True)
class CacheMatch:
    """The best answer of the caches under a root, and its gaps."""

    answer: str
    """`hit`: exactly the request; `covers`: the request and more; `partial`: layers or sequences
    are missing; `miss`: no cache."""
    path: Path | None = None
    """Folder of the answering cache; for a miss of the nearest one, None without any."""
    missing_layers: tuple[int, ...] = ()
    """Requested layers that the cache lacks."""
    missing_sequences: tuple[int, ...] = ()
    """Numbers of the request's sequences that the cache lacks."""
    unfinished: bool = False
    """True if the cache's own extraction was interrupted."""
    differences: tuple[Difference, ...] = ()
    """For a miss: (field, requested value, value in the nearest cache)."""

    @property
    def is_sufficient(self) -> bool:
        """Whether the cache answers the request without any forward pass."""
        return self.answer in ("hit", "covers")

    def to_dict(self) -> dict[str, Any]:
        """The match as a JSON object."""
        value = asdict(self)
        value["cache"] = self.path.name if self.path else None
        value["path"] = str(self.path) if self.path else None
        value["missing_sequences"] = len(self.missing_sequences)
        keys = ("field", "asked", "found")
        value["differences"] = [
            dict(zip(keys, difference, strict=True)) for difference in self.differences
        ]
        return value


def read_stream(
    request: ExtractionRequest, source: ModelSource, progress: StageProgress | None
) -> TokenStream:
    """Read and tokenize the texts of `request`; token columns lie on the disk.

    Raises `DataError` if no text can be read, `ModelError` if the tokenizer gives ids beyond the
    model's vocabulary.
    """
    if isinstance(source, ClassifierSource):
        return read_image_stream(request, source, progress)
    scratch = scratch_folder(cache_root(request.root))
    template = None
    if source.has_chat_template and request.format > 1:
        template = LazyChatTemplate(source, request.generation_prompt)
    documents = _load_documents(request, scratch, template and template.render)
    _check_readable(request, documents)
    stream = tokenize(
        documents,
        source.tokenizer_for_format(request.format),
        context=choose_context(request, source),
        pack=request.pack,
        separator=source.separator,
        seed=request.seed,
        max_tokens=request.max_tokens,
        progress=progress and (lambda done, total: progress("tokenize", done, total)),
        scratch=scratch,
        version=request.format,
        bos=request.bos,
        eos=source.eos if request.bos == "bos-eos" else None,
    )
    if template is not None and documents.is_rendered:
        stream = replace(stream, chat_template=template.digest)
        documents.reading.notes.append(
            f"the conversations of the column {documents.reading.text_column!r} are rendered with "
            f"the model's chat template, {'with' if request.generation_prompt else 'without'} a "
            "generation prompt (--generation-prompt)"
        )
    _check_vocabulary(source, stream, documents)
    return keep_positions(request.positions, stream, documents, request.seed)


def _check_readable(request: ExtractionRequest, documents: Documents) -> None:
    """Raise an error for options that need another kind of documents."""
    if documents.holds_token_ids and request.positions == "answer":
        raise UsageError(
            "positions answer looks for the answer in a text, and these rows are token ids; give "
            "their token numbers in a column `positions`, and --positions explicit"
        )
    if documents.holds_token_ids and request.format == 1:
        raise UsageError("rows of token ids need a cache of format 2; leave --format out")
    if request.generation_prompt and not documents.is_rendered:
        raise UsageError(
            f"a generation prompt is for conversations; {request.data} is read as "
            f"{'token ids' if documents.holds_token_ids else 'texts'}"
        )


def _check_vocabulary(source: ModelSource, stream: TokenStream, documents: Documents) -> None:
    """Raise an error if a token id lies beyond the model's vocabulary.

    A tokenizer of another model shows itself by ids that the embedding does not have.
    """
    _check_no_placeholder(source, stream)
    vocab = source.config_value("vocab_size")
    largest_id = max(int(block.max()) for block in row_blocks(stream.ids))
    if not isinstance(vocab, int) or largest_id < vocab:
        return
    if documents.holds_token_ids:
        raise DataError(
            f"the column {documents.reading.text_column!r} holds token {largest_id}, but the "
            f"model's vocabulary has {vocab}; the rows were made with another model's tokenizer"
        )
    raise ModelError(
        f"the tokenizer gives token {largest_id}, but the model's vocabulary has "
        f"{vocab}; the tokenizer files do not belong to this model"
    )


def _check_no_placeholder(source: ModelSource, stream: TokenStream) -> None:
    """Raise `DataError` if a token stands for an image, a video or a sound, which no text has.

    The model would read the placeholder's own embedding in its place.
    """
    placeholders = {
        value: name
        for name in PLACEHOLDERS
        if isinstance(value := source.config_value(name), int) and value >= 0
    }
    if not placeholders:
        return
    for block in row_blocks(stream.ids):
        found = np.flatnonzero(np.isin(block, list(placeholders)))
        if len(found):
            token = int(block[found[0]])
            raise DataError(
                f"the data hold token {token}, in whose place {source.name} reads an image, a "
                f"video or a sound ({placeholders[token]}); only texts are read here, and "
                "the rows would be those of no image: take it out of the texts"
            )


def _load_documents(
    request: ExtractionRequest, scratch: Path | None, render: RenderConversation | None
) -> Documents:
    """The texts of `request`: those that were given, or those of its file or data set."""
    texts = request.given.texts
    if texts is not None:
        if request.separator is not None:
            raise UsageError(f"separator is for .csv and .tsv files, not for {texts.name}")
        return load_given_documents(
            texts,
            request.text_column,
            request.split,
            scratch=scratch,
            labels=not request.pack,
            render=render,
        )
    return load_documents(
        request.data,
        request.text_column,
        request.split,
        lines=not request.pack,
        scratch=scratch,
        separator=request.separator,
        labels=not request.pack,
        data_format=request.data_format,
        render=render,
    )


def choose_context(request: ExtractionRequest, source: ModelSource) -> int:
    """Context length of the request in tokens.

    Default the model's, at most `DEFAULT_CONTEXT`. Raises `UsageError` beyond the model's.
    """
    limit = source.context
    if isinstance(source, ClassifierSource):
        return source.grid.tokens
    if request.context is None:
        return min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if limit is not None and request.context > limit:
        raise UsageError(
            f"context {request.context} is longer than this model's {limit}; choose less"
        )
    return request.context


def summarize_stream(
    request: ExtractionRequest, source: ModelSource, stream: TokenStream
) -> StreamSummary:
    """The identity of `stream`, the token stream of `request`.

    An image processor takes the place of the tokenizer.
    """
    if isinstance(source, ClassifierSource):
        return StreamSummary.of(stream, json_digest(source.processor_settings))
    return StreamSummary.of(stream, tokenizer_digest(source.tokenizer_for_format(request.format)))


def wanted_cache(
    request: ExtractionRequest, source: ModelSource, stream: StreamSummary
) -> WantedCache:
    """The cache that `request` asks for, by the identity of model, tokens and capture."""
    return WantedCache(
        model=source.identity_for_format(request.format),
        tokens=TokenIdentity(
            digest=stream.digest,
            positions=stream.positions,
            sequences=stream.sequences,
            tokenizer=stream.tokenizer,
            context=choose_context(request, source),
            packed=request.pack,
            seed=request.seed,
            split_by=stream.split_by if request.format > 1 else SEQUENCE,
            bos=request.bos,
            chat_template=stream.chat_template,
        ),
        capture=CaptureIdentity(
            compute_dtype=source.compute_dtype,
            dtype=request.dtype,
            attention=request.attention,
            positions=request.positions,
            logits=request.logits,
        ),
        hashes=stream.hashes,
        layers=request.layers,
        format=request.format,
    )


def match_cache(wanted: WantedCache, root: Path) -> CacheMatch:
    """The best match for `wanted` among the caches under `root`; damaged caches are skipped.

    Best is the order of `ANSWERS`, then the fewest missing layers and sequences, or for a miss the
    fewest differing fields.
    """
    matches = []
    for path in list_paths(root):
        try:
            matches.append(_match_with(ActivationCache(path), wanted))
        except UNREADABLE:
            continue
    return min(matches, key=_rank, default=CacheMatch("miss"))


def _rank(match: CacheMatch) -> tuple[int, int, int]:
    """Sort key of a match, smaller is better."""
    layers, sequences = len(match.missing_layers), len(match.missing_sequences)
    gaps = len(match.differences) if match.answer == "miss" else layers + sequences
    return ANSWERS.index(match.answer), gaps, layers


def _match_with(cache: ActivationCache, wanted: WantedCache) -> CacheMatch:
    """How `cache` answers `wanted`."""
    differences = differing_fields(wanted.identity, cache.manifest.identity)
    miss = CacheMatch("miss", cache.path, differences=differences)

    # Identity: only the token stream may differ, and logits if the cache keeps more of them.
    more_logits = False
    for name, requested, stored in differences:
        if name == LOGITS_FIELD and logits_mode_covers(stored, requested):
            more_logits = True
        elif name not in STREAM_FIELDS:
            return miss

    # Sequences: either stream may contain the other. Where only some positions are kept, a cache
    # of more tokens cannot be extended; nor are caches of images.
    missing_sequences, more_sequences = _compare_sequences(wanted.hashes, cache.sequence_hash)
    cannot_grow = wanted.capture.positions != "all" or wanted.tokens.split_by == IMAGE
    if missing_sequences and (more_sequences or cannot_grow):
        return miss

    # Layers: any of them may be missing, they are added in place.
    layers = absolute_numbers(wanted.layers, cache.n_blocks) or range(cache.n_blocks + 1)
    missing_layers = tuple(layer for layer in layers if layer not in cache.layers)
    unfinished = not cache.finished
    if missing_sequences or missing_layers:
        return CacheMatch("partial", cache.path, missing_layers, missing_sequences, unfinished)
    more_layers = len({*layers, cache.n_blocks}) < len(cache.layers)
    is_more = more_sequences or more_logits or more_layers
    return CacheMatch("covers" if is_more else "hit", cache.path, unfinished=unfinished)


def _compare_sequences(
    requested_hashes: np.ndarray, cache_hashes: np.ndarray
) -> tuple[tuple[int, ...], bool]:
    """Numbers of requested sequences that the cache lacks; whether the cache has further ones.

    Equal sequences are counted: the cache must have as many of them as requested.
    """
    if np.array_equal(requested_hashes, cache_hashes):
        return (), False
    unmatched = Counter(cache_hashes.tolist())
    missing = []
    for number, sequence_hash in enumerate(requested_hashes.tolist()):
        if unmatched[sequence_hash] > 0:
            unmatched[sequence_hash] -= 1
        else:
            missing.append(number)
    return tuple(missing), +unmatched != Counter()


def differing_fields(
    first: dict[str, Any], second: dict[str, Any], prefix: str = ""
) -> tuple[Difference, ...]:
    """Fields in which two identities differ: (dotted name, value in first, value in second)."""
    differences: list[Difference] = []
    for name in sorted(set(first) | set(second)):
        a, b = first.get(name), second.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            differences += differing_fields(a, b, f"{prefix}{name}.")
        elif a != b:
            differences.append((f"{prefix}{name}", a, b))
    return tuple(differences)


def named_differences(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """`differing_fields` as JSON objects with the keys `field`, `one` and `other`."""
    keys = ("field", "one", "other")
    return [
        dict(zip(keys, difference, strict=True)) for difference in differing_fields(first, second)
    ]


def describe(differences: Sequence[Difference]) -> str:
    """Differences in one line, for messages."""
    return "; ".join(
        f"{name}: {_short_text(first)} is not {_short_text(second)}"
        for name, first, second in differences
    )


def _short_text(value: Any) -> str:
    """The value as text; of a sha256 only the beginning."""
    text = str(value)
    return text[:12] if len(text) == 64 else text

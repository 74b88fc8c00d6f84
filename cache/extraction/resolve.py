"""Does a cache answer a request? Coverage, not equality: more layers or more tokens also do."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..documents.load_documents import load_documents
from ..errors import ModelError, ResiduaError, UsageError
from ..files.disk_columns import row_blocks, scratch_folder
from ..format.logits_arrays import logits_mode_covers
from ..format.manifest import (
    FORMAT,
    SEQUENCE,
    CaptureIdentity,
    ModelIdentity,
    TokenIdentity,
    identity_of,
)
from ..model.source import ModelSource
from ..model.tokenizer import tokenizer_digest
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.catalog import cache_root, list_paths
from ..tokens.positions import keep_positions
from ..tokens.token_stream import TokenStream
from ..tokens.tokenization import tokenize
from .request import ExtractionRequest

ANSWERS = ("hit", "covers", "partial", "miss")


@dataclass(frozen=True)
class WantedCache:
    """What a request asks for, known without loading the model's weights."""

    model: ModelIdentity
    tokens: TokenIdentity
    capture: CaptureIdentity
    hashes: np.ndarray
    """64 bits of the sha256 of each sequence, `(sequences,)` uint64."""
    layers: tuple[int, ...] | None = None
    """None for all layers."""
    format: int = FORMAT
    """Format of the cache: one of another format is another cache."""

    @property
    def identity(self) -> dict[str, Any]:
        return identity_of(self.format, self.model, self.tokens, self.capture)


@dataclass(frozen=True)
class CacheMatch:
    """The best answer that the caches under a root give."""

    answer: str
    """`hit`: just this; `covers`: this and more; `partial`: a part is missing; `miss`."""
    path: Path | None = None
    """Folder of the cache that answers; for a miss the nearest one, if there is any."""
    missing_layers: tuple[int, ...] = ()
    missing_sequences: tuple[int, ...] = ()
    """Numbers of the request's sequences that the cache lacks."""
    unfinished: bool = False
    """True if the cache's own extraction was interrupted."""
    differences: tuple[tuple[str, Any, Any], ...] = ()
    """For a miss: (field, asked, found) of the nearest cache."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        value = asdict(self)
        value["cache"] = self.path.name if self.path else None
        value["path"] = str(self.path) if self.path else None
        value["missing_sequences"] = len(self.missing_sequences)
        fields = ("field", "asked", "found")
        value["differences"] = [dict(zip(fields, d, strict=True)) for d in self.differences]
        return value


def match_cache(wanted: WantedCache, root: Path) -> CacheMatch:
    """The best answer to `wanted` among the caches under `root`; damaged caches are passed over."""
    found = []
    for path in list_paths(root):
        try:
            found.append(_answer(wanted, ActivationCache(path)))
        except ResiduaError:
            continue
    return min(found, key=_preference, default=CacheMatch("miss"))


def _preference(resolution: CacheMatch) -> tuple[int, int, int]:
    missing = len(resolution.missing_layers), len(resolution.missing_sequences)
    closeness = len(resolution.differences) if resolution.answer == "miss" else sum(missing)
    return ANSWERS.index(resolution.answer), closeness, missing[0]


def _answer(wanted: WantedCache, cache: ActivationCache) -> CacheMatch:
    identity = wanted.identity
    differences = differing_fields(identity, cache.manifest.identity)
    more_logits = [name == _LOGITS and logits_mode_covers(b, a) for name, a, b in differences]
    if any(
        name not in _STREAM and not also
        for (name, _, _), also in zip(differences, more_logits, strict=True)
    ):
        return CacheMatch("miss", cache.path, differences=differences)
    lacking, extra = _sequences(wanted.hashes, cache.sequence_hash)
    # Where only some positions are kept, a cache of more tokens is a new one.
    if lacking and (extra or wanted.capture.positions != "all"):
        return CacheMatch("miss", cache.path, differences=differences)
    asked = range(cache.n_blocks + 1) if wanted.layers is None else wanted.layers
    layers = tuple(layer for layer in asked if layer not in cache.layers)
    unfinished = not cache.finished
    if lacking or layers:
        return CacheMatch("partial", cache.path, layers, lacking, unfinished)
    more = extra or any(more_logits) or len(set(asked) | {cache.n_blocks}) < len(cache.layers)
    return CacheMatch("covers" if more else "hit", cache.path, unfinished=unfinished)


_STREAM = frozenset(f"tokens.{name}" for name in ("digest", "positions", "sequences", "seed"))
"""Fields that may differ where one token stream holds the other."""
_LOGITS = "capture.logits"


def _sequences(asked: np.ndarray, held: np.ndarray) -> tuple[tuple[int, ...], bool]:
    """Numbers of the asked sequences that are not held, and whether more are held than asked."""
    if np.array_equal(asked, held):
        return (), False
    left = Counter(held.tolist())
    lacking = []
    for number, sequence in enumerate(asked.tolist()):
        if left[sequence] > 0:
            left[sequence] -= 1
        else:
            lacking.append(number)
    return tuple(lacking), +left != Counter()


def differing_fields(
    one: dict[str, Any], other: dict[str, Any], prefix: str = ""
) -> tuple[tuple[str, Any, Any], ...]:
    """Fields in which two identities differ: (name, in one, in other)."""
    differences: list[tuple[str, Any, Any]] = []
    for name in sorted(set(one) | set(other)):
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            differences += differing_fields(a, b, f"{prefix}{name}.")
        elif a != b:
            differences.append((f"{prefix}{name}", a, b))
    return tuple(differences)


def named_differences(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """`compare` as JSON objects with the keys `field`, `one` and `other`."""
    names = ("field", "one", "other")
    return [dict(zip(names, found, strict=True)) for found in differing_fields(one, other)]


def describe(differences: Sequence[tuple[str, Any, Any]]) -> str:
    """Differences in one line."""
    return "; ".join(f"{name}: {_short(a)} is not {_short(b)}" for name, a, b in differences)


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


"""Called with (stage, done, total); stages are `tokenize` (documents) and `extract` (positions)."""
DEFAULT_CONTEXT = 1024


def choose_context(request: ExtractionRequest, source: ModelSource) -> int:
    """Context length of the request, checked against the model's."""
    limit = source.context
    if request.context is None:
        return min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if limit is not None and request.context > limit:
        raise UsageError(
            f"context {request.context} is longer than this model's {limit}; choose less"
        )
    return request.context


def read_stream(
    request: ExtractionRequest, source: ModelSource, progress: StageProgress | None
) -> TokenStream:
    """The token stream of the request; its columns lie on the disk."""
    scratch = scratch_folder(cache_root(request.root))
    documents = load_documents(
        request.data,
        request.text_column,
        request.split,
        lines=not request.pack,
        scratch=scratch,
        separator=request.separator,
        labels=not request.pack,
    )
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
    )
    vocab = source.config_value("vocab_size")
    largest = max(int(block.max()) for block in row_blocks(stream.ids))
    if isinstance(vocab, int) and largest >= vocab:
        raise ModelError(
            f"the tokenizer gives token {largest}, but the model's vocabulary has "
            f"{vocab}; the tokenizer files do not belong to this model"
        )
    return keep_positions(request.positions, stream, documents, request.seed)


def wanted_cache(
    request: ExtractionRequest, source: ModelSource, stream: TokenStream
) -> WantedCache:
    """The identity that the request asks for."""
    digest, hashes = stream.digests()
    tokens = TokenIdentity(
        digest,
        stream.positions,
        stream.sequences,
        tokenizer_digest(source.tokenizer_for_format(request.format)),
        choose_context(request, source),
        request.pack,
        request.seed,
        stream.split_by if request.format > 1 else SEQUENCE,
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
    model = source.identity_for_format(request.format)
    return WantedCache(model, tokens, capture, hashes, request.layers, request.format)

"""The token stream that a request asks for, and the identity that it wants; loads no weights."""

from collections.abc import Callable

from .catalog import cache_root
from .columns import blocks, scratch_folder
from .data import load_documents
from .encode import tokenize
from .errors import ModelError, UsageError
from .manifest import SEQUENCE, CaptureIdentity, TokenIdentity
from .policy import keep
from .request import Request
from .resolve import Wanted
from .source import ModelSource
from .tokenizer import tokenizer_digest
from .tokens import TokenStream

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages are `tokenize` (documents) and `extract` (positions)."""
DEFAULT_CONTEXT = 1024


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
        source.tokenizer_in(request.format),
        context=choose_context(request, source),
        pack=request.pack,
        separator=source.separator,
        seed=request.seed,
        max_tokens=request.max_tokens,
        progress=progress and (lambda done, total: progress("tokenize", done, total)),
        scratch=scratch,
        version=request.format,
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
        tokenizer_digest(source.tokenizer_in(request.format)),
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
    model = source.identity_in(request.format)
    return Wanted(model, tokens, capture, hashes, request.layers, request.format)

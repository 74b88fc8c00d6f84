"""Extraction: a frozen model and texts go in, a cache comes out; hit, resume or extract.

ids -> forward up to the last block -> valid rows -> float32 on the host -> shard writers
"""

import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .catalog import cache_root
from .create import create_cache
from .data import load_documents, tokenize
from .errors import ModelError, NoSpaceError, UsageError
from .jsonfile import read_json
from .layout import STORED_DTYPES, Layout
from .lease import lease
from .manifest import CaptureIdentity, Manifest, TokenIdentity
from .request import Request
from .runner import PartRunner
from .source import ModelSource
from .store import ActivationCache
from .tokens import TokenStream

if TYPE_CHECKING:
    import torch

    from .stack import Stack

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages are `tokenize` (documents) and `extract` (positions)."""
DEFAULT_CONTEXT = 1024
BATCH_TOKENS = {"cpu": 4096, "gpu": 32768}
SPARE_BYTES = 64 << 20
"""Free space that is left on the disk."""


@dataclass(frozen=True)
class Extraction:
    """What `run` did."""

    cache: ActivationCache
    status: str
    """`extracted`, `resumed` or `hit`."""
    head_error: float
    """Largest |head(layer L) - model's logits| over the largest |logit|, measured on a canary."""
    positions: int
    """Positions written by this call."""
    seconds: float
    """Wall time of this call."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua extract`."""
        return {
            "cache": self.cache.id,
            "path": str(self.cache.path),
            "status": self.status,
            "positions": self.cache.positions,
            "layers": list(self.cache.layers),
            "bytes": self.cache.bytes,
            "head_error": self.head_error,
            "written": self.positions,
            "seconds": round(self.seconds, 3),
        }


def extract(
    model: str | Path, data: str | Path, *, progress: Progress | None = None, **options: Any
) -> ActivationCache:
    """Run `model` on the texts of `data` once and return the cache of its residual streams.

    An existing cache of the same weights, tokens and capture is returned at once; an unfinished
    one is finished. Options are the fields of `Request`. Raises `ModelError`, `DataError`,
    `HeadMismatchError` before anything is written, `NoSpaceError` if the disk is too small.
    """
    if options.get("root") is not None:
        options["root"] = Path(options["root"])
    return run(Request(str(model), str(data), **options), progress).cache


def run(request: Request, progress: Progress | None = None) -> Extraction:
    """Answer `request` from an existing cache, or finish it, or make it."""
    began = time.perf_counter()
    root = cache_root(request.root)
    source = ModelSource.locate(request.model, request.revision)
    context = choose_context(request, source)
    stream = read_stream(request, source, context, progress)
    digest, hashes = stream.digests()
    identity = (
        source.identity,
        TokenIdentity(
            digest, stream.positions, len(stream.lengths), source.tokenizer_digest,
            context, request.pack, request.seed,
        ),
        CaptureIdentity(source.compute_dtype, request.dtype, request.attention),
    )  # fmt: skip
    probe = Manifest(*identity, Layout(1, 1), 0, 0, 0, 0, "", "")
    path = root / probe.id
    status = "resumed" if (path / "manifest.json").is_file() else "extracted"
    if status == "resumed" and (cache := ActivationCache(path)).complete:
        return _result(cache, "hit", 0, began)
    model = _load(request, source)
    if status == "resumed":
        from .canary import reexamine

        stack = reexamine(model, ActivationCache(path))
    else:
        path, stack = _create(request, source, model, identity, stream, hashes, root)
    written = fill(ActivationCache(path), stack, progress)
    return _result(ActivationCache(path), status, written, began)


def _result(cache: ActivationCache, status: str, written: int, began: float) -> Extraction:
    cache.check_complete()
    error = read_json(cache.path / "provenance.json")["canary"]["head_error"]
    return Extraction(cache, status, error, written, time.perf_counter() - began)


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


def read_stream(
    request: Request, source: ModelSource, context: int, progress: Progress | None
) -> TokenStream:
    """The token stream of the request."""
    documents = load_documents(request.data, request.text_column, request.split, not request.pack)
    stream = tokenize(
        documents,
        source.tokenizer,
        context=context,
        pack=request.pack,
        separator=source.separator,
        seed=request.seed,
        max_tokens=request.max_tokens,
        progress=None
        if progress is None
        else lambda done, total: progress("tokenize", done, total),
    )
    vocab = source.constant("vocab_size")
    if isinstance(vocab, int) and int(stream.ids.max()) >= vocab:
        raise ModelError(
            f"the tokenizer gives token {int(stream.ids.max())}, but the model's vocabulary has "
            f"{vocab}; the tokenizer files do not belong to this model"
        )
    return stream


def _load(request: Request, source: ModelSource) -> "torch.nn.Module":
    from .model import choose_device, load_model

    device = choose_device(request.device)
    return load_model(source, device, request.attention, request.trust_remote_code)


def _create(
    request: Request,
    source: ModelSource,
    model: "torch.nn.Module",
    identity: tuple[Any, TokenIdentity, CaptureIdentity],
    stream: TokenStream,
    hashes: np.ndarray,
    root: Path,
) -> tuple[Path, "Stack"]:
    """Examine the model, check the space and make the empty cache."""
    from .canary import examine

    canary = examine(model, stream, source.compute_dtype, request.dtype)
    itemsize = max(np.dtype(STORED_DTYPES[dtype]).itemsize for dtype in canary.dtypes.values())
    layout = Layout.choose(canary.head.d_model, itemsize, request.part_positions)
    kind = "cpu" if next(model.parameters()).device.type == "cpu" else "gpu"
    manifest = Manifest(
        *identity,
        layout,
        canary.head.d_model,
        canary.head.vocab,
        canary.stack.depth,
        request.batch_tokens or BATCH_TOKENS[kind],
        request.model,
        request.data,
        extra={"pad": canary.pad, "causal": canary.causal},
    )
    _check_space(root, manifest, canary.dtypes, canary.head.unembedding.nbytes)

    def write_head(folder: Path) -> None:
        canary.head.save(folder, canary.tensors)
        source.tokenizer.save(str(folder / "tokenizer.json"))
        for name in ("config.json", "tokenizer_config.json"):
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)

    provenance = {**_provenance(model, canary.report()), "revision": source.revision}
    path = create_cache(root, manifest, stream, hashes, canary.dtypes, write_head, provenance)
    return path, canary.stack


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


def _check_space(root: Path, manifest: Manifest, dtypes: dict[int, str], head_bytes: int) -> None:
    """Refuse a cache that does not fit on the disk, before anything is written."""
    width = (
        sum(np.dtype(STORED_DTYPES[dtype]).itemsize for dtype in dtypes.values()) * manifest.d_model
    )
    chunks = -(-manifest.tokens.positions // manifest.layout.chunk_rows)
    need = chunks * manifest.layout.chunk_rows * width + manifest.tokens.positions * 12 + head_bytes
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if need + SPARE_BYTES > free:
        raise NoSpaceError(
            f"this cache needs {need / 1e9:.2f} GB, {root} has {free / 1e9:.2f} GB free; "
            "use --max-tokens, or another --root"
        )


def fill(cache: ActivationCache, stack: "Stack", progress: Progress | None = None) -> int:
    """Write every part that is not committed and not leased by another; returns positions."""
    runner = PartRunner(cache, stack)
    written = 0
    done = sum(record.stop - record.start for record in cache.journal.parts().values())
    for part in range(cache.parts):
        with lease(cache.path / "leases", part) as mine:
            if not mine or part in cache.journal.parts():
                continue
            for rows in runner.write_part(part):
                written += rows
                if progress is not None:
                    progress("extract", done + written, cache.positions)
    return written

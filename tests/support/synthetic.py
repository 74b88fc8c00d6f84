"""Caches made of arrays, with the files that extraction writes, without a model: `make_cache`."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from residua.cache.format.layout import Layout
from residua.cache.format.manifest import CaptureIdentity, Manifest, ModelIdentity, TokenIdentity
from residua.cache.head.head import Head
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.cache_creation import create_cache
from residua.cache.store.part_writer import PartWriter
from residua.cache.tokens.token_stream import KeptRuns, from_sequences


def random_head(d_model: int, vocab: int, seed: int = 0) -> Head:
    """A layer-norm head with no parameter at its default."""
    rng = np.random.default_rng(seed)
    return Head(
        norm="layernorm",
        eps=1e-5,
        norm_weight=rng.normal(1, 0.3, d_model).astype(np.float32),
        norm_bias=rng.normal(0, 0.3, d_model).astype(np.float32),
        unembedding=rng.normal(0, 0.5, (vocab, d_model)).astype(np.float32),
        bias=rng.normal(0, 0.2, vocab).astype(np.float32),
    )


def make_cache(
    root: Path,
    layers: Sequence[np.ndarray],
    lengths: Sequence[int],
    head: Head,
    ids: np.ndarray | None = None,
    dtype: str = "float32",
    part_rows: int = 256,
    chunk_rows: int = 64,
    seed: int = 0,
    documents: np.ndarray | None = None,
    runs: KeptRuns | None = None,
    model: str = "synthetic",
) -> ActivationCache:
    """A complete cache of `layers`, each `(sum(lengths), d_model)`, with random token ids.

    `documents` `(tokens,)` are the document numbers of the tokens, as in a packed cache. With
    `runs` only these positions are kept, and `layers` have a row for each of them. Models of
    different names are different models.
    """
    positions, d_model = layers[0].shape
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, head.vocab, sum(lengths)) if ids is None else ids
    stream = from_sequences(np.split(tokens, np.cumsum(lengths)[:-1]))
    if documents is not None:
        stream.token_arrays["tokens/row_id"] = np.asarray(documents, np.int64)
        starts = np.cumsum([0, *lengths])[:-1]
        stream = replace(stream, row_ids=np.asarray(documents, np.int64)[starts])
    if runs is not None:
        stream = stream.with_runs(runs)
    digest, hashes = stream.digests()
    layout = Layout(chunk_rows, part_rows)
    weights = "0" * 64 if model == "synthetic" else sha256(model.encode()).hexdigest()
    manifest = Manifest(
        model=ModelIdentity(weights, "0" * 64, "Synthetic"),
        tokens=TokenIdentity(
            digest=digest,
            positions=positions,
            sequences=stream.sequences,
            tokenizer="0" * 64,
            context=max(lengths),
            packed=documents is not None,
            seed=seed,
        ),
        capture=CaptureIdentity("float32", dtype, "none"),
        layout=layout,
        d_model=d_model,
        vocab=head.vocab,
        depth=len(layers) - 1,
        batch_tokens=1024,
        model_name=model,
        data_name="random",
    )
    # Write the parts, each with rows writer.start..writer.stop-1 of all layers.
    numbers = tuple(range(len(layers)))
    path = create_cache(
        root, manifest, stream, hashes, dict.fromkeys(numbers, dtype), head.save, {}
    )
    for part in range(layout.parts(positions)):
        with PartWriter(path, layout, part, numbers) as writer:
            for number, values in enumerate(layers):
                rows = values[writer.start : writer.stop].astype(np.float32)
                writer.write(number, writer.start, rows)
            writer.commit()
    return ActivationCache(path)

"""Extends a cache: layers are added in place, tokens in a new cache that shares the old shards.

Cache folders are immutable but for layers that are added, so nothing that is there can be hurt:
a cache of more tokens gets its own id, hard links to every full shard of the old one (a copy
where the file system has no links), and the old rows of the shard in which the old tokens end.
"""

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..documents.labels import LABEL_PREFIX
from ..files.json_files import file_digest, make_folder, read_json, sync_folder, write_atomically
from ..files.leases import hold_lock, lease_part
from ..files.paths import copy_object, is_remote
from ..format.array_writer import create_residual
from ..format.journal import Journal
from ..format.layout import Layout
from ..format.manifest import Manifest, TokenIdentity
from ..tokens.token_stream import TokenStream, concatenate
from .activation_cache import ActivationCache
from .create_cache import create_cache
from .lineage import EXTENDS
from .local_origin import read_origin, write_origin


def add_layers(cache: ActivationCache, dtypes: dict[int, str]) -> None:
    """Create the empty arrays of further layers, for `write_missing_parts` to fill.

    One process at a time; layers that the journal names already are not touched.
    """
    store = cache.path / "arrays.zarr"
    with hold_lock(cache.path / "leases", "layers"):
        if not is_remote(store):
            # What makers of layers that were killed left: metadata of zarr's, and our record.
            patterns = ("*.partial", "residual/*.partial", "residual/*/*.partial")
            left = [path for pattern in patterns for path in store.glob(pattern)]
            for path in (*left, *cache.journal.folder.glob(".base.*.tmp")):
                path.unlink()
        files = {}
        for layer in unnamed_layers(cache, tuple(dtypes)):
            path = cache.path / _metadata(layer)
            # What a maker that died left may be cut short: only what the journal names is sure.
            with tempfile.TemporaryDirectory(prefix="residua-") as folder:
                create_residual(
                    Path(folder), layer, cache.positions, cache.d_model, dtypes[layer],
                    cache.manifest.layout, cache.manifest.codec,
                )  # fmt: skip
                made = (Path(folder) / f"residual/{layer}/zarr.json").read_bytes()
            if not is_remote(path):
                make_folder(path.parent)
            write_atomically(path, made)
            files[_metadata(layer)] = file_digest(path)
        if files:
            cache.journal.commit_base({}, files)


def unnamed_layers(cache: ActivationCache, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Those of `layers` that the journal does not know, whether or not they have an array."""
    _, named = cache.journal.base()
    return tuple(layer for layer in layers if _metadata(layer) not in named)


def _metadata(layer: int) -> str:
    return f"arrays.zarr/residual/{layer}/zarr.json"


def join_stream(
    cache: ActivationCache, stream: TokenStream, lacking: tuple[int, ...]
) -> TokenStream:
    """The stream of `cache` followed by the sequences `lacking` of `stream`."""
    labels = [LABEL_PREFIX + name for name in cache.label_names]
    further = [n for n in stream.sequence_arrays if n not in labels and cache.has(n)]
    held = TokenStream(
        cache.tokens,
        cache.sequence_length,
        cache.array("sequences/row_id")[:],
        {name: cache.array(name) for name in stream.token_arrays if cache.has(name)},
        {name: cache.array(name)[:] for name in (*labels, *further)},
        {n: cache.categories(n) for n in labels if cache.has_categories(n)},
        cut_tokens=None
        if stream.cut_tokens is None
        else np.zeros(len(cache.sequence_length), np.int64),
        splits=None if stream.splits is None else cache.sequence_split,
        documents=None if stream.documents is None else cache.sequence_document,
    )
    return concatenate(held, stream.select(np.array(lacking)))


def add_tokens(
    cache: ActivationCache, tokens: TokenIdentity, stream: TokenStream, layout: Layout,
    extra: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A cache of `stream`, which begins with all sequences of `cache`; full parts are linked.

    `cache` must be complete in its layers, and parts are linked only if they have the `layout` of
    its own. The rest is left to `write_missing_parts`. `extra` replaces keys of the manifest's
    `extra`.
    """
    old = cache.manifest
    manifest = Manifest(
        old.model, tokens, old.capture, layout, old.d_model, old.vocab, old.depth,
        old.batch_tokens, old.model_name, old.data_name,
        {**old.extra, **(extra or {}), EXTENDS: cache.id}, old.format,
    )  # fmt: skip
    dtypes = {layer: cache.residual_array(layer).layout.logical_dtype for layer in cache.layers}
    kept = [n for n in ("logits/full", "logits/values") if n in cache.logits_names]
    logits_dtype = cache.array(kept[0]).layout.logical_dtype if kept else "float16"
    provenance = {**read_json(cache.path / "provenance.json"), EXTENDS: cache.id}
    if "cut" in provenance:
        more = stream.cut_counts
        provenance["cut"] = {name: n + more[name] for name, n in provenance["cut"].items()}
    provenance["reading"] = stream.reading.to_dict()
    _, hashes = stream.digests()
    path = create_cache(
        cache.path.parent,
        manifest,
        stream,
        hashes,
        dtypes,
        partial(_copy_head, cache.path / "head"),
        provenance,
        logits_dtype,
    )
    if layout == old.layout:
        share_parts(cache, ActivationCache(path))
    return path


def _copy_head(source: Path, target: Path) -> None:
    """The folder `head/` of a cache, and where its model and data are."""
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if origin := read_origin(source.parent):
        write_origin(target.parent, **origin)


def share_parts(old: ActivationCache, new: ActivationCache) -> None:
    """Link every shard of `old` that is full, and commit its part in `new`."""
    journal = Journal(new.path / "journal")
    for part, record in sorted(old.committed.items()):
        if record.stop - record.start < old.manifest.layout.part_rows:
            continue
        with lease_part(new.path / "leases", part) as mine:
            if not mine or (journal.folder / f"{part:08d}.json").exists():
                continue
            for name in record.arrays:
                key = old.array(name).layout.shard_key(part)
                link_file(
                    old.path / "arrays.zarr" / name / key, new.path / "arrays.zarr" / name / key
                )
            journal.commit(record)


def link_file(source: Path, target: Path) -> None:
    """A hard link to `source`, durable; a copy where there are no links.

    What was under the name `target` stays until the new file is whole. In an object store the
    store itself copies.
    """
    if is_remote(target):
        copy_object(source, target)
        return
    for folder in reversed(target.parents[:2]):  # of the chunk key; see `PartWriter`
        folder.mkdir(exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # rename leaves both names of one file
    for folder in target.parents[:3]:
        sync_folder(folder)

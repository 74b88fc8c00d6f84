"""Extends a cache: layers are added in place, tokens in a new cache that shares the old shards.

`answer_request` calls `add_layers` or `add_tokens`; `write_missing_parts` then writes the rows.

No file of the old cache changes. A cache of more tokens has an id of its own, and hard links to
every full shard of the old cache (copies if the file system has no links). The old rows of the last
shard, which is not full, are copied when that part is written.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..documents.labels import LABEL_PREFIX
from ..files.confined_files import check_regular, confined_path, read_confined, read_confined_json
from ..files.json_files import file_digest, make_folder, sync_folder, write_atomically
from ..files.leases import hold_lock, lease_part
from ..files.paths import copy_object, is_remote, list_folder
from ..files.staging import temporary_folder
from ..format.array_writer import create_residual
from ..format.journal import PartRecord
from ..format.layout import Layout
from ..format.manifest import EXTENDS, TokenIdentity
from ..tokens.token_stream import TokenStream, concatenate
from .activation_cache import ActivationCache
from .cache_creation import create_cache
from .checked_arrays import metadata_file
from .local_origin import read_origin, write_origin


def add_layers(cache: ActivationCache, dtypes: dict[int, str]) -> None:
    """Create empty arrays for the layers of `dtypes`, layer -> stored dtype.

    Layers that the journal names already are not touched. One process at a time creates arrays; the
    others wait.
    """
    store = cache.path / "arrays.zarr"
    with hold_lock(cache.path / "leases", "layers"):
        if not is_remote(store):
            # Temporary files of processes that were killed here: zarr's metadata, our record.
            patterns = ("*.partial", "residual/*.partial", "residual/*/*.partial")
            temporary = [path for pattern in patterns for path in store.glob(pattern)]
            for path in (*temporary, *cache.journal.folder.glob(".base.*.tmp")):
                path.unlink()

        digests = {}
        for layer in unnamed_layers(cache, tuple(dtypes)):
            # The metadata is made elsewhere and written atomically: a process that was killed may
            # have left a cut file under this name, which the journal does not know.
            with temporary_folder() as folder:
                shape = cache.positions, cache.d_model
                layout, codec = cache.manifest.layout, cache.manifest.codec
                create_residual(folder, layer, *shape, dtypes[layer], layout, codec=codec)
                metadata = (folder / f"residual/{layer}/zarr.json").read_bytes()
            path = confined_path(cache.path, metadata_file(f"residual/{layer}"))
            if not is_remote(path):
                make_folder(path.parent)
            write_atomically(path, metadata)
            digests[metadata_file(f"residual/{layer}")] = file_digest(path)
        if digests:
            cache.journal.commit_base({}, digests)


def unnamed_layers(cache: ActivationCache, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Those of `layers` whose array the journal does not name; a cut file may exist."""
    _, files = cache.journal.base()
    return tuple(layer for layer in layers if metadata_file(f"residual/{layer}") not in files)


def join_stream(
    cache: ActivationCache, stream: TokenStream, new_sequences: tuple[int, ...]
) -> TokenStream:
    """The token stream of `cache`, followed by the sequences `new_sequences` of `stream`."""
    labels = [LABEL_PREFIX + name for name in cache.label_names]
    further = [n for n in stream.sequence_arrays if n not in labels and cache.has(n)]
    cached = TokenStream(
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
    return concatenate(cached, stream.select(np.array(new_sequences)))


def add_tokens(
    cache: ActivationCache,
    tokens: TokenIdentity,
    stream: TokenStream,
    layout: Layout,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Create the cache of `stream`, which begins with all sequences of `cache`; returns its folder.

    `cache` must be complete. Its full parts are linked into the new cache, if that has the same
    `layout`. `tokens` is the identity of `stream`; `extra` replaces keys of the manifest's `extra`.
    """
    old = cache.manifest
    manifest = replace(
        old,
        tokens=tokens,
        layout=layout,
        extra={**old.extra, **(extra or {}), EXTENDS: cache.id},
    )
    dtypes = {layer: cache.residual_array(layer).layout.logical_dtype for layer in cache.layers}
    logits = [name for name in cache.logits_names if name in ("logits/full", "logits/values")]
    logits_dtype = cache.array(logits[0]).layout.logical_dtype if logits else "float16"

    # Provenance of the old cache; tokens cut off at the context are those of old and new texts.
    provenance = {**read_confined_json(cache.path, "provenance.json"), EXTENDS: cache.id}
    if "cut" in provenance:
        counts = stream.cut_counts
        provenance["cut"] = {name: n + counts[name] for name, n in provenance["cut"].items()}
    provenance["reading"] = stream.reading.to_dict()
    _, hashes = stream.digests()
    path = create_cache(
        cache.path.parent,
        manifest,
        stream,
        hashes,
        dtypes,
        write_head=partial(_copy_head, cache.path / "head"),
        provenance=provenance,
        logits_dtype=logits_dtype,
    )
    if layout == old.layout:
        share_parts(cache, ActivationCache(path))
    return path


def _copy_head(source: Path, target: Path) -> None:
    """Copy the folder `head/` of a cache, and the cache's origin."""
    for path in list_folder(source):
        (target / path.name).write_bytes(read_confined(source.parent, f"head/{path.name}"))
    if origin := read_origin(source.parent):
        write_origin(target.parent, **origin)


def share_parts(old: ActivationCache, new: ActivationCache) -> None:
    """Link all shards of the full parts of `old` into `new`, and commit these parts."""
    for part in sorted(old.committed):
        with lease_part(new.path / "leases", part) as lease:
            if lease is not None and not new.journal.arrays_of(part):
                link_part(old, new, part, new.target_names)


def link_part(
    old: ActivationCache, new: ActivationCache, part: int, names: Sequence[str]
) -> PartRecord | None:
    """Link the shards of the arrays `names` of a full part of `old` into `new`, and commit them.

    `new` begins with the rows of `old`; the caller holds the lease of the part. The record is that
    of `old`: ranges of values before the cast to the stored dtype are no longer in the rows. None,
    with nothing done, unless both have the same layout and `old` has all of the full part.
    """
    record = old.committed.get(part)
    is_full = record is not None and record.stop - record.start == new.manifest.layout.part_rows
    if record is None or not is_full or old.manifest.layout != new.manifest.layout:
        return None
    if not set(names) <= set(record.arrays):
        return None
    for name in names:
        layout = new.array(name).layout
        if replace(layout, shape=old.array(name).shape) != old.array(name).layout:
            return None
    for name in names:
        shard = f"arrays.zarr/{name}/{old.array(name).layout.shard_key(part)}"
        check_regular(old.path, shard)
        link_file(old.path / shard, new.path / shard)
    linked = replace(record, arrays={name: record.arrays[name] for name in names})
    new.journal.commit(linked)
    return linked


def link_file(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, durably; a copy if the file system has no links.

    An existing file `target` stays until the new file is whole. An object store copies inside the
    store.
    """
    if is_remote(target):
        copy_object(source, target)
        return
    # The folders of the shard, but not those of the array; see `PartWriter`.
    for folder in reversed(target.parents[:2]):
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

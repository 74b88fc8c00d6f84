"""Moments kept in the folder of a cache: found, loaded and saved again by `obtain_moments.py`.

Each folder `<cache>/moments/<name>/` was written by `MomentSet.save`; a folder is whole or absent,
and never rewritten. The rules are in the format page, `cache/README.md`.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...cache.errors import CorruptError, NoSpaceError, NotFoundError, UsageError
from ...cache.files.confined_files import check_regular
from ...cache.files.json_files import json_digest, make_folder
from ...cache.files.paths import (
    check_not_served,
    is_remote,
    is_served,
    list_folder,
    store_of,
    total_bytes,
    upload_folder,
)
from ...cache.files.staging import publish_folder, staging_folder, sweep_staging, temporary_folder
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.lineage import cache_lineage
from ...cache.tokens.segments import has_document_borders
from .moment_set import TABLE, TENSORS, MomentSet, scope_of
from .moments_table import read_moments_table
from .pass_plan import MomentRequest
from .row_identity import layer_digest, same_documents, same_rows, same_sequences, sequences_digest
from .shifted_sums import LayerOffsetTarget

FOLDER = "moments"
"""Folder of all kept moments in that of the cache."""
SHARE = 4
"""By default, kept moments take at most 1/SHARE of the bytes of the residual streams, or ..."""
SMALL_BYTES, SMALL_SHARE = 1 << 30, 10
"""... on a local disk so many bytes, but not more than 1/SMALL_SHARE of the free space.

The moments of a wide model take as much as some thousand positions, however few are cached: a
second fit would sum them again."""
SPARE_BYTES = 64 << 20
"""Free space that is left on the disk."""


@dataclass(frozen=True)
class MomentEntry:
    """One folder of kept moments, with the content of its `moments.json`."""

    path: Path
    table: dict[str, Any]
    """Content of `moments.json`."""

    @property
    def pairs(self) -> list[LayerOffsetTarget]:
        """Every (layer, offset, target) of the folder."""
        return [(row["layer"], row["offset"], row["target"]) for row in self.table["pairs"]]


EntryOf = dict[LayerOffsetTarget, MomentEntry]
"""The folder that has the moments of a (layer, offset, target)."""


@dataclass(frozen=True)
class Inherited:
    """Moments of the first sequences of a cache, kept with the cache that it extends."""

    sequences: int
    """Number of first sequences that they count."""
    entry_of: EntryOf


def moments_folder(cache: ActivationCache) -> Path:
    """Folder of all kept moments of a cache."""
    return cache.path / FOLDER


def moment_entries(cache: ActivationCache) -> Iterator[MomentEntry]:
    """All folders of kept moments with a readable `moments.json`, also of other rows."""
    for path in list_folder(moments_folder(cache)):
        if path.name.startswith("."):
            continue
        with suppress(OSError, CorruptError):  # damaged, or removed meanwhile
            for file in (TABLE, TENSORS):
                check_regular(cache.path, f"{FOLDER}/{path.name}/{file}")
            yield MomentEntry(path, read_moments_table(path / TABLE, of_cache=True))


def find_kept(cache: ActivationCache, request: MomentRequest) -> EntryOf:
    """The folders with moments of `request` that count the rows that `cache` has now."""
    entry_of: EntryOf = {}
    sequences = sequences_digest(cache.sequences(request.split))
    requested, layer_digests = set(request.pairs), dict[int, str]()
    for entry in moment_entries(cache):
        # The folder must count the same pairs of the same sequences, ...
        table = entry.table
        if not (
            table["cache"] == cache.id
            and (table["split"], table["folds"]) == (request.split, request.folds)
            # Exact products also serve a request for quick ones.
            and table["products"] in (request.products, "float64")
            and table["sequences"] == sequences
            and counts_same_pairs(cache, table, request)
        ):
            continue
        # ... and the rows of both layers must be the same.
        for pair in requested.intersection(entry.pairs):
            layers = pair[0], pair[2]
            for layer in layers:
                layer_digests.setdefault(layer, layer_digest(cache, layer))
            if all(table["content"][str(layer)] == layer_digests[layer] for layer in layers):
                entry_of[pair] = entry
    return entry_of


def counts_same_pairs(
    cache: ActivationCache, table: dict[str, Any], request: MomentRequest
) -> bool:
    """Whether kept moments count the pairs (t, t+N) of `request`.

    `across_documents` makes no difference in a cache without two documents in one sequence.
    """
    across_documents, drop_first = scope_of(table)
    if drop_first != request.drop_first:
        return False
    return across_documents == request.across_documents or not has_document_borders(cache)


def inherited_moments(
    cache: ActivationCache, request: MomentRequest, lacking: set[LayerOffsetTarget]
) -> Iterator[Inherited]:
    """Moments of `lacking` pairs kept with the caches that this one extends, the latest first."""
    lacking = set(lacking)
    for base in cache_lineage(cache):
        # The cache must begin with the sequences and documents of the base, ...
        layers = {layer for pair in lacking for layer in (pair[0], pair[2])}
        if not layers <= set(base.layers):
            continue
        if not same_sequences(base, cache, request.split, request.folds):
            continue
        if not same_documents(base, cache, request.across_documents):
            continue
        # ... and with its rows, in both layers of a pair.
        entry_of = {pair: e for pair, e in find_kept(base, request).items() if pair in lacking}
        layers = {layer for pair in entry_of for layer in (pair[0], pair[2])}
        equal_layers = {layer for layer in layers if same_rows(base, cache, layer)}
        entry_of = {p: entry for p, entry in entry_of.items() if {p[0], p[2]} <= equal_layers}
        if entry_of:
            yield Inherited(len(base.sequence_length), entry_of)
        lacking -= set(entry_of)


def load_kept(entry_of: EntryOf, pairs: Iterable[LayerOffsetTarget], d_model: int) -> MomentSet:
    """The moments of `pairs`, of rows of width `d_model`.

    Removes a damaged folder, and raises `CorruptError`.
    """
    pairs_of_folder: dict[Path, list[LayerOffsetTarget]] = {}
    for pair in pairs:
        pairs_of_folder.setdefault(entry_of[pair].path, []).append(pair)
    sets: list[MomentSet] = []
    for path, folder_pairs in pairs_of_folder.items():
        try:
            with local_folder(path) as folder:
                sets.append(MomentSet.load(folder, folder_pairs, d_model))
        except (CorruptError, NotFoundError) as error:
            remove_moments(path)
            raise CorruptError(str(error)) from error
    joined = {pair: folds for moments in sets for pair, folds in moments.pairs.items()}
    return replace(sets[0], pairs=joined)


def save_moments(cache: ActivationCache, moments: MomentSet) -> int:
    """Keep `moments` with the cache and return their bytes; raises `OSError` if writing fails.

    Of writers that race, the first to finish wins. Folders that count rows which the cache no
    longer has are removed.
    """
    # The name of a folder is a digest of its content's identity.
    folder = moments_folder(cache)
    identity = [
        sorted(moments.pairs),
        moments.sequences,
        sorted(moments.content.items()),
        moments.across_documents,
        moments.drop_first,
    ]
    name = f"{moments.split}-{moments.folds}-{moments.products}-{json_digest(identity)[:16]}"
    if not is_remote(folder):
        make_folder(folder)
        sweep_moments(cache)
    with staging_folder(folder, ".", ".tmp") as staging:
        moments.save(staging)
        if is_remote(folder):
            # The table is uploaded last: without a table a folder does not count.
            with suppress(FileExistsError):
                upload_folder(staging, folder / name, last=[TABLE])
        else:
            publish_folder(staging, folder / name, marker=TABLE)
    return moments.bytes


def sweep_moments(cache: ActivationCache) -> None:
    """Remove staging folders of dead writers, damaged folders, and moments of changed rows."""
    sweep_staging(moments_folder(cache), ".*.tmp")
    for path in moments_folder(cache).glob("[!.]*"):
        try:
            entry = MomentEntry(path, read_moments_table(path / TABLE, of_cache=True))
        except (CorruptError, NotFoundError):
            shutil.rmtree(path, ignore_errors=True)
            continue
        # A folder stays while the rows of at least one of its pairs are those of the cache.
        table = entry.table
        digests = {int(layer): digest for layer, digest in table["content"].items()}
        current = {
            layer
            for layer, digest in digests.items()
            if layer in cache.layers and digest == layer_digest(cache, layer)
        }
        sequences = sequences_digest(cache.sequences(table["split"]))
        is_other = table["cache"] != cache.id or table["sequences"] != sequences
        if is_other or not any({pair[0], pair[2]} <= current for pair in entry.pairs):
            remove_moments(path)


def remove_moments(path: Path) -> None:
    """Remove a folder of kept moments; one that cannot be removed stays."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        for file in list_folder(path):
            file.unlink(missing_ok=True)


@contextmanager
def local_folder(path: Path) -> Iterator[Path]:
    """A folder of kept moments on a disk: `path`, or a temporary copy from an object store."""
    if not is_remote(path):
        yield path
        return
    with temporary_folder() as folder:
        for file in list_folder(path):
            store, key = store_of(file)
            store.get_file(key, str(folder / file.name))
        yield folder


def reason_not_to_keep(cache: ActivationCache, size: int, keep: bool | None) -> str:
    """Why moments of `size` bytes are not kept with the cache; empty if they are.

    With `keep` True, a reason is raised as `UsageError` or `NoSpaceError`.
    """
    if keep is False:
        return "not asked for"
    if is_served(cache.path):
        if keep:
            check_not_served(cache.path)
        return "the cache is read from a service"
    if not is_remote(cache.path) and (reason := _disk_reason(cache, size, bool(keep))):
        return reason
    limit = max(residual_bytes(cache) // SHARE, _small_bytes(cache))
    if keep is None and total_bytes(moments_folder(cache)) + size > limit:
        return (
            f"moments of {size / 1e6:.1f} MB would take more than 1/{SHARE} of the residual "
            f"streams, and more than {_small_bytes(cache) / 1e6:.1f} MB: not kept unless asked for"
        )
    return ""


def _small_bytes(cache: ActivationCache) -> int:
    """Bytes that moments may take by default, however small the residual streams."""
    if is_remote(cache.path):
        return 0
    return min(SMALL_BYTES, shutil.disk_usage(cache.path).free // SMALL_SHARE)


def _disk_reason(cache: ActivationCache, size: int, must_keep: bool) -> str:
    """Why the disk of `cache` cannot take `size` bytes more, raised if `must_keep`."""
    folder = moments_folder(cache) if moments_folder(cache).exists() else cache.path
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        message = f"moments cannot be kept: {folder} cannot be written to"
        if must_keep:
            raise UsageError(f"{message}; fit without keeping them, or change its permissions")
        return message
    free = shutil.disk_usage(folder).free
    if size + SPARE_BYTES > free:
        message = f"moments of {size / 1e9:.2f} GB do not fit the {free / 1e9:.2f} GB free"
        if must_keep:
            raise NoSpaceError(f"{message} at {folder}; fit without keeping them, or make room")
        return message
    return ""


def residual_bytes(cache: ActivationCache) -> int:
    """Bytes of all residual streams."""
    shards = (shard for record in cache.committed.values() for shard in record.arrays.items())
    return sum(shard.bytes for name, shard in shards if name.startswith("residual/"))

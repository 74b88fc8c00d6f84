"""Moments kept with a cache: found again, completed, and brought up to date when it has grown.

Each folder `<cache>/moments/<name>/` was written by `MomentSet.save`; it is whole or not there at
all, and never rewritten. The format page has the rules.
"""

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...cache.errors import CorruptError, NoSpaceError, NotFoundError, UsageError
from ...cache.files.json_files import json_digest, make_folder, read_json, sync_folder
from ...cache.files.leases import try_lock
from ...cache.files.paths import is_remote, list_folder, store_of, total_bytes, upload_folder
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.lineage import cache_lineage
from ...cache.tokens.segments import has_document_borders
from .moment_set import TABLE, MomentSet, scope_of
from .pass_plan import MomentRequest
from .row_identity import layer_digest, same_documents, same_rows, same_sequences, sequences_digest
from .shifted_sums import LayerOffsetTarget

EXTENDS = "extends"
"""Key of the manifest's `extra`: id of the cache whose rows come first."""


@dataclass(frozen=True)
class MomentEntry:
    """One folder of kept moments."""

    path: Path
    about: dict[str, Any]
    """Its `moments.json`."""

    @property
    def pairs(self) -> list[LayerOffsetTarget]:
        """The (layer, offset, target) that it has."""
        return [(row["layer"], row["offset"], row["target"]) for row in self.about["pairs"]]

    def discard(self) -> None:
        """Remove a folder that is damaged or of other rows, where that is possible."""
        remove_moments(self.path)


Source = dict[LayerOffsetTarget, MomentEntry]
"""Where the moments of each pair lie."""


@dataclass(frozen=True)
class Inherited:
    """Moments of the first sequences of a cache, kept with the cache that it extends."""

    first: int
    """Number of the first sequence that they do not count."""
    source: Source


def folder_of(cache: ActivationCache) -> Path:
    """Where the moments of a cache are kept."""
    return cache.path / "moments"


def moment_entries(cache: ActivationCache) -> Iterator[MomentEntry]:
    """All folders of kept moments that can be read, whatever they are of."""
    for path in list_folder(folder_of(cache)):
        if path.name.startswith("."):
            continue
        with suppress(OSError, CorruptError):  # damaged, or removed meanwhile
            yield MomentEntry(path, read_json(path / TABLE))


def find_kept(cache: ActivationCache, request: MomentRequest) -> Source:
    """Where the moments lie that are those of `request` and of the rows that `cache` has now."""
    found: Source = {}
    numbers = sequences_digest(cache.sequences(request.split))
    asked, content = set(request.pairs), dict[int, str]()
    for entry in moment_entries(cache):
        about = entry.about
        same = (
            about["cache"] == cache.id
            and (about["split"], about["folds"]) == (request.split, request.folds)
            # Exact products also serve who asks for quick ones.
            and about["products"] in (request.products, "float64")
            and about["sequences"] == numbers
            and same_pairs(cache, about, request)
        )
        for pair in asked.intersection(entry.pairs) if same else ():
            for layer in (pair[0], pair[2]):
                content.setdefault(layer, layer_digest(cache, layer))
            if all(about["content"][str(la)] == content[la] for la in (pair[0], pair[2])):
                found[pair] = entry
    return found


def same_pairs(cache: ActivationCache, about: dict[str, Any], request: MomentRequest) -> bool:
    """Whether moments count the pairs of `request`: where no sequence has two documents, all do."""
    across, drop_first = scope_of(about)
    if drop_first != request.drop_first:
        return False
    return across == request.across_documents or not has_document_borders(cache)


def inherited_moments(
    cache: ActivationCache, request: MomentRequest, lacking: set[LayerOffsetTarget]
) -> Iterator[Inherited]:
    """Moments of `lacking` pairs kept with the caches that this one extends, the latest first."""
    lacking = set(lacking)
    for old in cache_lineage(cache):
        layers = {layer for pair in lacking for layer in (pair[0], pair[2])}
        if not layers <= set(old.layers):
            continue
        if not same_sequences(old, cache, request.split, request.folds):
            continue
        if not same_documents(old, cache, request.across_documents):
            continue
        source = {p: entry for p, entry in find_kept(old, request).items() if p in lacking}
        used = {layer for pair in source for layer in (pair[0], pair[2])}
        same = {layer for layer in used if same_rows(old, cache, layer)}
        source = {p: entry for p, entry in source.items() if {p[0], p[2]} <= same}
        if source:
            yield Inherited(len(old.sequence_length), source)
        lacking -= set(source)


def load_kept(source: Source, pairs: Iterable[LayerOffsetTarget]) -> MomentSet:
    """The moments of `pairs`; raises `CorruptError`, and removes the folder, if it is damaged."""
    of_entry: dict[Path, list[LayerOffsetTarget]] = {}
    for pair in pairs:
        of_entry.setdefault(source[pair].path, []).append(pair)
    found: list[MomentSet] = []
    for path, chosen in of_entry.items():
        try:
            with fetched(path) as here:
                found.append(MomentSet.load(here, chosen))
        except (CorruptError, NotFoundError) as error:
            source[chosen[0]].discard()
            raise CorruptError(str(error)) from error
    merged = {pair: parts for one in found for pair, parts in one.pairs.items()}
    return found[0].with_pairs(merged)


def save_moments(cache: ActivationCache, moments: MomentSet) -> int:
    """Keep `moments` with the cache; returns their bytes. Raises `OSError` where it cannot.

    Writers may race: the folder that is there first stays. What lies there of rows that the
    cache no longer has is removed.
    """
    folder = folder_of(cache)
    about = [sorted(moments.pairs), moments.sequences, sorted(moments.content.items())]
    about += [moments.across_documents, moments.drop_first]
    name = f"{moments.split}-{moments.folds}-{moments.products}-{json_digest(about)[:16]}"
    if is_remote(folder):
        with TemporaryDirectory(prefix="residua-") as made, suppress(FileExistsError):
            moments.save(made)
            upload_folder(Path(made), folder / name, last=[TABLE])
        return moments.bytes
    make_folder(folder)
    sweep_moments(cache)
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        try_lock(descriptor)
        moments.save(temporary)
        sync_folder(temporary)
        try:
            os.rename(temporary, folder / name)
        except OSError:
            if not (folder / name / TABLE).is_file():
                raise
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)
    return moments.bytes


def sweep_moments(cache: ActivationCache) -> None:
    """Remove what writers that died left, what is damaged, and moments of rows that are gone."""
    for left in folder_of(cache).glob(".*.tmp"):
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            if try_lock(descriptor):
                shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
    for path in folder_of(cache).glob("[!.]*"):
        try:
            entry = MomentEntry(path, read_json(path / TABLE))
        except (CorruptError, NotFoundError):
            shutil.rmtree(path, ignore_errors=True)
            continue
        about = entry.about
        content = {int(layer): value for layer, value in about["content"].items()}
        now = {layer for layer in content if layer in cache.layers}
        now = {layer for layer in now if content[layer] == layer_digest(cache, layer)}
        numbers = sequences_digest(cache.sequences(about["split"]))
        other = about["cache"] != cache.id or about["sequences"] != numbers
        if other or not any({pair[0], pair[2]} <= now for pair in entry.pairs):
            entry.discard()


def kept_bytes(cache: ActivationCache) -> int:
    """Bytes of all files of kept moments."""
    return total_bytes(folder_of(cache))


@contextmanager
def fetched(path: Path) -> Iterator[Path]:
    """A folder of kept moments on a disk: itself, or a copy if it lies in an object store."""
    if not is_remote(path):
        yield path
        return
    with TemporaryDirectory(prefix="residua-") as folder:
        for file in list_folder(path):
            store, key = store_of(file)
            store.get_file(key, str(Path(folder) / file.name))
        yield Path(folder)


def remove_moments(path: Path) -> None:
    """Remove a folder, where that is possible."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        for file in list_folder(path):
            file.unlink(missing_ok=True)


SHARE = 4
"""Unless asked for, kept moments take at most 1/SHARE of the bytes of the residual streams."""
SPARE_BYTES = 64 << 20
"""Free space that is left on the disk."""


def reason_not_to_keep(cache: ActivationCache, size: int, keep: bool | None) -> str:
    """Why moments of `size` bytes are not kept with the cache; empty if they are.

    Raises `UsageError` or `NoSpaceError` where `keep` asks for what cannot be.
    """
    if keep is False:
        return "not asked for"
    if not is_remote(cache.path) and (message := _no_room(cache, size, bool(keep))):
        return message
    limit = residual_bytes(cache) // SHARE
    if keep is None and kept_bytes(cache) + size > limit:
        return (
            f"moments of {size / 1e6:.1f} MB would take more than 1/{SHARE} of the residual "
            "streams: not kept unless asked for"
        )
    return ""


def _no_room(cache: ActivationCache, size: int, asked: bool) -> str:
    """Why the disk of `cache` does not take `size` bytes more; raises where they are asked for."""
    folder = folder_of(cache) if folder_of(cache).exists() else cache.path
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        message = f"moments cannot be kept: {folder} cannot be written to"
        if asked:
            raise UsageError(f"{message}; fit without keeping them, or change its permissions")
        return message
    free = shutil.disk_usage(folder).free
    if size + SPARE_BYTES > free:
        message = f"moments of {size / 1e9:.2f} GB do not fit the {free / 1e9:.2f} GB free"
        if asked:
            raise NoSpaceError(f"{message} at {folder}; fit without keeping them, or make room")
        return message
    return ""


def residual_bytes(cache: ActivationCache) -> int:
    """Bytes of all residual streams."""
    shards = (shard for record in cache.committed.values() for shard in record.arrays.items())
    return sum(shard.bytes for name, shard in shards if name.startswith("residual/"))

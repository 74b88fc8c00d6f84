"""Creates a new cache folder: manifest, head, tokens and empty arrays, without any row.

`prepare.make_cache` (a new extraction) and `add_tokens` (a longer copy of a cache) call
`create_cache`; `write_missing_parts` then writes the rows. The folder appears whole or not at all.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptError, NotFoundError
from ..files.confined_files import check_regular, confined_path
from ..files.json_files import file_digest, write_atomically, write_json
from ..files.leases import hold_lock
from ..files.paths import is_remote, upload_folder
from ..files.staging import publish_folder, staging_folder, sweep_staging
from ..format.array_writer import create_logits, create_residual, write_table
from ..format.journal import Journal
from ..format.logits_arrays import list_logits_arrays
from ..format.manifest import Manifest
from ..tokens.index_arrays import compute_index_arrays
from ..tokens.token_stream import TokenStream
from .local_origin import FILE as ORIGIN

CACHE_FOLDERS = ("head", "journal", "leases", "moments")
"""Folders that every cache has beside `arrays.zarr`."""
STAGING_PREFIX = ".new-"
"""Beginning of the names of staging folders of caches under a root."""


def create_cache(
    root: Path,
    manifest: Manifest,
    stream: TokenStream,
    hashes: np.ndarray,
    dtypes: Mapping[int, str],
    write_head: Callable[[Path], None],
    provenance: dict[str, Any],
    logits_dtype: str = "float16",
) -> Path:
    """Create the cache of `manifest` under `root`; returns its folder, named by the cache's id.

    `hashes` has one uint64 per sequence of `stream`, `dtypes` the stored dtype of every layer.
    `write_head` writes the files of the head into the folder it is given.

    The files are written into a staging folder `.new-*`, which is then renamed: a folder with an id
    always has all of them. If another process created the same cache meanwhile, their folder stays.
    In an object store the files are uploaded, the manifest last.
    """
    target = root / manifest.id
    with staging_folder(root, STAGING_PREFIX) as staging:
        for folder in CACHE_FOLDERS:
            (staging / folder).mkdir()
        manifest.write(staging / "manifest.json")
        write_json(staging / "provenance.json", provenance)
        write_head(staging / "head")

        # Tokens and index arrays are written whole, arrays of layers and logits are empty.
        store = staging / "arrays.zarr"
        tables = {
            name: write_table(store, name, values, _zarr_attributes(stream, name))
            for name, values in compute_index_arrays(stream, hashes).items()
        }
        for layer, dtype in dtypes.items():
            shape = stream.positions, manifest.d_model
            create_residual(store, layer, *shape, dtype, manifest.layout, codec=manifest.codec)
        for array in list_logits_arrays(manifest.capture.logits, manifest.vocab, logits_dtype):
            create_logits(store, array, stream.positions, manifest.layout, manifest.codec)

        # The journal names all files with their digests, for `verify`.
        digests = {
            path.relative_to(staging).as_posix(): file_digest(path)
            for path in _digested_files(staging)
        }
        Journal(staging / "journal").commit_base(tables, digests)
        publish_cache(staging, target)
    return target


def publish_cache(staging: Path, target: Path) -> None:
    """Make the whole cache in the folder `staging` appear at `target`.

    A cache that another process has published at `target` stays. If the cache at `target` has lost
    its manifest, it gets the one of `staging`, which must be the same; its shards stay.
    """
    if not is_remote(target):
        _restore_manifest(staging, target)
        publish_folder(staging, target, marker="manifest.json")
        return
    with hold_lock(target / "leases", "create"):
        if not (target / "manifest.json").is_file():
            upload_folder(staging, target, last=["manifest.json"])


def _restore_manifest(staging: Path, target: Path) -> None:
    """Give a cache at `target` whose manifest is lost or damaged the manifest of `staging`.

    Raises `CorruptError` if it had another one, in which its shards may lie otherwise.
    """
    if not os.path.lexists(target / "journal" / "base.json"):
        return
    try:
        check_regular(target, "manifest.json")
        Manifest.read(target / "manifest.json")
        return
    except (CorruptError, FileNotFoundError):
        pass
    try:
        _, files = Journal(target / "journal").base()
        is_same = files.get("manifest.json") == file_digest(staging / "manifest.json")
    except (CorruptError, NotFoundError):
        is_same = False
    if not is_same:
        raise CorruptError(
            f"{target} has lost its manifest, and the one of this request is another: give the "
            "options of the first extraction (size of parts, batches, codec), or move the folder "
            "away and extract again"
        )
    path = confined_path(target, "manifest.json")
    write_atomically(path, (staging / "manifest.json").read_bytes())


def sweep_unfinished(root: Path) -> None:
    """Remove the staging folders `.new-*` under `root` whose makers died.

    An object store has none: a partly uploaded cache has no manifest, and is uploaded again.
    """
    if not is_remote(root):
        sweep_staging(root, f"{STAGING_PREFIX}*")


def _zarr_attributes(stream: TokenStream, name: str) -> dict[str, Any]:
    """zarr attributes of an array: for labels stored as codes, the words by code."""
    words = stream.categories.get(name)
    return {} if words is None else {"categories": list(words)}


def _digested_files(folder: Path) -> list[Path]:
    """Files whose digests the journal keeps: manifest, provenance, head and array metadata.

    Shards have checksums of their own; the origin is a note for this machine.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ORIGIN]
    return sorted(p for p in files if "arrays.zarr" not in p.parts or p.name == "zarr.json")

"""Makes a new cache folder, whole or not at all, and writes its parts."""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..files.json_files import file_digest, make_folder, sync_folder, sync_tree, write_json
from ..files.leases import hold_lock, try_lock
from ..files.paths import is_remote, upload_folder
from ..format.array_writer import create_logits, create_residual, write_table
from ..format.journal import Journal
from ..format.logits_arrays import logits_arrays
from ..format.manifest import Manifest
from ..tokens.index_arrays import index_arrays
from ..tokens.token_stream import TokenStream
from .local_origin import FILE as ORIGIN

UNFINISHED_SECONDS = 24 * 3600.0
"""Age at which an unfinished cache is given up on where folders cannot be locked."""
FOLDERS = ("head", "journal", "leases", "moments")


def create_cache(
    root: Path,
    manifest: Manifest,
    stream: TokenStream,
    hashes: np.ndarray,
    dtypes: Mapping[int, str],
    write_head: Callable[[Path], None],
    provenance: dict,
    logits_dtype: str = "float16",
) -> Path:
    """Write manifest, head, tokens and empty arrays of the parts, then rename the folder to its id.

    A cache folder with an id therefore always has all of these; a crash leaves only a
    `.new-*` folder. If another process made the same cache meanwhile, theirs stays. For an
    object store the folder is made in the system's temporary folder, and sent.
    """
    target = root / manifest.id
    with _staging(root) as staging:
        for folder in FOLDERS:
            (staging / folder).mkdir()
        manifest.write(staging / "manifest.json")
        write_json(staging / "provenance.json", provenance)
        write_head(staging / "head")
        store = staging / "arrays.zarr"
        record = {
            name: write_table(store, name, values, _attributes(stream, name))
            for name, values in index_arrays(stream, hashes).items()
        }
        for layer, dtype in dtypes.items():
            create_residual(
                store, layer, stream.positions, manifest.d_model, dtype, manifest.layout,
                manifest.codec,
            )  # fmt: skip
        for array in logits_arrays(manifest.capture.logits, manifest.vocab, logits_dtype):
            create_logits(store, array, stream.positions, manifest.layout, manifest.codec)
        files = {p.relative_to(staging).as_posix(): file_digest(p) for p in _plain_files(staging)}
        Journal(staging / "journal").commit_base(record, files)
        publish(staging, target)
    return target


def publish(staging: Path, target: Path) -> None:
    """Make the whole cache in the folder `staging` appear at `target`, unless there is one."""
    if is_remote(target):
        with hold_lock(target / "leases", "create"):
            if not (target / "manifest.json").is_file():
                upload_folder(staging, target, last=["manifest.json"])
        return
    sync_tree(staging)
    try:
        os.rename(staging, target)
    except OSError:
        if not (target / "manifest.json").is_file():
            raise
    sync_folder(target.parent)


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """A new folder `.new-*` that is locked as long as it is in use, and then removed."""
    if is_remote(root):
        with tempfile.TemporaryDirectory(prefix="residua-") as folder:
            yield Path(folder)
        return
    make_folder(root)
    while True:
        staging = root / f".new-{uuid.uuid4().hex}"
        staging.mkdir()
        try:
            descriptor = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:  # swept away by another process, which saw no lock yet
            continue
        try:
            if try_lock(descriptor) is False or not _is_open(descriptor, staging):
                continue
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return
        finally:
            os.close(descriptor)


def _is_open(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def sweep_unfinished(root: Path) -> None:
    """Remove the `.new-*` folders of makers that died: those that nobody has locked.

    Where folders cannot be locked, those that are older than `UNFINISHED_SECONDS`.
    """
    if is_remote(root):  # what was sent of a cache without a manifest is sent again
        return
    for staging in root.glob(".new-*"):
        try:
            descriptor = os.open(staging, os.O_RDONLY)
        except OSError:
            continue
        try:
            free = try_lock(descriptor)
            if free is None:
                free = time.time() - os.fstat(descriptor).st_mtime > UNFINISHED_SECONDS
            if free:
                shutil.rmtree(staging, ignore_errors=True)
        finally:
            os.close(descriptor)


def _attributes(stream: TokenStream, name: str) -> dict[str, Any]:
    """What zarr keeps beside a label that is coded: the words by code."""
    words = stream.categories.get(name)
    return {} if words is None else {"categories": list(words)}


def _plain_files(folder: Path) -> list[Path]:
    """Files that are not shards: manifest, provenance, head and array metadata."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if path.name != ORIGIN]
    return sorted(p for p in files if "arrays.zarr" not in p.parts or p.name == "zarr.json")

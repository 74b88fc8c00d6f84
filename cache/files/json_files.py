"""Canonical JSON files with their own digest, and durable, atomic writing of files.

`write_json` and `read_json` are for all files of the format (manifest, journal, head, moments);
`plain_value` and `json_digest` serve identities and results elsewhere. cache/README.md, *JSON
files* and *Crashes*, has the format.
"""

import fcntl
import glob
import hashlib
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import CorruptError, NotFoundError
from .json_fields import MAX_JSON_BYTES, parse_json_object
from .paths import create_object, is_remote, open_new, read_object, write_object
from .read_errors import translate_read_errors

DIGEST_KEY = "sha256"
"""Key of the digest in a file: hex sha256 of the canonical JSON of the object without the key."""


def canonical_json(value: Any) -> bytes:
    """Encode `value` as JSON with sorted keys and no white space: equal values, equal bytes."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def plain_value(value: Any) -> Any:
    """Convert `value` to types of JSON: numpy's numbers and arrays, tuples, sets and paths too.

    NaN and the infinities, which JSON (RFC 8259) lacks, become None.
    """
    if isinstance(value, np.ndarray | np.generic):
        return plain_value(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {plain_key(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range | set | frozenset):
        return [plain_value(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def plain_key(key: Any) -> Any:
    """Convert a key of a JSON object: numpy's numbers to Python's, which JSON writes alike."""
    return key.item() if isinstance(key, np.generic) else key


def json_digest(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def write_json(path: Path, value: dict[str, Any], new: bool = False) -> None:
    """Write `value` with its digest, atomically and durably.

    With `new`, an object that exists in an object store raises `FileExistsError`; on disk a lease
    excludes other writers.
    """
    data = canonical_json({**value, DIGEST_KEY: json_digest(value)}) + b"\n"
    if new and is_remote(path):
        create_object(path, data)
    else:
        # Of new files, as the records of parts, a folder holds thousands; their writers sweep.
        write_atomically(path, data, sweep=not new)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of `write_json`, without the digest.

    Raises `NotFoundError` for a missing file, and `CorruptError` if a byte was changed or cannot be
    read.
    """
    try:
        with translate_read_errors(path):
            return parse_json(read_bounded(path), path)
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing") from None


def read_bounded(path: Path) -> bytes:
    """The bytes of a JSON file; raises `CorruptError` for a file larger than `MAX_JSON_BYTES`."""
    if not is_remote(path) and (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise CorruptError(f"{path} has {size} bytes; a JSON file has at most {MAX_JSON_BYTES}")
    return read_object(path, MAX_JSON_BYTES) if is_remote(path) else path.read_bytes()


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """Parse the bytes of the file `path` of `write_json`; raises `CorruptError` as `read_json`."""
    value = parse_json_object(raw, path)
    if DIGEST_KEY not in value:
        raise CorruptError(f"{path} is not a file of this cache format: it has no {DIGEST_KEY}")
    del value[DIGEST_KEY]
    if raw != canonical_json({**value, DIGEST_KEY: json_digest(value)}) + b"\n":
        raise CorruptError(f"{path} was changed after it was written (digest differs)")
    return value


def write_atomically(path: Path, data: bytes, sweep: bool = True) -> None:
    """Write `path` so that readers see the old file or the whole new one, even after a power cut.

    Temporary file, fsync, rename, fsync of the folder; a remote object is written at once. With
    `sweep`, temporary files that killed writers of `path` left are removed first.
    """
    if is_remote(path):
        write_object(path, data)
        return
    if sweep:
        _sweep_temporary_files(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _open_locked(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException as error:
        # On a full disk the unfinished file would take the remaining space.
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # errors of `write` name no file
        raise
    sync_folder(path.parent)


def _open_locked(temporary: Path) -> BinaryIO:
    """Open the new file `temporary` and lock it, so that no other writer sweeps it."""
    while True:
        file = open_new(temporary)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # waits for a sweep that saw the file before its lock
        except OSError:
            return file  # no locks here: then nobody sweeps
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(temporary)):
                return file
        file.close()


def _sweep_temporary_files(path: Path) -> None:
    """Remove temporary files of `path` that no living process has locked."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO or link may wait under the name
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            descriptor = os.open(temporary, flags)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()
            finally:
                os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder`, or the bytes of a file, durable; nothing to do in a store."""
    if is_remote(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make `folder` and all files and folders in it durable."""
    for path in (*folder.rglob("*"), folder):
        sync_folder(path)


def make_folder(folder: Path) -> None:
    """Make `folder` and missing folders above it, durably: names survive a power cut."""
    if is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        with suppress(PermissionError):  # a folder in which we may write but not read
            sync_folder(path.parent)


def file_digest(path: Path) -> str:
    """Hex sha256 of a file; raises `CorruptError` if the disk fails."""
    with translate_read_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

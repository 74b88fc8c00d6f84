"""Canonical JSON files that carry their own digest and are written atomically."""

import hashlib
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptError, NotFoundError
from .paths import create_object, is_remote, write_object

DIGEST_KEY = "sha256"


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no white space, UTF-8: equal values give equal bytes."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def plain_value(value: Any) -> Any:
    """`value` as JSON has it (RFC 8259): numpy's numbers and arrays, tuples and paths converted.

    NaN and the infinities, for which JSON has no word, become None.
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
    """A key of a JSON object: numpy's numbers as Python's, whose JSON is the same word."""
    return key.item() if isinstance(key, np.generic) else key


def json_digest(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def write_json(path: Path, value: dict[str, Any], new: bool = False) -> None:
    """Write `value` with its digest: temporary file, fsync, rename, fsync of the folder.

    An object of a store is written at once; if it is to be `new`, one that is there already
    raises `FileExistsError`.
    """
    data = canonical_json({**value, DIGEST_KEY: json_digest(value)}) + b"\n"
    if new and is_remote(path):
        create_object(path, data)
    else:
        write_atomically(path, data)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of `write_json`; any changed byte raises `CorruptError`."""
    try:
        return parse_json(path.read_bytes(), path)
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing") from None


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """The value of the bytes of the file `path`; raises as `read_json` does."""
    try:
        value = json.loads(raw)
        value.pop(DIGEST_KEY)
        whole = canonical_json({**value, DIGEST_KEY: json_digest(value)}) + b"\n"
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptError(f"{path} is not a file of this cache format: {error}") from None
    if raw != whole:
        raise CorruptError(f"{path} was changed after it was written (digest differs)")
    return value


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the whole new one, also after a power cut."""
    if is_remote(path):
        write_object(path, data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # On a full disk the beginning of a file would take what space is left.
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` (or the bytes of a file) durable; object stores do so alone."""
    if is_remote(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make all files and folders in `folder`, and itself, durable."""
    for path in (*folder.rglob("*"), folder):
        sync_folder(path)


def make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it, durably: a power cut takes no name away."""
    if is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        with suppress(PermissionError):  # a folder that lets us make others, but not look
            sync_folder(path.parent)


def file_digest(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

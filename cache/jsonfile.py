"""Canonical JSON files that carry their own digest and are written atomically."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .errors import CorruptError, NotFoundError

DIGEST_KEY = "sha256"


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no white space, UTF-8: equal values give equal bytes."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def digest(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value)).hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` with its digest: temporary file, fsync, rename, fsync of the folder."""
    write_atomically(path, canonical({**value, DIGEST_KEY: digest(value)}) + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of `write_json`; any changed byte raises `CorruptError`."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing") from None
    try:
        value = json.loads(raw)
        value.pop(DIGEST_KEY)
        whole = canonical({**value, DIGEST_KEY: digest(value)}) + b"\n"
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptError(f"{path} is not a file of this cache format: {error}") from None
    if raw != whole:
        raise CorruptError(f"{path} was changed after it was written (digest differs)")
    return value


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the whole new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` (or the bytes of a file) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Where caches lie: a folder, or the URL of an object store, behind one kind of path.

An object store has no rename, no append and no lock. It has whole objects, which appear at once,
and conditional creation: of several who create one name, one succeeds.
"""

import re
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..errors import UsageError

LOST = ("PreconditionFailed", "ConditionalRequestConflict")
"""What S3 servers say to all but one of those who create an object."""
CREATE_ROUNDS = 8
"""Times that two try to create one object; a store that lets both is found out at the first."""
TRANSFERS = 8
"""Objects that are read or written at the same time."""


def as_path(name: str | Path) -> Path:
    """The path that a user names: a folder, or a URL such as `s3://bucket/caches`.

    URLs become paths of `universal_pathlib`, which behave like those of pathlib; options of a
    store (endpoint, credentials) come from its own environment variables and files. Raises
    `UsageError` where the library for such URLs is not installed.
    """
    if isinstance(name, Path) and re.match(r"\w{2,}:/[^/]", str(name)):
        raise UsageError(f"{name} was a URL, and lost a slash in pathlib.Path; give it as a str")
    if not isinstance(name, str):
        return name
    if "://" not in name:
        return Path(name).expanduser()
    if name.startswith("file://"):
        return Path(url2pathname(urlsplit(name).path))
    try:
        from upath import UPath

        # Other processes write too: a listing is true only at the moment it is made.
        return cast(Path, UPath(name, use_listings_cache=False))
    except ImportError as error:
        raise UsageError(
            f"{name} needs a library that is not installed ({error}); for s3:// give: pip "
            "install 'residua[s3]', for other stores the package of fsspec that reads them"
        ) from None
    except ValueError as error:
        raise UsageError(f"{name} is not the URL of a store that fsspec knows: {error}") from None


def is_remote(path: Path) -> bool:
    """Whether `path` lies in an object store."""
    return not isinstance(path, Path)


def store_of(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote `path`, and its name in it."""
    found: Any = path
    return found.fs, found.path


def write_object(path: Path, data: bytes) -> None:
    """Write a remote object, whole or not at all; what was there is replaced."""
    store, key = store_of(path)
    store.pipe_file(key, data)


def create_object(path: Path, data: bytes) -> None:
    """Write a remote object that must not be there; raises `FileExistsError` if it is.

    Of several writers at the same time one succeeds (for S3: `If-None-Match: *`). For objects of
    one request only: Ceph's gateway overwrites where there are many.
    """
    store, key = store_of(path)
    try:
        store.pipe_file(key, data, mode="create")
    except OSError as error:
        if store_error_code(error) in LOST:
            raise FileExistsError(f"{path} exists") from error
        raise


def store_error_code(error: BaseException) -> str:
    """What an S3 server called the error, such as `NoSuchBucket`; empty if it did not say."""
    response = getattr(error.__cause__, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(found or "")


def upload_folder(source: Path, target: Path, last: Sequence[str] = ()) -> None:
    """Write all files under the folder `source` below `target`; those named `last` at the end."""
    files = [path for path in source.rglob("*") if path.is_file()]
    names = [path.relative_to(source).as_posix() for path in files]

    def send(name: str) -> None:
        store, key = store_of(target / name)
        store.put_file(str(source / name), key)

    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(send, [name for name in names if name not in last]))
    for name in last:
        create_object(target / name, (source / name).read_bytes())


def copy_object(source: Path, target: Path) -> None:
    """Copy a remote object inside its store; the bytes do not pass through this machine."""
    store, key = store_of(source)
    store.cp_file(key, store_of(target)[1])


def list_folder(folder: Path) -> list[Path]:
    """Everything in a folder, which may be missing, as it is at this moment."""
    try:
        if not is_remote(folder):
            return list(folder.iterdir())
        store, key = store_of(folder)
        found = store.ls(key, detail=False, refresh=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {
        name.rstrip("/").rpartition("/")[2] for name in found if name.strip("/") != key.strip("/")
    }
    return [folder / name for name in sorted(names)]


def read_all(paths: Sequence[Path]) -> list[bytes]:
    """The contents of several files; of remote ones, many at a time."""
    if not paths or not is_remote(paths[0]):
        return [path.read_bytes() for path in paths]
    with ThreadPoolExecutor(TRANSFERS) as pool:
        return list(pool.map(lambda path: path.read_bytes(), paths))


def total_bytes(path: Path) -> int:
    """Bytes of all files under the folder `path`."""
    if is_remote(path):
        store, key = store_of(path)
        return sum(entry["size"] or 0 for entry in store.find(key, detail=True).values())
    total = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # a temporary file that its writer has just renamed
            total += file.stat().st_size if file.is_file() else 0
    return total


def check_creates(root: Path) -> None:
    """Raise `UsageError` unless of two who create one object in the store of `root` one is refused.

    Some stores take no notice of the condition, some have none, and some look only before they
    write (OpenStack Swift): two workers would then write one part.
    """
    with ThreadPoolExecutor(2) as pool:
        for _ in range(CREATE_ROUNDS):
            probe = root / f".probe-{uuid.uuid4().hex}"
            try:
                refused = [code for code in pool.map(_refusal, [probe, probe]) if code is not None]
            finally:
                probe.unlink(missing_ok=True)
            if refused != [""]:
                said = refused[0] if refused else "it let two create one object"
                raise UsageError(
                    f"the store of {root} does not keep the condition `If-None-Match: *` ({said}), "
                    "so that two workers could write one part; use a store that does, or a folder"
                )


def _refusal(path: Path) -> str | None:
    """None if `path` could be created, an empty word if it exists, else what the store lacks."""
    try:
        create_object(path, b"")
    except FileExistsError:
        return ""
    except (OSError, NotImplementedError) as error:
        said = f"{store_error_code(error)} {error}"
        if not re.search("not.?(implemented|supported)", said, re.IGNORECASE):
            raise
        return said
    return None

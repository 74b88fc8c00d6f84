"""Paths of caches: folders on disk and URLs of object stores behind the interface of pathlib.

`as_path` makes a path of a user's name; `is_remote` tells the two kinds apart. The other functions
are operations that differ between them. An object store has no rename, no append and no lock. An
object appears whole, at once, and can be created conditionally (`create_object`): of several
writers that create the same object, one succeeds, which is all that leases and commits rely on.
"""

import re
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from ..errors import MissingLibraryError, UsageError
from ..http.served_path import SCHEMES, ServedPath, is_served, served_path
from ..optional_libraries import missing_library
from .read_errors import read_file

EXISTS_CODES = ("PreconditionFailed", "ConditionalRequestConflict")
"""Error codes of S3 servers for a conditional creation of an object that exists."""
CREATE_ROUNDS = 8
"""Trials of `check_creates`; a store without conditional creation fails the first."""
TRANSFERS = 8
"""Objects that are read or written at the same time."""


def as_path(name: str | Path) -> Path:
    """Convert a user's name, a folder or a URL such as `s3://bucket/caches`, to a path.

    URLs become paths of `universal_pathlib`, which behave like those of pathlib; options of a
    store (endpoint, credentials) come from its own environment variables and files. A URL
    `http://...` is a place of a residua service, which is only read (`cache/http/`). Raises
    `MissingLibraryError` for a URL whose library is not installed, `UsageError` for one that no
    library knows.
    """
    if isinstance(name, Path) and re.match(r"\w{2,}:/[^/]", str(name)):
        raise UsageError(f"{name} was a URL, and lost a slash in pathlib.Path; give it as a str")
    if not isinstance(name, str):
        return name
    if "://" not in name:
        return Path(name).expanduser()
    if name.startswith("file://"):
        from urllib.request import url2pathname  # imports http.client and email, too

        return Path(url2pathname(urlsplit(name).path))
    if name.startswith(SCHEMES):
        return cast(Path, served_path(name))
    try:
        from upath import UPath

        # No cache of listings: other processes write too.
        return cast(Path, UPath(name, use_listings_cache=False))
    except MissingLibraryError:
        raise
    except ImportError as error:  # UPath asks fsspec for the library of this kind of URL
        if urlsplit(name).scheme in ("s3", "s3a"):
            raise missing_library("s3fs", name) from None
        raise MissingLibraryError(
            f"{name} needs a library that is not installed: {error}", error.name
        ) from None
    except ValueError as error:
        raise UsageError(f"{name} is not the URL of a store that fsspec knows: {error}") from None


def is_remote(path: Path) -> bool:
    """Whether `path` lies in an object store or on a server, not on a disk of this machine."""
    return not isinstance(path, Path)


def check_not_served(path: Path, advice: str = "") -> None:
    """Raise `UsageError` for a place of a service, which nothing can be written to.

    `advice` says what to do instead, where it is not to write elsewhere.
    """
    if is_served(path):
        if advice:
            raise UsageError(f"{path} is a residua service; {advice}")
        path.mkdir()  # says it


def store_of(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote `path`, and the key of the object in the file system."""
    remote: Any = path
    return remote.fs, remote.path


def open_new(path: Path) -> BinaryIO:
    """Open a new file `path` for writing, in place of a file or link of this name.

    In a folder of strangers a link may wait under the name of a temporary file.
    """
    path.unlink(missing_ok=True)
    return open(path, "xb")


def read_object(path: Path, most: int | None = None) -> bytes:
    """The bytes of a remote object; of a service, at most `most`, else `UnreachableError`."""
    if is_served(path):
        return cast(ServedPath, path).read_bytes(most)
    return path.read_bytes()


def write_object(path: Path, data: bytes) -> None:
    """Write a remote object, whole or not at all; an existing object is replaced."""
    store, key = store_of(path)
    store.pipe_file(key, data)


def create_object(path: Path, data: bytes) -> None:
    """Write a new remote object; raises `FileExistsError` if the object exists.

    Of several simultaneous writers one succeeds (for S3: `If-None-Match: *`). Only for objects
    that one request can hold: in multipart uploads, Ceph's gateway overwrites.
    """
    store, key = store_of(path)
    try:
        store.pipe_file(key, data, mode="create")
    except OSError as error:
        if store_error_code(error) in EXISTS_CODES:
            raise FileExistsError(f"{path} exists") from error
        raise


def store_error_code(error: BaseException) -> str:
    """Error code of an S3 server, such as `NoSuchBucket`; empty for an error without a code."""
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(code or "")


def upload_folder(source: Path, target: Path, last: Sequence[str] = ()) -> None:
    """Write all files under the local folder `source` to the remote folder `target`.

    The files `last`, relative to `source`, come at the end and by conditional creation: raises
    `FileExistsError` if such an object exists.
    """
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
    """Copy a remote object inside its store, without a transfer through this machine."""
    store, key = store_of(source)
    store.cp_file(key, store_of(target)[1])


def list_folder(folder: Path) -> list[Path]:
    """Files and folders in `folder` at this moment; empty for a missing folder."""
    try:
        if not is_remote(folder) or is_served(folder):
            return list(folder.iterdir())
        store, key = store_of(folder)
        keys = store.ls(key, detail=False, refresh=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    # Some stores list the folder itself, and folders with a slash at the end.
    names = {
        entry.rstrip("/").rpartition("/")[2] for entry in keys if entry.strip("/") != key.strip("/")
    }
    return [folder / name for name in sorted(names)]


def read_all(paths: Sequence[Path]) -> list[bytes]:
    """The contents of several files of one kind; remote files are read `TRANSFERS` at a time."""
    if not paths or not is_remote(paths[0]):
        return [read_file(path) for path in paths]
    with ThreadPoolExecutor(TRANSFERS) as pool:
        return list(pool.map(lambda path: path.read_bytes(), paths))


def total_bytes(path: Path) -> int:
    """Size of all files under the folder `path`, in bytes."""
    if is_remote(path):
        store, key = store_of(path)
        return sum(entry["size"] or 0 for entry in store.find(key, detail=True).values())
    total = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # a temporary file that its writer has just renamed
            total += file.stat().st_size if file.is_file() else 0
    return total


def check_creates(root: Path) -> None:
    """Raise `UsageError` unless the store of `root` refuses a second creation of an object.

    Some stores ignore the condition, some have none, and some check only before the write
    (OpenStack Swift): two workers could then write the same part.
    """
    check_not_served(root)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(CREATE_ROUNDS):
            probe = root / f".probe-{uuid.uuid4().hex}"
            try:
                refused = [
                    code for code in pool.map(_creation_error, [probe, probe]) if code is not None
                ]
            finally:
                probe.unlink(missing_ok=True)
            # Right: one of the two creations is refused, because the object exists.
            if refused != [""]:
                reason = refused[0] if refused else "it let two create one object"
                raise UsageError(
                    f"the store of {root} does not keep the condition `If-None-Match: *` "
                    f"({reason}), so that two workers could write one part; use a store that does, "
                    "or a folder"
                )


def _creation_error(path: Path) -> str | None:
    """None if `path` was created, empty if it exists, else the feature that the store lacks."""
    try:
        create_object(path, b"")
    except FileExistsError:
        return ""
    except (OSError, NotImplementedError) as error:
        message = f"{store_error_code(error)} {error}"
        if not re.search("not.?(implemented|supported)", message, re.IGNORECASE):
            raise
        return message
    return None

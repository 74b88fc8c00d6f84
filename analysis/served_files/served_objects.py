"""The files of a root that are served as bytes: which names, opened without leaving the root.

`ServedFiles.find` gives an object for the path of a request, `ServedFiles.list_entries` the
content of a folder. Served are the files of the format below `caches/<id>/` and the two files of
each probe below `probes/<name>/`; nothing else of the root, no name that begins with a dot, and
nothing that is reached through a link.
"""

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from ...cache.errors import CorruptError, NotFoundError
from ...cache.files.confined_files import is_confined_name
from ...cache.files.paths import is_remote, list_folder, store_of
from ...cache.files.read_errors import translate_read_errors
from ...cache.format.journal import ShardRecord
from ...probes.saved.save import FILES
from .committed_shards import CommittedShards
from .open_files import OpenFile, OpenFiles

CACHES, PROBES = "caches", "probes"
"""First part of the path of every object."""
CACHE_PARTS = (
    "manifest.json",
    "provenance.json",
    "arrays.zarr",
    "head",
    "journal",
    "leases",
    "moments",
)
"""Files and folders of a cache that are served. `local.json`, paths of this machine, is not."""
LIST_LIMIT = 10_000
"""Most entries of one answer to a listing."""
_CACHE_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
"""Error numbers of names that lead to no file that may be read."""


class ServedObject(Protocol):
    """One file or object, to be read in pieces; `close` after use."""

    size: int
    """In bytes."""
    etag: str
    """Strong entity tag, in its quotes."""
    modified: float
    """Time of the last change, in seconds since 1970."""
    is_immutable: bool
    """Whether it is a committed shard, whose bytes stay the same."""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes `start:stop`; raises `CorruptError` if the object is shorter by now."""
        ...

    def is_in_memory(self, start: int, stop: int) -> bool:
        """Whether reading `start:stop` waits for no disk and no network."""
        ...

    def close(self) -> None:
        """Give the object back; it is not read afterwards."""
        ...


@dataclass(frozen=True)
class FolderEntry:
    """A file or folder in a listing."""

    name: str
    """Relative to the folder that is listed."""
    bytes: int | None
    """Size of a file; None for a folder."""


@lru_cache(maxsize=4096)
def split_name(path: str) -> tuple[str, ...] | None:
    """The parts of the path of an object or folder that is served, such as `caches/<id>/head`.

    `path` is decoded and has no slash at its ends. None for any other path: it is decided by the
    name alone, and nothing is looked up.
    """
    if not path.isprintable() or not is_confined_name(path):
        return None
    kind, *parts = path.split("/")
    if any(part.startswith(".") for part in parts):
        return None
    if kind == CACHES:
        is_served = (not parts or _CACHE_ID.fullmatch(parts[0])) and (
            len(parts) < 2 or parts[1] in CACHE_PARTS
        )
    elif kind == PROBES:
        is_served = len(parts) < 2 or (len(parts) == 2 and parts[1] in FILES)
    else:
        is_served = False
    return (kind, *parts) if is_served else None


class ServedFiles:
    """The objects under one root, a folder or an object store. Safe to use from several threads."""

    def __init__(self, root: Path, open_files: int = 256) -> None:
        self.root = root
        self._committed = CommittedShards(root)
        self._open_files = OpenFiles(open_files)

    def close(self) -> None:
        """Close all files that are not being read."""
        self._open_files.close()

    def find(self, path: str) -> ServedObject:
        """The object at `path`, such as `caches/<id>/manifest.json`.

        Raises `NotFoundError` for everything else: another name, a folder, a link, no file.
        """
        found = self.find_open(path)
        if found is not None:
            return found
        parts = _object_parts(path)
        if is_remote(self.root):
            return self._find_stored(path, parts)
        try:
            file = self._open_files.add(self.root, _name_below_root(parts))
        except (CorruptError, OSError) as error:
            raise _as_not_found(error, path) from None
        return self._local_object(parts, file)

    def find_open(self, path: str) -> ServedObject | None:
        """As `find`, without waiting for a disk or a store: None if the file is not open yet."""
        parts = _object_parts(path)
        file = None if is_remote(self.root) else self._open_files.get(_name_below_root(parts))
        return None if file is None else self._local_object(parts, file)

    def _local_object(self, parts: tuple[str, ...], file: OpenFile) -> ServedObject:
        """The object of an open file, which has one more reader already."""
        record = self._record_of(parts)
        if record is not None and record.bytes == file.size:
            return LocalObject(self._open_files, file, _committed_tag(record), True)
        return LocalObject(self._open_files, file, f'"{_digest(file.state)}"', False)

    def _find_stored(self, path: str, parts: tuple[str, ...]) -> ServedObject:
        """The object of a store."""
        store, key = store_of(self.root.joinpath(*parts[parts[0] == CACHES :]))
        try:
            status = store.info(key, refresh=True)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise _not_found(path) from None
        if status.get("type") != "file":
            raise _not_found(path)
        record = self._record_of(parts)
        served = StoredObject(store, key, int(status["size"]))
        modified = status.get("LastModified") or status.get("mtime") or 0.0
        served.modified = modified if isinstance(modified, int | float) else modified.timestamp()
        record = self._record_of(parts)
        served.is_immutable = record is not None and record.bytes == served.size
        if record is not None and served.is_immutable:
            served.etag = _committed_tag(record)
        else:
            state = status.get("ETag"), status.get("VersionId"), served.size, served.modified
            served.etag = f'"{_digest(state)}"'
        return served

    def _record_of(self, parts: tuple[str, ...]) -> ShardRecord | None:
        """The commit record of a shard; None for any other object."""
        if parts[0] != CACHES or parts[2] != "arrays.zarr":
            return None
        return self._committed.record_of(parts[1], "/".join(parts[2:]))

    def list_entries(
        self, path: str, recursive: bool = False, after: str = "", limit: int = LIST_LIMIT
    ) -> tuple[list[FolderEntry], str | None]:
        """Files and folders at `path`, sorted; with `recursive`, all files below, and no folders.

        The first `limit` after the name `after`, and the name to go on after, None at the end.
        Raises `NotFoundError` for a path that is no folder that is served.
        """
        parts = split_name(path)
        if parts is None:
            raise _not_found(path)
        if recursive and len(parts) == 1:
            raise _not_found(path)  # no walk over all caches
        entries = []
        try:
            for entry in self._walk(parts, "", recursive, tuple(after.split("/")) if after else ()):
                if len(entries) == limit:
                    return entries, entries[-1].name
                entries.append(entry)
        except (CorruptError, OSError) as error:
            raise _as_not_found(error, path) from None
        return entries, None

    def _walk(
        self, parts: tuple[str, ...], prefix: str, recursive: bool, after: tuple[str, ...]
    ) -> Iterator[FolderEntry]:
        """Entries of a folder after the name `after`, relative to the folder."""
        for entry in self._scan(parts):
            if after and entry.name < after[0]:
                continue
            is_cursor = bool(after) and entry.name == after[0]
            if entry.bytes is None and recursive:
                rest = after[1:] if is_cursor else ()
                with suppress(FileNotFoundError):  # removed meanwhile
                    yield from self._walk(
                        (*parts, entry.name), f"{prefix}{entry.name}/", recursive, rest
                    )
            elif not is_cursor:
                yield FolderEntry(prefix + entry.name, entry.bytes)

    def _scan(self, parts: tuple[str, ...]) -> list[FolderEntry]:
        """Entries of one folder that are served, sorted by name."""
        names = parts[parts[0] == CACHES :]  # caches lie in the root itself
        if is_remote(self.root):
            entries = _scan_store(self.root.joinpath(*names))
        else:
            entries = _scan_disk(self.root, names)
        served = [e for e in entries if self._is_served(parts, e)]
        return sorted(served, key=lambda entry: entry.name)

    def _is_served(self, parts: tuple[str, ...], entry: FolderEntry) -> bool:
        """Whether an entry of the folder `parts` is shown: a cache needs its id as name."""
        if split_name("/".join((*parts, entry.name))) is None:
            return False
        is_file = entry.bytes is not None
        return not (is_file and len(parts) == 1)


def _object_parts(path: str) -> tuple[str, ...]:
    """Parts of the path of an object; raises `NotFoundError` for names that are not served."""
    parts = split_name(path)
    if parts is None or len(parts) < 3:
        raise _not_found(path)
    return parts


def _name_below_root(parts: tuple[str, ...]) -> str:
    """Name of the file of an object below the root, in which caches lie without a folder."""
    return "/".join(parts[parts[0] == CACHES :])


def _scan_disk(root: Path, names: tuple[str, ...]) -> list[FolderEntry]:
    """Regular files and real folders in a folder below `root`, reached through real folders."""
    folder = _open_folder(root, names)
    entries = []
    try:
        with os.scandir(folder) as scan:
            for entry in scan:
                with suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        entries.append(FolderEntry(entry.name, None))
                    elif entry.is_file(follow_symlinks=False):
                        size = entry.stat(follow_symlinks=False).st_size
                        entries.append(FolderEntry(entry.name, size))
    finally:
        os.close(folder)
    return entries


def _open_folder(root: Path, names: tuple[str, ...]) -> int:
    """Descriptor of a folder below `root`; only `root` itself may be a link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    folder = os.open(root, flags)
    for name in names:
        try:
            inner = os.open(name, flags | os.O_NOFOLLOW, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
    return folder


def _scan_store(folder: Path) -> list[FolderEntry]:
    """Objects and folders in a folder of an object store."""
    store, key = store_of(folder)
    entries = {}
    for status in store.ls(key, detail=True, refresh=True):
        name = status["name"].rstrip("/").rpartition("/")[2]
        if status["name"].strip("/") != key.strip("/"):
            is_file = status["type"] == "file"
            entries[name] = FolderEntry(name, int(status["size"]) if is_file else None)
    if not entries and not list_folder(folder.parent):
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(folder))
    return list(entries.values())


class LocalObject:
    """A file on disk, see `ServedObject`. One read is one system call."""

    def __init__(self, files: OpenFiles, file: OpenFile, etag: str, is_immutable: bool) -> None:
        self._files = files
        self._file = file
        self.size = file.size
        self.etag = etag
        """Of other files than shards: a digest of inode, size and times. Writers of the format
        replace files by new ones, so it is as strong as the clock of the file system is fine."""
        self.modified = file.modified
        self.is_immutable = is_immutable

    def read(self, start: int, stop: int) -> bytes:
        with translate_read_errors(Path(self._file.path)):
            data = os.pread(self._file.descriptor, stop - start, start)
        if len(data) < stop - start:  # the file was cut, or the system gives less at a time
            return _complete(data, self._file, start, stop)
        return data

    def is_in_memory(self, start: int, stop: int) -> bool:
        return self._file.is_in_memory(start, stop)

    def close(self) -> None:
        self._files.give_back(self._file)


def _complete(data: bytes, file: OpenFile, start: int, stop: int) -> bytes:
    """`data`, the beginning of the bytes `start:stop` of a file, with the rest of them."""
    pieces, position = [data], start + len(data)
    while position < stop:
        piece = os.pread(file.descriptor, stop - position, position)
        if not piece:
            raise CorruptError(f"{file.path} was cut short while it was read")
        pieces.append(piece)
        position += len(piece)
    return b"".join(pieces)


class StoredObject:
    """An object of a store, see `ServedObject`. One read is one ranged request to the store."""

    def __init__(self, store: Any, key: str, size: int) -> None:
        self._store = store
        self._key = key
        self.size = size
        self.etag = ""
        self.modified = 0.0
        self.is_immutable = False

    def read(self, start: int, stop: int) -> bytes:
        data = self._store.cat_file(self._key, start=start, end=stop)
        if len(data) != stop - start:
            raise CorruptError(f"{self._key} was cut short while it was read")
        return data

    def is_in_memory(self, start: int, stop: int) -> bool:
        return False

    def close(self) -> None:
        pass


def _committed_tag(record: ShardRecord) -> str:
    """Entity tag of a committed shard: the crc32c of its chunks' checksums, and its size."""
    return f'"{record.crc32c:08x}-{record.bytes:x}"'


def _digest(state: object) -> str:
    """32 hex digits of a state that changes whenever the bytes of a file do."""
    return hashlib.blake2b(repr(state).encode(), digest_size=16).hexdigest()


def _not_found(path: str) -> NotFoundError:
    return NotFoundError(f"there is no object {path[:200]!r} on this server")


def _as_not_found(error: CorruptError | OSError, path: str) -> Exception:
    """`NotFoundError` for an error of a name that leads to no file; else the error itself.

    A link or FIFO is a `CorruptError`, whose message would name folders of this machine.
    """
    is_absent = isinstance(error, CorruptError) or error.errno in _ABSENT
    return _not_found(path) if is_absent else error

"""The files under a root, and their bytes by the item they belong to; hard links count once.

`walk_files` lists the files of a folder or of an object store. `FileTally` adds them up: a file
with several names takes its bytes once, and is freed only when its last name goes.
"""

import os
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ...cache.files.paths import is_remote, store_of

ItemKey = tuple[str, str]
"""Kind and name of an item, such as `cache` and an id."""
Inode = tuple[int, int]
"""Device and number of a file on it."""


@dataclass(frozen=True)
class FoundFile:
    """A file, link or object under a root; no link is followed."""

    name: str
    """Path below the root, with `/`."""
    bytes: int
    written: float
    """Time of the last change, in seconds since 1970; 0 if the store does not say."""
    read: float | None = None
    """Time of the last reading, to a day; None where the disk does not note it."""
    links: int = 1
    """Names that the file has, under the root and elsewhere on its disk."""
    inode: Inode = (0, 0)
    is_link: bool = False
    is_folder: bool = False
    """Whether it is an empty folder, whose name ends with `/`."""


@dataclass
class ItemSum:
    """Files of one item."""

    files: int = 0
    single_bytes: int = 0
    """Bytes of the files that have one name."""
    written: float = 0.0
    """Time of the last change of a file."""
    read: float | None = None
    """Time of the last reading of a file, None where unknown."""
    inodes: set[Inode] = field(default_factory=set)
    """The files that have several names."""


@dataclass
class LinkedFile:
    """A file with several names."""

    bytes: int
    links: int
    names: dict[ItemKey, int] = field(default_factory=dict)
    """Number of its names in each item."""


class FileTally:
    """Sums of files by item; `bytes_of` and `freed_by` take any set of items."""

    def __init__(self) -> None:
        self.items: dict[ItemKey, ItemSum] = {}
        self._linked: dict[Inode, LinkedFile] = {}

    def add(self, key: ItemKey, file: FoundFile, is_content: bool = True) -> None:
        """Count `file` as one of the item `key`.

        A file that is no content, which listings read, says nothing on the item's last use.
        """
        item = self.items.setdefault(key, ItemSum())
        item.files += not file.is_folder
        item.written = max(item.written, file.written)
        if is_content and file.read is not None:
            item.read = max(item.read or 0.0, file.read)
        if file.links == 1:
            item.single_bytes += file.bytes
            return
        item.inodes.add(file.inode)
        linked = self._linked.setdefault(file.inode, LinkedFile(file.bytes, file.links))
        linked.names[key] = linked.names.get(key, 0) + 1

    def bytes_of(self, keys: Collection[ItemKey]) -> int:
        """Bytes of the items `keys` together."""
        sums = [self.items[key] for key in keys]
        inodes = set().union(*(item.inodes for item in sums))
        single = sum(item.single_bytes for item in sums)
        return single + sum(self._linked[inode].bytes for inode in inodes)

    def freed_by(self, keys: Collection[ItemKey]) -> int:
        """Bytes that go free if all items `keys` go: no file with a name elsewhere counts."""
        keys = set(keys)
        sums = [self.items[key] for key in keys]
        inodes = set().union(*(item.inodes for item in sums))
        freed = sum(item.single_bytes for item in sums)
        for inode in inodes:
            linked = self._linked[inode]
            names, fewer = linked.names, min(keys, linked.names, key=len)
            if sum(names.get(key, 0) for key in fewer if key in keys) >= linked.links:
                freed += linked.bytes
        return freed


def walk_files(root: Path, report: Callable[[str], None]) -> Iterator[FoundFile]:
    """All files, links and empty folders under `root`, a folder or a URL; no link is followed.

    `report` gets the name of each folder that cannot be looked into.
    """
    if is_remote(root):
        yield from _list_objects(root)
        return
    notes_reading = _notes_reading(root)
    folders = [("", os.fspath(root))]
    while folders:
        prefix, folder = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):  # removed meanwhile
            continue
        except PermissionError:
            report(prefix.rstrip("/"))
            continue
        if not entries and prefix:
            written = os.stat(folder, follow_symlinks=False).st_mtime
            yield FoundFile(prefix, 0, written, is_folder=True)
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            name = f"{prefix}{entry.name}"
            if stat.S_ISDIR(status.st_mode):
                folders.append((f"{name}/", entry.path))
                continue
            yield FoundFile(
                name,
                status.st_size,
                status.st_mtime,
                read=status.st_atime if notes_reading else None,
                links=status.st_nlink,
                inode=(status.st_dev, status.st_ino),
                is_link=stat.S_ISLNK(status.st_mode),
            )


def _notes_reading(root: Path) -> bool:
    """Whether the disk of `root` notes when files are read; False for a root that is not there."""
    try:
        return not os.statvfs(root).f_flag & getattr(os, "ST_NOATIME", 1024)
    except OSError:
        return False


def _list_objects(root: Path) -> Iterator[FoundFile]:
    """The objects under a remote `root`."""
    store, key = store_of(root)
    prefix = f"{key.rstrip('/')}/"
    try:
        entries = store.find(key, detail=True)
    except FileNotFoundError:
        return
    for name, entry in entries.items():
        if name.startswith(prefix):
            yield FoundFile(name[len(prefix) :], entry["size"] or 0, _time_of(entry))


def _time_of(entry: dict[str, Any]) -> float:
    """Time of an object's last change, as its store calls it; 0 if the store does not say."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "created"):
        value = entry.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0

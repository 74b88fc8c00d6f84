"""Files that a power cut would lose: `Disk` follows fsync and rename of this process.

POSIX promises only that the bytes of a file are on the disk after an fsync of the file, and its
name after an fsync of its folder; of anything not synced any part may survive, in any order. So a
file must be synced before a rename gives it its public name, its folder after the rename, and both
before another file announces it. `Disk` records every rename that breaks this order.
"""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

LOCKS = (".lock",)
"""Endings of lock files, which need not survive."""


class Disk:
    """Synced state of the files and folders under `base`, followed by patched os functions."""

    def __init__(self, base: Path, patch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.faults: list[str] = []
        """A message per rename of an unsynced file, and per announcement of an unsynced file."""
        self.events: list[tuple[str, str]] = []
        """(`fsync` or `rename`, path under `base`) in order."""
        self._lock = threading.RLock()
        self._synced_content: dict[int, str] = {}
        self._synced_entries: dict[int, dict[str, int]] = {}
        self._os_functions = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}
        patch.setattr(os, "fsync", self._fsync)
        for name in ("replace", "rename"):
            patch.setattr(os, name, lambda *paths, name=name: self._rename(name, *paths))
        self.assume_synced()

    def assume_synced(self) -> None:
        """Take the present files and folders as synced."""
        for path in (self.base, *self.base.rglob("*")):
            self._mark_synced(path)

    def _fsync(self, descriptor: int) -> None:
        self._os_functions["fsync"](descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.is_relative_to(self.base):
            return
        with self._lock:
            self._mark_synced(path)
            self.events.append(("fsync", self._relative_name(path)))

    def _mark_synced(self, path: Path) -> None:
        """Record the content of a file, or the entries of a folder, as synced."""
        number = path.stat().st_ino
        if path.is_dir():
            self._synced_entries[number] = {e.name: e.inode() for e in os.scandir(path)}
        else:
            self._synced_content[number] = content(path)

    def _rename(self, call: str, source: Any, target: Any) -> None:
        source, target = Path(os.fspath(source)), Path(os.fspath(target))
        inside = target.is_relative_to(self.base)
        with self._lock:
            if inside and self.is_public(target):
                self._check_source(source, target)
                if target.suffix == ".json":
                    self._check_announced(source, target)
            self._os_functions[call](source, target)
            if inside:
                self.events.append(("rename", self._relative_name(target)))

    def _check_source(self, source: Path, target: Path) -> None:
        """Record a fault for each unsynced file or folder that a rename makes public."""
        for path in (source, *(source.rglob("*") if source.is_dir() else ())):
            if self.is_part_of(path, source) and not self._is_synced(path):
                self.faults.append(
                    f"{self._relative_name(target)} appears before {path.name} is synced"
                )

    def _check_announced(self, source: Path, target: Path) -> None:
        """Record a fault for each unsynced file that the JSON file `target` announces.

        A JSON file announces the files beside it; a journal record also the shards it names.
        """
        announced = [path for path in target.parent.iterdir() if path.name != target.name]
        if target.parent.name == "journal":
            record = json.loads(source.read_bytes())
            if "rows" in record:
                cache, part = target.parent.parent, record["part"]
                for name in record["arrays"]:
                    announced += (cache / "arrays.zarr" / name / "c" / str(part)).rglob("*")
                    announced += [cache / "arrays.zarr" / name / "c" / str(part)]
        for path in announced:
            if self.is_part_of(path, self.base) and not self.survives(path):
                self.faults.append(
                    f"{self._relative_name(target)} appears before "
                    f"{self._relative_name(path)} is safe"
                )

    def survives(self, path: Path) -> bool:
        """Return whether `path` would survive a power cut now, with its name and content."""
        folder = self.base
        for name in path.relative_to(self.base).parts:
            synced_entries = self._synced_entries.get(folder.stat().st_ino, {})
            folder = folder / name
            if synced_entries.get(name) != folder.stat().st_ino:
                return False
        return path.is_dir() or self._is_synced(path)

    def lost(self, under: Path | None = None) -> list[str]:
        """Files and folders that would not survive a power cut now."""
        paths = sorted((under or self.base).rglob("*"))
        return [
            self._relative_name(path)
            for path in paths
            if self.is_part_of(path, self.base) and not self.survives(path)
        ]

    def _is_synced(self, path: Path) -> bool:
        """Return whether the content of a file, or the entries of a folder, are synced."""
        number = path.stat().st_ino
        if not path.is_dir():
            return self._synced_content.get(number) == content(path)
        synced_entries = self._synced_entries.get(number, {})
        entries = {entry.name: entry.inode() for entry in os.scandir(path)}
        return all(
            synced_entries.get(name) == inode
            for name, inode in entries.items()
            if self.is_part_of(path / name, path)
        )

    def is_public(self, path: Path) -> bool:
        """Return whether no part of the path is hidden, as unfinished files and folders are."""
        return not any(part.startswith(".") for part in path.relative_to(self.base).parts)

    @staticmethod
    def is_part_of(path: Path, top: Path) -> bool:
        """Return whether `path` under `top` is neither a lock nor a temporary file."""
        names = path.relative_to(top).parts
        return not path.name.endswith(LOCKS) and not any(name.startswith(".") for name in names)

    def _relative_name(self, path: Path) -> str:
        return path.relative_to(self.base).as_posix()


def content(path: Path) -> str:
    """sha256 of a file as other processes read it: without buffers of this process."""
    return hashlib.sha256(path.read_bytes()).hexdigest()

"""What a power cut would leave: follows fsync and rename, and knows what the disk has for sure.

POSIX promises little: the bytes of a file are on the disk after an fsync of it, a name after an
fsync of its folder, and of what was not synced any part may be there, in any order. So a file must
be synced before it is given its name, its folder after that, and both before anything else says
that the file is there. `Disk` looks at every rename and fsync of this process and notes where one
of these is left out.
"""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

LOCKS = (".lock",)
"""Files that mean nothing after a power cut."""


class Disk:
    """Files and folders under `base`, of which only what was synced is kept for sure."""

    def __init__(self, base: Path, patch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.faults: list[str] = []
        """Each rename that came too early, and each file that was announced too early."""
        self.events: list[tuple[str, str]] = []
        """`fsync`, `rename` with the path under `base` that was synced or appeared."""
        self._lock = threading.RLock()
        self._bytes: dict[int, str] = {}
        self._entries: dict[int, dict[str, int]] = {}
        self._real = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}
        patch.setattr(os, "fsync", self._fsync)
        for name in ("replace", "rename"):
            patch.setattr(os, name, lambda *paths, name=name: self._rename(name, *paths))
        self.assume_synced()

    def assume_synced(self) -> None:
        """Take what is there now as kept."""
        for path in (self.base, *self.base.rglob("*")):
            self._keep(path)

    def _fsync(self, descriptor: int) -> None:
        self._real["fsync"](descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.is_relative_to(self.base):
            return
        with self._lock:
            self._keep(path)
            self.events.append(("fsync", self._name(path)))

    def _keep(self, path: Path) -> None:
        number = path.stat().st_ino
        if path.is_dir():
            self._entries[number] = {e.name: e.inode() for e in os.scandir(path)}
        else:
            self._bytes[number] = content(path)

    def _rename(self, call: str, source: Any, target: Any) -> None:
        source, target = Path(os.fspath(source)), Path(os.fspath(target))
        inside = target.is_relative_to(self.base)
        with self._lock:
            if inside and self.is_public(target):
                self._check_source(source, target)
                if target.suffix == ".json":
                    self._check_announced(source, target)
            self._real[call](source, target)
            if inside:
                self.events.append(("rename", self._name(target)))

    def _check_source(self, source: Path, target: Path) -> None:
        """What appears under its name must be whole on the disk, with all that is in it."""
        for path in (source, *(source.rglob("*") if source.is_dir() else ())):
            if self.is_part_of(path, source) and not self._is_kept(path):
                self.faults.append(f"{self._name(target)} appears before {path.name} is synced")

    def _check_announced(self, source: Path, target: Path) -> None:
        """A JSON file says that what lies beside it, and the shards that it names, are there."""
        named = [path for path in target.parent.iterdir() if path.name != target.name]
        if target.parent.name == "journal":
            record = json.loads(source.read_bytes())
            if "rows" in record:
                cache, part = target.parent.parent, record["part"]
                for name in record["arrays"]:
                    named += (cache / "arrays.zarr" / name / "c" / str(part)).rglob("*")
                    named += [cache / "arrays.zarr" / name / "c" / str(part)]
        for path in named:
            if self.is_part_of(path, self.base) and not self.survives(path):
                self.faults.append(
                    f"{self._name(target)} appears before {self._name(path)} is safe"
                )

    def survives(self, path: Path) -> bool:
        """Whether a power cut now leaves `path` under its name, with the bytes that it has."""
        folder = self.base
        for name in path.relative_to(self.base).parts:
            kept = self._entries.get(folder.stat().st_ino, {})
            folder = folder / name
            if kept.get(name) != folder.stat().st_ino:
                return False
        return path.is_dir() or self._is_kept(path)

    def lost(self, under: Path | None = None) -> list[str]:
        """Files that a power cut now would cost, with their folders."""
        paths = sorted((under or self.base).rglob("*"))
        return [self._name(p) for p in paths
                if self.is_part_of(p, self.base) and not self.survives(p)]  # fmt: skip

    def _is_kept(self, path: Path) -> bool:
        number = path.stat().st_ino
        if path.is_dir():
            there = {e.name: e.inode() for e in os.scandir(path)}
            kept = self._entries.get(number, {})
            return all(
                kept.get(n) == i for n, i in there.items() if self.is_part_of(path / n, path)
            )
        return self._bytes.get(number) == content(path)

    def is_public(self, path: Path) -> bool:
        """Whether `path` is not in a folder, or under a name, of something unfinished."""
        return not any(part.startswith(".") for part in path.relative_to(self.base).parts)

    @staticmethod
    def is_part_of(path: Path, top: Path) -> bool:
        """Whether `path` under `top` is no lock and no temporary file."""
        names = path.relative_to(top).parts
        return not path.name.endswith(LOCKS) and not any(name.startswith(".") for name in names)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.base).as_posix()


def content(path: Path) -> str:
    """Digest of what other processes read in a file now: buffers of this one are not in it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()

"""Extractions that tests kill or disturb, and checks of the files under their root.

`run_undisturbed` gives the files that an interrupted and resumed extraction must have in the end;
`CommittedRecords.check` is called after every interruption, `assert_complete` at the end.
"""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from residua.cache.format.journal import Journal
from residua.cache.store.cache_creation import sweep_unfinished
from residua.cache.store.catalog import list_paths
from residua.cache.store.verification import verify

from .crashing import Driver
from .models import texts


def write_texts(folder: Path) -> Path:
    """Write a file of 70 documents of about 40 tokens; return its path."""
    path = folder / "texts.txt"
    path.write_text("<|endoftext|>".join(texts(70)))
    return path


@dataclass(frozen=True)
class Scene:
    """An extraction to kill, and the extraction before it."""

    model: Path
    data: Path
    options: tuple[object, ...] = ()
    before: tuple[object, ...] | None = None
    """Options of a first, undisturbed extraction; None for an empty root."""

    def command(self, root: Path, *options: object) -> tuple[object, ...]:
        """Arguments of the command line, with further `options`."""
        size = ("--context", 40, "--part-positions", 128, "--batch-tokens", 200)
        return ("extract", self.model, self.data, *size, *self.options, *options, "--root", root)


def journal_records(root: Path) -> dict[Path, bytes]:
    """Bytes of all journal records of all caches."""
    paths = [record for path in list_paths(root) for record in path.glob("journal/*.json")]
    return {path: path.read_bytes() for path in paths if not path.name.startswith(".")}


def array_files(root: Path) -> dict[str, bytes]:
    """Bytes of all files in the arrays of all caches, temporary files included."""
    paths = [
        path
        for cache in list_paths(root)
        for path in cache.glob("arrays.zarr/**/*")
        if path.is_file()
    ]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def temporary_files(root: Path) -> list[Path]:
    """Paths of all hidden files and folders."""
    return list(root.rglob(".*"))


@dataclass
class CommittedRecords:
    """Journal records under `root` at the last `check`, which fails if one changed or is gone."""

    root: Path
    seen: dict[Path, bytes] = field(default_factory=dict)

    def check(self) -> None:
        """Verify all caches, compare the records with the last ones, and remember the new ones."""
        for path in list_paths(self.root):
            assert verify(path).damages == ()
        current = journal_records(self.root)
        assert self.seen.items() <= current.items()
        self.seen = current


def run_undisturbed(driver: Driver, scene: Scene, folder: Path) -> tuple[dict[str, bytes], float]:
    """Array files of an undisturbed run and its seconds; `folder`/start is a copy of its start."""
    start, root = folder / "start", folder / "undisturbed"
    start.mkdir(parents=True)
    if scene.before is not None:
        driver.run(*scene.command(start, *scene.before))
    shutil.copytree(start, root)
    began = time.perf_counter()
    driver.run(*scene.command(root))
    return array_files(root), time.perf_counter() - began


def assert_complete(root: Path) -> None:
    """Fail unless `root` has no temporary files and the journals name all arrays' metadata."""
    sweep_unfinished(root)
    assert temporary_files(root) == [], temporary_files(root)
    for path in list_paths(root):
        _, named = Journal(path / "journal").base()
        metadata = path.glob("arrays.zarr/**/zarr.json")
        assert {p.relative_to(path).as_posix() for p in metadata} <= set(named)

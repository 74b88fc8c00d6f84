"""Commands to be killed or disturbed, and what they leave under a root."""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from residua.cache.format.journal import Journal
from residua.cache.store.catalog import list_paths
from residua.cache.store.create_cache import sweep_unfinished
from residua.cache.store.verify import verify

from .crashing import Driver
from .models import texts


def write_texts(folder: Path) -> Path:
    """A file of documents of about 40 tokens."""
    path = folder / "texts.txt"
    path.write_text("<|endoftext|>".join(texts(70)))
    return path


@dataclass(frozen=True)
class Scene:
    """A command to kill, and the one that went before it."""

    model: Path
    data: Path
    options: tuple[object, ...] = ()
    before: tuple[object, ...] | None = None
    """Options of a first extraction that ends undisturbed."""

    def command(self, root: Path, *more: object) -> tuple[object, ...]:
        size = ("--context", 40, "--part-positions", 128, "--batch-tokens", 200)
        return ("extract", self.model, self.data, *size, *self.options, *more, "--root", root)


def records(root: Path) -> dict[Path, bytes]:
    """Bytes of all records in the journals."""
    found = [record for path in list_paths(root) for record in path.glob("journal/*.json")]
    return {path: path.read_bytes() for path in found if not path.name.startswith(".")}


def files(root: Path) -> dict[str, bytes]:
    """Bytes of all files in the arrays of all caches, temporary ones too."""
    found = [p for cache in list_paths(root) for p in cache.glob("arrays.zarr/**/*") if p.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def temporary(root: Path) -> list[Path]:
    return list(root.rglob(".*"))


@dataclass
class Witness:
    """Remembers what was committed under a root; `check` fails if any of it is not as it was."""

    root: Path
    seen: dict[Path, bytes] = field(default_factory=dict)

    def check(self) -> None:
        for path in list_paths(self.root):
            assert verify(path).damages == ()
        now = records(self.root)
        assert self.seen.items() <= now.items()
        self.seen = now


def run_undisturbed(driver: Driver, scene: Scene, folder: Path) -> tuple[dict[str, bytes], float]:
    """Files of an undisturbed run, and its seconds; `folder`/start is how it began."""
    start, root = folder / "start", folder / "whole"
    start.mkdir(parents=True)
    if scene.before is not None:
        driver.run(*scene.command(start, *scene.before))
    shutil.copytree(start, root)
    began = time.perf_counter()
    driver.run(*scene.command(root))
    return files(root), time.perf_counter() - began


def assert_complete(root: Path) -> None:
    """A finished root holds nothing temporary, and its journals name every array's metadata."""
    sweep_unfinished(root)
    assert temporary(root) == [], temporary(root)
    for path in list_paths(root):
        _, named = Journal(path / "journal").base()
        metadata = path.glob("arrays.zarr/**/zarr.json")
        assert {p.relative_to(path).as_posix() for p in metadata} <= set(named)

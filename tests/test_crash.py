"""Nothing that was committed is ever lost: processes killed at any moment, disks full or gone."""

import contextlib
import errno
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from residua.cache.catalog import list_paths
from residua.cache.create import sweep_unfinished
from residua.cache.disk import disk_errors
from residua.cache.errors import NoSpaceError, NotFoundError, UsageError
from residua.cache.extract import run
from residua.cache.grow import share_parts
from residua.cache.journal import Journal
from residua.cache.request import Request
from residua.cache.verify import verify

from .crashing import Child, Driver, shared_driver, until
from .models import texts

SEED = 20261120
MANY = 220
"""Kills of the slow test."""


@pytest.fixture(scope="module")
def driver(private_folders: None) -> Driver:
    return shared_driver()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of about 40 tokens."""
    path = tmp_path_factory.mktemp("data") / "texts.txt"
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


@pytest.fixture
def scene(model_folder: Path, data: Path) -> Scene:
    return Scene(model_folder, data)


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


def whole(driver: Driver, scene: Scene, folder: Path) -> tuple[dict[str, bytes], float]:
    """Files of an undisturbed run, and its seconds; `folder`/start is how it began."""
    start, root = folder / "start", folder / "whole"
    start.mkdir(parents=True)
    if scene.before is not None:
        driver.run(*scene.command(start, *scene.before))
    shutil.copytree(start, root)
    began = time.perf_counter()
    driver.run(*scene.command(root))
    return files(root), time.perf_counter() - began


def torture(
    driver: Driver, scene: Scene, folder: Path, workers: int, kills: int, rng: random.Random
) -> Counter[str]:
    """Kill workers of `scene` again and again, from a fresh root whenever one is complete.

    Returns the number of kills by `phase`. Every process lives for a random part of an
    undisturbed run; one death in four is everybody's, as if the power went.
    """
    want, seconds = whole(driver, scene, folder)
    killed, rounds = Counter[str](), 0
    while killed.total() < kills:
        rounds += 1
        root = folder / f"root{rounds}"
        shutil.copytree(folder / "start", root)
        began = time.perf_counter()
        deaths = _round(driver, scene, root, workers, seconds, rng)
        killed += deaths
        if not deaths.total():  # other work on this machine disturbed the first measurement
            seconds = min(seconds, time.perf_counter() - began)
        found = files(root)
        assert [name for name in {**want, **found} if want.get(name) != found.get(name)] == []
        _complete(root)
        shutil.rmtree(root)
    shutil.rmtree(folder)
    return killed


def _round(
    driver: Driver, scene: Scene, root: Path, workers: int, seconds: float, rng: random.Random
) -> Counter[str]:
    """Kill and start workers until one ends by itself; returns the number of kills by `phase`."""
    witness, killed, finished = Witness(root), Counter[str](), False
    witness.check()
    alive: dict[int, tuple[Child, float]] = {}
    while alive or not finished:
        while len(alive) < workers and not finished:
            child = driver.start(*scene.command(root))
            # Workers slow each other down, and on a busy machine nobody would ever get to the end
            # if lives did not grow longer.
            longest = seconds * (0.6 + workers / 2 + killed.total() / 10)
            alive[child.pid] = child, time.monotonic() + rng.uniform(0, longest)
        time.sleep(0.002)
        due = [child for child, end in alive.values() if time.monotonic() > end]
        if due and rng.random() < 0.25:
            due = [child for child, _ in alive.values()]
        deaths = sum(child.kill() for child in due)
        if deaths:
            killed[phase(root)] += deaths
            witness.check()
        for child in [child for child, _ in alive.values() if child.ended()]:
            if child.code != -signal.SIGKILL:
                assert child.code == 0, child.out.read_text() + child.err.read_text()
                finished = True
            del alive[child.pid]
    witness.check()
    return killed


def phase(root: Path) -> str:
    """How far the work under `root` is."""
    if list(root.glob(".new-*")):
        return "creating"
    found = list_paths(root)
    if not found:
        return "before"
    journals = [Journal(path / "journal") for path in found]
    parts = sum(len(journal.paths()) for journal in journals)
    return "parts" if parts else "created"


def _complete(root: Path) -> None:
    """A finished root holds nothing temporary, and its journals name every array's metadata."""
    sweep_unfinished(root)
    assert temporary(root) == []
    for path in list_paths(root):
        _, named = Journal(path / "journal").base()
        metadata = path.glob("arrays.zarr/**/zarr.json")
        assert {p.relative_to(path).as_posix() for p in metadata} <= set(named)


SCENES: dict[str, dict[str, Any]] = {
    "packed": {},
    "unpacked": {"options": ("--no-pack",)},
    "layers": {"before": ("--layers", "1")},
    "tokens": {"before": ("--max-tokens", 1500)},
    "layers and tokens": {"options": ("--no-pack",),
                          "before": ("--layers", "0,2", "--max-tokens", 1100)},
    "top logits": {"options": ("--logits", "topk:5", "--no-pack"),
                   "before": ("--layers", "1", "--max-tokens", 1100)},
    "compact logits": {"options": ("--logits", "full", "--codec", "compact")},
}  # fmt: skip


def test_a_dozen_kills_lose_nothing(driver: Driver, scene: Scene, tmp_path: Path) -> None:
    killed = torture(driver, scene, tmp_path / "one", 1, 3, random.Random(SEED))
    killed += torture(driver, scene, tmp_path / "three", 3, 9, random.Random(SEED + 1))
    assert killed.total() >= 12


@pytest.mark.parametrize("name", ["top logits", "compact logits"])
def test_a_few_kills_lose_no_logits(
    driver: Driver, model_folder: Path, data: Path, tmp_path: Path, name: str
) -> None:
    scene = Scene(model_folder, data, **SCENES[name])
    rng = random.Random(f"{SEED} {name}")
    assert torture(driver, scene, tmp_path / "kills", 2, 4, rng).total() >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("workers", [1, 3])
def test_many_kills_lose_nothing(
    driver: Driver, model_folder: Path, data: Path, tmp_path: Path, workers: int, name: str
) -> None:
    scene = Scene(model_folder, data, **SCENES[name])
    rng = random.Random(f"{SEED} {name} {workers}")
    began = time.perf_counter()
    killed = torture(driver, scene, tmp_path / "kills", workers, MANY // len(SCENES) // 2, rng)
    seconds = time.perf_counter() - began
    phases = ", ".join(f"{number} {name}" for name, number in killed.most_common())
    print(f"\n{name}, {workers} workers: {killed.total()} kills ({phases}) in {seconds:.0f} s")


def begin(driver: Driver, command: tuple[object, ...], root: Path) -> Child:
    """A process that is stopped (SIGSTOP) after it committed a part, before it has all."""
    child = driver.start(*command)
    until(lambda: child.ended() or list(root.glob("*/journal/0*.json")))
    child.signal(signal.SIGSTOP)
    assert not child.ended(), child.err.read_text()
    return child


def finish(driver: Driver, scene: Scene, root: Path, seen: Path, want: dict[str, bytes]) -> None:
    """The same command must go on and end with the files `want`."""
    assert driver.run(*scene.command(root))["status"] == "resumed"
    assert files(seen) == want
    _complete(seen)


@pytest.fixture(scope="module")
def undisturbed(
    driver: Driver, model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    return whole(driver, Scene(model_folder, data), tmp_path_factory.mktemp("undisturbed"))[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_whole_parts_and_the_command_goes_on(
    driver: Driver, scene: Scene, tmp_path: Path, undisturbed: dict, number: signal.Signals
) -> None:
    child = begin(driver, scene.command(tmp_path), tmp_path)
    child.signal(number)
    child.signal(signal.SIGCONT)
    assert child.wait() == 130
    assert child.json()["error"] == "Interrupted"
    assert "the same command goes on from here" in child.json()["message"]
    assert child.err.read_text() == ""
    witness = Witness(tmp_path)
    witness.check()
    assert temporary(tmp_path) == []
    finish(driver, scene, tmp_path, tmp_path, undisturbed)
    witness.check()


@pytest.fixture
def disk(driver: Driver, tmp_path: Path) -> Iterator[Path]:
    """A file system of 80 MB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if driver.shell("mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", path):
        pytest.skip("this system lets nobody mount a file system")
    yield path
    driver.shell("umount", path)


def fill_up(folder: Path) -> Path:
    """A file that takes all the space that is left."""
    ballast = folder / "ballast"
    with pytest.raises(OSError, match="No space left"), open(ballast, "wb", buffering=0) as file:
        file.writelines(repeat(bytes(1 << 16)))
    return ballast


def test_a_disk_that_fills_up_loses_nothing(
    driver: Driver, scene: Scene, disk: Path, undisturbed: dict
) -> None:
    root, seen = disk / "root", driver.see(disk / "root")
    child = begin(driver, scene.command(root), seen)
    ballast = fill_up(driver.see(disk))
    child.signal(signal.SIGCONT)
    assert child.wait() == 5
    assert child.json()["error"] == "NoSpaceError"
    assert f"the disk of {root}" in child.json()["message"]
    assert "is full; parts that are committed are kept" in child.json()["message"]
    assert child.err.read_text() == ""
    witness = Witness(seen)
    witness.check()
    assert witness.seen
    assert not list(seen.glob("*/arrays.zarr/**/.*"))
    driver.run(*scene.command(root), code=5)  # refused before anything is written
    witness.check()
    ballast.unlink()
    finish(driver, scene, root, seen, undisturbed)
    witness.check()


def test_a_cache_that_does_not_fit_is_refused_beforehand(
    driver: Driver, scene: Scene, disk: Path
) -> None:
    with open(driver.see(disk) / "ballast", "wb") as file:
        file.write(bytes(20 << 20))
    said = driver.run(*scene.command(disk / "root"), code=5)
    assert said["error"] == "NoSpaceError"
    assert "this cache needs" in said["message"]
    assert list(driver.see(disk / "root").iterdir()) == []


def test_a_read_only_root_says_so_and_goes_on_when_it_is_writable(
    driver: Driver, scene: Scene, disk: Path, undisturbed: dict
) -> None:
    root, seen = disk / "root", driver.see(disk / "root")
    child = begin(driver, scene.command(root), seen)
    child.signal(signal.SIGTERM)
    child.signal(signal.SIGCONT)
    assert child.wait() == 130
    witness = Witness(seen)
    witness.check()
    assert driver.shell("mount", "-o", "remount,ro", disk) == 0
    for path in (root, disk / "other"):
        said = driver.run(*scene.command(path), code=2)
        assert said["error"] == "UsageError"
        assert f"{path} cannot be written (read-only file system)" in said["message"]
    witness.check()
    driver.shell("mount", "-o", "remount,rw", disk)
    finish(driver, scene, root, seen, undisturbed)
    driver.shell("mount", "-o", "remount,ro", disk)
    assert driver.run(*scene.command(root))["status"] == "hit"


@pytest.mark.parametrize("gone", ["root", "cache"])
def test_a_root_that_vanishes_ends_the_run_and_no_stump_is_left(
    driver: Driver, scene: Scene, tmp_path: Path, undisturbed: dict, gone: str
) -> None:
    root = tmp_path / "root"
    child = begin(driver, scene.command(root), root)
    away = root if gone == "root" else list_paths(root)[0]
    witness = Witness(root)
    witness.check()
    away.rename(tmp_path / "away")
    child.signal(signal.SIGCONT)
    assert child.wait() == 2
    assert child.json()["error"] == "NotFoundError"
    assert "vanished" in child.json()["message"]
    assert child.err.read_text() == ""
    assert not away.exists()
    (tmp_path / "away").rename(away)
    witness.check()
    finish(driver, scene, root, root, undisturbed)
    witness.check()


def test_a_root_that_is_deleted_ends_the_run_with_a_message(
    driver: Driver, scene: Scene, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    child = begin(driver, scene.command(root), root)
    shutil.rmtree(root)
    child.signal(signal.SIGCONT)
    assert child.wait() == 2
    assert child.json()["error"] == "NotFoundError"
    assert not root.exists()


def test_errors_of_the_disk_are_told_apart(tmp_path: Path) -> None:
    from safetensors.numpy import save_file  # raises no OSError
    from tokenizers import Tokenizer, models

    for number, kind in [(errno.ENOSPC, NoSpaceError), (errno.EDQUOT, NoSpaceError),
                         (errno.EROFS, UsageError), (errno.EACCES, UsageError),
                         (errno.ESTALE, NotFoundError)]:  # fmt: skip
        with pytest.raises(kind, match=str(tmp_path)), disk_errors(tmp_path):
            raise OSError(number, "as the system says", str(tmp_path / "file"))
    with pytest.raises(NoSpaceError), disk_errors(tmp_path):
        Tokenizer(models.BPE()).save("/dev/full")
    with pytest.raises(NotFoundError, match="vanished"), disk_errors(tmp_path / "gone"):
        save_file({}, tmp_path / "gone" / "file")
    with pytest.raises(PermissionError), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "not ours", "/etc/shadow")


def test_layers_that_a_killed_process_created_get_into_the_journal(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request(*layers: int) -> Request:
        return Request(str(model_folder), str(data), tmp_path, context=40, layers=layers)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    run(request(1))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "commit_base", die)
        with pytest.raises(KeyboardInterrupt):
            run(request(0, 2))
    run(request(0, 2))
    _complete(tmp_path)


def test_sharing_parts_again_never_takes_a_committed_shard_away(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request(tokens: int | None) -> Request:
        size = {"context": 40, "part_positions": 128, "max_tokens": tokens}
        return Request(str(model_folder), str(data), tmp_path, **size)  # pyright: ignore

    few, more = run(request(1000)).cache, run(request(None)).cache
    assert len(few.committed) > 3

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Journal, "parts", lambda _: {})  # as another process saw it, a moment before
        patch.setattr("os.link", die)
        share_parts(few, more)
    assert verify(more.path).ok

"""Nothing that was committed is ever lost, whenever processes are killed."""

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.format.journal import Journal
from residua.cache.store.cache_extension import share_parts
from residua.cache.store.catalog import list_paths
from residua.cache.store.verification import verify

from ...conftest import LONG_PART
from ...support.crashing import Child, Driver, shared_driver
from ...support.scenes import (
    CommittedRecords,
    Scene,
    array_files,
    assert_complete,
    run_undisturbed,
    write_texts,
)

SEED = 20261120
KILLS = 15
"""Kills of each case of the long test, 210 in all; a third of them where CI runs a part of it."""


@pytest.fixture(scope="module")
def driver(private_folders: None) -> Driver:
    return shared_driver()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture
def scene(model_folder: Path, data: Path) -> Scene:
    return Scene(model_folder, data)


def kill_and_restart(
    driver: Driver, scene: Scene, folder: Path, workers: int, kills: int, rng: random.Random
) -> Counter[str]:
    """Kill workers of `scene` again and again, from a fresh root whenever one is complete.

    Returns the number of kills by `phase`. Every process lives for a random part of an
    undisturbed run; one death in four is everybody's, as if the power went.
    """
    want, seconds = run_undisturbed(driver, scene, folder)
    killed, rounds = Counter[str](), 0
    while killed.total() < kills:
        rounds += 1
        root = folder / f"root{rounds}"
        shutil.copytree(folder / "start", root)
        began = time.perf_counter()
        deaths = kill_until_one_finishes(driver, scene, root, workers, seconds, rng)
        killed += deaths
        if not deaths.total():  # other work on this machine disturbed the first measurement
            seconds = min(seconds, time.perf_counter() - began)
        found = array_files(root)
        assert [name for name in {**want, **found} if want.get(name) != found.get(name)] == []
        assert_complete(root)
        shutil.rmtree(root)
    shutil.rmtree(folder)
    return killed


def kill_until_one_finishes(
    driver: Driver, scene: Scene, root: Path, workers: int, seconds: float, rng: random.Random
) -> Counter[str]:
    """Kill and start workers until one ends by itself; returns the number of kills by `phase`."""
    witness, killed, finished = CommittedRecords(root), Counter[str](), False
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


SCENES: dict[str, dict[str, Any]] = {
    "packed": {},
    "unpacked": {"options": ("--no-pack",)},
    "layers": {"before": ("--layers", "1")},
    "tokens": {"before": ("--max-tokens", 1500)},
    "layers and tokens": {
        "options": ("--no-pack",),
        "before": ("--layers", "0,2", "--max-tokens", 1100),
    },
    "top logits": {
        "options": ("--logits", "topk:5", "--no-pack"),
        "before": ("--layers", "1", "--max-tokens", 1100),
    },
    "compact logits": {"options": ("--logits", "full", "--codec", "compact")},
}


def test_a_dozen_kills_lose_nothing(driver: Driver, scene: Scene, tmp_path: Path) -> None:
    killed = kill_and_restart(driver, scene, tmp_path / "one", 1, 3, random.Random(SEED))
    killed += kill_and_restart(driver, scene, tmp_path / "three", 3, 9, random.Random(SEED + 1))
    assert killed.total() >= 12


@pytest.mark.parametrize("name", ["top logits", "compact logits"])
def test_a_few_kills_lose_no_logits(
    driver: Driver, model_folder: Path, data: Path, tmp_path: Path, name: str
) -> None:
    scene = Scene(model_folder, data, **SCENES[name])
    rng = random.Random(f"{SEED} {name}")
    assert kill_and_restart(driver, scene, tmp_path / "kills", 2, 4, rng).total() >= 4


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("workers", [1, 3])
def test_many_kills_lose_nothing(
    driver: Driver, model_folder: Path, data: Path, tmp_path: Path, workers: int, name: str
) -> None:
    scene = Scene(model_folder, data, **SCENES[name])
    rng = random.Random(f"{SEED} {name} {workers}")
    began = time.perf_counter()
    kills = KILLS // 3 if LONG_PART in os.environ else KILLS
    killed = kill_and_restart(driver, scene, tmp_path / "kills", workers, kills, rng)
    seconds = time.perf_counter() - began
    phases = ", ".join(f"{number} {name}" for name, number in killed.most_common())
    print(f"\n{name}, {workers} workers: {killed.total()} kills ({phases}) in {seconds:.0f} s")


def test_layers_that_a_killed_process_created_get_into_the_journal(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request(*layers: int) -> ExtractionRequest:
        return ExtractionRequest(str(model_folder), str(data), tmp_path, context=40, layers=layers)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    answer_request(request(1))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "commit_base", die)
        with pytest.raises(KeyboardInterrupt):
            answer_request(request(0, 2))
    (path,) = list_paths(tmp_path)
    left = [path / "journal" / ".base.1.json.99.tmp"]  # of processes that died in it
    left.append(path / "arrays.zarr" / "residual" / "2" / ".zarr.json.99.tmp")
    for temporary in left:
        temporary.write_bytes(b"{")
    answer_request(request(0, 2))
    assert_complete(tmp_path)
    assert not [temporary for temporary in left if temporary.exists()]


def test_sharing_parts_again_never_takes_a_committed_shard_away(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request(tokens: int | None) -> ExtractionRequest:
        size = {"context": 40, "part_positions": 128, "max_tokens": tokens}
        return ExtractionRequest(str(model_folder), str(data), tmp_path, **size)  # pyright: ignore

    few, more = answer_request(request(1000)).cache, answer_request(request(None)).cache
    assert len(few.committed) > 3

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Journal, "parts", lambda _: {})  # as another process saw it, a moment before
        patch.setattr("os.link", die)
        share_parts(few, more)
    assert verify(more.path).ok

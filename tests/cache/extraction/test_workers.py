"""Several processes on one root share the work: no part is written twice, none is lost."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from residua.cache.errors import Interrupted
from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.files.leases import hold_lock
from residua.cache.forward import write_parts
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.cache_creation import sweep_unfinished
from residua.cache.store.catalog import list_paths
from residua.cache.store.verification import verify

from ...support.crashing import Child, Driver, shared_driver, wait_until
from ...support.models import texts
from .test_crash import array_files

SIZE: dict[str, Any] = {"context": 40, "part_positions": 128, "batch_tokens": 200}


@pytest.fixture(scope="module")
def driver(private_folders: None) -> Driver:
    return shared_driver()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("<|endoftext|>".join(texts(70, seed=1)))
    return path


@pytest.fixture(scope="module")
def files_of_one_process(
    driver: Driver, model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """Files of a cache that one process made."""
    root = tmp_path_factory.mktemp("alone")
    driver.run(*extract_command(model_folder, data, root))
    return array_files(root)


def extract_command(model: Path, data: Path, root: Path, *more: object) -> tuple[object, ...]:
    options = [
        word for name, value in SIZE.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    return ("extract", model, data, *options, *more, "--root", root)


def only_cache(root: Path) -> ActivationCache:
    """The one cache under `root`, which holds nothing else."""
    assert [path.name for path in root.iterdir()] == [path.name for path in list_paths(root)]
    (path,) = list_paths(root)
    return ActivationCache(path)


def test_three_processes_make_one_cache_and_write_no_part_twice(
    driver: Driver,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    files_of_one_process: dict[str, bytes],
) -> None:
    children = [driver.start(*extract_command(model_folder, data, tmp_path)) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    results = [child.json() for child in children]
    assert len({s["cache"] for s in results}) == 1
    assert all(s["complete"] and s["layers"] == [0, 1, 2, 3] for s in results)
    assert sum(s["written"] for s in results) == results[0]["positions"]
    cache = only_cache(tmp_path)
    assert len(cache.journal.paths()) == cache.n_parts
    assert array_files(tmp_path) == files_of_one_process
    assert verify(cache.path).ok


def test_shares_of_a_job_array_complete_a_cache_together(
    driver: Driver,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    files_of_one_process: dict[str, bytes],
) -> None:
    first = driver.run(*extract_command(model_folder, data, tmp_path, "--part", "1/2"))
    done, parts = first["parts"]
    assert (first["complete"], first["layers"]) == (False, [])
    assert done == -(-parts // 2)
    assert set(only_cache(tmp_path).committed) == set(range(0, parts, 2))
    again = driver.run(*extract_command(model_folder, data, tmp_path, "--part", "1/2"))
    assert (again["written"], again["complete"]) == (0, False)
    second = driver.run(*extract_command(model_folder, data, tmp_path, "--part", "2/2"))
    assert second["complete"]
    assert second["parts"] == [parts, parts]
    assert first["written"] + second["written"] == second["positions"]
    assert array_files(tmp_path) == files_of_one_process


def test_shares_that_run_at_once_need_no_waiting(
    driver: Driver,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    files_of_one_process: dict[str, bytes],
) -> None:
    shares = [f"{number}/3" for number in (1, 2, 3)]
    children = [
        driver.start(*extract_command(model_folder, data, tmp_path, "--part", s)) for s in shares
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert sum(child.json()["written"] for child in children) == only_cache(tmp_path).positions
    assert array_files(tmp_path) == files_of_one_process


def stop_while_leasing(child: Child, root: Path) -> int:
    """The number of a part that `child`, which is stopped then, holds and has not committed."""

    def leased_parts() -> list[int]:
        found = [
            path
            for path in root.glob("[!.]*/leases/*.lock")
            if path.read_text().startswith(f"{child.pid} ")
        ]
        numbers = [int(path.stem) for path in found]
        return [n for n in numbers if not list(root.glob(f"[!.]*/journal/{n:08d}.json"))]

    wait_until(lambda: child.ended() or leased_parts())
    child.signal(signal.SIGSTOP)
    assert not child.ended(), child.err.read_text()
    if not (numbers := leased_parts()):  # it committed the part before it stopped
        child.signal(signal.SIGCONT)
        return stop_while_leasing(child, root)
    return numbers[0]


def test_a_stopped_process_keeps_its_part_and_a_dead_one_is_replaced(
    driver: Driver,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    files_of_one_process: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(write_parts, "NOTICE_SECONDS", 0.3)
    holder = driver.start(*extract_command(model_folder, data, tmp_path))
    part = stop_while_leasing(holder, tmp_path)
    stages: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        assert done <= total
        if stage.startswith("waiting") and stage not in stages:
            cache = only_cache(tmp_path)
            missing = set(range(cache.n_parts)) - set(cache.committed)
            # It may hold two: one whose commit was under way.
            assert part in missing
            assert missing <= {part - 1, part, part + 1}
            holder.kill()
        stages.append(stage)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = answer_request(
            ExtractionRequest(str(model_folder), str(data), tmp_path, **SIZE), progress
        )
    finally:
        torch.set_num_threads(threads)
    assert f"waiting for process {holder.pid} on {os.uname().nodename}" in stages
    assert done.cache.finished
    assert array_files(tmp_path) == files_of_one_process
    assert not list(tmp_path.rglob("*.tmp"))


def test_sigterm_reaches_a_process_that_waits(
    driver: Driver, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    holder = driver.start(*extract_command(model_folder, data, tmp_path))
    stop_while_leasing(holder, tmp_path)
    waiting = driver.start(*extract_command(model_folder, data, tmp_path))
    wait_until(lambda: len(only_cache(tmp_path).committed) == only_cache(tmp_path).n_parts - 1)
    waiting.signal(signal.SIGTERM)
    assert waiting.wait() == Interrupted.exit_code
    assert "the same command goes on from here" in waiting.json()["message"]
    holder.signal(signal.SIGCONT)
    assert holder.wait() == 0


def test_a_cache_in_the_making_is_swept_only_when_its_maker_is_dead(
    driver: Driver,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    files_of_one_process: dict[str, bytes],
) -> None:
    maker = driver.start(*extract_command(model_folder, data, tmp_path))
    wait_until(lambda: list(tmp_path.glob(".new-*/journal")))
    maker.signal(signal.SIGSTOP)
    (unfinished,) = tmp_path.glob(".new-*")
    sweep_unfinished(tmp_path)
    assert unfinished.is_dir()
    maker.kill()
    time.sleep(0.01)
    sweep_unfinished(tmp_path)
    assert not unfinished.exists()
    driver.run(*extract_command(model_folder, data, tmp_path))
    assert array_files(tmp_path) == files_of_one_process


def test_processes_that_want_different_layers_of_a_new_cache_both_get_them(
    driver: Driver,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    files_of_one_process: dict[str, bytes],
) -> None:
    for number in range(3):
        root = tmp_path / str(number)
        ways = [("--layers", "1"), (), ("--layers", "0,2")]
        children = [driver.start(*extract_command(model_folder, data, root, *way)) for way in ways]
        codes = [child.wait() for child in children]
        assert codes == [0, 0, 0], [c.err.read_text()[-900:] for c in children if c.code]
        assert children[1].json()["layers"] == [0, 1, 2, 3]
        assert {0, 2, 3} <= set(children[2].json()["layers"])
        assert array_files(root) == files_of_one_process
        assert verify(only_cache(root).path).ok


def test_what_only_one_may_do_waits_for_the_other(tmp_path: Path) -> None:
    inside, order = threading.Event(), []

    def second() -> None:
        with hold_lock(tmp_path, "layers"):
            order.append("second")
            inside.set()

    thread = threading.Thread(target=second)
    with hold_lock(tmp_path, "layers"):
        thread.start()
        assert not inside.wait(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]

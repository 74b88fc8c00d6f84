"""Signals, and disks that are full, read-only or gone, end a run with whole parts and a message."""

import errno
import shutil
import signal
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

import residua.cache.extraction.answer as extraction
from residua import extract
from residua.cache.errors import NoSpaceError, NotFoundError, UsageError
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.files.disk_errors import translate_any_disk_errors, translate_disk_errors
from residua.cache.forward.write_parts import write_missing_parts
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.catalog import list_paths

from ...support.crashing import Child, Driver, shared_driver, wait_until
from ...support.scenes import (
    CommittedRecords,
    Scene,
    array_files,
    assert_complete,
    run_undisturbed,
    temporary_files,
    write_texts,
)


@pytest.fixture(scope="module")
def driver(private_folders: None) -> Driver:
    return shared_driver()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture
def scene(model_folder: Path, data: Path) -> Scene:
    return Scene(model_folder, data)


def stop_after_a_part(driver: Driver, command: tuple[object, ...], root: Path) -> Child:
    """A process that is stopped (SIGSTOP) after it committed a part, before it has all."""
    child = driver.start(*command)
    wait_until(lambda: child.ended() or list(root.glob("[!.]*/journal/0*.json")))
    child.signal(signal.SIGSTOP)
    assert not child.ended(), child.err.read_text()
    return child


def assert_resumes(
    driver: Driver, scene: Scene, root: Path, seen: Path, want: dict[str, bytes]
) -> None:
    """The same command must go on and end with the files `want`."""
    assert driver.run(*scene.command(root))["status"] == "resumed"
    assert array_files(seen) == want
    assert_complete(seen)


@pytest.fixture(scope="module")
def undisturbed_files(
    driver: Driver, model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    return run_undisturbed(
        driver, Scene(model_folder, data), tmp_path_factory.mktemp("undisturbed")
    )[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_whole_parts_and_the_command_goes_on(
    driver: Driver, scene: Scene, tmp_path: Path, undisturbed_files: dict, number: signal.Signals
) -> None:
    child = stop_after_a_part(driver, scene.command(tmp_path), tmp_path)
    child.signal(number)
    child.signal(signal.SIGCONT)
    assert child.wait() == 130, child.err.read_text()
    assert child.json()["error"] == "Interrupted"
    assert "the same command goes on from here" in child.json()["message"]
    assert child.err.read_text() == ""
    witness = CommittedRecords(tmp_path)
    witness.check()
    assert temporary_files(tmp_path) == []
    assert_resumes(driver, scene, tmp_path, tmp_path, undisturbed_files)
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
    driver: Driver, scene: Scene, disk: Path, undisturbed_files: dict
) -> None:
    root, seen = disk / "root", driver.visible_path(disk / "root")
    child = stop_after_a_part(driver, scene.command(root), seen)
    ballast = fill_up(driver.visible_path(disk))
    child.signal(signal.SIGCONT)
    assert child.wait() == 5, child.err.read_text()
    assert child.json()["error"] == "NoSpaceError"
    assert f"the disk of {root}" in child.json()["message"]
    assert "is full; parts that are committed are kept" in child.json()["message"]
    assert child.err.read_text() == ""
    witness = CommittedRecords(seen)
    witness.check()
    assert witness.seen
    assert not list(seen.glob("*/arrays.zarr/**/.*"))
    driver.run(*scene.command(root), code=5)  # refused before anything is written
    witness.check()
    ballast.unlink()
    assert_resumes(driver, scene, root, seen, undisturbed_files)
    witness.check()


FITS = {
    "ridge": ("--offsets", "0-2", "--no-keep-moments"),
    "lens": ("--steps", "8", "--batch", "64"),
    "vocab": ("--epochs", "1", "--lr", "0.01", "--checkpoint-seconds", "0"),
    "baseline": (),
}


@pytest.mark.parametrize("kind", FITS)
def test_a_fit_on_a_full_disk_says_so_and_leaves_no_part_of_a_file(
    driver: Driver, disk: Path, tiny_cache: ActivationCache, kind: str
) -> None:
    command = "fit", kind, tiny_cache.path, "--root", disk / "root", *FITS[kind]
    ballast = fill_up(driver.visible_path(disk))
    child = driver.start(*command)
    assert child.wait() == 5, child.err.read_text()
    assert child.json()["error"] == "NoSpaceError"
    assert "free some space and give the same command again" in child.json()["message"]
    assert child.err.read_text() == ""
    assert [
        path
        for path in driver.visible_path(disk).rglob("*")
        if path.stat().st_size and path.is_file() and path != ballast
    ] == []
    ballast.unlink()
    driver.run(*command)
    assert list(driver.visible_path(disk).glob("root/probes/*/config.json"))


def test_a_full_disk_is_named_where_nobody_knows_which(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match="device: here; what was"), translate_any_disk_errors():
        raise OSError(errno.ENOSPC, "as the system says", "here")
    with pytest.raises(UsageError, match="Permission denied: there"), translate_any_disk_errors():
        raise PermissionError(errno.EACCES, "as the system says", "there")
    with pytest.raises(NotFoundError, match="there vanished while"), translate_any_disk_errors():
        raise FileNotFoundError(errno.ENOENT, "as the system says", "there")
    with pytest.raises(UsageError, match="the disk fails .*: here"), translate_any_disk_errors():
        raise OSError(errno.EIO, "as the system says", "here")
    with pytest.raises(KeyError), translate_any_disk_errors():
        raise KeyError("no disk")


def test_a_cache_that_does_not_fit_is_refused_beforehand(
    driver: Driver, scene: Scene, disk: Path
) -> None:
    with open(driver.visible_path(disk) / "ballast", "wb") as file:
        file.write(bytes(20 << 20))
    said = driver.run(*scene.command(disk / "root"), code=5)
    assert said["error"] == "NoSpaceError"
    assert "this cache needs" in said["message"]
    assert list(driver.visible_path(disk / "root").iterdir()) == []


def test_a_read_only_root_says_so_and_goes_on_when_it_is_writable(
    driver: Driver, scene: Scene, disk: Path, undisturbed_files: dict
) -> None:
    root, seen = disk / "root", driver.visible_path(disk / "root")
    child = stop_after_a_part(driver, scene.command(root), seen)
    child.signal(signal.SIGTERM)
    child.signal(signal.SIGCONT)
    assert child.wait() == 130, child.err.read_text()
    witness = CommittedRecords(seen)
    witness.check()
    assert driver.shell("mount", "-o", "remount,ro", disk) == 0
    for path in (root, disk / "other"):
        said = driver.run(*scene.command(path), code=2)
        assert said["error"] == "UsageError"
        assert f"{path} cannot be written (read-only file system)" in said["message"]
    witness.check()
    driver.shell("mount", "-o", "remount,rw", disk)
    assert_resumes(driver, scene, root, seen, undisturbed_files)
    driver.shell("mount", "-o", "remount,ro", disk)
    assert driver.run(*scene.command(root))["status"] == "hit"


@pytest.mark.parametrize("gone", ["root", "cache"])
def test_a_root_that_vanishes_ends_the_run_and_no_stump_is_left(
    driver: Driver, scene: Scene, tmp_path: Path, undisturbed_files: dict, gone: str
) -> None:
    root = tmp_path / "root"
    child = stop_after_a_part(driver, scene.command(root), root)
    away = root if gone == "root" else list_paths(root)[0]
    witness = CommittedRecords(root)
    witness.check()
    away.rename(tmp_path / "away")
    child.signal(signal.SIGCONT)
    assert child.wait() == 2, child.err.read_text()
    assert child.json()["error"] == "NotFoundError"
    assert "vanished" in child.json()["message"]
    assert child.err.read_text() == ""
    assert not away.exists()
    (tmp_path / "away").rename(away)
    witness.check()
    assert_resumes(driver, scene, root, root, undisturbed_files)
    witness.check()


SIZES: dict[str, Any] = {"context": 40, "part_positions": 128, "batch_tokens": 200}


@pytest.mark.parametrize("call", [0, 1, 2, -1])
def test_a_cache_that_vanishes_at_any_moment_is_said_to_have_vanished(
    scene: Scene, tmp_path: Path, call: int
) -> None:
    """Renamed at the first, second, third and last report of progress, when all is committed."""
    root, calls = tmp_path / "root", 0

    def rename(stage: str, done: int, total: int) -> None:
        nonlocal calls
        if stage != "extract":
            return
        if calls == call or (call < 0 and done == total):
            list_paths(root)[0].rename(tmp_path / "away")
        calls += 1

    with pytest.raises(NotFoundError, match="vanished"):
        extract(scene.model, scene.data, root=root, progress=rename, **SIZES)
    assert (tmp_path / "away").is_dir()


def test_a_cache_that_vanishes_after_its_last_part_is_said_to_have_vanished(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ExtractionRequest(str(scene.model), str(scene.data), root=tmp_path / "root", **SIZES)
    done = extraction.answer_request(request)
    done.cache.path.rename(tmp_path / "away")
    with pytest.raises(NotFoundError, match="vanished"):
        done.to_dict()

    def write_and_rename(cache: ActivationCache, *rest: Any) -> int:
        written = write_missing_parts(cache, *rest)
        cache.path.rename(tmp_path / "again away")
        return written

    monkeypatch.setattr(extraction, "write_missing_parts", write_and_rename)
    with pytest.raises(NotFoundError, match="vanished"):
        extraction.answer_request(request)


def test_a_root_that_is_deleted_ends_the_run_with_a_message(
    driver: Driver, scene: Scene, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    child = stop_after_a_part(driver, scene.command(root), root)
    shutil.rmtree(root)
    child.signal(signal.SIGCONT)
    assert child.wait() == 2, child.err.read_text()
    assert child.json()["error"] == "NotFoundError"
    assert not root.exists()


def test_errors_of_the_disk_are_told_apart(tmp_path: Path) -> None:
    from safetensors.numpy import save_file  # raises no OSError
    from tokenizers import Tokenizer, models

    for number, kind in [
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.EROFS, UsageError),
        (errno.EACCES, UsageError),
        (errno.ESTALE, NotFoundError),
    ]:
        with pytest.raises(kind, match=str(tmp_path)), translate_disk_errors(tmp_path):
            raise OSError(number, "as the system says", str(tmp_path / "file"))
    with pytest.raises(NoSpaceError), translate_disk_errors(tmp_path):
        Tokenizer(models.BPE()).save("/dev/full")
    with pytest.raises(NotFoundError, match="vanished"), translate_disk_errors(tmp_path / "gone"):
        save_file({}, tmp_path / "gone" / "file")
    with pytest.raises(PermissionError), translate_disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "not ours", "/etc/shadow")
    # A folder that is removed between `mkdir`, which found it, and the look at it.
    with pytest.raises(NotFoundError, match="vanished"), translate_disk_errors(tmp_path):
        raise FileExistsError(errno.EEXIST, "as the system says", str(tmp_path / "gone"))
    with pytest.raises(FileExistsError), translate_disk_errors(tmp_path):
        raise FileExistsError(errno.EEXIST, "as the system says", str(tmp_path))

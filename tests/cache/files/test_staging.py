"""Claims about staging folders: targets are whole, and folders of dead makers do not stay."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from residua.cache.files import staging
from residua.cache.files.staging import (
    exchange_folder,
    publish_folder,
    resumable_staging_folder,
    staging_folder,
    sweep_staging,
    temporary_folder,
)


def fail_in(staging: AbstractContextManager[Path], error: BaseException) -> None:
    """Write a file into the staging folder, then raise `error`."""
    with staging as folder:
        (folder / "file").write_text("rows")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_published_folder_is_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    parent = tmp_path / "new" / "parent"
    with staging_folder(parent, ".new-", ".tmp") as folder:
        assert folder.parent == parent
        assert folder.name.startswith(".new-")
        assert folder.name.endswith(".tmp")
        (folder / "file").write_text("rows")
        publish_folder(folder, parent / "target")
    assert names(parent) == ["target"]
    assert (parent / "target" / "file").read_text() == "rows"


def test_an_error_removes_the_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_in(staging_folder(tmp_path, ".new-"), KeyboardInterrupt())
    assert names(tmp_path) == []


def test_a_target_that_another_process_published_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "manifest.json").write_text("theirs")
    with staging_folder(tmp_path, ".new-") as folder:
        (folder / "manifest.json").write_text("ours")
        publish_folder(folder, target, marker="manifest.json")
    assert (target / "manifest.json").read_text() == "theirs"
    with pytest.raises(OSError, match="."), staging_folder(tmp_path, ".new-") as folder:
        publish_folder(folder, target)
    assert names(tmp_path) == ["target"]


def test_only_folders_of_dead_makers_are_swept(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from residua.cache.files.staging import staging_folder\n"
        "with staging_folder(Path(sys.argv[1]), '.new-') as folder: os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(names(tmp_path)) == 1
    with staging_folder(tmp_path, ".new-") as folder:
        sweep_staging(tmp_path, ".new-*")
        assert names(tmp_path) == [folder.name]


def test_without_locks_only_old_folders_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "try_lock", lambda descriptor: None)
    for name in (".new-old", ".new-young"):
        (tmp_path / name).mkdir()
    day_before = time.time() - 2 * staging.UNLOCKED_SECONDS
    os.utime(tmp_path / ".new-old", (day_before, day_before))
    sweep_staging(tmp_path, ".new-*")
    assert names(tmp_path) == [".new-young"]


def test_a_resumable_folder_stays_for_the_next_maker_unless_its_content_is_wrong(
    tmp_path: Path,
) -> None:
    path = tmp_path / ".pull-1"
    with pytest.raises(OSError, match="no network"):
        fail_in(resumable_staging_folder(path, (ValueError,)), OSError("no network"))
    assert (path / "file").exists()
    with pytest.raises(ValueError, match="wrong"):
        fail_in(resumable_staging_folder(path, (ValueError,)), ValueError("wrong"))
    assert not path.exists()


def test_a_resumable_folder_has_one_maker_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / ".pull-1"
    with resumable_staging_folder(path, ()):
        with pytest.raises(BlockingIOError), resumable_staging_folder(path, ()):
            pass
        assert path.is_dir()
    assert not path.exists()


def test_temporary_folders_of_killed_processes_are_swept_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.tempfile, "tempdir", str(tmp_path))
    code = (
        "import os\nfrom residua.cache.files.staging import temporary_folder\n"
        "with temporary_folder() as folder:\n    os._exit(9)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert len(names(tmp_path)) == 1
    with temporary_folder() as first, temporary_folder() as second:
        assert first != second
        assert (first.stat().st_mode & 0o777) == 0o700
        assert names(tmp_path) == sorted([first.name, second.name])
    assert names(tmp_path) == []


def test_a_folder_that_its_maker_removed_is_no_lock(tmp_path: Path) -> None:
    """The next maker waits for no one, and makes a folder of its own."""
    path = tmp_path / ".pull-1"
    with resumable_staging_folder(path, ()):
        first = path.stat().st_ino
        shutil.rmtree(path)
        with resumable_staging_folder(path, ()):
            assert path.is_dir()
            with pytest.raises(BlockingIOError), resumable_staging_folder(path, ()):
                pass
    assert first
    assert names(tmp_path) == []


def test_an_interrupted_folder_is_swept_when_it_was_not_used_for_long(tmp_path: Path) -> None:
    old, new = tmp_path / ".pull-old", tmp_path / ".pull-new"
    for path in (old, new):
        path.mkdir()
    os.utime(old, (0, 0))
    sweep_staging(tmp_path, ".pull-*", unused_seconds=3600)
    assert names(tmp_path) == [".pull-new"]
    os.utime(new, (0, 0))
    with pytest.raises(KeyError), resumable_staging_folder(new, (ValueError,)):
        raise KeyError
    sweep_staging(tmp_path, ".pull-*", unused_seconds=3600)
    assert names(tmp_path) == [".pull-new"]


def test_folders_are_exchanged_at_once(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("")
    with staging_folder(tmp_path, ".new-") as folder:
        (folder / "new").write_text("")
        assert exchange_folder(folder, target)
        assert names(folder) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["target"]

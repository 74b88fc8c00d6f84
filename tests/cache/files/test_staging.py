"""Claims about staging folders: targets are whole, and folders of dead makers do not stay."""

import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from residua.cache.files import staging
from residua.cache.files.staging import (
    publish_folder,
    resumable_staging_folder,
    staging_folder,
    sweep_staging,
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

"""Removal takes a cache away at once, leaves shared files whole, and never one that is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import residua
from residua.cache.errors import UsageError
from residua.cache.files import removal
from residua.cache.files.leases import hold_lock, lease_part
from residua.cache.files.paths import as_path
from residua.cache.files.removal import exclusive_bytes, remove_folder
from residua.cache.store.activation_cache import ActivationCache


@pytest.fixture
def cache(tiny_cache: ActivationCache, tmp_path: Path) -> ActivationCache:
    """A copy of `tiny_cache` under a root of its own."""
    shutil.copytree(tiny_cache.path, tmp_path / "root" / tiny_cache.id)
    return ActivationCache(tmp_path / "root" / tiny_cache.id)


def test_a_removed_cache_leaves_nothing(cache: ActivationCache) -> None:
    with lease_part(cache.path / "leases", 0):
        pass  # leaves a lock file that nobody holds
    remove_folder(cache.path, "manifest.json")
    assert list(cache.path.parent.iterdir()) == []


def test_a_part_that_is_being_written_keeps_the_cache(cache: ActivationCache) -> None:
    with (
        lease_part(cache.path / "leases", 3),
        pytest.raises(UsageError, match=rf"being written by process {os.getpid()} on"),
    ):
        remove_folder(cache.path, "manifest.json")
    assert residua.verify(cache.path).ok


def test_layers_and_moments_that_are_being_written_keep_the_cache(cache: ActivationCache) -> None:
    from residua.cache.files.staging import staging_folder

    with (
        hold_lock(cache.path / "leases", "layers"),
        pytest.raises(UsageError, match="being written by another process"),
    ):
        remove_folder(cache.path, "manifest.json")
    with (
        staging_folder(cache.path / "moments", ".", ".tmp"),
        pytest.raises(UsageError, match="being written by another process"),
    ):
        remove_folder(cache.path, "manifest.json")
    assert residua.verify(cache.path).ok


def test_a_lease_of_another_process_counts(cache: ActivationCache) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from residua.cache.files.leases import lease_part\n"
        f"with lease_part(Path({str(cache.path / 'leases')!r}), 1):\n"
        "    print('held', flush=True)\n    sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=f"process {process.pid} on"):
        remove_folder(cache.path, "manifest.json")
    process.communicate("\n")
    remove_folder(cache.path, "manifest.json")
    assert not cache.path.exists()


def test_a_writer_that_comes_at_the_last_moment_gets_the_cache_back(
    cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename
    with pytest.MonkeyPatch.context() as patch:
        held = []

        def rename_after_a_lease(source: Path, target: Path) -> None:
            if not held:
                lease = lease_part(cache.path / "leases", 99)
                held.append((lease, lease.__enter__()))
            rename(source, target)

        patch.setattr(removal.os, "rename", rename_after_a_lease)
        with pytest.raises(UsageError, match="being written"):
            remove_folder(cache.path, "manifest.json")
        held[0][0].__exit__(None, None, None)
    assert residua.verify(cache.path).ok


def test_what_a_killed_removal_left_is_removed_by_the_next(cache: ActivationCache) -> None:
    left = cache.path.with_name(".rm-0123")
    left.mkdir()
    (left / "shard").write_bytes(b"rows")
    remove_folder(cache.path, "manifest.json")
    assert list(cache.path.parent.iterdir()) == []


def test_links_are_not_followed(cache: ActivationCache, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(cache.path)
    with pytest.raises(UsageError, match="is a link to"):
        remove_folder(link, "manifest.json")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.lock").write_text("mine")
    shutil.rmtree(cache.path / "leases")
    (cache.path / "leases").symlink_to(outside)
    remove_folder(cache.path, "manifest.json")
    assert (outside / "kept.lock").read_text() == "mine"
    assert not cache.path.exists()


def test_a_cache_that_extends_a_removed_one_stays_whole(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    options = {"root": tmp_path, "context": 64, "part_positions": 512}
    short = residua.extract(model_folder, texts_file, max_tokens=2048, **options)
    long = residua.extract(model_folder, texts_file, max_tokens=4096, **options)
    rows = long.residual_array(2)[:]
    freed, shared = exclusive_bytes(short.path)
    assert shared > 2048 * 32 * 2 * 3  # the full parts of all layers
    assert freed + shared >= short.bytes
    remove_folder(short.path, "manifest.json")
    again = ActivationCache(long.path)
    assert residua.verify(again.path).ok
    assert (again.residual_array(2)[:] == rows).all()
    residua.RidgeProbe([0]).fit(again)
    assert exclusive_bytes(again.path)[1] == 0


def test_a_cache_in_an_object_store_is_removed(
    tiny_cache: ActivationCache, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from residua.cache.files import object_leases
    from residua.cache.sharing.root_transfer import copy_cache

    copy = copy_cache(tiny_cache, as_path(s3_root), verify=False).cache
    monkeypatch.setattr(removal, "EXPIRY_SECONDS", 0.2)
    with (
        object_leases.object_lease(copy.path / "leases", "00000001"),
        pytest.raises(UsageError, match="being written by process"),
    ):
        remove_folder(copy.path, "manifest.json")
    assert (copy.path / "manifest.json").is_file()
    remove_folder(copy.path, "manifest.json")
    assert [path for path in as_path(s3_root).rglob("*") if path.is_file()] == []

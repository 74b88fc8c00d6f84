"""A disk that cannot read a file is a message that names the file, whatever reads it."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residua
from residua.cache.errors import CorruptError
from residua.cache.files.json_files import file_digest, read_json
from residua.cache.files.paths import read_all
from residua.cache.files.read_errors import check_readable, read_file
from residua.cache.sharing.flat_export import export
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.verification import verify
from residua.probes.ridge.ridge_probe import RidgeProbe

BLOCK = 1024
"""Bytes of a block of the file system."""


def test_a_read_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"{}")

    def fail(*_: Any, **__: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")  # as of read(), which names no file

    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(Path, "open", fail)
    for read in (read_file, read_json, file_digest, check_readable, lambda path: read_all([path])):
        with pytest.raises(CorruptError, match=rf"{file} cannot be read \(input/output error\)"):
            read(file)


def test_other_errors_are_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "file")
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)


def test_a_file_that_is_shorter_than_it_should_be_is_not_readable(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(5000))
    check_readable(file)
    check_readable(file, 4000, 5000)
    with pytest.raises(CorruptError, match="cut short"):
        check_readable(file, 4000, 5001)


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def failing_cache(tiny_cache: ActivationCache, tmp_path: Path) -> Iterator[Path]:
    """A copy of the tiny cache, with the shards of layer 1 on a disk that cannot read them."""
    path = tmp_path / "root" / tiny_cache.id
    shutil.copytree(tiny_cache.path, path)
    shards = path / "arrays.zarr/residual/1/c"
    image, copies = tmp_path / "image", tmp_path / "copies"
    image.touch()
    os.truncate(image, 16 << 20)
    shutil.move(shards, copies)
    shards.mkdir()
    try:
        run("mkfs.ext4", "-q", "-F", "-b", BLOCK, "-O", "^has_journal", image)
        run("mount", "-o", "loop", image, shards)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may make and mount a file system")
    try:
        shutil.copytree(copies, shards, dirs_exist_ok=True)
        os.sync()
        extents = run("filefrag", "-v", shards / "0/0").splitlines()
        first = next(line.split()[3] for line in extents if line.strip().startswith("0:"))
        run("umount", shards)
        run("mount", "-o", "loop,noatime", image, shards)
        # The loop device cannot read what its file no longer has.
        os.truncate(image, int(first.rstrip(".")) * BLOCK + 4096)
        yield path
    finally:
        run("umount", "-l", shards)


def test_a_failing_disk_is_named_by_everything_that_reads_a_cache_and_repair_mends_it(
    failing_cache: Path, tmp_path: Path
) -> None:
    cache = ActivationCache(failing_cache)
    for use in (
        lambda: RidgeProbe(layers=[1]).fit(cache, keep=False),
        lambda: export(cache, tmp_path / "exported"),
        lambda: cache.residual_array(1).take(np.arange(cache.positions)),
    ):
        with pytest.raises(CorruptError, match=r"residual/1/c/.* cannot be read: the disk fails"):
            use()
    assert not list(tmp_path.glob(".residua-*"))
    damages = verify(failing_cache).damages
    assert "arrays.zarr/residual/1/c/0/0" in {damage.file for damage in damages}
    assert all("cannot be read" in damage.message for damage in damages)
    assert residua.repair(failing_cache).ok
    assert verify(failing_cache).ok

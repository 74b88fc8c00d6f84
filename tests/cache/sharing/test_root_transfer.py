"""A cache goes from root to root by path: linked on one disk, else copied, verified either way."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import residua
from residua.cache.errors import CorruptError, IncompleteError, MismatchError, UsageError
from residua.cache.files.paths import as_path
from residua.cache.sharing import root_transfer
from residua.cache.sharing.root_transfer import copy_cache
from residua.cache.store.activation_cache import ActivationCache


@pytest.fixture
def source(tiny_cache: ActivationCache, tmp_path: Path) -> ActivationCache:
    """A copy of `tiny_cache` under a root of its own."""
    shutil.copytree(tiny_cache.path, tmp_path / "source" / tiny_cache.id)
    return ActivationCache(tmp_path / "source" / tiny_cache.id)


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another disk: no hard links."""

    def refuse(*names: object, **options: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(root_transfer.os, "link", refuse)


def assert_same_cache(copy: ActivationCache, source: ActivationCache) -> None:
    assert copy.id == source.id
    assert residua.verify(copy.path).ok
    for layer in source.layers:
        np.testing.assert_array_equal(
            copy.residual_array(layer)[:], source.residual_array(layer)[:]
        )
    np.testing.assert_array_equal(copy.tokens[:], source.tokens[:])


def test_on_one_disk_the_copy_takes_no_space(source: ActivationCache, tmp_path: Path) -> None:
    copied = copy_cache(source, tmp_path / "there")
    assert copied.status == "copied"
    assert_same_cache(copied.cache, source)
    shard = "arrays.zarr/residual/1/c/0/0"
    assert os.path.samefile(copied.cache.path / shard, source.path / shard)
    assert not (copied.cache.path / "local.json").exists()
    assert [path.name for path in (tmp_path / "there").iterdir()] == [source.id]


@pytest.mark.usefixtures("no_links")
def test_on_another_disk_every_file_is_copied(source: ActivationCache, tmp_path: Path) -> None:
    stages = []
    copied = copy_cache(
        source, tmp_path / "there", progress=lambda stage, done, total: stages.append(stage)
    )
    assert_same_cache(copied.cache, source)
    assert set(stages) == {"copy", "verify"}
    shard = "arrays.zarr/residual/1/c/0/0"
    assert not os.path.samefile(copied.cache.path / shard, source.path / shard)
    assert not list(copied.cache.path.rglob(".*"))


def test_a_second_copy_finds_the_first(source: ActivationCache, tmp_path: Path) -> None:
    copy_cache(source, tmp_path / "there")
    assert copy_cache(source, tmp_path / "there").status == "hit"


@pytest.mark.usefixtures("no_links")
def test_an_interrupted_copy_goes_on(
    source: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_confined = root_transfer.open_confined

    def open_some(folder: Path, name: str):
        if len(opened) == 5:
            raise KeyboardInterrupt
        opened.append(name)
        return open_confined(folder, name)

    monkeypatch.setattr(root_transfer, "open_confined", open_some)
    with pytest.raises(KeyboardInterrupt):
        copy_cache(source, tmp_path / "there")
    assert not (tmp_path / "there" / source.id).exists()
    names: list[str] = []
    monkeypatch.setattr(
        root_transfer,
        "open_confined",
        lambda folder, name: (names.append(name), open_confined(folder, name))[1],
    )
    assert_same_cache(copy_cache(source, tmp_path / "there").cache, source)
    assert not set(names) & set(opened)
    assert [path.name for path in (tmp_path / "there").iterdir()] == [source.id]


@pytest.mark.parametrize("links", [True, False])
def test_damage_is_not_copied(
    source: ActivationCache, tmp_path: Path, links: bool, request: pytest.FixtureRequest
) -> None:
    if not links:
        request.getfixturevalue("no_links")
    shard = source.path / "arrays.zarr/residual/1/c/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptError, match="damaged"):
        copy_cache(source, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_link_in_the_cache_is_refused(source: ActivationCache, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"of another user")
    shard = source.path / "arrays.zarr/residual/1/c/0/0"
    shard.unlink()
    shard.symlink_to(secret)
    with pytest.raises(CorruptError, match="is a link"):
        copy_cache(source, tmp_path / "there")
    assert not (tmp_path / "there" / source.id).exists()


def test_unfinished_and_unexpected_caches_are_refused(
    source: ActivationCache, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match="not 0123"):
        copy_cache(source, tmp_path / "there", expect="0123")
    sorted((source.path / "journal").glob("0*.json"))[-1].unlink()
    with pytest.raises(IncompleteError):
        copy_cache(ActivationCache(source.path), tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_two_copies_at_once_do_not_meet(
    source: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_again(*arguments: object) -> None:
        with pytest.raises(UsageError, match="another process is copying"):
            copy_cache(source, tmp_path / "there")
        raise RuntimeError("seen")

    monkeypatch.setattr(root_transfer, "_copy_files", copy_again)
    with pytest.raises(RuntimeError, match="seen"):
        copy_cache(source, tmp_path / "there")


def test_a_cache_goes_to_an_object_store_and_back(
    tiny_cache: ActivationCache, s3_root: str, tmp_path: Path
) -> None:
    there = copy_cache(tiny_cache, as_path(s3_root)).cache
    back = copy_cache(there, tmp_path / "back").cache
    assert_same_cache(back, tiny_cache)

"""Claims about the list of caches: one that is damaged in any way stops no other."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from residua.cache.errors import CorruptError, NotFoundError
from residua.cache.files.json_files import read_json, write_json
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.catalog import describe_cache, find_cache, find_path, list_caches

from ...support.synthetic import make_cache, random_head


def make_link(path: Path) -> None:
    path.symlink_to(path.rename(path.parent / "elsewhere"))


def replace_field(**fields: object) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        write_json(path, {**read_json(path), **fields})

    return apply


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty manifest": ("manifest.json", lambda path: path.write_bytes(b"")),
    "lost manifest": ("manifest.json", Path.unlink),
    "manifest is a FIFO": ("manifest.json", lambda path: (path.unlink(), os.mkfifo(path))),
    "manifest is a link": ("manifest.json", make_link),
    "manifest is deep": ("manifest.json", lambda path: path.write_bytes(b"[" * 100_000)),
    "layout of zeros": ("manifest.json", replace_field(layout={"chunk_rows": 0, "part_rows": 0})),
    "layout of words": ("manifest.json", replace_field(layout="x")),
    "identity is null": ("manifest.json", replace_field(identity=None)),
    "empty record": ("journal/00000000.json", lambda path: path.write_bytes(b"")),
    "record is a folder": ("journal/00000000.json", lambda path: (path.unlink(), path.mkdir())),
    "record of words": ("journal/00000000.json", replace_field(arrays="x", rows="y")),
    "empty base record": ("journal/base.json", lambda path: path.write_bytes(b"")),
    "lost base record": ("journal/base.json", Path.unlink),
    "journal is a link": ("journal", make_link),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_cache_is_listed_as_such_beside_the_others(tmp_path: Path, kind: str) -> None:
    caches = [small_cache(tmp_path, seed) for seed in range(2)]
    bad, good = caches[0].path, caches[1].path
    name, damage = DAMAGE[kind]
    damage(bad / name)
    states = {entry["path"]: entry["state"] for entry in list_caches(tmp_path)}
    assert states.keys() == {str(bad), str(good)}
    assert states[str(good)] == "complete"
    assert states[str(bad)].startswith("damaged: ")
    # It is found by its name, so that it can be verified; opening it says what is wrong.
    assert find_path(bad.name[:12], tmp_path) == bad
    assert find_path(bad, tmp_path) == bad
    with pytest.raises((CorruptError, NotFoundError)):
        find_cache(bad.name, tmp_path).residual_array(0)


def small_cache(root: Path, seed: int) -> ActivationCache:
    layers = [np.zeros((100, 4), np.float32) for _ in range(2)]
    return make_cache(root, layers, [60, 40], random_head(4, 9), seed=seed)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_cache_that_may_not_be_read_is_listed_as_such(tmp_path: Path) -> None:
    cache = small_cache(tmp_path, 0)
    cache.path.chmod(0)
    try:
        (entry,) = list_caches(tmp_path)
        assert entry["state"].startswith("damaged: ")
    finally:
        cache.path.chmod(0o755)


def test_other_files_and_folders_under_a_root_are_no_caches(tmp_path: Path) -> None:
    cache = small_cache(tmp_path, 0)
    (tmp_path / "notes").mkdir()
    (tmp_path / ("0" * 64)).mkdir()
    (tmp_path / ("1" * 64)).write_text("a file")
    (tmp_path / "link").symlink_to("nowhere")
    shutil.copytree(cache.path, tmp_path / ".hidden")
    assert [entry["cache"] for entry in list_caches(tmp_path)] == [cache.id]


FORMAT1_ROOT = Path(__file__).parents[2] / "format1" / "root"


@pytest.mark.parametrize("version", ["present", "format 1"])
def test_no_tensor_of_the_head_is_read_to_list_and_describe_caches(
    tiny_cache: ActivationCache, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = FORMAT1_ROOT if version == "format 1" else tiny_cache.path.parent
    path = next(
        path for path in root.iterdir() if version == "format 1" or path.name == tiny_cache.id
    )
    head = ActivationCache(path).head
    geometry = head.digest if version == "present" else None  # as recorded

    def refuse(*_: object) -> None:
        raise AssertionError("the head was read")

    monkeypatch.setattr("residua.cache.head.saved_head.load_head", refuse)
    monkeypatch.setattr("residua.cache.head.head_files.read_head_tensors", refuse)
    described = describe_cache(ActivationCache(path))
    assert described["head"] == {**head.describe(), "geometry": geometry}
    assert (described["vocab"], described["d_model"]) == (head.vocab, head.d_model)
    assert any(entry["cache"] == path.name for entry in list_caches(root))

"""The caches that a cache extends: an order by positions, which forged manifests cannot close."""

from pathlib import Path

import numpy as np
import pytest

from residua.cache.errors import CorruptError, UsageError
from residua.cache.files.json_files import read_json, write_json
from residua.cache.format.layout import MAX_PARTS, Layout
from residua.cache.format.manifest import EXTENDS
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.lineage import cache_lineage, open_ancestor
from residua.probes.ridge.ridge_probe import RidgeProbe

from ...support.synthetic import make_cache, random_head


def small_cache(root: Path, positions: int) -> ActivationCache:
    rng = np.random.default_rng(positions)
    layers = [rng.normal(size=(positions, 4)).astype(np.float32) for _ in range(2)]
    lengths = [positions // 8] * 8
    return make_cache(root, layers, lengths, random_head(4, 11))


def set_extends(cache: ActivationCache, cache_id: str) -> ActivationCache:
    manifest = read_json(cache.path / "manifest.json")
    manifest["extra"][EXTENDS] = cache_id
    write_json(cache.path / "manifest.json", manifest)
    return ActivationCache(cache.path)


def test_caches_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    small, large = small_cache(tmp_path, 64), small_cache(tmp_path, 128)
    small, large = set_extends(small, large.id), set_extends(large, small.id)
    for cache in (small, large):
        with pytest.raises(CorruptError, match="no earlier cache of fewer tokens"):
            list(cache_lineage(cache))
    with pytest.raises(CorruptError, match="no earlier cache of fewer tokens"):
        RidgeProbe(offsets=[1]).fit(small)


def test_a_lineage_ends_where_a_cache_was_removed(tmp_path: Path) -> None:
    small, large = small_cache(tmp_path, 64), small_cache(tmp_path, 128)
    large = set_extends(large, small.id)
    assert [cache.id for cache in cache_lineage(large)] == [small.id]
    assert open_ancestor(set_extends(small, "0" * 64)) is None


def test_a_folder_with_another_cache_is_no_ancestor(tmp_path: Path) -> None:
    small, large = small_cache(tmp_path, 64), small_cache(tmp_path, 128)
    small.path.rename(tmp_path / ("0" * 64))
    with pytest.raises(CorruptError, match="no earlier cache"):
        list(cache_lineage(set_extends(large, "0" * 64)))


def test_parts_beyond_what_is_read_are_refused_before_the_extraction() -> None:
    Layout(1, 1).check_parts(MAX_PARTS)
    with pytest.raises(UsageError, match="at least 3"):
        Layout(1, 1).check_parts(2 * MAX_PARTS + 1)

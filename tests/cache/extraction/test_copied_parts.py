"""Parts that a longer cache takes from a shorter one: links, with the records of the shorter one.

Also after a kill between the creation of the longer cache and its first link.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residua
from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.store import cache_extension
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.verification import verify

OPTIONS: dict[str, Any] = {"context": 40, "part_positions": 512, "batch_tokens": 400}
SHARD = "arrays.zarr/residual/1/c/{}/0"


def extract(model: Path, data: Path, root: Path, **options: Any) -> ActivationCache:
    request = ExtractionRequest(str(model), str(data), root, **{**OPTIONS, **options})
    return answer_request(request).cache


def extend(model: Path, data: Path, root: Path) -> tuple[ActivationCache, ActivationCache]:
    """A cache of some tokens, and the cache of all tokens that extends it."""
    short = extract(model, data, root, max_tokens=1300, dtype="float16")
    return short, extract(model, data, root, dtype="float16")


def test_after_a_kill_before_the_first_link_the_records_and_links_are_the_same(
    model_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, undisturbed = extend(model_folder, texts_file, tmp_path / "undisturbed")
    full_parts = short.positions // 512
    assert full_parts
    with monkeypatch.context() as patch:
        patch.setattr(cache_extension, "share_parts", lambda *_: None)
        short, resumed = extend(model_folder, texts_file, tmp_path / "killed")
    assert resumed.committed == undisturbed.committed
    for part in range(full_parts):
        file = SHARD.format(part)
        assert os.path.samefile(short.path / file, resumed.path / file)
    assert verify(resumed.path).ok


def test_the_record_of_copied_rows_has_their_range_before_the_cast(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    """The last part of the shorter cache is not full: its rows are copied."""
    short, long = extend(model_folder, texts_file, tmp_path)
    part = short.positions // 512
    assert short.committed[part].stop == short.positions
    for name in long.complete_names:
        before = short.committed[part].arrays[name].absmax
        assert long.committed[part].arrays[name].absmax >= before


def test_layers_of_the_shorter_cache_that_came_later_are_linked_too(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    extract(model_folder, texts_file, tmp_path, max_tokens=1300, layers=(0,))
    extract(model_folder, texts_file, tmp_path, layers=(0,))
    short = extract(model_folder, texts_file, tmp_path, max_tokens=1300, layers=(0, 1))
    long = extract(model_folder, texts_file, tmp_path, layers=(0, 1))
    assert short.id != long.id
    assert os.path.samefile(short.path / SHARD.format(0), long.path / SHARD.format(0))
    assert long.committed[0].arrays["residual/1"] == short.committed[0].arrays["residual/1"]
    assert verify(long.path).ok


def test_damage_that_both_caches_share_by_a_link_is_repaired_in_both(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    short, long = extend(model_folder, texts_file, tmp_path)
    rows = long.residual_array(1)[:512]
    shard = long.path / SHARD.format(0)
    data = bytearray(shard.read_bytes())
    data[30] ^= 4
    with open(shard, "r+b") as file:  # the linked file itself
        file.write(data)
    assert not verify(short.path).ok
    assert residua.repair(long.path).ok
    assert verify(long.path).ok
    assert not verify(short.path).ok
    assert residua.repair(short.path).ok
    np.testing.assert_array_equal(ActivationCache(long.path).residual_array(1)[:512], rows)

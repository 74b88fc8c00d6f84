"""Caches and probes of format 1 (tests/format1) are read, verified, repaired and extended."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import residua
from residua.cache.errors import CorruptError, MismatchError
from residua.cache.extraction.answer import answer_request, find_match
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.files.json_files import read_json, write_json
from residua.cache.format.manifest import Manifest
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.catalog import list_paths
from residua.probes.base.readout import ReadoutBatch

from ...support.models import save_model

HERE = Path(__file__).parents[2] / "format1"
EXPECTED = json.loads((HERE / "expected.json").read_text())["caches"]
OPTIONS: dict[str, dict[str, Any]] = {
    "packed": {"context": 48, "layers": (0, 1, 2), "part_positions": 512},
    "rows": {
        "context": 32,
        "pack": False,
        "logits": "topk:4",
        "codec": "compact",
        "layers": (1,),
    },
    "sparse": {"context": 32, "pack": False, "positions": "sample:3", "layers": (1,)},
}
"""What each of the caches was asked for with."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the three caches, with the folders that git does not keep."""
    shutil.copytree(HERE / "root", tmp_path / "root")
    for cache in (tmp_path / "root").iterdir():
        for name in ("leases", "moments"):
            (cache / name).mkdir(exist_ok=True)
    return tmp_path / "root"


def request_for(
    name: str, root: Path, data: str = "texts.jsonl", **options: Any
) -> ExtractionRequest:
    fields = {"batch_tokens": 256, "format": 1, **OPTIONS[name], **options}
    return ExtractionRequest(str(HERE / "model"), str(HERE / data), root, **fields)


def cache_of(name: str, root: Path) -> ActivationCache:
    return ActivationCache(root / EXPECTED[name]["id"])


def sha256(values: Any, dtype: str | None = None) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, dtype).tobytes()).hexdigest()


@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_cache_of_format_1_held_is_read(name: str, root: Path) -> None:
    cache, expected = cache_of(name, root), EXPECTED[name]
    assert (cache.manifest.format, cache.id) == (1, expected["id"])
    assert (cache.positions, list(cache.layers)) == (expected["positions"], expected["layers"])
    for array, digest in expected["sha256"].items():
        layer = array.removeprefix("residual/")
        values = cache.residual(int(layer)).compute() if layer.isdigit() else cache.array(array)[:]
        assert sha256(values, "<f4" if layer.isdigit() else None) == digest, array
    assert cache.tokens[:16].tolist() == expected["ids_head"]
    np.testing.assert_array_equal(cache.sequence_document, cache.sequence_hash)
    assert residua.verify(cache.path).ok


@pytest.mark.parametrize("name", OPTIONS)
def test_a_request_of_format_1_finds_its_cache(name: str, root: Path) -> None:
    assert find_match(request_for(name, root)).answer == "hit"
    extraction = answer_request(request_for(name, root))
    assert (extraction.status, extraction.cache.id) == ("hit", EXPECTED[name]["id"])


@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_of_format_1_gets_the_layers_that_it_lacks(name: str, root: Path) -> None:
    extraction = answer_request(request_for(name, root, layers=None))
    assert (extraction.status, extraction.cache.id) == (
        "hit" if name == "packed" else "extended",
        EXPECTED[name]["id"],
    )
    assert extraction.cache.layers == (0, 1, 2, 3)
    fresh = answer_request(request_for(name, root.parent / "fresh", layers=None)).cache
    assert fresh.id == extraction.cache.id
    for layer in fresh.layers:
        expected = fresh.residual(layer).compute()
        # The kept rows may come from another processor.
        np.testing.assert_allclose(extraction.cache.residual(layer).compute(), expected, atol=2e-3)


def test_a_cache_of_format_1_is_extended_by_tokens_as_it_was(root: Path) -> None:
    """The same documents one by one, and twenty more."""
    old = cache_of("rows", root)
    extraction = answer_request(request_for("rows", root, data="more.jsonl"))
    assert extraction.status == "extended"
    assert extraction.cache.manifest.format == 1
    assert extraction.cache.manifest.extra["extends"] == old.id
    assert len(extraction.cache.sequence_length) == 60
    count = old.positions
    np.testing.assert_array_equal(extraction.cache.tokens[:count], old.tokens[:])
    np.testing.assert_array_equal(
        extraction.cache.residual_array(1)[:count], old.residual_array(1)[:]
    )
    assert not extraction.cache.has("sequences/document")
    assert residua.verify(extraction.cache.path).ok


@pytest.mark.parametrize("name", OPTIONS)
def test_a_damaged_cache_of_format_1_is_repaired(name: str, root: Path) -> None:
    cache = cache_of(name, root)
    before = cache.residual(1).compute()
    shard = cache.path / "arrays.zarr/residual/1/c/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    assert not residua.verify(cache.path).ok
    assert residua.repair(cache.path, str(HERE / "model")).ok
    assert residua.verify(cache.path).ok
    np.testing.assert_allclose(cache_of(name, root).residual(1).compute(), before, atol=2e-3)


def test_repair_with_another_model_is_refused(root: Path, tmp_path: Path) -> None:
    cache = cache_of("packed", root)
    (cache.path / "arrays.zarr/residual/1/c/0/0").unlink()
    with pytest.raises(MismatchError, match=r"is not the model of this cache \(.*weights: "):
        residua.repair(cache.path, str(save_model(tmp_path / "other", seed=5)))


def test_without_a_word_a_new_cache_has_the_new_format(root: Path) -> None:
    extraction = answer_request(request_for("rows", root, format=2))
    assert extraction.status == "extracted"
    assert (extraction.cache.manifest.format, extraction.cache.has("sequences/document")) == (
        2,
        True,
    )
    assert len(list_paths(root)) == 4
    old, new = cache_of("rows", root), extraction.cache
    np.testing.assert_array_equal(old.tokens[:], new.tokens[:])
    np.testing.assert_allclose(old.residual_array(1)[:], new.residual_array(1)[:], atol=2e-3)


def test_an_unknown_format_is_refused(root: Path, tmp_path: Path) -> None:
    file = cache_of("rows", root).path / "manifest.json"
    value = read_json(file)
    value["identity"]["format"] = 3
    write_json(file, value)
    with pytest.raises(CorruptError, match="has format 3, this version reads 1, 2; install"):
        Manifest.read(file)


@pytest.mark.parametrize("name", sorted(load_file(HERE / "expected.safetensors")))
def test_a_probe_that_was_saved_beside_format_1_says_the_same(name: str, root: Path) -> None:
    kind, _, offset = name.partition(".")
    probe = residua.load_probe(HERE / "probes" / kind)
    cache, shift = cache_of("packed", root), int(offset)
    ids = torch.from_numpy(cache.tokens[:12].astype(np.int64))
    layer = cache.n_blocks if kind == "marginal" else 1
    batch = ReadoutBatch(
        hidden=torch.from_numpy(cache.residual_array(layer)[:8]),
        token=ids[1:9],
        last_token=ids[1 + shift : 9 + shift],
        previous_token=ids[shift : 8 + shift],
        head=cache.head.torch("cpu"),
    )
    expected = load_file(HERE / "expected.safetensors")[name]
    values = probe.logits(batch, 1, shift).float().numpy()
    np.testing.assert_allclose(values, expected, atol=2e-5, rtol=1e-5)

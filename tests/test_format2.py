"""Caches and probes of format 2 (tests/format2), written once, open and give the same numbers."""

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
from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.readout import ReadoutBatch

HERE = Path(__file__).parent / "format2"
INPUTS = Path(__file__).parent / "format1"
EXPECTED = json.loads((HERE / "expected.json").read_text())["caches"]
LOGITS = load_file(HERE / "expected.safetensors")
OPTIONS: dict[str, dict[str, Any]] = {
    "packed": {"context": 48, "part_positions": 512},
    "rows": {"context": 32, "pack": False, "logits": "topk:4", "codec": "compact", "layers": (1,)},
    "sparse": {"context": 32, "pack": False, "positions": "sample:3", "layers": (1,)},
}
"""Options that each cache was extracted with."""
PROBES = sorted(path.name for path in (HERE / "probes").iterdir())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the three caches, with the empty folders that git does not keep."""
    shutil.copytree(HERE / "root", tmp_path / "root")
    for cache in (tmp_path / "root").iterdir():
        for name in ("leases", "moments"):
            (cache / name).mkdir(exist_ok=True)
    return tmp_path / "root"


def answer(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Extract, or find, the cache `name` under `root`, with the paths that it was made with."""
    monkeypatch.chdir(INPUTS)
    request = ExtractionRequest("model", "texts.jsonl", root, batch_tokens=256, **OPTIONS[name])
    return answer_request(request)


def sha256(values: Any, dtype: str | None = None) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, dtype).tobytes()).hexdigest()


def files_below(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_is_read_verified_and_found(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = EXPECTED[name]
    cache = ActivationCache(root / expected["id"])
    assert (cache.positions, list(cache.layers)) == (expected["positions"], expected["layers"])
    for array, digest in expected["sha256"].items():
        layer = array.removeprefix("residual/")
        if layer.isdigit():
            assert sha256(cache.residual(int(layer)).compute(), "<f4") == digest, array
        else:
            assert sha256(cache.array(array)[:]) == digest, array
    for split, numbers in expected["splits"].items():
        assert cache.sequences(split).tolist() == numbers
    assert residua.verify(cache.path).ok
    extraction = answer(name, root, monkeypatch)
    assert (extraction.status, extraction.cache.id) == ("hit", expected["id"])


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_extraction_makes_the_same_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of residual streams and logits, which the processor decides, to a tolerance."""
    old = ActivationCache(HERE / "root" / EXPECTED[name]["id"])
    new = answer(name, tmp_path / "root", monkeypatch).cache
    assert new.id == old.id
    before, after = files_below(old.path), files_below(new.path)
    local = {path for path in after if path.startswith("leases/")} | {"local.json"}
    assert set(before) == set(after) - local
    decided = ("arrays.zarr/residual/", "arrays.zarr/logits/", "journal/", "head/canary")
    metadata = "zarr.json"
    for path, data in before.items():
        if path != "provenance.json" and (not path.startswith(decided) or path.endswith(metadata)):
            assert after[path] == data, path
    for layer in old.layers:
        rows = old.residual(layer).compute()
        np.testing.assert_allclose(new.residual(layer).compute(), rows, atol=2e-3)


@pytest.mark.parametrize("name", sorted(LOGITS))
def test_a_probe_gives_the_same_logits(name: str) -> None:
    kind, _, offset = name.partition(".")
    probe = residua.load_probe(HERE / "probes" / kind)
    cache, shift = ActivationCache(HERE / "root" / EXPECTED["packed"]["id"]), int(offset)
    ids = torch.from_numpy(cache.tokens[:12].astype(np.int64))
    layer = cache.n_blocks if kind == "marginal" else 1
    batch = ReadoutBatch(
        hidden=torch.from_numpy(cache.residual_array(layer)[:8]),
        token=ids[1:9],
        last_token=ids[1 + shift : 9 + shift],
        previous_token=ids[shift : 8 + shift],
        head=cache.head.torch("cpu"),
    )
    logits = probe.logits(batch, 1, shift).float().numpy()
    np.testing.assert_allclose(logits, LOGITS[name], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PROBES)
def test_a_probe_that_is_saved_again_is_the_same_bytes(kind: str, tmp_path: Path) -> None:
    residua.save_probe(residua.load_probe(HERE / "probes" / kind), tmp_path / kind)
    assert files_below(tmp_path / kind) == files_below(HERE / "probes" / kind)

"""A power cut costs nothing that was committed: files are synced before, folders after a rename."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.sharing.flat_export import export
from residua.probes.lens.tuned_lens import TunedLens
from residua.probes.lens.tuned_lens_files import write_tuned_lens
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.ridge.solver import AffineMap
from residua.probes.saved.save import save_probe
from residua.probes.training.checkpoint import Checkpoint
from residua.probes.vocabulary.vocab_probe import VocabProbe

from ...support.powercut import Disk

OPTIONS: dict[str, Any] = {"context": 40, "part_positions": 512, "batch_tokens": 400}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A folder that is watched; at the end nothing may have appeared too early."""
    base = tmp_path / "disk"
    base.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        watched_disk = Disk(base.resolve(), patch)
        yield watched_disk
    assert not watched_disk.faults


def request_for(model: Path, data: Path, root: Path, **options: Any) -> ExtractionRequest:
    return ExtractionRequest(str(model), str(data), root, **{**OPTIONS, **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"pack": False, "logits": "topk:3", "codec": "compact"}, {"positions": "last"}],
    ids=["packed", "logits", "sparse"],
)
def test_an_extraction_is_whole_after_a_power_cut(
    disk: Disk, model_folder: Path, texts_file: Path, options: dict[str, Any]
) -> None:
    cache = answer_request(
        request_for(model_folder, texts_file, disk.base / "caches", **options)
    ).cache
    assert not disk.lost()
    appeared = [name for event, name in disk.events if event == "rename"]
    shards = [name for name in appeared if "/residual/" in name and "/c/" in name]
    assert len(shards) == cache.n_parts * len(cache.layers)
    records = [name for name in appeared if "/journal/0" in name]
    assert len(records) == cache.n_parts


@pytest.mark.parametrize("growth", ["layers", "tokens"])
def test_a_cache_that_grows_is_whole_after_a_power_cut(
    disk: Disk, model_folder: Path, texts_file: Path, growth: str
) -> None:
    options: dict[str, Any] = {"layers": (1,)} if growth == "layers" else {"max_tokens": 1300}
    answer_request(request_for(model_folder, texts_file, disk.base, **options))
    assert not disk.lost()
    assert answer_request(request_for(model_folder, texts_file, disk.base)).status == "extended"
    assert not disk.lost()


def test_where_there_are_no_links_copied_shards_are_synced(
    disk: Disk, model_folder: Path, texts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def no_links(source: Any, target: Any) -> None:
        if "/c/" in os.fspath(source):  # zarr links its own files too
            raise OSError("no links here")
        link(source, target)

    first = answer_request(request_for(model_folder, texts_file, disk.base, max_tokens=1300)).cache
    monkeypatch.setattr(os, "link", no_links)
    longer = answer_request(request_for(model_folder, texts_file, disk.base)).cache
    assert longer.manifest.extra["extends"] == first.id
    assert not disk.lost()


def test_a_repaired_cache_is_whole_after_a_power_cut(
    disk: Disk, model_folder: Path, texts_file: Path
) -> None:
    cache = answer_request(request_for(model_folder, texts_file, disk.base)).cache
    shard = cache.path / "arrays.zarr/residual/1/c/1/0"
    for file in (shard, cache.path / "arrays.zarr/residual/2/zarr.json"):
        data = bytearray(file.read_bytes())
        data[30] ^= 4
        file.write_bytes(data)
    disk.assume_synced()
    assert residua.repair(cache.path).ok
    assert not disk.lost()


def test_kept_moments_and_saved_probes_are_whole_after_a_power_cut(
    disk: Disk, model_folder: Path, texts_file: Path
) -> None:
    cache = answer_request(request_for(model_folder, texts_file, disk.base / "caches")).cache
    probe = RidgeProbe(layers=[0], folds=2).fit(cache, keep=True)
    assert list((cache.path / "moments").iterdir())
    assert not disk.lost()
    for _ in range(2):  # a probe that is saved again
        save_probe(probe, disk.base / "probes" / "ridge")
        assert not disk.lost()


def test_an_export_is_whole_after_a_power_cut(
    disk: Disk, model_folder: Path, texts_file: Path
) -> None:
    cache = answer_request(request_for(model_folder, texts_file, disk.base / "caches")).cache
    for name, format in (("tensors", "safetensors"), ("arrays", "numpy")):
        export(cache, disk.base / "exports" / name, layers=[1], format=format)
        assert not disk.lost()


def test_a_lens_for_other_tools_is_whole_after_a_power_cut(
    disk: Disk, model_folder: Path, texts_file: Path
) -> None:
    cache = answer_request(request_for(model_folder, texts_file, disk.base / "caches")).cache
    eye = np.eye(cache.d_model, dtype=np.float32)
    maps = {(layer, 0): AffineMap(eye, eye[0]) for layer in range(cache.n_blocks)}
    write_tuned_lens(TunedLens.of(maps), disk.base / "lens", cache)
    assert not disk.lost()


def test_a_checkpoint_is_whole_after_a_power_cut(disk: Disk) -> None:
    checkpoint = Checkpoint(disk.base / "fits" / "one", {"of": 1})
    for step in (1, 2):
        checkpoint.save({"step": step}, {"a": torch.full((3,), float(step))})
        assert not disk.lost()


@pytest.mark.parametrize("kind", ["lens", "vocab"])
def test_a_fit_leaves_checkpoints_that_are_whole_after_a_power_cut(
    disk: Disk, tiny_cache: residua.ActivationCache, kind: str
) -> None:
    folder = disk.base / "fit"
    lost: list[str] = []
    checkpoints = []

    def check_disk(*_: Any) -> None:
        if files := list(folder.rglob("fit.json")):
            checkpoints.extend(files)
            lost.extend(disk.lost())

    if kind == "lens":
        probe: Any = TunedLens(layers=[1], steps=30, batch=64, lr=0.1)
        probe.fit(tiny_cache, checkpoint=folder, progress=check_disk)
    else:
        probe = VocabProbe(0, [1], epochs=1, batch=512, lr=0.05)
        probe.fit(tiny_cache, checkpoint=folder, checkpoint_seconds=0, progress=check_disk)
    assert checkpoints
    assert not lost


def test_what_is_not_synced_is_noticed(disk: Disk) -> None:
    """The watch itself: each thing that can be left out is a fault or a loss."""
    file, folder = disk.base / "file", disk.base / "folder"
    (disk.base / ".file").write_bytes(b"1")
    os.replace(disk.base / ".file", file)
    assert disk.faults == ["file appears before .file is synced"]
    disk.faults.clear()
    assert disk.lost() == ["file"]
    with file.open("wb") as stream:
        stream.write(b"2")  # in the buffer only
        os.fsync(stream.fileno())
    assert disk.lost() == ["file"]
    descriptor = os.open(disk.base, os.O_RDONLY)
    os.fsync(descriptor)
    assert disk.lost() == ["file"]
    file.write_bytes(b"")
    assert disk.lost() == []  # what was in the file when it was synced
    folder.mkdir()
    assert disk.lost() == ["folder"]
    os.close(descriptor)

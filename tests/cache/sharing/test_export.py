"""Claims about exports: other libraries read the same rows, whole folders only, bounded memory."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from residua.cache.errors import IncompleteError, NoSpaceError, NotFoundError, UsageError
from residua.cache.files.json_files import file_digest, read_json
from residua.cache.files.staging import staging_folder
from residua.cache.format.dtypes import decode_rows
from residua.cache.sharing import flat_export as export_module
from residua.cache.sharing.flat_export import export
from residua.cache.store.activation_cache import ActivationCache

from ...support.synthetic import make_cache, random_head

LENGTHS = [37, 5, 200, 64, 1, 90, 33, 70, 120, 80]
WIDTH = 8
DTYPES = ["float16", "bfloat16", "float32"]


def small_cache(root: Path, dtype: str = "float32", seed: int = 0) -> ActivationCache:
    rng = np.random.default_rng(seed)
    layers = [rng.normal(size=(sum(LENGTHS), WIDTH)).astype(np.float32) for _ in range(3)]
    return make_cache(root, layers, LENGTHS, random_head(WIDTH, 11), dtype=dtype)


@pytest.fixture(scope="module", params=DTYPES)
def cache(request, tmp_path_factory) -> ActivationCache:
    return small_cache(tmp_path_factory.mktemp(request.param), request.param)


def read_exported(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Tensors of an exported file as float32 or integers, by the library that owns the format."""
    index = json.loads((folder / "index.json").read_bytes())
    if index["format"] == "safetensors":
        tensors = safetensors.torch.load_file(folder / f"{name}.safetensors")
        floats = {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
        return {k: t.numpy() for k, t in floats.items()}
    tensors = {}
    for path in folder.glob(f"{name}*.npy"):
        ((column, entry),) = index["files"][path.name]["tensors"].items()
        tensors[column] = decode_rows(np.load(path, mmap_mode="r"), entry["dtype"])
    return tensors


@pytest.mark.parametrize("format", ["safetensors", "numpy"])
@pytest.mark.parametrize("split", ["all", "train", "test"])
def test_other_libraries_read_the_rows_of_the_split(cache, tmp_path, format, split):
    index = export(cache, tmp_path / "out", format=format, split=split)
    sequences = cache.sequences(split)
    rows = cache.positions_of(sequences)
    assert index["positions"] == len(rows)
    for layer in cache.layers:
        exported = read_exported(tmp_path / "out", f"residual.{layer:02d}")["residual"]
        np.testing.assert_array_equal(exported, cache.residual_array(layer)[rows])
    tokens = read_exported(tmp_path / "out", "tokens")
    np.testing.assert_array_equal(tokens["ids"], cache.tokens[rows])
    table = read_exported(tmp_path / "out", "sequences")
    for name in ("row_id", "hash", "split", "length"):
        np.testing.assert_array_equal(table[name], cache.array(f"sequences/{name}")[:][sequences])
    for number, (start, length) in enumerate(zip(table["start"], table["length"], strict=True)):
        assert (tokens["sequence"][start : start + length] == number).all()
        assert tokens["index"][start : start + length].tolist() == list(range(length))


def test_bfloat16_is_bfloat16_for_torch_and_the_same_bits_for_numpy(tmp_path):
    cache = small_cache(tmp_path, "bfloat16")
    export(cache, tmp_path / "st", layers=[1])
    export(cache, tmp_path / "np", layers=[1], format="numpy")
    tensor = safetensors.torch.load_file(tmp_path / "st" / "residual.01.safetensors")["residual"]
    bits = np.load(tmp_path / "np" / "residual.01.npy", mmap_mode="r")
    assert tensor.dtype == torch.bfloat16
    assert bits.dtype == np.uint16
    np.testing.assert_array_equal(tensor.view(torch.uint16).numpy(), bits)
    assert "astype(np.uint32) << 16" in (tmp_path / "np" / "README.md").read_text()


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_written_in_another_dtype(tmp_path, stored, dtype):
    cache = small_cache(tmp_path, stored)
    export(cache, tmp_path / "out", dtype=dtype, layers=[2])
    exported = safetensors.torch.load_file(tmp_path / "out" / "residual.02.safetensors")
    expected = torch.from_numpy(cache.residual_array(2)[:]).to(getattr(torch, dtype))
    assert torch.equal(exported["residual"], expected)


def test_numpy_readers_of_safetensors_open_every_file_without_bfloat16(tmp_path):
    cache = small_cache(tmp_path, "float16")
    export(cache, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert all(len(array) for array in safetensors.numpy.load_file(path).values())


def test_the_index_names_the_digest_of_every_file(cache, tmp_path):
    index = export(cache, tmp_path / "out", layers=[0, 2])
    assert read_json(tmp_path / "out" / "index.json") == index
    assert index["cache"] == cache.id
    assert index["layers"] == {"0": "residual.00.safetensors", "2": "residual.02.safetensors"}
    on_disk = {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert on_disk == set(index["files"])
    for name, entry in index["files"].items():
        path = tmp_path / "out" / name
        assert (entry["sha256"], entry["bytes"]) == (file_digest(path), path.stat().st_size)
    for name, digest in index["head"].items():
        assert digest == file_digest(tmp_path / "out" / "head" / name)


def test_the_readme_opens_the_folder_it_lies_in(cache, tmp_path, monkeypatch):
    for format in ("safetensors", "numpy"):
        export(cache, tmp_path / format, format=format)
        code = (tmp_path / format / "README.md").read_text().split("```python\n")[1]
        monkeypatch.chdir(tmp_path / format)
        names: dict[str, Any] = {}
        exec(code.split("```")[0], names)
        assert names["hidden"].shape == (cache.positions, WIDTH)


def test_a_folder_with_files_is_refused_and_an_empty_one_is_used(cache, tmp_path):
    (tmp_path / "empty").mkdir()
    export(cache, tmp_path / "empty", layers=[0])
    with pytest.raises(UsageError, match="is there already and not an empty folder"):
        export(cache, tmp_path / "empty", layers=[0])


def test_an_export_that_fails_leaves_nothing(cache, tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(cache, tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_the_number_of_residual_rows(cache, tmp_path):
    seen: list[tuple[int, int]] = []
    export(cache, tmp_path / "out", layers=[0, 1], progress=lambda *at: seen.append(at))
    assert seen[-1] == (2 * cache.positions, 2 * cache.positions)
    assert seen == sorted(seen)


def test_a_full_disk_is_refused_before_anything_is_written(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(NoSpaceError, match="needs .* GB free; take fewer --layers"):
        export(cache, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_cannot_hold_a_value_is_refused(tmp_path):
    values = np.full((70, WIDTH), 70_000.0, np.float32)
    cache = make_cache(tmp_path, [values], [70], random_head(WIDTH, 11))
    with pytest.raises(UsageError, match=r"layer 0 reaches 7e\+04, which float16 cannot hold"):
        export(cache, tmp_path / "out", dtype="float16")
    export(cache, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"format": "csv"}, UsageError, "choose one of safetensors, numpy"),
        ({"dtype": "int8"}, UsageError, "choose one of float16"),
        ({"split": "dev"}, UsageError, "no split 'dev'"),
        ({"layers": [7]}, NotFoundError, "layer 7 is not in this cache; it holds 0-2"),
    ],
)
def test_wrong_requests_are_refused(cache, tmp_path, wrong, error, message):
    with pytest.raises(error, match=message):
        export(cache, tmp_path / "out", **wrong)


def test_an_unfinished_cache_is_refused(tmp_path):
    cache = small_cache(tmp_path)
    (cache.path / "journal" / "00000001.json").unlink()
    with pytest.raises(IncompleteError):
        export(ActivationCache(cache.path), tmp_path / "out")


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(ActivationCache, "block_rows", lambda self: 256)
    monkeypatch.setattr(export_module, "TABLE_ROWS", 256)

    def peak(rows: int) -> int:
        values = np.zeros((rows, 256), np.float32)
        root = tmp_path / str(rows)
        cache = make_cache(root, [values], [64] * (rows // 64), random_head(256, 11))
        cache.sequences("all")
        del values
        tracemalloc.start()
        try:
            export(cache, root / "out", dtype="bfloat16")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1024)
    assert peak(16384) < peak(2048) + (1 << 20)


def test_a_folder_that_cannot_be_written_is_named(cache, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="out cannot be written: "):
        export(cache, tmp_path / "file" / "out")


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(cache, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_flat_file", full)
    with pytest.raises(NoSpaceError, match="out is full"):
        export(cache, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_exports_left_is_swept_by_an_export_to_any_name(cache, tmp_path):
    for number in range(3):
        (tmp_path / f".residua-export-{number}.tmp" / "head").mkdir(parents=True)
    (tmp_path / ".other.tmp").mkdir()
    with staging_folder(tmp_path, export_module.STAGING_PREFIX, ".tmp") as of_a_living_process:
        export(cache, tmp_path / "out", layers=[1])
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", ".other.tmp", of_a_living_process.name}

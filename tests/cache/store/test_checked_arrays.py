"""Claims about metadata of arrays: no array opens with another `zarr.json` than was written."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.cache.errors import CorruptError, NotFoundError
from residua.cache.files.json_files import read_json, write_json
from residua.cache.format.manifest import Manifest
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.checked_arrays import (
    ArrayMetadata,
    CheckedArray,
    array_of_metadata,
    metadata_file,
)
from residua.cache.store.part_writer import PartWriter
from residua.cache.store.verification import verify

from ...support.synthetic import make_cache, random_head

LENGTHS = [100, 30, 170]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """Layers 0 and 1 of 300 positions, with documents."""
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(300, 4)).astype(np.float32) for _ in range(2)]
    documents = np.repeat(np.arange(3), LENGTHS)
    return make_cache(
        tmp_path_factory.mktemp("pristine"), layers, LENGTHS, random_head(4, 9),
        dtype="bfloat16", documents=documents,
    )  # fmt: skip


@pytest.fixture
def forged(pristine: ActivationCache, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(pristine.path, tmp_path / pristine.id))


def metadata_files(path: Path) -> list[str]:
    files = path.glob("arrays.zarr/**/zarr.json")
    return sorted(file.relative_to(path).as_posix() for file in files)


def open_array(path: Path, name: str) -> CheckedArray:
    cache = ActivationCache(path)
    if name.startswith("residual/"):
        return cache.residual_array(int(name.split("/")[1]))  # pyright: ignore[reportReturnType]
    return cache.array(name)  # pyright: ignore[reportReturnType]


def test_every_wrong_digit_of_metadata_is_refused_on_open(
    pristine: ActivationCache, forged: Path
) -> None:
    tried = 0
    for file in metadata_files(pristine.path):
        raw = (pristine.path / file).read_bytes()
        name = array_of_metadata(file)
        is_group = name is None or json.loads(raw)["node_type"] == "group"
        for place in [place for place, byte in enumerate(raw) if chr(byte).isdigit()]:
            digit = str((int(chr(raw[place])) + 1) % 10).encode()
            (forged / file).write_bytes(raw[:place] + digit + raw[place + 1 :])
            tried += 1
            if is_group:  # readers of this package do not use it
                assert file in [damage.file for damage in verify(forged).damages]
            else:
                with pytest.raises(CorruptError, match=r"zarr\.json"):
                    open_array(forged, name or "")
        (forged / file).write_bytes(raw)
    assert tried > 150


def reseal(path: Path, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a `zarr.json`, and its digest in the base record, as a forger would."""
    meta = json.loads((path / file).read_bytes())
    change(meta)
    (path / file).write_text(json.dumps(meta))
    base = read_json(path / "journal/base.json")
    base["files"][file] = hashlib.sha256((path / file).read_bytes()).hexdigest()
    write_json(path / "journal/base.json", base)


def set_shape(*shape: int) -> Callable[[dict[str, Any]], None]:
    return lambda meta: meta.update(shape=list(shape))


def set_chunk_rows(meta: dict[str, Any]) -> None:
    meta["codecs"][0]["configuration"]["chunk_shape"][0] //= 2


def set_shard_rows(meta: dict[str, Any]) -> None:
    meta["chunk_grid"]["configuration"]["chunk_shape"][0] *= 2


def set_codecs(meta: dict[str, Any]) -> None:
    codec = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
    meta["codecs"][0]["configuration"]["codecs"].insert(1, codec)


@pytest.mark.parametrize(("name", "change", "reason"), [
    ("residual/0", set_shape(299, 4), "shape"),
    ("residual/0", set_shape(1 << 40, 4), "shape"),
    ("residual/1", lambda m: m.update(data_type="int16"), "stored as"),
    ("residual/1", lambda m: m["attributes"].update(logical_dtype="float16"), "stored as"),
    ("residual/1", lambda m: m["attributes"].update(logical_dtype=["bfloat16"]), "logical_dtype"),
    ("residual/1", lambda m: m.update(attributes=[]), "attributes"),
    ("residual/0", set_chunk_rows, "chunks of 32 rows"),
    ("residual/0", set_shard_rows, "in shards of 512"),
    ("residual/0", set_codecs, "codecs other than"),
    ("tokens/ids", set_shape(299), "shape"),
    ("tokens/ids", lambda m: m.update(data_type="uint32"), "stored as"),
    ("tokens/ids", lambda m: m.update(data_type="object"), "data_type"),
    ("tokens/ids", lambda m: m.update(shape=[True]), "shape"),
    ("tokens/ids", lambda m: m.update(shape=[3e2]), "shape"),
    ("tokens/ids", lambda m: m.update(codecs=[]), "codecs"),
    ("sequences/split", set_shape(2), "shape"),
    ("sequences/length", lambda m: m.update(data_type="float32"), "stored as"),
    ("sequences/start", set_chunk_rows, "chunks of"),
])  # fmt: skip
def test_metadata_that_do_not_fit_the_manifest_are_refused_though_their_digest_is_right(
    forged: Path, name: str, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    reseal(forged, metadata_file(name), change)
    with pytest.raises(CorruptError, match=reason):
        open_array(forged, name)
    assert metadata_file(name) in [damage.file for damage in verify(forged).damages]


def test_one_damaged_layer_leaves_the_others_readable(
    pristine: ActivationCache, forged: Path
) -> None:
    (forged / metadata_file("residual/0")).unlink()
    cache = ActivationCache(forged)
    np.testing.assert_array_equal(cache.residual_array(1)[:], pristine.residual_array(1)[:])
    with pytest.raises(CorruptError, match=r"no zarr\.json; run `residua repair`"):
        cache.residual_array(0)


def test_an_array_whose_metadata_are_lost_is_not_taken_for_one_that_was_never_there(
    forged: Path,
) -> None:
    """Folds without `sequences/document`, or pairs without `tokens/row_id`, would be others."""
    for name in ("sequences/document", "tokens/row_id"):
        (forged / metadata_file(name)).unlink()
    cache = ActivationCache(forged)
    with pytest.raises(CorruptError):
        cache.sequence_folds(3)
    with pytest.raises(CorruptError):
        _ = cache.document_numbers


def test_no_row_is_written_through_damaged_metadata(forged: Path) -> None:
    file = forged / metadata_file("residual/1")
    file.write_bytes(file.read_bytes().replace(b"300", b"200"))
    manifest = Manifest.read(forged / "manifest.json")
    with pytest.raises(CorruptError, match="not what was written"):
        PartWriter(forged, manifest.layout, 1, (0, 1))


@pytest.mark.parametrize("folder", ["arrays.zarr", "arrays.zarr/residual", "arrays.zarr/residual/1",
                                    "arrays.zarr/residual/1/c"])  # fmt: skip
def test_no_row_is_written_or_read_through_a_link(
    forged: Path, tmp_path: Path, folder: str
) -> None:
    outside = tmp_path / "outside"
    (forged / folder).rename(outside)
    (forged / folder).symlink_to(outside)
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    manifest = Manifest.read(forged / "manifest.json")
    with pytest.raises(CorruptError, match="is a link"):
        PartWriter(forged, manifest.layout, 1, (0, 1))
    with pytest.raises(CorruptError, match="is a link"):
        ActivationCache(forged).residual_array(1)[:]
    assert not verify(forged).ok
    assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before


def test_a_pickled_array_is_checked_again(forged: Path) -> None:
    array = ActivationCache(forged).residual_array(1)
    data = pickle.dumps(array)
    assert len(data) < 600
    np.testing.assert_array_equal(pickle.loads(data)[:], array[:])
    file = forged / metadata_file("residual/1")
    file.write_bytes(file.read_bytes().replace(b"300", b"200"))
    with pytest.raises(CorruptError, match="not what was written"):
        pickle.loads(data)


def test_a_process_reads_base_records_that_were_written_since(forged: Path) -> None:
    array = ActivationCache(forged).residual_array(1)
    data = pickle.dumps(array)
    base = read_json(forged / "journal/base.json")
    digest = base["files"].pop(metadata_file("residual/1"))
    write_json(forged / "journal/base.json", base)
    with pytest.raises(CorruptError, match="no base record names this array"):
        pickle.loads(data)
    added = {"arrays": {}, "files": {metadata_file("residual/1"): digest}}
    write_json(forged / "journal/base.1.json", added)
    np.testing.assert_array_equal(pickle.loads(data)[:], array[:])


def test_names_of_metadata_and_arrays_agree() -> None:
    assert array_of_metadata(metadata_file("sequences/labels/a")) == "sequences/labels/a"
    for file in ("arrays.zarr/zarr.json", "head/head.json", "zarr.json", "arrays.zarr/x/c/0"):
        assert array_of_metadata(file) is None


def test_without_base_records_nothing_is_opened(forged: Path) -> None:
    (forged / "journal/base.json").unlink()
    metadata = ArrayMetadata(forged)
    with pytest.raises(NotFoundError, match=r"base\.json is missing; `residua repair`"):
        CheckedArray(metadata, "tokens/ids")

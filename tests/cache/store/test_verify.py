"""Claims about `verify`: whatever is changed, cut, deleted or swapped is found and named."""

import errno
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from residua.cache.files.json_files import json_digest, read_json, write_json
from residua.cache.format.manifest import Manifest
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.verification import verify
from residua.probes.ridge.ridge_probe import RidgeProbe

from ...support.synthetic import make_cache, random_head

LENGTHS = [100, 30, 300, 70, 100]
ROWS = sum(LENGTHS)


def small_cache(root: Path) -> ActivationCache:
    """Layers 0-2 of 600 positions: parts of 256 rows in chunks of 64."""
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(ROWS, 4)).astype(np.float32) for _ in range(3)]
    return make_cache(root, layers, LENGTHS, random_head(4, 9), dtype="float16")


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


RESIDUALS = [f"arrays.zarr/residual/{layer}" for layer in range(3)]
TABLES_OF_SEQUENCES = ("document", "hash", "length", "row_id", "split", "start")
TABLES = ["arrays.zarr/tokens/" + name for name in ("ids", "index", "sequence")]
TABLES += ["arrays.zarr/sequences/" + n for n in TABLES_OF_SEQUENCES]
FILES = sorted(
    ["manifest.json", "provenance.json", "head/head.json", "head/head.safetensors"]
    + ["journal/base.json", *(f"journal/{part:08d}.json" for part in range(3))]
    + ["arrays.zarr/zarr.json"]
    + [f"arrays.zarr/{group}/zarr.json" for group in ("residual", "sequences", "tokens")]
    + [f"{name}/zarr.json" for name in RESIDUALS + TABLES]
    + [f"{name}/c/{part}/0" for name in RESIDUALS for part in range(3)]
    + [f"{name}/c/0" for name in TABLES]
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> ActivationCache:
    return small_cache(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def damaged(pristine, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(pristine.path, tmp_path / "copy"))


def messages(path: Path) -> list[tuple[str, str]]:
    return [(damage.file, damage.message) for damage in verify(path).damages]


def test_a_good_cache_is_good(pristine):
    result = verify(pristine.path)
    assert result.ok
    assert result.missing_parts == ()
    shards = [file for file in FILES if "/c/" in file]
    assert result.shards == len(shards)
    assert result.bytes == sum((pristine.path / file).stat().st_size for file in shards)


def test_these_are_all_files(pristine):
    assert files_of(pristine.path) == FILES


@pytest.mark.parametrize("file", FILES)
def test_a_changed_byte_is_found_in_every_file(pristine, damaged, file):
    raw = (pristine.path / file).read_bytes()
    choose = random.Random(file)
    places = {0, len(raw) // 2, len(raw) - 1, *(choose.randrange(len(raw)) for _ in range(9))}
    for place in places:
        changed = bytearray(raw)
        changed[place] ^= 1 << choose.randrange(8)
        (damaged / file).write_bytes(changed)
        found = verify(damaged).damages
        assert any(damage.file == file for damage in found), (place, found)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_found(damaged, file):
    (damaged / file).unlink()
    result = verify(damaged)
    if file.startswith("journal/0"):
        assert result.missing_parts == (int(file[8:16]),)
    else:
        assert file in [damage.file for damage in result.damages]


@pytest.mark.parametrize(
    "file",
    [f"arrays.zarr/{name}zarr.json" for name in ("", "tokens/", "residual/1/", "sequences/split/")],
)
def test_metadata_that_became_other_json_are_found_without_a_crash(pristine, damaged, file):
    raw = (pristine.path / file).read_bytes()
    digits = [place for place, byte in enumerate(raw) if chr(byte).isdigit()]
    for place in digits + [place - 1 for place in digits]:
        for byte in b" 0-e":
            if raw[place] != byte:
                (damaged / file).write_bytes(raw[:place] + bytes([byte]) + raw[place + 1 :])
                assert not verify(damaged).ok


@pytest.mark.parametrize("file", [f for f in FILES if "/c/" in f])
def test_a_cut_shard_is_found(damaged, file):
    raw = (damaged / file).read_bytes()
    for keep in (0, 1, len(raw) // 2, len(raw) - 1):
        (damaged / file).write_bytes(raw[:keep])
        assert file in [damage.file for damage in verify(damaged).damages]
    (damaged / file).write_bytes(raw + b"\0")
    assert file in [damage.file for damage in verify(damaged).damages]


def test_bytes_between_the_chunks_and_the_index_are_found(damaged):
    """All chunks and the index are right, but it is not the file that was committed."""
    file = "arrays.zarr/residual/0/c/0/0"
    raw = (damaged / file).read_bytes()
    index = 4 * 16 + 4
    (damaged / file).write_bytes(raw[:-index] + b"\0" + raw[-index:])
    (damage,) = verify(damaged).damages
    assert damage.file == file
    assert "another size" in damage.message


@pytest.mark.parametrize(("one", "two"), [
    ("residual/0/c/0/0", "residual/0/c/1/0"),
    ("residual/0/c/0/0", "residual/1/c/0/0"),
    ("residual/1/c/1/0", "residual/1/c/2/0"),
    ("tokens/index/c/0", "tokens/sequence/c/0"),
])  # fmt: skip
def test_two_swapped_shards_are_found(damaged, one, two):
    first, second = damaged / "arrays.zarr" / one, damaged / "arrays.zarr" / two
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    found = [damage.file for damage in verify(damaged).damages]
    assert {f"arrays.zarr/{one}", f"arrays.zarr/{two}"} <= set(found)


def test_damage_names_array_and_rows(damaged):
    file = damaged / "arrays.zarr/residual/1/c/1/0"
    raw = bytearray(file.read_bytes())
    raw[2 * (64 * 4 * 2 + 4) + 5] ^= 1
    file.write_bytes(raw)
    (damage,) = verify(damaged).damages
    assert (damage.array, damage.start, damage.stop) == ("residual/1", 384, 448)
    file.unlink()
    (damage,) = verify(damaged).damages
    assert (damage.array, damage.start, damage.stop) == ("residual/1", 256, 512)


def test_the_last_damaged_row_is_a_row_of_the_cache(damaged):
    file = damaged / "arrays.zarr/residual/1/c/2/0"
    raw = bytearray(file.read_bytes())
    raw[64 * 4 * 2 + 4 + 1] ^= 1
    file.write_bytes(raw)
    (damage,) = verify(damaged).damages
    assert (damage.start, damage.stop) == (576, ROWS)


def test_one_damaged_record_does_not_hide_the_other_parts(damaged):
    record = damaged / "journal/00000001.json"
    record.write_bytes(record.read_bytes().replace(b"rows", b"r0ws"))
    shard = damaged / "arrays.zarr/residual/0/c/2/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = verify(damaged)
    found = {damage.file for damage in result.damages}
    assert {"journal/00000001.json", "arrays.zarr/residual/0/c/2/0"} <= found
    assert result.missing_parts in ((), (1,))


@pytest.fixture(scope="module")
def real(tiny_cache: ActivationCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An extraction with tokenizer, reference rows and configuration, and with kept moments."""
    path = tmp_path_factory.mktemp("real") / tiny_cache.id
    shutil.copytree(tiny_cache.path, path)
    RidgeProbe(layers=[1], folds=2).fit(ActivationCache(path), keep=True)
    return path


def guarded(path: Path) -> list[str]:
    """Files that may not change: all but notes of this machine, locks, and what is derived."""
    free = ("local.json", "leases/", "moments/")
    return [file for file in files_of(path) if not file.startswith(free)]


def test_a_changed_byte_is_found_in_every_file_of_an_extraction(real: Path) -> None:
    assert verify(real).ok
    names = {Path(file).name for file in guarded(real)}
    assert {"tokenizer.json", "canary.safetensors", "config.json", "head.safetensors"} <= names
    choose = random.Random(1)
    for file in guarded(real):
        raw = (real / file).read_bytes()
        for place in {0, len(raw) - 1, choose.randrange(len(raw)), choose.randrange(len(raw))}:
            changed = bytearray(raw)
            changed[place] ^= 1 << choose.randrange(8)
            (real / file).write_bytes(changed)
            assert file in [damage.file for damage in verify(real).damages], (file, place)
        (real / file).unlink()
        result = verify(real)
        lost = [f"journal/{part:08d}.json" for part in result.missing_parts]
        assert file in [*lost, *(damage.file for damage in result.damages)]
        (real / file).write_bytes(raw)
    assert verify(real).ok


def test_damaged_moments_are_named_and_not_used(real: Path) -> None:
    want = RidgeProbe(layers=[1], folds=2).fit(ActivationCache(real), keep=False).map().weight
    choose = random.Random(2)
    files = [file for file in files_of(real) if file.startswith("moments/")]
    assert {Path(file).suffix for file in files} == {".json", ".safetensors"}
    whole = {file: (real / file).read_bytes() for file in files}
    for file in files:
        for place in (choose.randrange(len(whole[file])) for _ in range(12)):
            changed = bytearray(whole[file])
            changed[place] ^= 1 << choose.randrange(8)
            (real / file).write_bytes(changed)
            assert {damage.file for damage in verify(real).damages} & set(files)
            probe = RidgeProbe(layers=[1], folds=2).fit(ActivationCache(real), keep=False)
            np.testing.assert_allclose(probe.map().weight, want, rtol=1e-5, atol=1e-6)
            for name, raw in whole.items():  # what was damaged may have been removed
                (real / name).parent.mkdir(exist_ok=True)
                (real / name).write_bytes(raw)
    probe = RidgeProbe(layers=[1], folds=2).fit(ActivationCache(real), keep=False)
    assert probe.moments_["kept"] == 1


def test_a_part_that_was_never_committed_is_missing_not_damaged(damaged):
    (damaged / "journal/00000001.json").unlink()
    for shard in damaged.glob("arrays.zarr/residual/*/c/1/0"):
        shard.unlink()
    result = verify(damaged)
    assert result.ok
    assert result.missing_parts == (1,)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
def test_a_file_of_another_kind_is_named_and_not_waited_for(damaged, tmp_path, file, kind):
    """Even a link to the very bytes that were written: they are not in the cache."""
    path = damaged / file
    if kind == "link":
        path.symlink_to(path.rename(tmp_path / "elsewhere"))
    else:
        path.unlink()
        os.mkfifo(path) if kind == "FIFO" else path.mkdir()
    found = {damage.file: damage.message for damage in verify(damaged).damages}
    assert f"is a {kind}, where a cache has a regular file" in found[file]


@pytest.mark.parametrize("file", FILES)
def test_an_empty_file_is_named(damaged, file):
    (damaged / file).write_bytes(b"")
    assert file in [damage.file for damage in verify(damaged).damages]


@pytest.mark.parametrize(
    "file",
    [
        "manifest.json",
        "journal/base.json",
        "journal/00000001.json",
        "head/head.json",
        "arrays.zarr/tokens/ids/zarr.json",
    ],
)
def test_a_file_that_the_disk_cannot_read_is_damage(damaged, file, monkeypatch):
    open_file, read_manifest = os.open, Manifest.read

    def fail(path, *args, **kwargs):
        if str(path).endswith(Path(file).name):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return open_file(path, *args, **kwargs)

    def fail_to_read(path):
        if file == "manifest.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read_manifest(path)

    monkeypatch.setattr(os, "open", fail)
    monkeypatch.setattr(Manifest, "read", fail_to_read)
    found = {damage.file: damage.message for damage in verify(damaged).damages}
    assert "input/output error" in found[file]


def test_a_record_before_a_later_one_cannot_be_missing(damaged):
    record = damaged / "journal/00000001.json"
    record.rename(damaged / "journal/00000001.2.json")
    found = [damage.file for damage in verify(damaged).damages]
    assert found == ["journal/00000001.json", "journal/00000001.1.json"]


def test_base_records_that_do_not_name_every_shard_of_a_table_are_damage(damaged):
    base = read_json(damaged / "journal/base.json")
    for shards in ({}, {"1": base["arrays"]["sequences/split"]["0"]}):
        base["arrays"]["sequences/split"] = shards
        write_json(damaged / "journal/base.json", base)
        found = [damage.file for damage in verify(damaged).damages]
        assert "journal/base.json" in found


def test_a_manifest_of_more_parts_than_tokens_are_there_names_no_parts(damaged):
    manifest = read_json(damaged / "manifest.json")
    manifest["identity"]["tokens"]["positions"] = 1 << 26
    manifest["id"] = json_digest(manifest["identity"])
    write_json(damaged / "manifest.json", manifest)
    result = verify(damaged)
    assert not result.ok
    assert result.missing_parts == ()


def test_progress_counts_shards(pristine):
    seen: list[tuple[int, int]] = []
    verify(pristine.path, lambda done, total: seen.append((done, total)))
    assert seen == [(n + 1, len(seen)) for n in range(len(seen))]
    assert len(seen) == verify(pristine.path).shards

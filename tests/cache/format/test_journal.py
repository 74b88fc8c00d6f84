"""Claims about commit records: what they name is data, and nothing else is."""

import pickle
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from residua.cache.errors import CorruptError, IncompleteError, UsageError
from residua.cache.files.json_files import write_json
from residua.cache.format.array import CacheArray
from residua.cache.format.journal import Journal, PartRecord, ShardRecord
from residua.cache.store import cache_creation as create_module
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.cache_creation import create_cache
from residua.cache.store.part_writer import PartWriter
from residua.cache.tokens.token_stream import from_sequences

from ...support.synthetic import make_cache, random_head

LENGTHS = [100, 30, 300, 70, 100]
ROWS = sum(LENGTHS)


@pytest.fixture
def tiny_cache(tmp_path) -> ActivationCache:
    """600 positions in 3 parts, layers 0 and 1."""
    return small_cache(tmp_path)


def small_cache(root: Path, dtype: str = "float32") -> ActivationCache:
    layers = [np.full((ROWS, 4), number, np.float32) for number in range(2)]
    return make_cache(root, layers, LENGTHS, random_head(4, 9), dtype=dtype)


def uncommit(cache: ActivationCache, part: int) -> ActivationCache:
    (cache.path / "journal" / f"{part:08d}.json").unlink()
    return ActivationCache(cache.path)


def temporary_files(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"]


def test_a_committed_cache_is_complete(tiny_cache):
    assert tiny_cache.complete
    assert sorted(tiny_cache.committed) == [0, 1, 2]
    records = tiny_cache.committed
    assert [(r.start, r.stop) for r in records.values()] == [(0, 256), (256, 512), (512, 600)]
    assert temporary_files(tiny_cache.path) == []


@pytest.mark.parametrize("part", range(3))
def test_a_part_without_its_record_is_not_data(tiny_cache, part):
    cache = uncommit(tiny_cache, part)
    assert (cache.path / "arrays.zarr/residual/0/c" / str(part) / "0").is_file()
    assert not cache.complete
    assert cache.layers == ()
    for read in (cache.check_complete, lambda: cache.residual_array(0), lambda: cache.residual(0)):
        with pytest.raises(IncompleteError, match="2 of 3 parts; run the same `residua extract`"):
            read()
    with pytest.raises(IncompleteError):
        cache.logits()


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_rows_without_a_record_cannot_be_read_from_the_stored_array_either(tiny_cache, codec):
    path = tiny_cache.path / "arrays.zarr/residual/0"
    if codec == "zstd":
        rewrite_compressed(path)
    record = tiny_cache.committed[1]
    cache = uncommit(tiny_cache, 1)
    (path / "c/1/0").unlink(missing_ok=True)  # zarr reads zeros
    array = CacheArray(path, cache.journal) if codec == "zstd" else cache.array("residual/0")
    np.testing.assert_array_equal(array[:256], np.zeros((256, 4)))
    np.testing.assert_array_equal(array.take(np.array([599, 512])), np.zeros((2, 4)))
    for one in (array, pickle.loads(pickle.dumps(array))):
        for key in (slice(0, 300), 256, [3, 511], slice(None), slice(500, 600)):
            with pytest.raises(IncompleteError, match="rows 256-511 of residual/0 are not"):
                one[key]
    assert len(cache.array("tokens/ids")[:]) == ROWS
    Journal(cache.path / "journal").commit(record)
    with pytest.raises(CorruptError) if codec == "raw" else nullcontext():
        array[300]  # a part that was committed since is looked for on the disk


def rewrite_compressed(path: Path) -> None:
    """The array at `path` in the same shards, compressed."""
    import zarr
    from zarr.codecs import ZstdCodec

    old = zarr.open_array(path, mode="r")
    values, names = np.asarray(old[:]), old.metadata.dimension_names  # pyright: ignore
    zarr.create_array(
        path, shape=values.shape, dtype=values.dtype, chunks=(64, 4), shards=(256, 4),
        compressors=(ZstdCodec(),), dimension_names=names, attributes=dict(old.attrs),
        overwrite=True,
    )[:] = values  # fmt: skip


def test_a_part_that_is_written_again_gives_the_same_files(tiny_cache):
    before = {p: p.read_bytes() for p in tiny_cache.path.rglob("*") if p.is_file()}
    cache = uncommit(tiny_cache, 1)
    with PartWriter(cache.path, cache.manifest.layout, 1, (0, 1)) as writer:
        for number in (1, 0):
            values = np.full((256, 4), number, np.float32)
            writer.write(number, 400, values[144:])
            writer.write(number, 256, values[:144])
        writer.commit()
    assert {p: p.read_bytes() for p in cache.path.rglob("*") if p.is_file()} == before


def test_a_part_abandoned_before_commit_leaves_no_file(tiny_cache):
    cache = uncommit(tiny_cache, 2)
    for layer in "01":
        shutil.rmtree(cache.path / "arrays.zarr/residual" / layer / "c/2")
    with PartWriter(cache.path, cache.manifest.layout, 2, (0, 1)) as writer:
        writer.write(0, 512, np.zeros((88, 4), np.float32))
    assert temporary_files(cache.path) == []
    assert not list((cache.path / "arrays.zarr/residual").glob("*/c/2/0"))
    assert 2 not in cache.journal.parts()


def test_what_a_killed_writer_leaves_is_not_data(tiny_cache):
    cache = uncommit(tiny_cache, 2)
    killed_writer = PartWriter(cache.path, cache.manifest.layout, 2, (0, 1))
    for shard in killed_writer._shards.values():
        assert shard._file is not None
        shard._file.close()
    (cache.path / "journal" / ".00000002.json.99.tmp").write_bytes(b"{")
    assert temporary_files(cache.path) != []
    assert sorted(cache.journal.parts()) == [0, 1]
    with PartWriter(cache.path, cache.manifest.layout, 2, (0, 1)) as writer:
        for layer in (0, 1):
            writer.write(layer, 512, np.full((88, 4), layer, np.float32))
        writer.commit()
    reopened = ActivationCache(cache.path)
    assert reopened.complete
    np.testing.assert_array_equal(reopened.residual_array(1)[:], 1)


def test_a_second_record_of_a_part_adds_arrays(tmp_path):
    journal = Journal(tmp_path)
    first, second = ShardRecord(10, 1, 2.5, 0), ShardRecord(20, 2)
    journal.commit(PartRecord(0, 0, 64, {"residual/0": first}))
    journal.commit(PartRecord(1, 64, 100, {"residual/0": first}))
    journal.commit(PartRecord(0, 0, 64, {"residual/1": second}))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["00000000.1.json", "00000000.json", "00000001.json"]
    parts = journal.parts()
    assert parts[0] == PartRecord(0, 0, 64, {"residual/0": first, "residual/1": second})
    assert parts[1].arrays == {"residual/0": first}


def test_the_last_record_of_a_shard_wins(tmp_path):
    journal = Journal(tmp_path)
    for number in range(12):
        journal.commit(PartRecord(0, 0, 64, {"residual/0": ShardRecord(number, number)}))
    assert journal.parts()[0].arrays["residual/0"] == ShardRecord(11, 11)


def test_a_layer_that_not_all_parts_have_is_not_in_the_cache(tiny_cache):
    record = tiny_cache.committed[2]
    cache = uncommit(tiny_cache, 2)
    cache.journal.commit(replace(record, arrays={"residual/0": record.arrays["residual/0"]}))
    assert ActivationCache(cache.path).layers == (0,)


def test_other_files_in_the_journal_are_no_parts(tmp_path):
    journal = Journal(tmp_path)
    journal.commit_base({}, {})
    write_json(tmp_path / "notes.json", {"a": 1})
    assert journal.parts() == {}
    assert journal.base() == ({}, {})


@pytest.mark.parametrize("value", [{}, {"part": 0}, {"part": 0, "rows": [0], "arrays": {}}])
def test_a_record_with_fields_missing_is_corrupt(tmp_path, value):
    write_json(tmp_path / "00000000.json", value)
    with pytest.raises(CorruptError, match="not a commit record"):
        Journal(tmp_path).parts()


def test_absmax_and_nonfinite_are_counted_before_the_cast(tiny_cache):
    cache = uncommit(tiny_cache, 2)
    values = np.zeros((88, 4), np.float32)
    values[3] = [np.nan, np.inf, -np.inf, -7.5]
    with PartWriter(cache.path, cache.manifest.layout, 2, (0, 1)) as writer:
        writer.write(0, 512, values)
        writer.write(1, 512, np.zeros((88, 4), np.float32))
        record = writer.commit()
    assert (record.arrays["residual/0"].absmax, record.arrays["residual/0"].nonfinite) == (7.5, 3)
    assert cache.journal.parts()[2] == record


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("bfloat16", 3.4e38)])
def test_a_cast_that_makes_an_infinity_is_refused(tmp_path, dtype, value):
    cache = uncommit(small_cache(tmp_path, dtype), 2)
    with (
        PartWriter(cache.path, cache.manifest.layout, 2, (0, 1)) as writer,
        pytest.raises(UsageError, match="layer 1 reaches"),
    ):
        writer.write(1, 512, np.full((1, 4), value, np.float32))


def test_a_cache_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(create_module, "create_residual", fail)
    with pytest.raises(OSError, match="disk is gone"):
        small_cache(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_equal_caches_stays(tmp_path):
    cache = small_cache(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in cache.path.rglob("*")}
    stream = from_sequences([[1, 2, 3], [4, 5]])
    hashes, save = stream.digests()[1], random_head(4, 9).save
    path = create_cache(tmp_path, cache.manifest, stream, hashes, {0: "float16"}, save, {})
    assert path == cache.path
    assert {p: p.stat().st_mtime_ns for p in cache.path.rglob("*")} == before
    assert [p.name for p in tmp_path.iterdir()] == [cache.id]


def test_what_was_quarantined_stays_so_when_a_part_gets_another_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit(PartRecord(0, 0, 8, {"residual/0": ShardRecord(1, 2)}, {3: "an infinity"}))
    journal.commit(PartRecord(0, 0, 8, {"residual/1": ShardRecord(3, 4)}, {5: "a NaN"}))
    journal.commit(PartRecord(0, 0, 8, {"residual/2": ShardRecord(5, 6)}))
    (record,) = Journal(tmp_path).parts().values()
    assert record.quarantine == {3: "an infinity", 5: "a NaN"}
    assert set(record.arrays) == {"residual/0", "residual/1", "residual/2"}

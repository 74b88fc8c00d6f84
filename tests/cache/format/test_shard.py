"""Claims about one shard file: zarr-python's bytes, any order, whole or not there at all."""

import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from residua.cache.errors import CorruptError
from residua.cache.format import shard as shard_module
from residua.cache.format.layout import ArrayLayout
from residua.cache.format.shard import ShardReader, ShardWriter

SHAPES = [
    ((600, 8), 64, 256, "<f4"),
    ((600, 8), 64, 256, "<u2"),
    ((256, 4), 64, 256, "<f2"),
    ((257, 4), 64, 256, "<f2"),
    ((70, 3), 16, 64, "<u2"),
    ((1, 5), 1, 16, "<f4"),
    ((33, 7), 1, 8, "<f2"),
    ((50, 2), 32, 32, "<f4"),
    ((65,), 16, 64, "<i4"),
    ((1,), 1, 16, "<u8"),
    ((40,), 8, 128, "|u1"),
    ((100,), 16, 64, "<i8"),
]


def write_with_zarr(
    path: Path, values: np.ndarray, chunk_rows: int, shard_rows: int
) -> ArrayLayout:
    """Let zarr-python write `values`."""
    array = zarr.create_array(
        path,
        shape=values.shape,
        chunks=(chunk_rows, *values.shape[1:]),
        shards=(shard_rows, *values.shape[1:]),
        dtype=values.dtype,
        serializer=BytesCodec(endian="little"),
        compressors=(Crc32cCodec(),),
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[:] = values
    return ArrayLayout.from_zarr_json(array.metadata.to_dict(), str(path))


def write_with_shard_writer(
    path: Path, values: np.ndarray, layout: ArrayLayout, order: np.random.Generator | None = None
) -> None:
    """Write `values` shard by shard, in pieces in random order if `order` is given."""
    for shard in range(layout.shards):
        rows = values[shard * layout.shard_rows : (shard + 1) * layout.shard_rows]
        writer = ShardWriter(path / layout.shard_key(shard), layout, len(rows))
        cuts = [0, len(rows)]
        if order is not None:
            cuts += order.integers(0, len(rows) + 1, 9).tolist()
        cuts = sorted(set(cuts))
        pieces = list(zip(cuts[:-1], cuts[1:], strict=True))
        if order is not None:
            order.shuffle(pieces)
        for start, stop in pieces:
            writer.write(start, rows[start:stop])
        writer.commit()


def random_values(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    values = np.random.default_rng(len(shape) + shape[0]).integers(0, 256, shape).astype(dtype)
    values[: shape[0] // 3] = 0  # chunks of zeros are written too
    return values


def shard_bytes(path: Path, layout: ArrayLayout) -> list[bytes]:
    return [(path / layout.shard_key(shard)).read_bytes() for shard in range(layout.shards)]


@pytest.fixture
def written_shard(tmp_path) -> tuple[Path, ArrayLayout, np.ndarray]:
    """One shard of 200 rows in chunks of 64, by us."""
    values = random_values((200, 5), "<f4")
    layout = write_with_zarr(tmp_path / "zarr", values, 64, 256)
    write_with_shard_writer(tmp_path / "ours", values, layout)
    return tmp_path / "ours" / layout.shard_key(0), layout, values


@pytest.mark.parametrize(("shape", "chunk_rows", "shard_rows", "dtype"), SHAPES)
def test_our_shards_are_byte_identical_to_those_of_zarr_python(
    tmp_path, shape, chunk_rows, shard_rows, dtype
):
    values = random_values(shape, dtype)
    layout = write_with_zarr(tmp_path / "zarr", values, chunk_rows, shard_rows)
    assert layout.raw
    write_with_shard_writer(tmp_path / "ours", values, layout)
    assert shard_bytes(tmp_path / "ours", layout) == shard_bytes(tmp_path / "zarr", layout)


@pytest.mark.parametrize("seed", range(6))
def test_rows_written_in_any_order_give_the_same_bytes(tmp_path, seed):
    values = random_values((600, 8), "<f4")
    layout = write_with_zarr(tmp_path / "zarr", values, 64, 256)
    write_with_shard_writer(tmp_path / "ours", values, layout, np.random.default_rng(seed))
    assert shard_bytes(tmp_path / "ours", layout) == shard_bytes(tmp_path / "zarr", layout)


def test_zarr_python_reads_our_shards(tmp_path):
    values = random_values((600, 8), "<f4")
    layout = write_with_zarr(tmp_path / "array", np.zeros_like(values), 64, 256)
    write_with_shard_writer(tmp_path / "array", values, layout, np.random.default_rng(0))
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "array", mode="r")[:], values)


@pytest.mark.parametrize(("shape", "chunk_rows", "shard_rows", "dtype"), SHAPES)
def test_our_reader_reads_shards_of_zarr_python(tmp_path, shape, chunk_rows, shard_rows, dtype):
    values = random_values(shape, dtype)
    layout = write_with_zarr(tmp_path, values, chunk_rows, shard_rows)
    for shard in range(layout.shards):
        expected = values[shard * shard_rows : (shard + 1) * shard_rows]
        out = np.empty_like(expected)
        ShardReader(tmp_path / layout.shard_key(shard), layout).read(0, len(expected), out)
        np.testing.assert_array_equal(out, expected)


def test_a_shard_is_chunks_then_index_then_checksum(written_shard):
    file, layout, values = written_shard
    raw, chunk_bytes = file.read_bytes(), 64 * 5 * 4 + 4
    assert layout.chunk_bytes == chunk_bytes
    assert len(raw) == 4 * chunk_bytes + 4 * 16 + 4
    index = np.frombuffer(raw[4 * chunk_bytes : -4], "<u8").reshape(4, 2)
    np.testing.assert_array_equal(index, [[c * chunk_bytes, chunk_bytes] for c in range(4)])
    assert raw[: 64 * 5 * 4] == values[:64].tobytes()
    tail = np.frombuffer(raw[3 * chunk_bytes : 4 * chunk_bytes - 4], "<f4").reshape(64, 5)
    np.testing.assert_array_equal(tail[:8], values[192:])
    assert not tail[8:].any()


def test_the_number_of_a_commit_is_the_number_of_a_check(tmp_path, written_shard):
    _, layout, values = written_shard
    writer = ShardWriter(tmp_path / "shard", layout, 200)
    writer.write(0, values)
    record = writer.commit()
    assert record["bytes"] == (tmp_path / "shard").stat().st_size
    assert ShardReader(tmp_path / "shard", layout).damaged_chunks(200) == ({}, record["crc32c"])


@pytest.mark.parametrize("chunk", range(4))
def test_a_flipped_byte_is_found_on_first_touch_and_the_message_names_the_rows(
    written_shard, chunk
):
    file, layout, _ = written_shard
    raw = bytearray(file.read_bytes())
    raw[chunk * layout.chunk_bytes + 17] ^= 4
    file.write_bytes(raw)
    reader = ShardReader(file, layout)
    for sound_chunk in set(range(4)) - {chunk}:
        reader.chunk(sound_chunk)
    with pytest.raises(CorruptError, match=f"rows {chunk * 64}-{chunk * 64 + 63} of this shard"):
        reader.chunk(chunk)
    assert list(reader.damaged_chunks(200)[0]) == [chunk]


@pytest.mark.parametrize("length", [0, 3, 67, 68, 500, -1])
def test_a_cut_shard_is_corrupt(written_shard, length):
    file, layout, _ = written_shard
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CorruptError, match=r"empty|cut short|index of the shard"):
        ShardReader(file, layout)


def test_a_missing_shard_is_corrupt_not_zeros(written_shard):
    file, layout, _ = written_shard
    file.unlink()
    with pytest.raises(CorruptError, match="is missing"):
        ShardReader(file, layout)


def test_a_chunk_without_rows_cannot_be_read(tmp_path):
    values = random_values((70, 3), "<u2")
    layout = write_with_zarr(tmp_path, values, 16, 64)
    with pytest.raises(CorruptError, match="chunk 1 is not in this shard"):
        ShardReader(tmp_path / layout.shard_key(1), layout).chunk(1)


def test_a_shard_has_its_name_only_after_commit(tmp_path, written_shard):
    _, layout, values = written_shard
    path = tmp_path / "new" / "shard"
    writer = ShardWriter(path, layout, 200)
    writer.write(0, values)
    assert not path.exists()
    assert [p.name.endswith(".tmp") for p in path.parent.iterdir()] == [True]
    writer.commit()
    assert [p.name for p in path.parent.iterdir()] == ["shard"]


def test_abandon_leaves_nothing(tmp_path, written_shard):
    _, layout, values = written_shard
    writer = ShardWriter(tmp_path / "new" / "shard", layout, 200)
    writer.write(0, values[:100])
    writer.abandon()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_shard_with_rows_missing_is_never_committed(tmp_path, written_shard):
    _, layout, values = written_shard
    writer = ShardWriter(tmp_path / "new" / "shard", layout, 200)
    writer.write(0, values[:199])
    with pytest.raises(AssertionError):
        writer.commit()
    writer.abandon()
    assert not (tmp_path / "new" / "shard").exists()


def long_shard(folder: Path) -> tuple[Path, ArrayLayout, np.ndarray]:
    """A shard of four chunks of 64 KiB, larger than a page."""
    layout = ArrayLayout((256, 256), "<f4", "float32", 64, 256, raw=True)
    values = np.random.default_rng(0).normal(size=(256, 256)).astype("<f4")
    writer = ShardWriter(folder / "shard", layout, 256)
    writer.write(0, values)
    writer.commit()
    return folder / "shard", layout, values


@pytest.mark.parametrize("populate", [shard_module.POPULATE_READ, 12345])
def test_rows_that_the_disk_cannot_give_are_an_error_and_kill_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, populate: int
) -> None:
    """A file that is cut after it was mapped gives no page, as a disk that fails (SIGBUS).

    With a number that no system knows, the file is read instead.
    """
    monkeypatch.setattr(shard_module, "POPULATE_READ", populate)
    path, layout, values = long_shard(tmp_path)
    reader = ShardReader(path, layout)
    assert (reader.chunk(0) == values[:64]).all()
    os.truncate(path, layout.chunk_bytes + 8192)
    with pytest.raises(CorruptError, match=r"shard: rows 128-191 of this shard cannot be read"):
        reader.chunk(2)
    damaged, _ = reader.damaged_chunks(256)
    assert list(damaged) == [1, 2, 3]
    assert all("cannot be read: the disk fails" in reason for reason in damaged.values())


def test_rows_that_were_checked_and_left_memory_are_read_with_care_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, layout, values = long_shard(tmp_path)
    reader = ShardReader(path, layout)
    assert (np.concatenate(list(reader.pieces(0, 256))) == values).all()
    os.truncate(path, layout.chunk_bytes)
    monkeypatch.setattr(shard_module, "LOADED_SECONDS", -1.0)
    assert (next(reader.pieces(0, 64)) == values[:64]).all()
    with pytest.raises(CorruptError, match="rows 64-127 of this shard cannot be read"):
        list(reader.pieces(100, 120))

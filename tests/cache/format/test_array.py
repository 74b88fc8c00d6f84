"""Claims about `CacheArray`: it indexes like numpy, pickles small, and falls back to zarr."""

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import ZstdCodec

from residua.cache.errors import CorruptError
from residua.cache.format import array as array_module
from residua.cache.format.array import CacheArray
from residua.cache.format.dtypes import encode_rows
from residua.cache.format.layout import ArrayLayout
from residua.cache.format.shard import ShardReader, ShardWriter
from residua.cache.store.activation_cache import ActivationCache

from ...support.synthetic import make_cache, random_head

ROWS, WIDTH = 600, 8
KEYS = [
    slice(None),
    slice(10, 20),
    slice(60, 70),
    slice(250, 530),
    slice(-5, None),
    slice(500, 10_000),
    slice(20, 10),
    slice(None, None, 7),
    slice(590, 3, -13),
    slice(None, None, -1),
    0,
    599,
    -1,
    np.int64(257),
    [3, 599, 0, 300],
    [-1, -600, 5],
    np.array([5, 5, 5]),
    np.array([200, 4], np.uint8),
    np.array([], int),
    np.arange(ROWS) % 3 == 0,
    np.zeros(ROWS, bool),
    (slice(3, 9), slice(2, 5)),
    (slice(3, 9), 4),
    (slice(3, 200, 50), -1),
    (7, slice(None, None, 2)),
    (-7, 3),
    ([7, 2, 7], slice(1, 3)),
    ([7, 2, 7], 3),
    (np.arange(ROWS) > 590, slice(None)),
    (slice(0, 4), [1, 3]),
]


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16", "zstd"])
def array_and_values(request, tmp_path_factory) -> tuple[CacheArray, np.ndarray]:
    """An array and the same rows in memory, as they are after rounding to its dtype."""
    values = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "zstd":
        return CacheArray(write_zstd_array(path / "0", values.astype(np.float16))), values.astype(
            np.float16
        ).astype(np.float32)
    cache = small_cache(path, values, request.param)
    return cache.residual_array(0), rounded_to(values, request.param)


def small_cache(root: Path, values: np.ndarray, dtype: str) -> ActivationCache:
    return make_cache(root, [values], [len(values)], random_head(WIDTH, 11), dtype=dtype)


def rounded_to(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (encode_rows(values, dtype).astype(np.uint32) << 16).view(np.float32)
    return values.astype(dtype).astype(np.float32)


def write_zstd_array(path: Path, values: np.ndarray) -> Path:
    array = zarr.create_array(
        path,
        shape=values.shape,
        chunks=(64, *values.shape[1:]),
        shards=(256, *values.shape[1:]),
        dtype=values.dtype,
        compressors=(ZstdCodec(level=1),),
    )
    array[:] = values
    return path


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_equals_numpys(array_and_values, key):
    array, values = array_and_values
    got = array[key]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, values[key])


def test_one_dimensional_arrays_index_like_numpys(tmp_path):
    ids = np.arange(ROWS) * 7 % 11
    cache = make_cache(tmp_path, [np.zeros((ROWS, 2), np.float32)], [ROWS], random_head(2, 11), ids)
    assert cache.tokens.dtype == np.int32
    for key in (slice(4, 90), slice(None, None, -3), 17, -17, [9, 1, 500], ids == 3):
        np.testing.assert_array_equal(cache.tokens[key], ids[key])


@pytest.mark.parametrize("key", [ROWS, -ROWS - 1, [0, ROWS], [-ROWS - 1]], ids=str)
def test_rows_out_of_range_raise(array_and_values, key):
    with pytest.raises(IndexError):
        array_and_values[0][key]


@pytest.mark.parametrize("size", [ROWS - 1, ROWS + 1])
def test_a_boolean_index_of_another_length_raises_as_numpys_does(array_and_values, size):
    array, values = array_and_values
    mask = np.zeros(size, bool)
    with pytest.raises(IndexError):
        values[mask]
    with pytest.raises(IndexError):
        array[mask]


@pytest.mark.parametrize("key", [[[1, 300], [599, 2]], [[1], [300]], [[1]]], ids=str)
def test_an_index_of_two_dimensions_is_refused(array_and_values, key):
    """Rows of rows would be an array of three dimensions, which no reader expects."""
    array, values = array_and_values
    assert values[key].ndim == 3
    for index in (key, np.array(key)):
        with pytest.raises(IndexError, match="must be a list of integers"):
            array[index]


def test_it_looks_like_an_array(array_and_values):
    array, values = array_and_values
    assert (array.shape, array.ndim, array.dtype) == (values.shape, 2, values.dtype)
    assert len(array) == ROWS


def test_only_the_path_is_pickled(array_and_values):
    array, values = array_and_values
    array[:]
    data = pickle.dumps(array)
    assert len(data) < 600
    np.testing.assert_array_equal(pickle.loads(data)[5:90], values[5:90])


def test_compressed_arrays_are_read_through_zarr_and_raw_ones_are_not(array_and_values):
    array, values = array_and_values
    np.testing.assert_array_equal(array[:], values)
    assert (array._zarr is not None) == (not array.layout.raw)


def test_zarr_python_reads_what_a_cache_holds(tmp_path):
    values = np.random.default_rng(3).normal(size=(300, WIDTH)).astype(np.float32)
    cache = small_cache(tmp_path, values, "bfloat16")
    group = zarr.open_group(cache.path / "arrays.zarr", mode="r")
    stored = group["residual/0"]
    assert isinstance(stored, zarr.Array)
    assert stored.attrs["logical_dtype"] == "bfloat16"
    assert stored.metadata.to_dict()["dimension_names"] == ("positions", "d_model")
    np.testing.assert_array_equal(np.asarray(stored[:]), encode_rows(values, "bfloat16"))


def test_few_maps_are_kept_open(array_and_values, monkeypatch):
    array, values = array_and_values
    if not array.layout.raw:
        pytest.skip("no maps")
    monkeypatch.setattr(array_module, "OPEN_SHARDS", 1)
    unread_array = CacheArray(array.path)
    np.testing.assert_array_equal(unread_array[::200], values[::200])
    assert len(unread_array._shards) == 1


def test_threads_may_share_an_array(array_and_values, monkeypatch):
    array, values = array_and_values
    monkeypatch.setattr(array_module, "OPEN_SHARDS", 1)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for row in np.random.default_rng(seed).integers(0, ROWS, 40).tolist():
            if not np.array_equal(array[row : row + 9], values[row : row + 9]):
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_folder_without_metadata_is_corrupt(tmp_path):
    with pytest.raises(CorruptError, match=r"no zarr\.json"):
        CacheArray(tmp_path)
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(CorruptError, match="not JSON"):
        CacheArray(tmp_path)
    (tmp_path / "zarr.json").write_text('{"shape": [3]}')
    with pytest.raises(CorruptError, match="not the metadata of an array"):
        CacheArray(tmp_path)


def test_a_shard_smaller_than_a_row_is_corrupt(tmp_path: Path) -> None:
    layout = ArrayLayout((4, 8), "<f4", "float32", 4, 4, raw=True)
    writer = ShardWriter(tmp_path / "0", layout, 4)
    writer.write(0, np.zeros((4, 8), "<f4"))
    writer.commit()
    wider = ArrayLayout((4, 1 << 20), "<f4", "float32", 4, 4, raw=True)
    with pytest.raises(CorruptError, match="less than one row"):
        ShardReader(tmp_path / "0", wider).first_row()

"""Claims about random rows: right in every layout, checked once, whatever is open."""

import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from residua.cache.errors import CorruptError
from residua.cache.format import array as array_module
from residua.cache.format.array import CacheArray
from residua.cache.format.array_writer import write_table

from ...support.synthetic import make_cache, random_head

ROWS = 300


def small_array(root: Path, width: int, dtype: str = "float16") -> tuple[CacheArray, np.ndarray]:
    """An array of 5 shards of 4 chunks, and its rows."""
    values = np.random.default_rng(width).normal(size=(ROWS, width)).astype(np.float16)
    head = random_head(width, 5)
    cache = make_cache(root, [values], [ROWS], head, dtype=dtype, part_rows=64, chunk_rows=16)
    return CacheArray(cache.residual_array(0).path), values.astype(np.float32)


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_random_rows_of_many_shards_equal_numpys(tmp_path, monkeypatch, width, dtype):
    first, values = small_array(tmp_path, width, dtype)
    rng = np.random.default_rng(0)
    for limit in (1, 2, 3, 64):
        array = CacheArray(first.path)
        monkeypatch.setattr(array_module, "OPEN_SHARDS", limit)
        for size in (1, 7, 200, 1000):
            rows = rng.integers(-ROWS, ROWS, size)
            np.testing.assert_array_equal(array.take(rows), values[rows])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_random_rows_of_tables_equal_numpys(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 200, 3000).astype(dtype)
    write_table(tmp_path, "tokens/table", values)
    rows = np.random.default_rng(1).integers(0, len(values), 500)
    rows_read = CacheArray(tmp_path / "tokens" / "table").take(rows)
    np.testing.assert_array_equal(rows_read, values[rows])


def test_no_rows_of_an_array_that_nobody_read_are_no_rows(tmp_path):
    array, _ = small_array(tmp_path, 8)
    for rows in ([], np.zeros(ROWS, bool)):
        assert array[rows].shape == (0, 8)


def test_a_chunk_is_checked_once_although_its_map_is_closed(tmp_path, monkeypatch):
    array, values = small_array(tmp_path, 8)
    monkeypatch.setattr(array_module, "OPEN_SHARDS", 2)
    checked: list[int] = []
    checksum_of = google_crc32c.value

    def count_checksum(data: np.ndarray) -> int:
        checked.append(len(data))
        return checksum_of(data)

    monkeypatch.setattr(google_crc32c, "value", count_checksum)
    for seed in range(3):
        rows = np.random.default_rng(seed).permutation(ROWS)
        np.testing.assert_array_equal(array.take(rows), values[rows])
        np.testing.assert_array_equal(array[:], values)
    assert checked.count(16 * 8 * 2) == -(-ROWS // 16)


def test_a_damaged_chunk_is_found_by_whichever_row_is_taken_first(tmp_path):
    array, values = small_array(tmp_path, 8)
    file = array.path / array.layout.shard_key(3)
    raw = bytearray(file.read_bytes())
    raw[2 * array.layout.chunk_bytes + 5] ^= 1
    file.write_bytes(raw)
    first = 3 * 64 + 2 * 16
    sound_rows = np.r_[0:first, first + 16 : ROWS]
    np.testing.assert_array_equal(array.take(sound_rows), values[sound_rows])
    for row in (first, first + 15):
        with pytest.raises(CorruptError, match="rows 32-47 of this shard"):
            array.take(np.array([0, row]))


def test_rows_that_were_taken_outlive_their_array(tmp_path):
    array, values = small_array(tmp_path, 8)
    rows = array.take(np.arange(ROWS))
    del array
    np.testing.assert_array_equal(rows, values)


def test_more_shards_than_the_soft_limit_of_open_files_can_be_read(tmp_path):
    array, values = small_array(tmp_path, 8)
    code = (
        "import resource, sys\nimport numpy as np\nfrom pathlib import Path\n"
        "from residua.cache.format.array import CacheArray\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))\n"
        f"arrays = [CacheArray(Path({str(array.path)!r})) for _ in range(12)]\n"
        "print(sum(array.take(np.arange(300)).shape[0] for array in arrays))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(12 * ROWS)

"""Claims about how positions are cut: chunks, shards, parts."""

import numpy as np
import pytest

from residua.cache.errors import CorruptError
from residua.cache.format.layout import (
    CHUNK_BYTES,
    CHUNK_ROWS_MAX,
    CHUNKS_PER_SHARD,
    SHARD_ROWS_MAX,
    ArrayLayout,
    Layout,
)

DEFAULT_SIZES = [
    (64, 2, 16384, 65536),
    (128, 2, 8192, 65536),
    (256, 2, 4096, 65536),
    (512, 2, 2048, 32768),
    (576, 2, 2048, 32768),
    (768, 2, 2048, 32768),
    (1024, 2, 1024, 16384),
    (2048, 2, 512, 8192),
    (4096, 2, 256, 4096),
    (5120, 2, 256, 4096),
    (8192, 2, 128, 2048),
    (64, 4, 8192, 65536),
    (768, 4, 1024, 16384),
    (1024, 4, 512, 8192),
    (8192, 4, 64, 1024),
]
ZARR_JSON = {
    "shape": [600, 8],
    "data_type": "uint16",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [256, 8]}},
    "codecs": [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [64, 8],
                "codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "crc32c"},
                ],
                "index_codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "crc32c"},
                ],
                "index_location": "end",
            },
        }
    ],
    "attributes": {"logical_dtype": "bfloat16"},
}


@pytest.mark.parametrize(("d_model", "itemsize", "chunk_rows", "part_rows"), DEFAULT_SIZES)
def test_the_rule_gives_these_sizes(d_model, itemsize, chunk_rows, part_rows):
    assert Layout.choose(d_model, itemsize).to_json() == {
        "chunk_rows": chunk_rows,
        "part_rows": part_rows,
    }


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("d_model", [1, 64, 100, 768, 1600, 4096, 8192, 12288, 1 << 20, 1 << 22])
def test_a_chunk_is_the_largest_power_of_two_of_rows_that_fits(d_model, itemsize):
    layout = Layout.choose(d_model, itemsize)
    rows, row_bytes = layout.chunk_rows, d_model * itemsize
    assert rows & (rows - 1) == 0
    assert rows == 1 or rows * row_bytes <= CHUNK_BYTES
    assert rows == CHUNK_ROWS_MAX or 2 * rows * row_bytes > CHUNK_BYTES
    assert layout.part_rows == min(rows * CHUNKS_PER_SHARD, SHARD_ROWS_MAX)


@pytest.mark.parametrize("part_positions", [1, 2, 3, 63, 64, 100, 1000, 5000, 16384, 100_000])
@pytest.mark.parametrize("d_model", [64, 768, 8192])
def test_part_positions_are_rounded_down_to_whole_chunks(d_model, part_positions):
    layout, default_layout = Layout.choose(d_model, 2, part_positions), Layout.choose(d_model, 2)
    assert 1 <= layout.part_rows <= part_positions
    assert layout.part_rows % layout.chunk_rows == 0
    assert part_positions - layout.part_rows < layout.chunk_rows
    assert layout.chunk_rows <= default_layout.chunk_rows
    assert layout.chunk_rows & (layout.chunk_rows - 1) == 0


@pytest.mark.parametrize("part_positions", [None, 1, 100, 5000])
@pytest.mark.parametrize("positions", [1, 2, 3, 64, 100, 1023, 1024, 1025, 2048, 10**6])
def test_a_cache_smaller_than_a_chunk_has_a_small_one(positions, part_positions):
    full_layout = Layout.choose(768, 2, part_positions)
    layout = full_layout.shrunk(positions)
    assert layout.shrunk(positions) == layout
    if positions >= full_layout.chunk_rows:
        assert layout == full_layout
    else:
        assert layout.chunk_rows == layout.part_rows <= full_layout.chunk_rows
        assert positions <= layout.chunk_rows < 2 * positions
        assert layout.parts(positions) == 1


@pytest.mark.parametrize("positions", [1, 255, 256, 257, 600, 1024])
def test_parts_cover_every_row_once(positions):
    layout = Layout(64, 256)
    rows = [layout.rows(part, positions) for part in range(layout.parts(positions))]
    assert rows[0][0] == 0
    assert rows[-1][1] == positions
    assert all(stop == start for (_, stop), (start, _) in zip(rows[:-1], rows[1:], strict=True))
    assert all(stop > start for start, stop in rows)


def test_metadata_give_everything_that_reading_needs():
    layout = ArrayLayout.from_zarr_json(ZARR_JSON, "here")
    assert layout == ArrayLayout((600, 8), "<u2", "bfloat16", 64, 256, True)
    assert (layout.row_bytes, layout.chunk_bytes, layout.shards) == (16, 64 * 16 + 4, 3)
    assert layout.shard_key(2) == "c/2/0"
    table_layout = ArrayLayout((600,), "<i4", "int32", 64, 256, True)
    assert (table_layout.row_bytes, table_layout.shard_key(1)) == (4, "c/1")


def test_without_the_attribute_the_stored_dtype_is_meant():
    layout = ArrayLayout.from_zarr_json({**ZARR_JSON, "attributes": {}}, "here")
    assert layout.logical_dtype == np.dtype(layout.stored_dtype).name == "uint16"


@pytest.mark.parametrize("change", [
    {"codecs": [{"name": "bytes"}, {"name": "crc32c"}]},
    {"codecs": [*ZARR_JSON["codecs"], {"name": "zstd"}]},
    {"codecs": [{"name": "sharding_indexed", "configuration": {
        **ZARR_JSON["codecs"][0]["configuration"], "index_location": "start"}}]},
    {"codecs": [{"name": "sharding_indexed", "configuration": {
        **ZARR_JSON["codecs"][0]["configuration"],
        "codecs": [{"name": "bytes"}, {"name": "zstd"}]}}]},
    {"codecs": [{"name": "sharding_indexed", "configuration": {
        **ZARR_JSON["codecs"][0]["configuration"],
        "codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]}}]},
], ids=["no shards", "shard codec", "index first", "zstd", "big endian"])  # fmt: skip
def test_only_plain_shards_are_mapped(change):
    assert not ArrayLayout.from_zarr_json({**ZARR_JSON, **change}, "here").raw


@pytest.mark.parametrize("change", [
    {"shape": None}, {"shape": []}, {"shape": [-5, 8]}, {"codecs": []},
    {"data_type": "nonsense"}, {"data_type": {"name": "struct"}},
    {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 8]}}},
    {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [100, 8]}}},
], ids=str)  # fmt: skip
def test_impossible_metadata_are_corrupt(change):
    with pytest.raises(CorruptError, match="here is not the metadata of an array"):
        ArrayLayout.from_zarr_json({**ZARR_JSON, **change}, "here")

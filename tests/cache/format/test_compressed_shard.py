"""Compact caches hold the same rows in fewer bytes; who writes, reads, checks and mends them."""

import json
import shutil
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from numcodecs.shuffle import Shuffle
from zarr.errors import ZarrUserWarning

from residua.cache.errors import CorruptError, UsageError
from residua.cache.extraction.answer import answer_request, estimate_request, find_match
from residua.cache.extraction.damage_repair import repair
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.format import compressed_shard
from residua.cache.format.array import CacheArray
from residua.cache.format.array_writer import create_residual
from residua.cache.format.chunk_cache import ChunkCache
from residua.cache.format.compressed_shard import (
    DECODED_CHUNKS,
    decompress_chunk,
    shard_writer_for,
)
from residua.cache.format.compression import (
    FRAME_HEADER_BYTES,
    compress_chunk,
    decompress,
    frame_content_size,
    shuffle_bytes,
)
from residua.cache.format.dtypes import encode_rows
from residua.cache.format.layout import ArrayLayout, Layout
from residua.cache.sharing.flat_export import export
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.row_loader import RowLoader
from residua.cache.store.verification import verify
from residua.cli import main

DTYPES = ("float16", "bfloat16", "float32")
ROWS, WIDTH = 300, 12
LAYOUT = Layout(32, 128)
OPTIONS: dict[str, Any] = {"context": 40, "part_positions": 512, "batch_tokens": 200}


def request_for(model: Path, data: Path, root: Path, **options: Any) -> ExtractionRequest:
    return ExtractionRequest(str(model), str(data), root, **{**OPTIONS, **options})


def stored_rows(dtype: str, rows: int = ROWS, width: int = WIDTH) -> np.ndarray:
    values = np.random.default_rng(5).normal(size=(rows, width)).astype(np.float32)
    values[7, 3], values[9, 1] = np.inf, np.nan
    return encode_rows(values, dtype)


def write_array(
    store: Path, dtype: str, rows: np.ndarray, codec: str, order: list[int]
) -> ArrayLayout:
    """Write all parts of one array, seven rows at a time; `order` permutes these steps."""
    layout = create_residual(store, 0, len(rows), rows.shape[1], dtype, LAYOUT, codec)
    for part in range(LAYOUT.parts(len(rows))):
        start, stop = LAYOUT.rows(part, len(rows))
        path = store / "residual/0" / layout.shard_key(part)
        path.parent.mkdir(parents=True)
        writer = shard_writer_for(path, layout, stop - start, make_folders=False)
        steps = range(0, stop - start, 7)
        for step in sorted(steps, key=lambda row: order[row // 7 % len(order)]):
            writer.write(step, rows[start + step : min(start + step + 7, stop)])
        writer.commit()
    return layout


def shard_files(store: Path) -> dict[str, bytes]:
    files = (store / "residual/0/c").rglob("*")
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in files if p.is_file()}


def open_with_zarr(path: Path, mode: Any = "r") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)
        return zarr.open_array(path, mode=mode)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f2", "f4", "i4", "f8"])
def test_the_shuffle_is_that_of_numcodecs_and_comes_undone(dtype: str) -> None:
    for size in (1, 100, 70_000):
        rows = np.random.default_rng(size).integers(0, 250, (size, 3)).astype(dtype)
        other = Shuffle(elementsize=rows.itemsize).encode(rows.reshape(-1))
        np.testing.assert_array_equal(shuffle_bytes(rows), other)
        out = np.empty_like(rows)
        decompress(np.frombuffer(compress_chunk(rows), np.uint8), out)
        np.testing.assert_array_equal(out, rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_are_those_of_zarr_python_in_whatever_order_rows_come(
    tmp_path: Path, dtype: str
) -> None:
    rows = stored_rows(dtype)
    for name, order in {"a": [0], "b": [3, 1, 2, 0], "c": list(range(40, 0, -1))}.items():
        write_array(tmp_path / name, dtype, rows, "compact", order)
    assert shard_files(tmp_path / "a") == shard_files(tmp_path / "b") == shard_files(tmp_path / "c")
    shutil.copytree(tmp_path / "a", tmp_path / "z")
    shutil.rmtree(tmp_path / "z/residual/0/c")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)
        array = zarr.open_array(tmp_path / "z/residual/0", mode="r+").with_config(
            {"write_empty_chunks": True}
        )
        array[:] = rows
    assert shard_files(tmp_path / "a") == shard_files(tmp_path / "z")


@pytest.mark.parametrize("dtype", DTYPES)
def test_zarr_python_and_this_package_read_the_same_rows(tmp_path: Path, dtype: str) -> None:
    rows = stored_rows(dtype)
    write_array(tmp_path, dtype, rows, "compact", [1, 0])
    array, bits = CacheArray(tmp_path / "residual/0"), rows.view(f"u{rows.itemsize}")
    assert array.layout.compact
    assert not array.layout.raw
    other = open_with_zarr(tmp_path / "residual/0")
    np.testing.assert_array_equal(other[:].view(bits.dtype), bits)
    row_numbers = np.random.default_rng(0).integers(0, ROWS, 90)
    for got, want in (
        (array.read_stored(0, ROWS), bits),
        (array.read_stored(30, 131), bits[30:131]),
        (array.take_stored(row_numbers), bits[row_numbers]),
        (array.take_stored(np.zeros(0, np.int64)), bits[:0]),
    ):
        np.testing.assert_array_equal(got.view(bits.dtype), want)
    write_array(tmp_path / "raw", dtype, rows, "raw", [0])
    raw = CacheArray(tmp_path / "raw/residual/0")
    np.testing.assert_array_equal(array[5:200], raw[5:200])
    np.testing.assert_array_equal(array.take(row_numbers), raw.take(row_numbers))
    assert array._zarr is None


def test_any_flipped_byte_of_a_shard_is_found(tmp_path: Path) -> None:
    rows = stored_rows("bfloat16", 128)
    write_array(tmp_path, "bfloat16", rows, "compact", [0])
    path = tmp_path / "residual/0/c/0/0"
    whole = path.read_bytes()
    index = len(whole) - 16 * 4 - 4
    ends = np.frombuffer(whole[index:-4], "<u8").reshape(4, 2).sum(-1)
    for place in range(0, len(whole), 3):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        unread_array = CacheArray(tmp_path / "residual/0")
        if place >= index:
            with pytest.raises(CorruptError, match="index of the shard"):
                unread_array.read(0, 1)
            continue
        chunk = int(np.searchsorted(ends, place, "right"))
        assert list(unread_array.shard(0).damaged_chunks(128)[0]) == [chunk]
        with pytest.raises(CorruptError, match="do not match their checksum"):
            unread_array.take(np.array([chunk * 32 + 5]))
        other = (chunk + 1) % 4 * 32
        np.testing.assert_array_equal(
            unread_array.read_stored(other, other + 32), rows[other:][:32]
        )


def test_a_chunk_of_other_bytes_with_the_right_checksum_is_corrupt() -> None:
    rows = np.arange(64, dtype=np.uint16)
    out = np.empty(64, np.uint16)
    for payload in (b"", b"no zstd", compress_chunk(rows[:60]), compress_chunk(rows)[:-3]):
        with pytest.raises(CorruptError, match="a chunk (does not decompress|holds)"):
            decompress(np.frombuffer(payload, np.uint8), out)


@pytest.mark.parametrize("nbytes", [1, 60, 255, 256, 257, 65_535, 65_791, 65_792, 1 << 20])
def test_the_header_of_a_frame_says_its_size(nbytes: int) -> None:
    frame = compress_chunk(np.zeros(nbytes, np.uint8))
    assert frame_content_size(frame[:FRAME_HEADER_BYTES]) == nbytes


def test_a_frame_of_another_size_is_refused_before_memory_is_taken() -> None:
    frame = compress_chunk(np.zeros(1 << 30, np.uint8))
    # The same frame with a size of 8 bytes in its header, and one that does not say its size.
    magic, window, blocks = frame[:4], frame[5:6], frame[10:]
    assert frame[4] == 0b1000_0000
    longer = magic + b"\xc0" + window + (1 << 60).to_bytes(8, "little") + blocks
    silent = magic + b"\x00" + window + blocks
    tracemalloc.start()
    try:
        for payload in (frame, longer, silent):
            out = np.empty(64, np.uint16)
            with pytest.raises(CorruptError, match=r"a chunk holds .* bytes, not 128"):
                decompress(np.frombuffer(payload, np.uint8), out)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_chunk_beyond_any_writer_is_refused_before_memory_is_taken() -> None:
    layout = ArrayLayout((1 << 40,), "<f4", "float32", 1 << 30, 1 << 30, raw=False, compact=True)
    with pytest.raises(CorruptError, match="compressed ones have at most"):
        decompress_chunk(np.zeros(20, np.uint8), layout, Path("shard"))


def test_decoded_chunks_take_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = stored_rows("float32")
    write_array(tmp_path, "float32", rows, "compact", [0])
    chunk = 32 * WIDTH * 4
    small_cache = ChunkCache(3 * chunk)
    monkeypatch.setattr(compressed_shard, "DECODED_CHUNKS", small_cache)
    arrays = [CacheArray(tmp_path / "residual/0") for _ in range(3)]
    for _ in range(2):
        for array in arrays:
            np.testing.assert_array_equal(array[:], rows)
            nbytes = sum(cached.nbytes for cached in small_cache._chunks.values())
            assert small_cache.nbytes == nbytes <= 3 * chunk
    calls: list[int] = []
    monkeypatch.setattr(
        compressed_shard, "decompress", lambda p, out: (calls.append(1), decompress(p, out))
    )
    unread_array = CacheArray(tmp_path / "residual/0")
    for row in range(0, 96, 4):  # three chunks, in small steps
        unread_array.read(row, row + 4)
    assert len(calls) == 3
    unread_array.take(np.random.default_rng(1).integers(0, ROWS, 200))
    assert len(calls) <= 3 + 10
    assert DECODED_CHUNKS is not small_cache


def test_a_writer_holds_what_waits_compressed(tmp_path: Path) -> None:
    layout = create_residual(tmp_path, 0, 128, WIDTH, "float16", LAYOUT, "compact")
    rows = np.ones((128, WIDTH), np.float16)
    writer = shard_writer_for(tmp_path / "residual/0/c/0/0", layout, 128)
    assert isinstance(writer, compressed_shard.CompressedShardWriter)
    writer.write(32, rows[32:])
    assert (sorted(writer._waiting), list(writer._buffers)) == ([1, 2, 3], [])
    assert sum(map(len, writer._waiting.values())) < rows[32:].nbytes
    writer.write(0, rows[:32])
    assert writer._waiting == {}
    writer.commit()


@pytest.fixture(scope="module")
def raw_and_compact(model_folder: Path, texts_file: Path, tmp_path_factory: pytest.TempPathFactory):
    """A raw and a compact cache of the same rows; warnings are errors here."""
    by_codec = {}
    for codec in ("raw", "compact"):
        root = tmp_path_factory.mktemp(codec)
        by_codec[codec] = answer_request(
            request_for(model_folder, texts_file, root, codec=codec)
        ).cache
    return by_codec


def test_a_compact_cache_has_the_same_id_and_rows(
    raw_and_compact: dict[str, ActivationCache],
) -> None:
    raw, compact = raw_and_compact["raw"], raw_and_compact["compact"]
    assert raw.id == compact.id
    assert (raw.manifest.codec, compact.manifest.codec) == ("raw", "compact")
    assert "codec" not in raw.manifest.extra
    assert 0.95 * raw.bytes > compact.bytes
    for layer in raw.layers:
        assert compact.residual_array(layer).layout.compact
        np.testing.assert_array_equal(
            raw.residual_array(layer)[:], compact.residual_array(layer)[:]
        )
    assert compact.array("tokens/ids").layout.raw
    np.testing.assert_array_equal(
        raw.residual(1)[40:90].compute(), compact.residual(1)[40:90].compute()
    )
    assert verify(compact.path).ok


def test_a_request_for_another_codec_finds_the_cache(
    model_folder: Path, texts_file: Path, raw_and_compact: dict[str, ActivationCache]
) -> None:
    for codec_of_cache, requested_codec in (("raw", "compact"), ("compact", "raw")):
        cache = raw_and_compact[codec_of_cache]
        request = request_for(model_folder, texts_file, cache.path.parent, codec=requested_codec)
        assert find_match(request).answer == "hit"
        answer = answer_request(request)
        assert (answer.status, answer.cache.path) == ("hit", cache.path)
        assert answer.cache.manifest.codec == codec_of_cache
    with pytest.raises(UsageError, match="codec 'zip' is unknown; choose one of raw, compact"):
        request_for(model_folder, texts_file, Path(), codec="zip")


def test_damage_is_named_and_mended_to_the_byte(
    raw_and_compact: dict[str, ActivationCache], tmp_path: Path
) -> None:
    cache = raw_and_compact["compact"]
    path = Path(shutil.copytree(cache.path, tmp_path / cache.id))
    want = {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    shard = path / "arrays.zarr/residual/2/c/1/0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 4
    shard.write_bytes(data)
    (path / "arrays.zarr/residual/1/c/0/0").write_bytes(b"")
    by_array = {damage.array: damage for damage in verify(path).damages}
    assert set(by_array) == {"residual/1", "residual/2"}
    chunk, rows = cache.manifest.layout.chunk_rows, cache.manifest.layout.part_rows
    start, stop = by_array["residual/2"].start, by_array["residual/2"].stop
    assert start is not None
    assert stop is not None
    assert rows <= start < stop <= 2 * rows
    assert stop - start == chunk
    assert by_array["residual/2"].file == "arrays.zarr/residual/2/c/1/0"
    assert repair(path).ok
    assert {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()} == want


def test_the_loader_and_the_export_give_what_a_raw_cache_gives(
    raw_and_compact: dict[str, ActivationCache], tmp_path: Path
) -> None:
    batches = [
        list(
            RowLoader(raw_and_compact[codec], [1, 3], batch_rows=100, slab_rows=16, buffer_rows=256)
        )
        for codec in ("raw", "compact")
    ]
    assert len(batches[0]) == len(batches[1]) > 5
    for one, other in zip(*batches, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    for codec, cache in raw_and_compact.items():
        export(cache, tmp_path / codec, split="train")
    for file in (tmp_path / "raw").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "compact" / file.name).read_bytes()


def test_layers_added_to_a_compact_cache_are_compact(
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
    raw_and_compact: dict[str, ActivationCache],
) -> None:
    answer_request(request_for(model_folder, texts_file, tmp_path, codec="compact", layers=(2,)))
    request_without_codec = request_for(model_folder, texts_file, tmp_path)
    answer = answer_request(request_without_codec)
    assert answer.status == "extended"
    for layer in answer.cache.layers:
        folder = Path("arrays.zarr/residual") / str(layer)
        files = [p.relative_to(answer.cache.path) for p in (answer.cache.path / folder).rglob("*")
                 if p.is_file()]  # fmt: skip
        for file in files:
            want = (raw_and_compact["compact"].path / file).read_bytes()
            assert (answer.cache.path / file).read_bytes() == want


def test_a_dry_run_measures_what_compression_saves(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    request = request_for(model_folder, texts_file, tmp_path, codec="compact", logits="topk:20")
    estimate = estimate_request(request)
    cache = answer_request(request).cache
    sizes = {
        name: sum(f.stat().st_size for f in (cache.path / "arrays.zarr" / name / "c").rglob("*")
                  if f.is_file())
        for name in cache.target_names
    }  # fmt: skip
    predicted = sum(estimate.arrays[name] for name in sizes)
    assert predicted == pytest.approx(sum(sizes.values()), rel=0.05)
    for name, size in sizes.items():
        assert estimate.arrays[name] == pytest.approx(size, rel=0.15), name
    assert 0 < estimate.slack < 0.2 * estimate.bytes
    limit = cache.bytes * 6 // 10
    short = answer_request(
        request_for(model_folder, texts_file, tmp_path / "b", codec="compact", max_bytes=limit)
    )
    assert short.cache.bytes <= limit
    assert short.cache.positions > cache.positions // 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dry_run_is_right_about_the_sample(tmp_path: Path, dtype: str) -> None:
    from residua.sample import MODEL_DIR, TEXT_PATH

    request = request_for(MODEL_DIR, TEXT_PATH, tmp_path, codec="compact", dtype=dtype, context=256,
                max_tokens=40_000, part_positions=None, batch_tokens=None)  # fmt: skip
    estimate = estimate_request(request)
    cache = answer_request(request).cache
    size = sum(p.stat().st_size for p in cache.path.glob("arrays.zarr/residual/*/c/*/0"))
    names = [name for name in estimate.arrays if name.startswith("residual/")]
    assert sum(estimate.arrays[name] for name in names) == pytest.approx(size, rel=0.05)


def test_the_command_line_says_how_a_cache_is_kept(
    raw_and_compact: dict[str, ActivationCache],
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
) -> None:
    command = ["extract", str(model_folder), str(texts_file), "--codec", "compact", "--dry-run"]
    shown = CliRunner().invoke(main, [*command, "--root", str(tmp_path)]).stdout
    assert "compression is measured on the first rows" in shown
    assert not list(tmp_path.iterdir())
    args = ["info", str(raw_and_compact["compact"].path)]
    assert json.loads(CliRunner().invoke(main, [*args, "--json"]).stdout)["codec"] == "compact"
    assert ", compact" in CliRunner().invoke(main, args).stdout

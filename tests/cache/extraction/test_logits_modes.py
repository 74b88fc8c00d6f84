"""Logits that a cache keeps are the model's own, and each mode's error is what `info` says."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from residua.cache.checks import logits_error
from residua.cache.checks.logits_error import measure_logits_errors
from residua.cache.errors import ModelError, UsageError
from residua.cache.extraction.answer import answer_request, estimate_request, find_match
from residua.cache.extraction.damage_repair import repair
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.format.dtypes import decode_rows, encode_rows
from residua.cache.format.layout import Layout
from residua.cache.format.logits_arrays import (
    DEFAULT_TOP,
    TopK,
    list_logits_arrays,
    logits_mode_covers,
    top_logits,
)
from residua.cache.forward import kept_logits
from residua.cache.model.transformers_guard import guard_transformers
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.verification import verify
from residua.cli import main

from ...support import models
from ...support.models import build_tokenizer, save_model, texts
from ...support.synthetic import random_head

K = 5
OPTIONS: dict[str, Any] = {"context": 40, "part_positions": 512, "batch_tokens": 200}


def request_for(model: Path, data: Path, root: Path, **options: Any) -> ExtractionRequest:
    return ExtractionRequest(str(model), str(data), root, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def cache_of_mode(model_folder: Path, texts_file: Path, tmp_path_factory: pytest.TempPathFactory):
    """A cache of the K largest logits and one of all, by mode."""
    root = tmp_path_factory.mktemp("kept")
    modes = (f"topk:{K}", "full")
    return {
        m: answer_request(request_for(model_folder, texts_file, root, logits=m)).cache
        for m in modes
    }


def model_logits(folder: Path, cache: ActivationCache) -> np.ndarray:
    """Logits of every row by transformers alone, `(positions, vocab)` float32."""
    with guard_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder)
    contexts, out = cache.contexts, []
    index = cache.array("tokens/index")[:]
    for start, length, row, rows in zip(
        contexts.start, contexts.length, contexts.row, contexts.rows, strict=True
    ):
        ids = torch.from_numpy(contexts.ids[start : start + length].astype(np.int64))[None]
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0].float().numpy()
        out.append(logits[index[row : row + rows]])
    return np.concatenate(out)


def computed_top(top: TopK) -> tuple[np.ndarray, ...]:
    return dask.compute(top.ids, top.values, top.logsumexp, top.tail)  # pyright: ignore


def check_top(
    expected: np.ndarray, got: tuple[np.ndarray, ...], size: int, error: float, rest: float = 1e-4
) -> None:
    """`got` is the top of `want` up to `error` per logit; sums over all up to `rest`."""
    ids, values, logsumexp, tail = got
    exact = np.sort(expected, -1)[:, ::-1][:, :size]
    assert ids.shape == values.shape == exact.shape
    assert all(len(set(row)) == size for row in ids.tolist())
    np.testing.assert_allclose(values, exact, rtol=0, atol=error)
    # Where two logits are closer than the error, either may come first.
    np.testing.assert_allclose(np.take_along_axis(expected, ids, -1), exact, rtol=0, atol=error)
    total = np.logaddexp.reduce(expected.astype(np.float64), -1)
    np.testing.assert_allclose(logsumexp, total, rtol=0, atol=rest)
    mass = 1 - np.exp(exact.astype(np.float64) - total[:, None]).sum(-1)
    np.testing.assert_allclose(tail, mass, rtol=0, atol=rest)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pack": False, "batch_tokens": 90},
        {"pack": False, "positions": "sample:3", "part_positions": 64},
        {"positions": "last", "part_positions": 16},
        {"codec": "compact", "dtype": "bfloat16"},
    ],
    ids=["packed", "rows", "sample", "last", "compact bfloat16"],
)
def test_what_is_kept_is_the_top_of_the_models_own_logits(
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(kept_logits, "TILE_BYTES", 4 * 300 * 7)  # tiles of seven rows
    cache = answer_request(
        request_for(model_folder, texts_file, tmp_path, logits=f"topk:{K}", **options)
    ).cache
    assert cache.n_parts > 2
    assert cache.finished
    expected = model_logits(model_folder, cache)
    half = options.get("dtype") == "bfloat16"
    error = float(np.abs(expected).max()) * (2.0**-8 if half else 2.0**-11) + 1e-4
    check_top(expected, computed_top(cache.topk()), K, error)
    assert cache.array("logits/ids").layout.stored_dtype == "<u2"
    assert verify(cache.path).ok


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_full_logits_are_the_models_own(
    model_folder: Path, texts_file: Path, tmp_path: Path, dtype: str
) -> None:
    request = request_for(
        model_folder, texts_file, tmp_path, logits="full", dtype=dtype, pack=False
    )
    cache = answer_request(request).cache
    expected = model_logits(model_folder, cache)
    error = {"auto": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2e-6}[dtype]
    got = cache.logits().compute()
    np.testing.assert_allclose(got, expected, rtol=error, atol=2e-5)
    stored = cache.array("logits/full")
    np.testing.assert_array_equal(stored[:], got)
    assert stored.layout.logical_dtype == ("float16" if dtype == "auto" else dtype)
    # A sum over rounded logits is as far off as they are.
    error = error * float(np.abs(expected).max()) + 2e-5
    check_top(expected, computed_top(cache.topk(3)), 3, error, rest=error)


def test_logits_of_a_layer_are_computed_though_all_are_stored(
    cache_of_mode: dict[str, ActivationCache],
) -> None:
    cache = cache_of_mode["full"]
    layer = cache.residual_array(cache.n_blocks)[:100]
    np.testing.assert_allclose(
        cache.logits(cache.n_blocks)[:100].compute(), cache.head.logits(layer), rtol=0, atol=1e-4
    )
    names = {key[0] for key in cache.logits().__dask_graph__() if isinstance(key, tuple)}
    assert any(name.startswith("logits-full") for name in names)
    assert not any(name.startswith("residual") for name in names)


def test_a_bfloat16_model_keeps_finer_logits_than_its_own(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    with guard_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "half")
    build_tokenizer().save_pretrained(tmp_path / "half")
    cache = answer_request(
        request_for(tmp_path / "half", texts_file, tmp_path, logits="topk:4")
    ).cache
    assert cache.residual_array(3).layout.logical_dtype == "bfloat16"
    assert cache.array("logits/values").layout.logical_dtype == "float16"
    # Layer L is exact in bfloat16, so the head gives again what was kept, to float16.
    expected = cache.logits().compute()
    check_top(
        expected, computed_top(cache.topk()), 4, float(np.abs(expected).max()) * 2.0**-11 + 1e-4
    )


def test_every_cache_has_a_top(
    tiny_cache: ActivationCache, cache_of_mode: dict[str, ActivationCache]
) -> None:
    expected = tiny_cache.logits().compute()
    top = tiny_cache.topk()
    assert top.ids.shape == (tiny_cache.positions, DEFAULT_TOP)
    assert [array.dtype for array in vars(top).values()] == [np.int32, *[np.float32] * 3]
    check_top(expected, computed_top(top), DEFAULT_TOP, 1e-6)
    cache = cache_of_mode[f"topk:{K}"]
    fewer, stored = computed_top(cache.topk(2)), computed_top(cache.topk())
    np.testing.assert_array_equal(fewer[0], stored[0][:, :2])
    mass = np.exp(fewer[1].astype(np.float64) - fewer[2][:, None]).sum(-1) + fewer[3]
    np.testing.assert_allclose(mass, 1, atol=2e-3)  # values are kept in float16
    more = computed_top(cache.topk(K + 4))
    assert more[0].shape == (cache.positions, K + 4)
    np.testing.assert_allclose(more[1][:, :K], stored[1], rtol=1e-3, atol=1e-3)
    with pytest.raises(UsageError, match=r"size must lie in 1\.\.300, got 301"):
        cache.topk(301)


def test_a_small_tail_does_not_drown_in_rounding() -> None:
    logits = np.zeros((2, 1000), np.float32)
    logits[0, 7], logits[1, 3] = 60.0, 30.0
    takes = kept_logits.KeptLogits(random_head(4, 1000), "topk:1", "float16", torch.device("cpu"))
    taken = takes._tile(torch.from_numpy(logits))["logits/tail"][0][:, 0].numpy()
    expected = 999 * np.exp(-np.array([60.0, 30.0]))
    np.testing.assert_allclose(taken, expected, rtol=1e-4)
    np.testing.assert_allclose(top_logits(logits, 1)[3], expected, rtol=1e-6)


@pytest.mark.parametrize("vocab", [60_000, 70_000])
def test_ids_beyond_the_range_of_their_sign_bit_are_kept(
    vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_logits, "TILE_BYTES", 4 * vocab * 2)
    head = random_head(4, vocab)
    hidden = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    takes = kept_logits.KeptLogits(head, "topk:3", "float16", torch.device("cpu"))
    ids = takes(torch.from_numpy(hidden))["logits/ids"][0].numpy()
    assert ids.dtype == list_logits_arrays("topk:3", vocab, "float16")[0].dtype
    expected = np.argsort(-head.logits(hidden), -1, kind="stable")[:, :3]
    assert expected.max() > 1 << 15
    np.testing.assert_array_equal(ids, expected)


def test_chunks_divide_parts_and_hold_a_few_megabytes() -> None:
    layout = Layout.choose(768, 2, widest=2 * 50_257)
    (full,) = list_logits_arrays("full", 50_257, "float16")
    assert layout.chunk_rows == 2048
    assert 1.5 * 2**20 <= layout.chunk_of(full.row_bytes) * full.row_bytes <= 3 * 2**20
    assert layout.part_rows * full.row_bytes <= 512 << 20
    odd = Layout.choose(32, 2, part_positions=3000)
    for array in (
        *list_logits_arrays("topk:64", 300, "float16"),
        *list_logits_arrays("full", 300, "float16"),
    ):
        assert odd.part_rows % odd.chunk_of(array.row_bytes) == 0


@pytest.mark.parametrize("mode", [f"topk:{K}", "full"])
def test_damage_is_named_and_mended(
    cache_of_mode: dict[str, ActivationCache], tmp_path: Path, mode: str
) -> None:
    cache = cache_of_mode[mode]
    path = Path(shutil.copytree(cache.path, tmp_path / cache.id))
    expected = {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    rows = cache.manifest.layout.part_rows
    for name in cache.logits_names:
        shard = path / "arrays.zarr" / name / cache.array(name).layout.shard_key(1)
        data = bytearray(shard.read_bytes())
        data[11] ^= 2
        shard.write_bytes(data)
    damages = verify(path).damages
    assert {damage.array for damage in damages} == set(cache.logits_names)
    assert all(damage.start == rows for damage in damages)
    done = repair(path)
    assert done.ok
    assert len(done.mended) == len(cache.logits_names)
    assert {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()} == expected


@pytest.mark.parametrize("name", ["logits/ids", "logits/values", "residual/0"])
def test_metadata_of_an_array_without_its_like_is_made_anew(
    cache_of_mode: dict[str, ActivationCache], tmp_path: Path, name: str
) -> None:
    cache = cache_of_mode[f"topk:{K}"]
    path = Path(shutil.copytree(cache.path, tmp_path / cache.id))
    for layer in cache.layers if name == "residual/0" else ():
        (path / f"arrays.zarr/residual/{layer}/zarr.json").unlink()  # no twin is left
    (path / "arrays.zarr" / name / "zarr.json").write_bytes(b"{}")
    assert not verify(path).ok
    assert repair(path).ok
    assert verify(path).ok
    file = f"arrays.zarr/{name}/zarr.json"
    assert (path / file).read_bytes() == (cache.path / file).read_bytes()


@pytest.mark.parametrize(("mode", "codec"), [(f"topk:{K}", "compact"), ("full", "raw")])
def test_more_layers_and_more_tokens_keep_the_logits(
    model_folder: Path, texts_file: Path, tmp_path: Path, mode: str, codec: str
) -> None:
    options = {"logits": mode, "codec": codec, "pack": False, "part_positions": 256}
    first = answer_request(
        request_for(model_folder, texts_file, tmp_path, layers=(1,), max_tokens=1500, **options)
    )
    shards = {p: p.read_bytes() for p in first.cache.path.rglob("c/*") if p.is_file()}
    second = answer_request(
        request_for(model_folder, texts_file, tmp_path, max_tokens=1500, **options)
    )
    assert (second.status, second.cache.id) == ("extended", first.cache.id)
    assert second.cache.layers == (0, 1, 2, 3)
    assert {p: p.read_bytes() for p in shards} == shards
    third = answer_request(request_for(model_folder, texts_file, tmp_path, **options))
    assert (third.status, third.cache.manifest.extra["extends"]) == ("extended", first.cache.id)
    whole = answer_request(
        request_for(model_folder, texts_file, tmp_path / "whole", **options)
    ).cache
    assert third.cache.positions == whole.positions
    assert verify(third.cache.path).ok
    name = third.cache.logits_names[0]
    old = first.cache.path / "arrays.zarr" / name / first.cache.array(name).layout.shard_key(0)
    assert os.path.samefile(old, third.cache.path / old.relative_to(first.cache.path))
    rows = first.cache.positions
    for name in whole.target_names:
        got, expected = third.cache.array(name), whole.array(name)
        assert got.layout == expected.layout
        same = second.cache.array(name).read_stored(0, rows)
        np.testing.assert_array_equal(got.read_stored(0, rows), same)
        if not name.endswith("ids"):
            order = np.argsort(third.cache.sequence_hash), np.argsort(whole.sequence_hash)
            mine, theirs = (
                a.take(c.positions_of(o))
                for a, c, o in zip((got, expected), (third.cache, whole), order, strict=True)
            )
            np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-3)


def test_a_cache_with_logits_answers_requests_for_less(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    made = answer_request(request_for(model_folder, texts_file, tmp_path, logits="topk:9")).cache
    for mode in ("recompute", "topk:4"):
        request = request_for(model_folder, texts_file, tmp_path, logits=mode)
        assert find_match(request).answer == "covers"
        assert (answer_request(request).status, answer_request(request).cache.id) == (
            "hit",
            made.id,
        )
    for mode in ("topk:10", "full"):
        match = find_match(request_for(model_folder, texts_file, tmp_path, logits=mode))
        assert match.answer == "miss"
        assert match.differences == (("capture.logits", mode, "topk:9"),)
    assert logits_mode_covers("full", "recompute")
    assert not logits_mode_covers("full", "topk:3")  # rounded ones are no answer for float32 ranks
    assert not logits_mode_covers("recompute", "topk:3")


def test_recompute_stays_the_default_and_its_id_unchanged(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    cache = answer_request(request_for(model_folder, texts_file, tmp_path)).cache
    assert cache.manifest.identity["capture"]["logits"] == "recompute"
    assert set(cache.manifest.extra) == {"pad", "causal", "embedding"}
    assert cache.logits_names == ()
    assert not (cache.path / "arrays.zarr" / "logits").exists()


@pytest.mark.parametrize("mode", ["topk:0", "topk", "top:3", "all", "topk:300", "topk:1000"])
def test_modes_that_cannot_be_are_refused_before_anything_is_written(
    model_folder: Path, texts_file: Path, tmp_path: Path, mode: str
) -> None:
    with pytest.raises(UsageError, match=r"logits .*(unknown|smaller K)"):
        answer_request(request_for(model_folder, texts_file, tmp_path / "root", logits=mode))
    assert not list(tmp_path.glob("root/*/manifest.json"))


def test_logits_that_are_not_finite_set_their_sequence_aside(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    """A head that overflows where the residual stream does not."""
    clean = answer_request(
        request_for(model_folder, texts_file, tmp_path, pack=False, dtype="float32")
    ).cache
    bad = Path(shutil.copytree(model_folder, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    # A direction along which one row is far out of line overflows there and nowhere else.
    z = clean.head.normalize(clean.residual_array(3)[:])
    row = int(np.argmax(np.abs(z).max(-1)))
    direction = z[row] / np.linalg.norm(z[row])
    along = z @ direction
    order = np.argsort(along)
    scale = 3.4e38 / ((along[order[-1]] + along[order[-2]]) / 2)
    tensors["embed_out.weight"][17] = direction * np.float32(scale)
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    del tensors
    with np.errstate(over="ignore"):
        expected = ~np.isfinite(
            clean.head.normalize(clean.residual_array(3)[:]).astype(np.float32)
            @ (direction * np.float32(scale))
        )
    assert expected.any()
    sequences = clean.array("tokens/sequence")[:]
    request = request_for(bad, texts_file, tmp_path, pack=False, dtype="float32", logits="full")
    cache = answer_request(request).cache
    assert set(cache.quarantined) == set(sequences[expected].tolist())
    assert all("in logits/full" in reason for reason in cache.quarantined.values())


def test_logits_beyond_float16_are_kept_in_bfloat16_and_never_narrowed(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    large = Path(shutil.copytree(model_folder, tmp_path / "large"))
    tensors = load_file(large / "model.safetensors")
    tensors["embed_out.weight"] *= np.float32(3e4)
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    cache = answer_request(request_for(large, texts_file, tmp_path, logits="topk:3")).cache
    assert cache.array("logits/values").layout.logical_dtype == "bfloat16"
    assert cache.residual_array(3).layout.logical_dtype == "float16"
    narrow = request_for(large, texts_file, tmp_path / "x", logits="topk:3", dtype="float16")
    with pytest.raises(ModelError, match="logits/values reaches .* which float16 cannot hold"):
        answer_request(replace(narrow, on_error="raise"))
    narrow_cache = answer_request(narrow).cache
    assert not np.isinf(narrow_cache.array("logits/values")[:]).any()
    too_large = np.abs(cache.array("logits/values")[:]).max(-1) > 66000
    sequences = narrow_cache.array("tokens/sequence")[:]
    assert set(narrow_cache.quarantined) >= set(sequences[too_large].tolist())


@pytest.mark.parametrize("options", [{"logits": "topk:20"}, {"logits": "full"}])
@pytest.mark.parametrize("more", [{}, {"part_positions": None}])
def test_a_dry_run_knows_the_logits(
    model_folder: Path, texts_file: Path, tmp_path: Path, options: dict, more: dict
) -> None:
    request = request_for(model_folder, texts_file, tmp_path, **{**options, **more})
    estimate = estimate_request(request)
    cache = answer_request(request).cache
    for name in cache.target_names:
        folder = cache.path / "arrays.zarr" / name / "c"
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        assert estimate.arrays[name] == pytest.approx(size, rel=0.02), name
    shards = cache.path.glob("arrays.zarr/*/*/c/**/*")
    parts = [p for p in shards if p.is_file() and p.parts[-4 - (p.name == "0")] != "tokens"]
    assert estimate.files <= len(parts)
    if options["logits"] == "full":
        assert estimate.largest == "logits/full"


def test_batches_of_wide_rows_are_small(
    model_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from residua.cache.extraction import plan

    monkeypatch.setattr(plan, "LOGITS_BATCH_BYTES", 600 * 130)
    request = request_for(
        model_folder, texts_file, tmp_path, logits="full", batch_tokens=None, pack=False
    )
    cache = answer_request(request).cache
    assert cache.manifest.batch_tokens == 130
    expected = model_logits(model_folder, cache)
    np.testing.assert_allclose(cache.logits().compute(), expected, rtol=2.0**-11, atol=2e-5)


def test_an_export_has_the_logits(
    cache_of_mode: dict[str, ActivationCache], tmp_path: Path
) -> None:
    from residua.cache.sharing.flat_export import export

    cache = cache_of_mode[f"topk:{K}"]
    export(cache, tmp_path / "st", split="test")
    got = load_file(tmp_path / "st" / "logits.safetensors")
    rows = cache.positions_of(cache.sequences("test"))
    for name in cache.logits_names:
        expected = cache.array(name).take_stored(rows)
        np.testing.assert_array_equal(got[name.partition("/")[2]], expected)
    export(cache, tmp_path / "np", format="numpy", logits=False)
    assert not list((tmp_path / "np").glob("logits.*"))
    export(cache_of_mode["full"], tmp_path / "full", format="numpy")
    full = np.load(tmp_path / "full" / "logits.full.npy", mmap_mode="r")
    np.testing.assert_array_equal(
        full, cache_of_mode["full"].array("logits/full").read_stored(0, len(full))
    )


def test_info_shows_what_was_measured(cache_of_mode: dict[str, ActivationCache]) -> None:
    cache = cache_of_mode[f"topk:{K}"]
    args = ["info", str(cache.path)]
    value = json.loads(CliRunner().invoke(main, [*args, "--json"]).stdout)
    measured = value["provenance"]["canary"]["logits"]
    assert value["logits"] == f"topk:{K}"
    assert set(measured["modes"]) == {"recompute", f"topk:{K}", "full"}
    assert measured["modes"][f"topk:{K}"]["tail_mass"] > measured["modes"]["full"]["kl_mean"]
    shown = CliRunner().invoke(main, args).stdout
    assert f"topk:{K} *" in shown
    assert "tail mass" in shown


def test_the_measured_errors_are_the_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    head = random_head(16, 200, seed=2)
    hidden = rng.normal(size=(40, 16)).astype(np.float32)
    model = head.logits(hidden) + rng.normal(0, 1e-3, (40, 200)).astype(np.float32)
    p = np.exp(model - np.logaddexp.reduce(model.astype(np.float64), -1, keepdims=True))
    cache_of_mode = {
        "recompute": head.logits(decode_rows(encode_rows(hidden, "bfloat16"), "bfloat16")),
        "full": head.logits(hidden).astype(np.float16).astype(np.float32),
    }
    own = head.logits(hidden)
    order = np.argsort(-own, -1)[:, :7]
    values = np.take_along_axis(own, order, -1)
    q = np.exp(own - np.logaddexp.reduce(own.astype(np.float64), -1, keepdims=True))
    tail = 1 - np.take_along_axis(q, order, -1).sum(-1)
    spread = np.repeat(np.log(tail / 193)[:, None], 200, -1)
    total = np.logaddexp.reduce(own.astype(np.float64), -1, keepdims=True)
    np.put_along_axis(spread, order, values.astype(np.float16) - total, -1)
    cache_of_mode["topk:7"] = spread
    errors = measure_logits_errors(head, hidden, model, "bfloat16", lambda _: "float16", "topk:7")
    for tile in (1, 1 << 30):
        monkeypatch.setattr(logits_error, "TILE_BYTES", tile)
        again = measure_logits_errors(
            head, hidden, model, "bfloat16", lambda _: "float16", "topk:7"
        )
        for mode, error in again.modes.items():
            assert error.kl_mean == pytest.approx(errors.modes[mode].kl_mean, rel=1e-3)
    for mode, given in cache_of_mode.items():
        q = np.exp(given - np.logaddexp.reduce(given.astype(np.float64), -1, keepdims=True))
        kl = (p * (np.log(p) - np.log(q))).sum(-1)
        error = errors.modes[mode]
        assert error.kl_mean == pytest.approx(kl.mean(), rel=1e-3), mode
        assert error.kl_max == pytest.approx(kl.max(), rel=1e-3), mode
        assert error.flips == (given.argmax(-1) != model.argmax(-1)).sum()
    assert errors.modes["topk:7"].tail_mass == pytest.approx(tail.mean(), rel=1e-5)
    assert errors.modes["full"].bytes == 400
    assert errors.modes["topk:7"].bytes == 7 * 4 + 8
    worst = np.abs(cache_of_mode["recompute"] - model).max() / np.abs(model).max()
    assert errors.modes["recompute"].relative_error == pytest.approx(worst, rel=1e-3)


def test_a_tie_in_the_model_is_no_flip() -> None:
    head = random_head(4, 50)
    hidden = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    model = head.logits(hidden)
    best = model.argmax(-1)
    others = (best - 1) % 50
    np.put_along_axis(model, others[:, None], model.max(-1, keepdims=True), -1)
    errors = measure_logits_errors(head, hidden, model, "float32", lambda _: "float32")
    assert errors.modes["full"].flips == 0


@pytest.mark.parametrize(("kind", "head"), [("gemma2", "explicit"), ("opt", "program")])
def test_softcaps_and_recorded_tails_are_in_the_logits(
    texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, head: str
) -> None:
    # An opt whose embedding is narrower than its stream has a tail that no formula gives.
    monkeypatch.setitem(models.CONFIGS, "opt", {**models.CONFIGS["opt"], "word_embed_proj_dim": 16})
    folder = save_model(tmp_path / "model", kind)
    cache = answer_request(
        request_for(folder, texts_file, tmp_path, logits="topk:3", context=32)
    ).cache
    assert cache.head.kind == head
    expected = model_logits(folder, cache)
    check_top(
        expected, computed_top(cache.topk()), 3, float(np.abs(expected).max()) * 2.0**-11 + 1e-4
    )


def test_rows_do_not_depend_on_how_they_were_batched(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(40)))
    caches = [
        answer_request(
            request_for(
                model_folder,
                data,
                tmp_path / str(tokens),
                logits="topk:4",
                dtype="float32",
                pack=False,
                batch_tokens=tokens,
                part_positions=part,
            )
        ).cache
        for tokens, part in ((50, 64), (3000, 100_000))
    ]
    one, other = (computed_top(cache.topk()) for cache in caches)
    np.testing.assert_allclose(one[1], other[1], rtol=0, atol=2e-5)
    np.testing.assert_allclose(one[2], other[2], rtol=0, atol=2e-5)
    np.testing.assert_allclose(one[3], other[3], rtol=0, atol=1e-6)
    clear = np.diff(one[1], axis=-1).max(-1) < -1e-4
    np.testing.assert_array_equal(one[0][clear], other[0][clear])
    assert clear.mean() > 0.9

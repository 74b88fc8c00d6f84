"""Claims about the bytes that are no shard: JSON with its digest, bfloat16, and the format page."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from residua.cache.errors import CorruptError, NotFoundError
from residua.cache.files.json_files import (
    canonical_json,
    json_digest,
    read_json,
    write_atomically,
    write_json,
)
from residua.cache.format.dtypes import decode_rows, encode_rows
from residua.cache.store.activation_cache import ActivationCache

from ...support.synthetic import make_cache, random_head

PAGE = Path(__file__).parents[3] / "cache" / "README.md"
SPECIAL_BITS = [
    0x00000000, 0x80000000, 0x00000001, 0x007FFFFF, 0x00008000, 0x00018000, 0x00017FFF,
    0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF, 0x7F7F8000,
    0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808000, 0xBF818000, 0x3FFF8000,
]  # fmt: skip
"""Zeros, subnormals, infinities, values that round to infinity, ties to even in both directions."""
TENSORS = ("norm_weight", "norm_bias", "unembedding", "bias")
NAN_BITS = [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF]


def float32_of_bits(bits: list[int] | np.ndarray) -> np.ndarray:
    return np.array(bits, np.uint32).view(np.float32)


def bfloat16_bits_by_torch(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("values", [
    float32_of_bits(SPECIAL_BITS),
    float32_of_bits(np.random.default_rng(0).integers(0, 1 << 32, 1 << 18)),
    float32_of_bits(np.arange(1 << 16) << 16 | 0x8000),
    np.random.default_rng(1).normal(size=(300, 7)).astype(np.float32),
], ids=["special", "random bits", "every tie", "normal"])  # fmt: skip
def test_bfloat16_is_rounded_as_torch_rounds_it(values):
    finite_or_infinite = values[~np.isnan(values)]
    np.testing.assert_array_equal(
        encode_rows(finite_or_infinite, "bfloat16"), bfloat16_bits_by_torch(finite_or_infinite)
    )


def test_nan_becomes_the_quiet_nan_of_bfloat16():
    np.testing.assert_array_equal(
        encode_rows(float32_of_bits(NAN_BITS), "bfloat16"), np.uint16(0x7FC0)
    )
    mixed = float32_of_bits([NAN_BITS[2], SPECIAL_BITS[7], 0x3F800000])
    np.testing.assert_array_equal(encode_rows(mixed, "bfloat16"), [0x7FC0, 0x7F80, 0x3F80])


def test_every_bfloat16_survives_decoding_and_encoding():
    bits = np.arange(1 << 16).astype(np.uint16)
    values = decode_rows(bits, "bfloat16")
    assert values.dtype == np.float32
    is_number = ~np.isnan(values)
    np.testing.assert_array_equal(encode_rows(values[is_number], "bfloat16"), bits[is_number])
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(values, expected)


def test_every_float16_survives_decoding_and_encoding():
    values = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    values = values[~np.isnan(values)]
    again = encode_rows(decode_rows(values, "float16"), "float16")
    np.testing.assert_array_equal(again.view(np.uint16), values.view(np.uint16))


def test_integers_are_not_decoded():
    ids = np.arange(5, dtype=np.int32)
    assert decode_rows(ids, "int32") is ids


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert canonical_json({"b": [1, 2.5, None], "a": {"d": "é", "c": True}}) == (
        b'{"a":{"c":true,"d":"\xc3\xa9"},"b":[1,2.5,null]}'
    )
    assert (
        json_digest({"a": 1, "b": 2})
        == json_digest({"b": 2, "a": 1})
        != json_digest({"a": 1, "b": 3})
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_have_are_refused(number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": number})


def test_json_files_carry_their_digest(tmp_path):
    value = {"name": "x", "numbers": [1, 2.25]}
    write_json(tmp_path / "a.json", value)
    raw = (tmp_path / "a.json").read_bytes()
    assert raw == canonical_json({**value, "sha256": json_digest(value)}) + b"\n"
    assert read_json(tmp_path / "a.json") == value


def test_any_changed_byte_of_a_json_file_is_found(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"absmax": 4.1234567, "name": "x", "part": 0})
    raw = file.read_bytes()
    for offset in range(len(raw)):
        for value in {raw[offset] ^ 1, raw[offset] ^ 128, *b'e "0'} - {raw[offset]}:
            file.write_bytes(raw[:offset] + bytes([value]) + raw[offset + 1 :])
            with pytest.raises(CorruptError):
                read_json(file)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", '{"a":1}', '{"sha256":"0"}', "\xff"])
def test_other_files_are_not_taken_for_ours(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(CorruptError):
        read_json(tmp_path / "a.json")
    with pytest.raises(NotFoundError):
        read_json(tmp_path / "b.json")


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_atomically(file, b"old")

    def fail(*_):
        raise OSError("the power is out")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["a.json"]


def example_cache(root: Path, dtype: str) -> ActivationCache:
    rng = np.random.default_rng(4)
    lengths = [5, 200, 90, 7, 130]
    layers = [rng.normal(size=(sum(lengths), 8)).astype(np.float32) for _ in range(3)]
    return make_cache(root, layers, lengths, random_head(8, 20), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_example_on_the_format_page_reads_what_activation_cache_reads(tmp_path, dtype):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 2
    assert len(blocks[0].strip().splitlines()) <= 15
    tail = "\nnp.savez(sys.argv[2], hidden=hidden, ids=ids, start=start, end=end, logits=logits)\n"
    cache = example_cache(tmp_path, dtype)
    if dtype == "bfloat16":  # a model in bfloat16 keeps its unembedding so
        tensors = {n: torch.from_numpy(getattr(cache.head, n).copy()) for n in TENSORS}
        tensors["unembedding"] = tensors["unembedding"].to(torch.bfloat16)
        cache.head.save(cache.path / "head", tensors)
        cache = ActivationCache(cache.path)
    out = tmp_path / "out.npz"
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        "".join(blocks) + tail,
        str(cache.path),
        str(out),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    example = np.load(out)
    np.testing.assert_array_equal(example["hidden"], cache.residual_array(cache.n_blocks)[:])
    np.testing.assert_array_equal(example["ids"], cache.tokens[:])
    np.testing.assert_array_equal(example["start"], cache.sequence_start)
    np.testing.assert_array_equal(example["end"], cache.sequence_start + cache.sequence_length)
    np.testing.assert_allclose(example["logits"], cache.logits().compute(), rtol=1e-4, atol=1e-4)


def test_the_format_page_names_every_file_and_every_manifest_field(tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    cache = example_cache(tmp_path, "float32")
    value = json.loads((cache.path / "manifest.json").read_bytes())
    fields = {*value, *value["layout"], *value["identity"]}
    for part in ("model", "tokens", "capture"):
        fields |= set(value["identity"][part])
    missing = [name for name in sorted(fields) if f"`{name}`" not in page]
    assert not missing
    arrays = [str(p.parent.relative_to(cache.path / "arrays.zarr"))
              for p in (cache.path / "arrays.zarr").glob("[ts]*/*/zarr.json")]  # fmt: skip
    assert not [name for name in arrays if f"`{name}`" not in page]
    assert not [p.name for p in cache.path.iterdir() if p.name not in page]

"""Claims about fast decoding: every float16 and bfloat16 comes out exactly as numpy's cast."""

import sys

import numpy as np
import pytest
import torch

from residua.cache.format.dtypes import (
    BLOCK,
    FEW_BYTES,
    decode_rows,
    decode_rows_into,
    decoded_copy,
)

ALL_BITS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def all_values_of(dtype: str) -> np.ndarray:
    """Every value of a 16-bit dtype, as it is stored."""
    return ALL_BITS.view(np.float16) if dtype == "float16" else ALL_BITS


def decoded(values: np.ndarray, dtype: str) -> np.ndarray:
    out = np.full(values.shape, 7, np.float32)
    decode_rows_into(values, dtype, out)
    return out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(-1, 8), (-1,), (4, -1)])
def test_every_bit_pattern_is_decoded_exactly(dtype, shape):
    values = all_values_of(dtype).reshape(shape)
    got, expected = decoded(values, dtype), decode_rows(values, dtype)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("index", [0, BLOCK - 1, BLOCK, BLOCK + 5])
@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan, 65504.0, -65504.0])
def test_a_special_value_anywhere_in_a_block_survives(index, special):
    values = np.ones(BLOCK + 6, np.float16)
    values[index] = special
    np.testing.assert_array_equal(decoded(values, "float16"), values.astype(np.float32))


def test_subnormals_survive_a_thread_that_flushes_them_to_zero():
    values = np.arange(1, 1024, dtype=np.uint16).view(np.float16)
    expected = values.astype(np.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        got = decoded(values, "float16")
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numpy_decodes_alike_where_torch_is_not_loaded(dtype, monkeypatch):
    values = all_values_of(dtype).reshape(-1, 16)
    by_torch = decoded(values[:1900], dtype)  # finite ones, which torch decodes
    monkeypatch.delitem(sys.modules, "torch")
    np.testing.assert_array_equal(decoded(values[:1900], dtype), by_torch)
    got, expected = decoded(values, dtype), decode_rows(values, dtype)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_read_only_and_empty_rows_are_decoded_without_a_warning(dtype, recwarn):
    values = all_values_of(dtype)[:1024].reshape(-1, 16).copy()
    expected = decode_rows(values, dtype)
    values.setflags(write=False)
    np.testing.assert_array_equal(decoded(values, dtype), expected)
    assert decoded(values[:0], dtype).shape == (0, 16)
    assert not recwarn.list


def test_other_dtypes_are_copied():
    values = np.arange(6, dtype=np.int32).reshape(2, 3)
    out = np.empty((2, 3), np.int32)
    decode_rows_into(values, "int32", out)
    np.testing.assert_array_equal(out, values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("repeats", [1, FEW_BYTES // ALL_BITS.nbytes + 1])
def test_a_decoded_copy_is_exact_and_its_own_memory(dtype, repeats, recwarn):
    values = np.tile(all_values_of(dtype), repeats).reshape(-1, 16)
    values.setflags(write=False)
    finite = values[:1900]  # no infinity, no NaN
    for rows, is_finite in ((values, False), (finite, True), (finite[:0], True)):
        got, expected = decoded_copy(rows, dtype, is_finite), decode_rows(rows, dtype)
        assert got.dtype == np.float32
        assert got.flags.writeable
        assert got.flags.c_contiguous
        assert not np.shares_memory(got, values)
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("int32", "int32"), ("uint16", "uint16"), ("float32", "float32"), ("float64", "float32")],
)
def test_a_decoded_copy_of_other_dtypes_has_floats_as_float32(dtype, expected):
    for rows in (np.arange(6, dtype=dtype).reshape(2, 3), np.zeros((0, 3), dtype)):
        got = decoded_copy(rows, dtype)
        assert got.dtype == expected
        assert not np.shares_memory(got, rows)
        np.testing.assert_array_equal(got, rows)

"""Stored rows to float32, fast: numpy's own float16 cast is scalar and costs four times as much."""

import numpy as np

BLOCK = 1 << 15
"""Values decoded at a time: the passes over a block stay in the processor's cache."""
MASK = np.int32(-0x7000_0001)
"""Keeps sign, exponent and mantissa of a sign-extended float16 that was shifted left by 13."""
REBIAS = np.float32(2.0**112)
"""float32's exponent bias is 112 more than float16's."""
TINY = np.array([1], np.int32).view(np.float32)
"""A subnormal, to see whether this thread flushes subnormals to zero (torch can ask for that)."""


def decode_into(stored: np.ndarray, logical_dtype: str, out: np.ndarray) -> None:
    """Write `stored` rows, C-contiguous, into `out` of the same shape; exact."""
    if logical_dtype not in ("bfloat16", "float16") or out.dtype != np.float32:
        out[...] = stored
        return
    flat, target = stored.reshape(-1), out.reshape(-1)
    convert = _bfloat16 if logical_dtype == "bfloat16" else _float16
    for start in range(0, flat.size, BLOCK):
        convert(flat[start : start + BLOCK], target[start : start + BLOCK])


def _bfloat16(stored: np.ndarray, out: np.ndarray) -> None:
    bits = out.view(np.uint32)
    bits[...] = stored
    np.left_shift(bits, 16, out=bits)


def _float16(stored: np.ndarray, out: np.ndarray) -> None:
    """Shift the bits into place, then let one product rebias the exponent (F. Giesen, 2012)."""
    signed = stored.view(np.int16)
    # Infinities and NaNs, of either sign, would come out finite; numpy's cast knows them.
    special = signed.max() >= 0x7C00 or stored.view(np.uint16).max() >= 0xFC00
    if special or (TINY * REBIAS)[0] == 0:
        out[...] = stored
        return
    bits = out.view(np.int32)
    bits[...] = signed
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, MASK, out=bits)
    np.multiply(out, REBIAS, out=out)

"""Between stored and logical dtypes: bfloat16 is kept as the uint16 of its upper bits."""

from dataclasses import dataclass

import numpy as np

FP16_ROUNDING = 1.001 * 2.0**-11
"""Loss of float16, relative to a row's largest |value|, that is rounding; numbers below 6e-5, for
which float16 has fewer bits, lose more."""
BLOCK = 1 << 15
"""Values decoded at a time: the passes over a block stay in the processor's cache."""
MASK = np.int32(-0x7000_0001)
"""Keeps sign, exponent and mantissa of a sign-extended float16 that was shifted left by 13."""
REBIAS = np.float32(2.0**112)
"""float32's exponent bias is 112 more than float16's."""
TINY = np.array([1], np.int32).view(np.float32)
"""A subnormal, to see whether this thread flushes subnormals to zero (torch can ask for that)."""
FP16_LIMIT = 16384.0
"""Calibrated absmax up to which a float32 or float16 layer is kept in float16."""
STORED_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
"""Logical dtype of a residual array -> dtype of its bytes (zarr has no bfloat16)."""
LARGEST = {"float16": 65504.0, "bfloat16": 3.3961773e38}
"""Largest value that a dtype does not round to infinity (float16 would round 65519 down)."""


def decode_rows(stored: np.ndarray, logical_dtype: str) -> np.ndarray:
    """Rows as float32 (exact for float16 and bfloat16); integers are left as they are."""
    if logical_dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if stored.dtype.kind == "f":
        return stored.astype(np.float32, copy=False)
    return stored


def encode_rows(values: np.ndarray, logical_dtype: str) -> np.ndarray:
    """float32 rows in the stored dtype, rounded to nearest, ties to even."""
    if logical_dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return values.astype(np.dtype(logical_dtype), copy=False)


def decode_rows_into(stored: np.ndarray, logical_dtype: str, out: np.ndarray) -> None:
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


@dataclass(frozen=True)
class ValueRange:
    """How large the values of an array were on the calibrated rows, and what float16 costs them."""

    absmax: float = 0.0
    """Largest |value|."""
    float16_loss: float = 0.0
    """Largest error of a row's values in float16, relative to the row's largest |value|."""

    def joined(self, other: "ValueRange") -> "ValueRange":
        """The range of both."""
        loss = max(self.float16_loss, other.float16_loss)
        return ValueRange(max(self.absmax, other.absmax), loss)


def choose_dtype(values: ValueRange, compute_dtype: str, policy: str) -> str:
    """Stored dtype of a layer: never one that the calibrated values do not fit.

    Under `auto`: bfloat16 where the model ran in it, or where values are large; float32 where
    float16 would lose more of small values than its rounding.
    """
    if policy != "auto":
        return policy
    if compute_dtype == "bfloat16":
        return "bfloat16"
    if values.absmax > LARGEST["bfloat16"]:
        return "float32"
    if values.absmax > FP16_LIMIT:
        return "bfloat16"
    return "float16" if values.float16_loss <= FP16_ROUNDING else "float32"

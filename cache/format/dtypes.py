"""Stored and logical dtypes of residual arrays: encoding, decoding, and the choice per layer.

numpy and zarr have no bfloat16: its bits (the upper half of a float32) are stored as uint16.
`CacheArray` decodes, `PartWriter` encodes, and the model's checks choose dtypes before extraction.
"""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

STORED_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
"""Logical dtype of a residual array -> numpy dtype of its bytes."""
LARGEST = {"float16": 65504.0, "bfloat16": 3.3961773e38}
"""Largest value that a dtype does not round to infinity (float16 would round 65519 down)."""
FP16_LIMIT = 16384.0
"""Calibrated absmax up to which a float32 or float16 layer is stored in float16."""
FP16_ROUNDING = 1.001 * 2.0**-11
"""Largest rounding error of float16, relative to a row's largest |value|; numbers below 6e-5, for
which float16 has fewer bits, lose more."""
BLOCK = 1 << 15
"""Values that `decode_rows_into` decodes at a time, few enough for the processor's cache."""
FEW_BYTES = 1 << 20
"""Largest size of rows that `decoded_copy` lets torch make memory for; numpy's has large pages."""
FLOAT16_BITS = np.int32(-0x7000_0001)
"""Mask of sign, exponent and mantissa of a sign-extended float16 shifted left by 13."""
FLOAT16_REBIAS = np.float32(2.0**112)
"""Factor that rebiases the exponent: float32's bias is 112 more than float16's."""
SUBNORMAL = np.array([1], np.int32).view(np.float32)
"""The smallest float32; a product of it is 0 in threads that flush subnormals (torch can ask for
that)."""


def decode_rows(stored: np.ndarray, logical_dtype: str) -> np.ndarray:
    """Decode `stored` rows to float32 (exact for float16 and bfloat16); integers stay integers."""
    if logical_dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if stored.dtype.kind == "f":
        return stored.astype(np.float32, copy=False)
    return stored


def encode_rows(values: np.ndarray, logical_dtype: str) -> np.ndarray:
    """Encode float32 rows in the stored dtype of `logical_dtype`, to nearest, ties to even."""
    if logical_dtype == "bfloat16":
        # Adding half of the last kept bit's weight rounds; the kept bit itself decides ties.
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return values.astype(np.dtype(logical_dtype), copy=False)


def decoded_copy(stored: np.ndarray, logical_dtype: str, is_finite: bool = False) -> np.ndarray:
    """`stored` rows as a new C-contiguous array: floats as float32, integers as they are.

    As `decode_rows_into` decodes, and somewhat quicker where the rows are few: then torch makes the
    memory too, and begins it at a multiple of 64 bytes.
    """
    is_half = logical_dtype in ("bfloat16", "float16")
    is_exact = is_finite or logical_dtype == "bfloat16"
    torch: Any = sys.modules.get("torch")
    if is_half and is_exact and stored.nbytes <= FEW_BYTES and hasattr(torch, "from_numpy"):
        return _as_tensor(torch, stored, logical_dtype).float().numpy()
    is_float = is_half or stored.dtype.kind == "f"
    out = np.empty(stored.shape, np.float32 if is_float else stored.dtype)
    decode_rows_into(stored, logical_dtype, out, is_finite)
    return out


def decode_rows_into(
    stored: np.ndarray, logical_dtype: str, out: np.ndarray, is_finite: bool = False
) -> None:
    """Decode `stored` rows into `out` of the same shape, exactly; both C-contiguous.

    By torch, whose cast is the processor's own, where the program has loaded torch; by numpy else.
    Torch sets the quiet bit of float16's NaNs, so rows with one are numpy's. `is_finite` says that
    there is none, and spares the look. Read-only rows cost some microseconds more, unless they are
    a `writable_view`.
    """
    if logical_dtype not in ("bfloat16", "float16") or out.dtype != np.float32:
        out[...] = stored
        return
    torch: Any = sys.modules.get("torch")
    is_loaded = hasattr(torch, "from_numpy")  # else another thread may be importing it now
    is_exact = is_finite or logical_dtype == "bfloat16"
    if is_loaded and (is_exact or not _has_nonfinite_float16(stored)):
        torch.from_numpy(out).copy_(_as_tensor(torch, stored, logical_dtype))
        return
    flat, target = stored.reshape(-1), out.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        block, decoded = flat[start : start + BLOCK], target[start : start + BLOCK]
        if logical_dtype == "bfloat16":
            _decode_bfloat16(block, decoded)
        else:
            _decode_float16(block, decoded, is_finite)


def writable_view(array: np.ndarray) -> np.ndarray:
    """A view of a read-only `array` that is flagged as writable, since torch warns of others.

    Nothing may be written to it: where the array is a map of a file, that would kill the process.
    """
    return np.asarray(_WritableFlag(array))


class _WritableFlag:
    """The memory of an array as numpy's interface describes it, but for the flag."""

    def __init__(self, array: np.ndarray) -> None:
        interface = array.__array_interface__
        address, _ = interface["data"]
        self.__array_interface__ = {**interface, "data": (address, False)}
        self._array = array  # keeps the memory alive


def _has_nonfinite_float16(stored: np.ndarray) -> bool:
    """Whether an infinity or a NaN is among the float16 numbers `stored`."""
    if not stored.size:
        return False
    # Of the bits, positive ones are the largest as int16, negative ones as uint16.
    return stored.view(np.int16).max() >= 0x7C00 or stored.view(np.uint16).max() >= 0xFC00


def _as_tensor(torch: Any, stored: np.ndarray, logical_dtype: str) -> Any:
    """The memory of `stored`, bfloat16 or float16, as a tensor; it may be read-only."""
    if not stored.flags.writeable:
        stored = writable_view(stored)
    if logical_dtype == "bfloat16":
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)


def _decode_bfloat16(stored: np.ndarray, out: np.ndarray) -> None:
    """Move the bits of bfloat16 into the upper half of float32."""
    bits = out.view(np.uint32)
    bits[...] = stored
    np.left_shift(bits, 16, out=bits)


def _decode_float16(stored: np.ndarray, out: np.ndarray, is_finite: bool) -> None:
    """Shift the bits of float16 into those of float32, then rebias the exponent by one product.

    F. Giesen, "Half to float done quic(k)", 2012; several times faster than numpy's cast.
    """
    # numpy's cast for infinities and NaNs of either sign, which would come out finite, and in
    # threads that flush subnormals.
    has_nonfinite = not is_finite and _has_nonfinite_float16(stored)
    if has_nonfinite or (SUBNORMAL * FLOAT16_REBIAS)[0] == 0:
        out[...] = stored
        return
    bits = out.view(np.int32)
    bits[...] = stored.view(np.int16)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, FLOAT16_BITS, out=bits)
    np.multiply(out, FLOAT16_REBIAS, out=out)


@dataclass(frozen=True)
class ValueRange:
    """Size of an array's values on the calibrated rows, and their error in float16."""

    absmax: float = 0.0
    """Largest |value|."""
    float16_loss: float = 0.0
    """Largest error of a row's values in float16, relative to the row's largest |value|."""

    def joined(self, other: "ValueRange") -> "ValueRange":
        """The range of the rows of both."""
        loss = max(self.float16_loss, other.float16_loss)
        return ValueRange(max(self.absmax, other.absmax), loss)


def choose_dtype(values: ValueRange, compute_dtype: str, policy: str) -> str:
    """Choose the logical dtype of a layer from its calibrated values and the user's `policy`.

    Any policy but `auto` is the dtype itself. `auto` gives bfloat16 if the model ran in bfloat16,
    or values are too large for float16; float32 if they are too large for bfloat16, or float16
    would lose more of a row than its rounding; else float16.
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

"""Between stored and logical dtypes: bfloat16 is kept as the uint16 of its upper bits."""

import numpy as np


def decode(stored: np.ndarray, logical_dtype: str) -> np.ndarray:
    """Rows as float32 (exact for float16 and bfloat16); integers are left as they are."""
    if logical_dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if stored.dtype.kind == "f":
        return stored.astype(np.float32, copy=False)
    return stored


def encode(values: np.ndarray, logical_dtype: str) -> np.ndarray:
    """float32 rows in the stored dtype, rounded to nearest, ties to even."""
    if logical_dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return values.astype(np.dtype(logical_dtype), copy=False)

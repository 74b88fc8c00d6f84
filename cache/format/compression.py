"""Compression of one chunk in caches of `codec="compact"`: byte shuffle, then zstd.

The codecs `numcodecs.shuffle` and `zstd` of zarr: bytes of equal significance side by side
compress better. `shuffle_bytes` gives the bytes of numcodecs' shuffle at twice its speed. Used by
`compressed_shard.py` and `remote_shard.py`.
"""

from functools import cache
from typing import Any

import numpy as np

from ..errors import CorruptError, UsageError

CODECS = ("raw", "compact")
"""Values of the option `codec`: chunks uncompressed, or compressed as in this file."""
LEVEL = 1
"""zstd level; higher ones gain a few percent of float16 rows for several times the time."""
BLOCK = 1 << 16
"""Values that `decompress` unshuffles at a time, few enough for the processor's cache."""


def check_codec(codec: str) -> None:
    """Raise `UsageError` unless `codec` is one of `CODECS`."""
    if codec not in CODECS:
        raise UsageError(f"codec {codec!r} is unknown; choose one of {', '.join(CODECS)}")


def is_compact(codecs: list[dict[str, Any]], itemsize: int) -> bool:
    """Whether the inner codecs of a shard, from `zarr.json`, are those of `compress_chunk`."""
    if [codec["name"] for codec in codecs] != ["bytes", "numcodecs.shuffle", "zstd", "crc32c"]:
        return False
    to_bytes, shuffle = (codec.get("configuration", {}) for codec in codecs[:2])
    is_little_endian = to_bytes.get("endian", "little") == "little"
    return is_little_endian and shuffle.get("elementsize", 4) == itemsize


def compress_chunk(rows: np.ndarray) -> bytes:
    """Compress the C-contiguous `rows` of a chunk into one zstd frame, without a checksum."""
    return _zstd().encode(shuffle_bytes(rows))


def shuffle_bytes(rows: np.ndarray) -> np.ndarray:
    """Reorder bytes, `(n,)` uint8: the first byte of every value, then all second bytes, ..."""
    values = np.ascontiguousarray(rows).reshape(-1)
    planes = np.empty((values.itemsize, values.size), np.uint8)
    planes[...] = values.view(np.uint8).reshape(values.size, values.itemsize).T
    return planes.reshape(-1)


def decompress(payload: np.ndarray, out: np.ndarray) -> None:
    """Decompress the frame `payload` of `compress_chunk` into `out`, C-contiguous.

    Raises `CorruptError` if the frame is damaged or of another size.
    """
    try:
        shuffled = np.frombuffer(_zstd().decode(payload), np.uint8)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise CorruptError(f"a chunk does not decompress: {error}") from None
    if shuffled.size != out.nbytes:
        raise CorruptError(f"a chunk holds {shuffled.size} bytes, not {out.nbytes}")

    # Assemble each value from its bytes, from the most significant (the last plane) down.
    planes = shuffled.reshape(out.itemsize, -1)
    values = out.reshape(-1).view(f"<u{out.itemsize}")
    for start in range(0, values.size, BLOCK):
        block = slice(start, start + BLOCK)
        target = values[block]
        target[...] = planes[-1, block]
        for plane in planes[-2::-1]:
            target <<= 8
            target |= plane[block]


@cache
def _zstd() -> Any:
    """The zstd codec; numcodecs is imported only where a cache is compressed."""
    from numcodecs.zstd import Zstd

    return Zstd(level=LEVEL)

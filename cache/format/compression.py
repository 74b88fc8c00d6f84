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
FRAME_HEADER_BYTES = 18
"""Most bytes of the header of a zstd frame."""
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

    Raises `CorruptError` if the frame is damaged or of another size, which the frame says before
    memory is taken for its content.
    """
    if (size := frame_content_size(payload[:FRAME_HEADER_BYTES].tobytes())) != out.nbytes:
        content = "an unknown number of" if size is None else size
        raise CorruptError(f"a chunk holds {content} bytes, not {out.nbytes}")
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


def frame_content_size(header: bytes) -> int | None:
    """Bytes that a zstd frame says to hold, from its first `FRAME_HEADER_BYTES` bytes.

    None if the frame does not say it, or the bytes are no frame (RFC 8878, section 3.1.1.1).
    """
    if header[:4] != b"\x28\xb5\x2f\xfd" or len(header) < 5:
        return None
    # The descriptor tells the sizes of the window's, dictionary's and content's fields.
    descriptor = header[4]
    is_single_segment = bool(descriptor & 0x20)
    start = 5 + (not is_single_segment) + (0, 1, 2, 4)[descriptor & 3]
    width = (int(is_single_segment), 2, 4, 8)[descriptor >> 6]
    field = header[start : start + width]
    if not width or len(field) < width:
        return None
    return int.from_bytes(field, "little") + (256 if width == 2 else 0)


@cache
def _zstd() -> Any:
    """The zstd codec; numcodecs is imported only where a cache is compressed."""
    from numcodecs.zstd import Zstd

    return Zstd(level=LEVEL)

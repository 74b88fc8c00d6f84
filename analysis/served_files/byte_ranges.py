"""Byte ranges of an HTTP request (RFC 9110, section 14): parsed, checked, joined.

`byte_routes.py` of the service asks `select_ranges` which bytes a request is for.
"""

import re
from typing import NamedTuple

MAX_RANGES = 128
"""Most ranges of one request; a request for more is refused."""
MAX_OVERLAPS = 2
"""Most ranges that may overlap the one before them; more are a mistake or an attack."""
PART_OVERHEAD = 100
"""Ranges with a smaller gap, in bytes, are sent as one: a part of its own would need more."""
_UNIT = re.compile(r"[ \t]*bytes[ \t]*=(.*)", re.ASCII | re.IGNORECASE | re.DOTALL)
_RANGE = re.compile(r"(\d{0,18})-(\d{0,18})", re.ASCII)
MAX_HEADER = 41 * MAX_RANGES
"""Longest header, in characters: so many ranges of two numbers of 18 digits each."""


class ByteRange(NamedTuple):
    """Bytes `start:stop` of an object."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


def select_ranges(header: str | None, size: int) -> list[ByteRange] | None:
    """The ranges of the header `Range` in an object of `size` bytes, in the order of the request.

    None means the whole object: no header, or another unit than bytes. An empty list means that
    the request is refused: no range lies in the object, the header is malformed, or asks for more
    than `MAX_RANGES` or for overlapping ranges. Ranges that overlap or nearly touch are joined,
    and are then in ascending order.
    """
    if header is None or (match := _UNIT.fullmatch(header)) is None:
        return None
    if len(header) > MAX_HEADER:
        return []
    texts = [text.strip(" \t") for text in match[1].split(",")]
    texts = [text for text in texts if text]  # empty elements of a list are allowed
    ranges = []
    for text in texts:
        if (pair := _RANGE.fullmatch(text)) is None or pair[0] == "-":
            return []
        first, last = pair[1], pair[2]
        if first and last and int(first) > int(last):
            return []
        if not first:
            start, stop = max(0, size - int(last)), size
        else:
            start, stop = int(first), min(int(last) + 1, size) if last else size
        if start < stop:
            ranges.append(ByteRange(start, stop))
    if len(texts) > MAX_RANGES or _count_overlaps(ranges) > MAX_OVERLAPS:
        return []
    return join_ranges(ranges)


def _count_overlaps(ranges: list[ByteRange]) -> int:
    """Number of ranges that begin before the end of a range that begins no later."""
    count, end = 0, 0
    for start, stop in sorted(ranges):
        count += start < end
        end = max(end, stop)
    return count


def join_ranges(ranges: list[ByteRange], gap: int = PART_OVERHEAD) -> list[ByteRange]:
    """`ranges` with those that overlap, or lie at most `gap` bytes apart, joined to one.

    In ascending order if any are joined, else in the order given.
    """
    joined: list[ByteRange] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1].stop + gap:
            joined[-1] = ByteRange(joined[-1].start, max(joined[-1].stop, stop))
        else:
            joined.append(ByteRange(start, stop))
    return joined if len(joined) < len(ranges) else ranges

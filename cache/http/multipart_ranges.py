"""Bodies of HTTP answers with several byte ranges (`multipart/byteranges`), read strictly.

The parts come from a server that is not trusted: every length is compared with the bytes that
came, and nothing is allocated by a number that the server sent.
"""

import re
from typing import NamedTuple

_BOUNDARY = re.compile(
    r'multipart/byteranges\s*;\s*boundary="?([A-Za-z0-9\'()+_,./:=? -]{1,70})"?\s*', re.IGNORECASE
)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.IGNORECASE)
MAX_PART_HEADER = 4096
"""Longest header of a part, in bytes."""


class ContentRange(NamedTuple):
    """The header `Content-Range`: bytes `start:stop` of an object of `size` bytes."""

    start: int
    stop: int
    size: int | None
    """None if the server does not say it."""


class BodyFormatError(Exception):
    """An answer that is not what HTTP allows; the message says which part of it."""


def parse_content_range(header: str | None) -> ContentRange:
    """The numbers of a header `Content-Range`; raises `BodyFormatError` for any other text."""
    match = _CONTENT_RANGE.fullmatch((header or "").strip())
    if match is None:
        raise BodyFormatError(f"its Content-Range is {(header or 'missing')[:80]!r}")
    start, stop = int(match[1]), int(match[2]) + 1
    size = None if match[3] == "*" else int(match[3])
    if start >= stop or (size is not None and stop > size):
        raise BodyFormatError(f"its Content-Range is {match[0]!r}")
    return ContentRange(start, stop, size)


def parse_boundary(content_type: str | None) -> bytes | None:
    """The boundary of a body of several ranges; None for any other type of content."""
    match = _BOUNDARY.fullmatch((content_type or "").strip())
    return match[1].strip().encode() if match else None


def parse_parts(body: bytes, boundary: bytes) -> list[tuple[ContentRange, memoryview]]:
    """The parts of `body`: range and bytes of each.

    Raises `BodyFormatError` unless each part has as many bytes as its range, and the last is
    followed by the end of the body.
    """
    view, delimiter, parts = memoryview(body), b"--" + boundary, []
    position = body.find(delimiter)
    if position < 0:
        raise BodyFormatError("its body has no part")
    while True:
        position += len(delimiter)
        if body[position : position + 2] == b"--":
            return parts
        end = body.find(b"\r\n\r\n", position, position + MAX_PART_HEADER)
        if end < 0:
            raise BodyFormatError("a part of its body has no end of its header")
        header = body[position:end].decode("latin-1")
        content_range = _range_of_part(header)
        start, stop = end + 4, end + 4 + content_range.stop - content_range.start
        if stop > len(body):
            raise BodyFormatError("a part of its body is cut short")
        parts.append((content_range, view[start:stop]))
        if body[stop : stop + 2 + len(delimiter)] != b"\r\n" + delimiter:
            raise BodyFormatError("a part of its body is longer than its range")
        position = stop + 2


def _range_of_part(header: str) -> ContentRange:
    """The range in the header of a part."""
    for line in header.split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-range":
            return parse_content_range(value)
    raise BodyFormatError("a part of its body has no Content-Range")

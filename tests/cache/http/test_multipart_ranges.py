"""Bodies of several ranges are read as they are meant, and no other bodies are read at all."""

import random

import pytest

from residua.cache.http.multipart_ranges import (
    BodyFormatError,
    ContentRange,
    parse_boundary,
    parse_content_range,
    parse_parts,
)


def body_of(parts: list[tuple[int, bytes]], boundary: str = "xyz", end: str = "--") -> bytes:
    body = b""
    for start, data in parts:
        body += f"\r\n--{boundary}\r\nContent-Type: a/b\r\n".encode()
        body += f"content-range: bytes {start}-{start + len(data) - 1}/100000\r\n\r\n".encode()
        body += data
    return (body + f"\r\n--{boundary}{end}\r\n".encode())[2:]


def test_parts_have_their_ranges_and_bytes_whatever_these_are() -> None:
    rng = random.Random(0)
    for _ in range(200):
        parts = [
            (rng.randrange(10_000), rng.choice([b"\r\n--xy", b"--xyz", rng.randbytes(30)]) * 3)
            for _ in range(rng.randint(1, 5))
        ]
        read = parse_parts(body_of(parts), b"xyz")
        assert [(r.start, r.stop, bytes(d)) for r, d in read] == [
            (start, start + len(data), data) for start, data in parts
        ]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no part",
        body_of([(0, b"abc")], end=""),
        body_of([(0, b"abc")])[:-12],
        body_of([(0, b"abc")]).replace(b"abc", b"ab"),
        body_of([(0, b"abc")]).replace(b"abc", b"abcd"),
        body_of([(0, b"abc")]).replace(b"content-range", b"content-rang"),
        body_of([(0, b"abc")]).replace(b"0-2", b"0-999999999999"),
        body_of([(0, b"abc")]).replace(b"0-2", b"2-0"),
        body_of([(0, b"abc")]).replace(b"\r\n\r\n", b"\r\n" + b"x" * 5000),
    ],
)
def test_a_body_that_does_not_keep_its_word_is_refused(body: bytes) -> None:
    with pytest.raises(BodyFormatError):
        parse_parts(body, b"xyz")


def test_random_changes_of_a_body_give_an_error_or_parts_inside_it() -> None:
    rng = random.Random(1)
    whole = body_of([(0, b"abcdef" * 5), (500, b"xyz" * 9), (900, b"")][:2])
    for _ in range(3000):
        body = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            position = rng.randrange(len(body))
            body[position : position + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        try:
            parts = parse_parts(bytes(body), b"xyz")
        except BodyFormatError:
            continue
        assert all(len(data) == given.stop - given.start for given, data in parts)


def test_content_ranges_and_boundaries_are_read_strictly() -> None:
    assert parse_content_range("bytes 5-9/100") == ContentRange(5, 10, 100)
    assert parse_content_range(" bytes 5-9/* ") == ContentRange(5, 10, None)
    for text in (
        None,
        "",
        "bytes 5-4/9",
        "bytes 5-9/9",
        "bytes */9",
        "items 0-1/2",
        "bytes -1-2/3",
    ):
        with pytest.raises(BodyFormatError):
            parse_content_range(text)
    assert parse_boundary('multipart/byteranges; boundary="a b"') == b"a b"
    assert parse_boundary("Multipart/Byteranges;boundary=ab") == b"ab"
    for text in (
        None,
        "text/plain",
        "multipart/byteranges",
        "multipart/byteranges; boundary=" + "a" * 71,
    ):
        assert parse_boundary(text) is None

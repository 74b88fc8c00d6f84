"""Byte ranges of RFC 9110: which bytes a header is for, and which headers are refused."""

import random

import pytest

from residua.analysis.served_files.byte_ranges import (
    MAX_RANGES,
    ByteRange,
    join_ranges,
    select_ranges,
)


@pytest.mark.parametrize(
    ("header", "ranges"),
    [
        (None, None),
        ("items=0-5", None),  # another unit: the header counts for nothing
        ("bytes=0-9", [(0, 10)]),
        ("Bytes = 0-9", [(0, 10)]),
        ("bytes=990-", [(990, 1000)]),
        ("bytes=990-5000", [(990, 1000)]),
        ("bytes=-10", [(990, 1000)]),
        ("bytes=-5000", [(0, 1000)]),
        ("bytes=999-999", [(999, 1000)]),
        ("bytes=0-0, ,500-500", [(0, 1), (500, 501)]),
        ("bytes=500-509,0-9", [(500, 510), (0, 10)]),  # far apart: in the order of the request
        ("bytes=500-509,0-9,505-600", [(0, 10), (500, 601)]),
        ("bytes=0-9,10-19", [(0, 20)]),
        ("bytes=0-9,2000-", [(0, 10)]),  # one range lies in the object
        ("bytes=1000-", []),
        ("bytes=-0", []),
        ("bytes=9-0", []),
        ("bytes=", []),
        ("bytes=-", []),
        ("bytes=a-b", []),
        ("bytes=0x1-5", []),
        ("bytes=1-2-3", []),
        ("bytes=+1-2", []),
        ("bytes=\u0661-\u0662", []),  # digits, and not those of HTTP
        (f"bytes=0-{'9' * 5000}", []),
        ("bytes=" + "0-," * MAX_RANGES, []),
        ("bytes=" + ",".join(f"{200 * n}-{200 * n}" for n in range(MAX_RANGES + 1)), []),
        ("bytes=0-,0-,0-,0-", []),
    ],
)
def test_a_header_selects_these_bytes(
    header: str | None, ranges: list[tuple[int, int]] | None
) -> None:
    assert select_ranges(header, 1000) == ranges


def test_an_empty_object_has_no_range() -> None:
    assert select_ranges("bytes=0-", 0) == []
    assert select_ranges("bytes=-1", 0) == []
    assert select_ranges(None, 0) is None


def test_selected_ranges_have_exactly_the_bytes_of_the_header() -> None:
    """Against a plain reading of the header, byte by byte; joined gaps aside."""
    rng = random.Random(0)
    size = 2000
    for _ in range(2000):
        texts, expected = [], set()
        for _ in range(rng.randint(1, 4)):
            first, length = rng.randrange(size + 200), rng.randint(1, 60)
            kind = rng.choice(["both", "suffix", "open"])
            if kind == "both":
                texts.append(f"{first}-{first + length - 1}")
                expected |= set(range(first, min(first + length, size)))
            elif kind == "suffix":
                texts.append(f"-{length}")
                expected |= set(range(size - length, size))
            else:
                texts.append(f"{first}-")
                expected |= set(range(first, size))
        ranges = select_ranges("bytes=" + ",".join(texts), size)
        if ranges == []:  # none lies in the object, or more than two overlap
            assert not expected or len(texts) > 2
            continue
        assert ranges is not None
        selected = [byte for part in ranges for byte in range(part.start, part.stop)]
        assert len(selected) == len(set(selected))
        assert expected <= set(selected)
        assert all(0 <= part.start < part.stop <= size for part in ranges)


def test_joined_ranges_lie_further_apart_than_the_gap() -> None:
    rng = random.Random(1)
    for _ in range(500):
        starts = [rng.randrange(5000) for _ in range(rng.randint(1, 8))]
        ranges = [ByteRange(start, start + rng.randint(1, 300)) for start in starts]
        joined = sorted(join_ranges(ranges, gap=50))
        assert all(b.start > a.stop + 50 for a, b in zip(joined, joined[1:], strict=False))
        assert all(any(j.start <= r.start and r.stop <= j.stop for j in joined) for r in ranges)

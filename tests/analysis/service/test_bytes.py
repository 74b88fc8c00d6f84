"""Bytes over HTTP: ranges, entity tags, caching, listings, hostile paths, other clients."""

import email
import email.policy
import http.client
import os
import random
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest

import residua
from residua.analysis.service.server import ServiceServer
from residua.cache.store.activation_cache import ActivationCache

from ...support.services import running_service
from ...support.synthetic import make_cache, random_head

SECRET = b"a secret outside of what is served"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(640, 8)).astype(np.float32) for _ in range(2)]
    folder = tmp_path_factory.mktemp("bytes")
    made = make_cache(folder / "root", layers, [40] * 16, random_head(8, 32))
    (folder / "secret").write_bytes(SECRET)
    (made.path / "local.json").write_bytes(SECRET)
    (made.path / "head" / "link.json").symlink_to(folder / "secret")
    (made.path / "leases" / "00000000.lock").parent.mkdir(exist_ok=True)
    (made.path / "leases" / "00000000.lock").write_bytes(b"1 here\n")
    return made


@pytest.fixture(scope="module")
def server(cache: ActivationCache) -> Any:
    with running_service(cache.path.parent) as running:
        yield running


@pytest.fixture(scope="module")
def shard(server: ServiceServer, cache: ActivationCache) -> tuple[str, bytes]:
    """URL and bytes of a committed shard."""
    name = "arrays.zarr/residual/1/c/1/0"
    return f"{server.address}/caches/{cache.id}/{name}", (cache.path / name).read_bytes()


def get(url: str, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.get(url, headers=named, timeout=20)


def parts_of(response: httpx.Response) -> list[tuple[str, bytes]]:
    """Content-Range and bytes of each part, by Python's own parser of MIME."""
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + response.content, policy=email.policy.HTTP)
    return [
        (str(part["Content-Range"]), part.get_payload(decode=True))  # pyright: ignore[reportReturnType]
        for part in message.iter_parts()  # pyright: ignore[reportAttributeAccessIssue]
    ]


def test_a_whole_object_comes_with_its_length_and_tag(
    shard: tuple[str, bytes], cache: ActivationCache
) -> None:
    url, data = shard
    response = get(url)
    assert response.status_code == 200
    assert response.content == data
    assert response.headers["content-length"] == str(len(data))
    record = cache.journal.parts()[1].arrays["residual/1"]
    assert response.headers["etag"] == f'"{record.crc32c:08x}-{record.bytes:x}"'
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"
    head = httpx.head(url, headers={"Range": "bytes=0-1"})
    assert (head.status_code, head.content) == (200, b"")
    dropped = ("date",)
    assert [h for h in head.headers.items() if h[0] not in dropped] == [
        h for h in response.headers.items() if h[0] not in dropped
    ]


def test_single_and_suffix_ranges_are_the_bytes_asked_for(shard: tuple[str, bytes]) -> None:
    url, data = shard
    size = len(data)
    for header, start, stop in (
        ("bytes=0-0", 0, 1),
        ("bytes=5-99", 5, 100),
        (f"bytes={size - 1}-{size + 5}", size - 1, size),
        ("bytes=100-", 100, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=-{size * 2}", 0, size),
    ):
        response = get(url, Range=header)
        assert response.status_code == 206
        assert response.content == data[start:stop]
        assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"


def test_several_ranges_come_as_parts_that_any_parser_reads(shard: tuple[str, bytes]) -> None:
    url, data = shard
    response = get(url, Range="bytes=4000-4999, 0-9, -5")
    assert response.status_code == 206
    assert response.headers["content-type"].startswith("multipart/byteranges; boundary=")
    assert "content-range" not in response.headers
    size = len(data)
    assert parts_of(response) == [
        (f"bytes 4000-4999/{size}", data[4000:5000]),
        (f"bytes 0-9/{size}", data[:10]),
        (f"bytes {size - 5}-{size - 1}/{size}", data[-5:]),
    ]
    joined = get(url, Range="bytes=0-9,10-19")
    assert joined.headers["content-range"] == f"bytes 0-19/{size}"
    assert joined.content == data[:20]


@pytest.mark.parametrize(
    "header",
    [
        "bytes=99999999-",
        "bytes=-0",
        "bytes=5-1",
        "bytes=x",
        "bytes=0-,0-,0-,0-",
        "bytes=" + "1-,2-," * 100,
    ],
)
def test_ranges_that_cannot_be_given_are_416(shard: tuple[str, bytes], header: str) -> None:
    url, data = shard
    response = get(url, Range=header)
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{len(data)}"
    assert response.json()["code"] == "range_not_satisfiable"
    assert get(url, Range="lines=1-2").content == data


def test_known_objects_are_not_sent_again(shard: tuple[str, bytes]) -> None:
    url, data = shard
    first = get(url)
    tag, date = first.headers["etag"], first.headers["last-modified"]
    for tags in (tag, f'"a", W/{tag} ,"b"', "*", f'"x",{tag}'):
        response = get(url, If_None_Match=tags)
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == tag
        assert "cache-control" in response.headers
    for tags in ('"other"', tag.strip('"'), "W/", ""):
        assert get(url, If_None_Match=tags).content == data
    assert get(url, If_Modified_Since=date).status_code == 304
    assert get(url, If_Modified_Since="Sun, 06 Nov 1994 08:49:37 GMT").content == data
    assert get(url, If_Modified_Since="yesterday").content == data
    # The tag counts before the date.
    assert get(url, If_None_Match='"other"', If_Modified_Since=date).status_code == 200
    assert get(url, If_Match='"other"').status_code == 412
    assert get(url, If_Match=f'"other", {tag}').content == data


def test_a_range_holds_for_the_object_that_the_client_has_a_part_of(
    shard: tuple[str, bytes], cache: ActivationCache
) -> None:
    url, data = shard
    first = get(url)
    tag = first.headers["etag"]
    assert get(url, Range="bytes=0-4", If_Range=tag).content == data[:5]
    for other in ('"other"', f"W/{tag}", "Sun, 06 Nov 1994 08:49:37 GMT", "nonsense"):
        response = get(url, Range="bytes=0-4", If_Range=other)
        assert (response.status_code, response.content) == (200, data)
    # A date is exact to the second: it counts once the second is long over.
    modified = first.headers["last-modified"]
    assert get(url, Range="bytes=0-4", If_Range=modified).status_code == 200
    path = cache.path / "provenance.json"
    old = time.time() - 3600
    os.utime(path, (old, old))
    other = url.partition("/arrays.zarr")[0] + "/provenance.json"
    modified = get(other).headers["last-modified"]
    assert get(other, Range="bytes=0-4", If_Range=modified).status_code == 206


def test_only_committed_shards_are_kept_by_caches(
    server: ServiceServer, cache: ActivationCache
) -> None:
    base = f"{server.address}/caches/{cache.id}/"
    for name in ("manifest.json", "journal/base.json", "journal/00000000.json", "", "journal/"):
        assert get(base + name).headers["cache-control"] == "no-cache", name
    assert get(base + "leases/00000000.lock").headers["cache-control"] == "no-store"
    table = get(base + "arrays.zarr/tokens/ids/c/0")
    assert table.headers["cache-control"].endswith("immutable")
    with running_service(cache.path.parent, private=True) as private:
        token = {"Authorization": f"Bearer {private.service.tokens.read}"}
        url = f"{private.address}/caches/{cache.id}/arrays.zarr/tokens/ids/c/0"
        assert httpx.get(url).status_code == 401
        answer = httpx.get(url, headers=token)
        assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"


def test_pages_of_other_origins_read_what_the_owner_allows(
    shard: tuple[str, bytes], cache: ActivationCache
) -> None:
    url, data = shard
    response = get(url, Origin="http://localhost:3000", Range="bytes=0-9")
    assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
    exposed = response.headers["access-control-expose-headers"]
    assert {"Content-Range", "ETag", "Accept-Ranges"} <= set(exposed.split(", "))
    assert "access-control-allow-origin" not in get(url, Origin="https://example.org").headers
    preflight = httpx.options(
        url,
        headers={
            "Origin": "http://localhost:3000",
            "Access-Control-Request-Method": "GET",
            "Access-Control-Request-Headers": "range",
        },
    )
    assert preflight.status_code == 204
    assert "Range" in preflight.headers["access-control-allow-headers"]
    assert httpx.post(url, timeout=20).status_code == 405


def test_folders_are_listed_page_by_page(server: ServiceServer, cache: ActivationCache) -> None:
    base = f"{server.address}/caches/"
    assert get(base).json() == {"entries": [{"name": cache.id, "bytes": None}], "next": None}
    names = {entry["name"] for entry in get(f"{base}{cache.id}/").json()["entries"]}
    folders = {"arrays.zarr", "head", "journal", "leases", "moments"}
    assert names == {"manifest.json", "provenance.json", *folders}
    url, entries, after = f"{base}{cache.id}/", [], ""
    while after is not None:
        page = get(f"{url}?recursive=true&limit=5&after={quote(after)}").json()
        entries, after = entries + page["entries"], page["next"]
        assert len(page["entries"]) <= 5
    files = {p.relative_to(cache.path).as_posix(): p for p in cache.path.rglob("*") if p.is_file()}
    for hidden in ("local.json", "head/link.json"):
        del files[hidden]
    assert {e["name"]: e["bytes"] for e in entries} == {
        n: p.stat().st_size for n, p in files.items()
    }
    for query in ("limit=0", "limit=100001", "recursive=perhaps", "other=1"):
        assert get(f"{url}?{query}").status_code == 400
    assert get(f"{base}{cache.id}/nothing/").status_code == 404
    assert get(f"{base}?recursive=true").status_code == 404


def raw_request(server: ServiceServer, target: bytes) -> tuple[int, bytes]:
    """Status and body for a target of the request line that no client library touched."""
    port = server.service.settings.port
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, response.read()


def test_hostile_targets_get_an_error_and_nothing_else(
    server: ServiceServer, cache: ActivationCache
) -> None:
    rng = random.Random(0)
    cid = cache.id.encode()
    ways = [
        b"..", b"%2e%2e", b"%2E.", b".%2e", b"..%2f..", b"%2f", b"%5c", b"..%5c", b"%00", b"%c0%ae",
        b"%252e%252e", b"%u002e", b"%ef%bc%8e%ef%bc%8e", b"//", b"/", b"~root", b"%0d%0a", b"%",
        b"%zz", b"local.json", b".service/tokens.json", b"..;", b"%ff%fe", b"etc/passwd",
    ]  # fmt: skip
    targets = [
        b"/caches/" + cid + b"/local.json",
        b"/caches/" + cid + b"/head/link.json",
        b"/caches/.service/tokens.json",
        b"/probes/../.service/tokens.json",
        b"/caches/" + cid + b"/../../secret",
        b"/caches//etc/passwd",
        b"http://localhost/caches/../secret",
    ]
    for _ in range(400):
        parts = [b"caches", cid, b"head", b"head.json"]
        for _ in range(rng.randint(1, 3)):
            position = rng.randrange(1, len(parts) + 1)
            parts[position : position + rng.randint(0, 1)] = [rng.choice(ways)] * rng.randint(1, 3)
        targets.append(b"/" + b"/".join(parts))
    right = (cache.path / "head" / "head.json").read_bytes()
    statuses = set()
    for target in targets:
        status, body = raw_request(server, target)
        statuses.add(status)
        assert SECRET not in body, target
        assert server.service.tokens.write.encode() not in body, target
        assert b"root:" not in body, target
        assert status in (400, 404) or (status == 200 and (body == right or b"entries" in body)), (
            target
        )
        assert str(cache.path.parent).encode() not in body, target
    assert statuses >= {404}


def test_a_reader_that_goes_away_leaves_nothing_open(
    server: ServiceServer, shard: tuple[str, bytes]
) -> None:
    from residua.analysis.service.byte_routes import ByteResponse

    path = shard[0].partition("://")[2].partition("/")[2]
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.service.settings.port), 10) as client:
            client.sendall(f"GET /{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            client.recv(10)
    deadline = time.monotonic() + 10
    while ByteResponse.readers and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ByteResponse.readers == 0
    assert get(shard[0]).content == shard[1]


def test_a_plain_zarr_client_reads_the_arrays(
    server: ServiceServer, cache: ActivationCache
) -> None:
    import zarr

    url = f"{server.address}/caches/{cache.id}/arrays.zarr"
    group: Any = zarr.open_group(url, mode="r")
    assert np.array_equal(group["residual/1"][:], cache.residual_array(1)[:])
    assert np.array_equal(group["tokens/ids"][100:200], cache.tokens[100:200])


def test_large_objects_come_in_pieces_and_whole(tmp_path: Path) -> None:
    """Longer than a piece: the pieces follow each other, in ranges, too."""
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 1000, (1 << 14, 160)).astype(np.float32)
    made = make_cache(tmp_path, [rows], [1 << 14], random_head(160, 4), part_rows=1 << 14)
    name = "arrays.zarr/residual/0/c/0/0"
    data = (made.path / name).read_bytes()
    assert len(data) > 10 << 20
    with running_service(tmp_path) as server:
        url = f"{server.address}/caches/{made.id}/{name}"
        assert get(url).content == data
        assert get(url, Range="bytes=1000-9000000").content == data[1000:9_000_001]
        response = get(url, Range="bytes=1000-5000000,6000000-")
        assert [part for _, part in parts_of(response)] == [data[1000:5_000_001], data[6_000_000:]]


def test_a_root_in_an_object_store_is_served_alike(
    cache: ActivationCache, s3_root: str, tmp_path: Path
) -> None:
    from residua.cache.files.paths import as_path, upload_folder

    root = as_path(s3_root)
    upload_folder(cache.path, root / cache.id)
    shard = f"/caches/{cache.id}/arrays.zarr/residual/1/c/1/0"
    data = (cache.path / shard.split("/", 3)[3]).read_bytes()
    with running_service(root, state=tmp_path) as server:
        whole = get(server.address + shard)
        assert whole.content == data
        assert whole.headers["cache-control"].endswith("immutable")
        assert get(server.address + shard, Range="bytes=-7").content == data[-7:]
        response = get(server.address + shard, Range="bytes=0-9,5000-5009")
        assert [part for _, part in parts_of(response)] == [data[:10], data[5000:5010]]
        known = whole.headers["etag"]
        assert get(server.address + shard, If_None_Match=known).status_code == 304
        assert get(f"{server.address}/caches/{cache.id}/local.json").status_code == 404
        served = residua.open(f"{server.address}/caches/{cache.id}")
        assert np.array_equal(served.residual_array(0)[:], cache.residual_array(0)[:])
        assert served.complete

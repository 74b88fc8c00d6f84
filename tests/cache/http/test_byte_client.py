"""The client of a service: retries, tokens, and servers that answer wrongly or without end."""

import socket
import threading
import time
import tracemalloc
from collections.abc import Callable

import pytest

from residua.cache.errors import UnreachableError, UsageError
from residua.cache.http import byte_client as client_module
from residua.cache.http.byte_client import ByteClient, ObjectReplacedError, Span
from residua.cache.http.served_file_system import ServedFileSystem

from ...support.scripted_server import http_answer, range_answer, scripted_server

DATA = bytes(range(256)) * 64
Answer = Callable[[str, int], bytes]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT", 0.005)
    monkeypatch.delenv("RESIDUA_TOKEN", raising=False)


def test_spans_are_the_bytes_of_the_object() -> None:
    with scripted_server(lambda head, number: range_answer(DATA, head)) as server:
        client = ByteClient(server.address)
        assert client.read_range("/x", Span(5, 100)).data == DATA[5:100]
        assert client.read_range("/x", Span(-7)).data == DATA[-7:]
        assert client.read_range("/x", Span(len(DATA) - 3)).data == DATA[-3:]
        assert client.read_range("/x", Span(len(DATA), len(DATA) + 5)).data == b""
        assert client.read_range("/x", Span(10, 99_999)).size == len(DATA)


def test_a_server_without_ranges_gives_the_object_whole() -> None:
    with scripted_server(lambda head, number: http_answer("200 OK", DATA)) as server:
        client = ByteClient(server.address)
        assert client.read_range("/x", Span(5, 100)).data == DATA[5:100]
        assert client.read_spans("/x", [Span(5, 10), Span(500, 600)]) == [DATA[5:10], DATA[500:600]]


def test_a_body_that_is_cut_is_asked_for_again() -> None:
    def answer(head: str, number: int) -> bytes:
        whole = range_answer(DATA, head)
        return whole[: len(whole) // 2] if number < 3 else whole

    with scripted_server(answer) as server:
        assert ByteClient(server.address).read_range("/x", Span(0, 9000)).data == DATA[:9000]
        assert len(server.requests) == 4


@pytest.mark.parametrize("status", ["429 Too Many Requests", "502 Bad", "503 Busy", "504 Late"])
def test_a_busy_server_is_asked_again(status: str) -> None:
    def answer(head: str, number: int) -> bytes:
        return range_answer(DATA, head) if number else http_answer(status, b"{}", Retry_After="0")

    with scripted_server(answer) as server:
        assert ByteClient(server.address).read_range("/x", Span(0, 4)).data == DATA[:4]


def test_a_server_that_stays_away_is_one_clear_error() -> None:
    with scripted_server(lambda head, number: range_answer(DATA, head)) as server:
        client = ByteClient(server.address)
        client.read_range("/x", Span(0, 4))
    with pytest.raises(UnreachableError, match=r"no connection can be made \(6 trials\)"):
        client.read_range("/x", Span(0, 4))
    with pytest.raises(UnreachableError, match=r"\(2 trials\)"):  # it never was there
        ByteClient(server.address).read_range("/x", Span(0, 4))


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "READ_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = ByteClient(f"http://127.0.0.1:{listener.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(UnreachableError, match="no answer came"):
            client.read_range("/x", Span(0, 4))
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda head, number: http_answer("206 P", b"abcd", Content_Range=""), "Content-Range"),
        (
            lambda head, number: http_answer("206 P", b"abcd", Content_Range="bytes 0-9/20"),
            "bytes 0",
        ),
        (
            lambda head, number: http_answer("206 P", b"abcd", Content_Range="bytes 9-12/20"),
            "not those asked for",
        ),
        (
            lambda head, number: http_answer("206 P", b"abc", Content_Range="bytes 0-3/20"),
            "another length",
        ),
        (
            lambda head, number: http_answer(
                "206 P", b"ab", Content_Range="bytes 0-3/20", Content_Length=str(1 << 50)
            ),
            "at most 4",
        ),
        (
            lambda head, number: http_answer("200 OK", b"ab", Content_Length=str(1 << 50)),
            "at most",
        ),
        (lambda head, number: http_answer("200 OK", b"ab", Content_Length="-5"), "no length"),
        (
            lambda head, number: http_answer("200 OK", b"ab", Content_Length="9" * 40),
            "length|broke",
        ),
        (
            lambda head, number: http_answer(
                "200 OK", b"2\r\nab\r\n" * 100, Content_Length="", Transfer_Encoding="chunked"
            ),
            "no length",
        ),
        (lambda head, number: http_answer("200 OK", b"ab", Content_Encoding="gzip"), "encoded"),
        (lambda head, number: b"SSH-2.0-OpenSSH_9\r\n", "broke"),
        (lambda head, number: b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000, "broke"),
        (lambda head, number: b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, "broke"),
        (lambda head, number: b"", "broke"),
        (lambda head, number: http_answer("500 Oh", b""), "answers 500"),
        (lambda head, number: http_answer("204 No", b""), "answers 204"),
    ],
)
def test_answers_that_are_none_are_refused(answer: Answer, message: str) -> None:
    with scripted_server(answer) as server, pytest.raises(UnreachableError, match=message):
        ByteClient(server.address).read_range("/x", Span(0, 4))


def test_a_body_without_end_is_read_no_further_than_asked() -> None:
    """The server sends what it can; the memory of the client stays that of the range."""
    ended = threading.Event()
    endless = http_answer("206 P", b"", Content_Range="bytes 0-3/20", Content_Length="4")

    def answer(head: str, number: int) -> bytes:
        return endless + b"abcd" + b"x" * (32 << 20)

    with scripted_server(answer) as server:
        client = ByteClient(server.address)
        tracemalloc.start()
        assert client.read_range("/x", Span(0, 4)).data == b"abcd"
        # The scripted server holds what it sends; the client, on top, next to nothing.
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
        tracemalloc.stop()
    ended.set()


def test_an_object_beyond_all_memory_is_refused_after_its_first_piece() -> None:
    piece, size = b"x" * (8 << 20), 1 << 50

    def answer(head: str, number: int) -> bytes:
        return http_answer("206 P", piece, Content_Range=f"bytes 0-{len(piece) - 1}/{size}")

    with scripted_server(answer) as server:
        with pytest.raises(UnreachableError, match="such a file has at most"):
            ServedFileSystem(server.address).read_whole("/x")
        assert len(server.requests) == 1
        with pytest.raises(UnreachableError, match="at most 100 here"):
            ServedFileSystem(server.address).read_whole("/x", 100)


def test_redirects_are_not_followed_and_no_token_goes_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RESIDUA_TOKEN", "t" * 20)
    with (
        scripted_server(lambda head, number: range_answer(DATA, head)) as other,
        scripted_server(
            lambda head, number: http_answer("302 Found", Location=f"{other.address}/x")
        ) as server,
    ):
        client = ByteClient(server.address)
        with pytest.raises(UsageError, match="name that address"):
            client.read_range("/x", Span(0, 4))
        assert len(server.requests) == 1
        assert f"Authorization: Bearer {'t' * 20}\r\n" in server.requests[0]
        assert other.requests == []


def test_tokens_are_told_about(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_server(lambda head, number: http_answer("401 No", b"{}")) as server:
        client = ByteClient(server.address)
        with pytest.raises(UsageError, match=r"a token is needed; set \$RESIDUA_TOKEN"):
            client.read_range("/x", Span(0, 4))
        assert "Authorization" not in server.requests[0]
        monkeypatch.setenv("RESIDUA_TOKEN", "wrong-token")
        with pytest.raises(UsageError, match="was refused"):
            client.read_range("/x", Span(0, 4))
        monkeypatch.setenv("RESIDUA_TOKEN", "a\r\nX-Header: b")
        with pytest.raises(UsageError, match="is no token"):
            client.read_range("/x", Span(0, 4))
        assert len(server.requests) == 2


def test_an_object_that_is_replaced_is_read_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second piece comes of another object: all is read again, and nothing is mixed."""
    monkeypatch.setattr("residua.cache.http.served_file_system.RUN_BYTES", 4096)
    old, new = b"o" * 10_000, b"n" * 9000

    def answer(head: str, number: int) -> bytes:
        if number == 0:
            return range_answer(old, head, ETag='"old"')
        if 'if-match: "old"' in head.lower():
            return http_answer("412 Precondition Failed", b"{}")
        return range_answer(new, head, ETag='"new"')

    with scripted_server(answer) as server:
        assert ServedFileSystem(server.address).read_whole("/x") == new
    with (
        scripted_server(lambda head, number: http_answer("412 Precondition Failed")) as server,
        pytest.raises(ObjectReplacedError),
    ):
        ByteClient(server.address).read_range("/x", Span(0, 4), etag='"old"')


def test_many_threads_share_the_connections_of_a_client() -> None:
    failures: list[BaseException] = []
    with scripted_server(lambda head, number: range_answer(DATA, head)) as server:
        client = ByteClient(server.address)

        def read(number: int) -> None:
            try:
                for start in range(number, number + 200, 20):
                    assert (
                        client.read_range("/x", Span(start, start + 50)).data
                        == DATA[start : start + 50]
                    )
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read, args=(n,)) for n in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert failures == []


def test_a_name_that_no_server_has_is_said_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="no server has the name 'nowhere.invalid'"):
        ByteClient("http://nowhere.invalid").read_range("/x", Span(0, 4))
    assert time.monotonic() - began < 20

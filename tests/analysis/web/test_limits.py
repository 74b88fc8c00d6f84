"""Clients that are slow, dead or greedy do not hold a service."""

import socket
import time
from pathlib import Path

import httpx

from residua.analysis.service.server import ServiceServer

from ...support.services import running_service


def connect(server: ServiceServer) -> socket.socket:
    host, port = server.address.removeprefix("http://").rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=20)


def seconds_until_closed(connection: socket.socket) -> float:
    """Seconds until the other side closes; what it still says is read."""
    began = time.monotonic()
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - began


def test_a_head_that_does_not_end_is_cut_off(tmp_path: Path) -> None:
    with running_service(tmp_path, header_seconds=0.5) as server:
        silent, slow, second = connect(server), connect(server), connect(server)
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        second.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /healthz HTTP/1.1\r\n")
        for connection in (silent, slow, second):
            with connection:
                assert seconds_until_closed(connection) < 10
        assert httpx.get(server.address + "/healthz", timeout=20).status_code == 200


def test_a_head_without_bounds_is_refused(tmp_path: Path) -> None:
    with running_service(tmp_path) as server, connect(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        try:
            for _ in range(100):
                connection.sendall(b"X-A: " + b"a" * 8000 + b"\r\n")
        except ConnectionError:
            return
        assert b" 431 " in connection.recv(1 << 16)


def test_a_body_that_stops_is_cut_off(tmp_path: Path) -> None:
    with running_service(tmp_path, body_seconds=0.5) as server, connect(server) as connection:
        connection.sendall(
            b"POST /v1/session HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(1 << 16)


def test_a_body_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with running_service(tmp_path) as server:
        url = server.address + "/v1/session"
        answer = httpx.post(url, content=b" " * (2 << 20), timeout=20)
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


def test_a_stopped_service_ends_its_answers_and_takes_no_more(tmp_path: Path) -> None:
    with running_service(tmp_path) as server:
        assert httpx.get(server.address + "/readyz", timeout=20).json() == {"status": "ok"}
        server.service.draining = True
        answer = httpx.get(server.address + "/readyz", timeout=20)
        assert (answer.status_code, answer.json()) == (503, {"status": "stopping"})

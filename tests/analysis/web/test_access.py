"""Only those who may reach a service: names, origins, tokens, their file."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from residua.analysis.service.server import ServiceServer, check_exposure
from residua.analysis.web.access_control import is_allowed_host
from residua.analysis.web.access_tokens import load_tokens
from residua.analysis.web.service_settings import ServiceSettings
from residua.cache.errors import CorruptError, UsageError

from ...support.services import running_service


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running_service(tmp_path_factory.mktemp("root")) as running:
        yield running


def ask(server: ServiceServer, method: str, path: str, **options: Any) -> httpx.Response:
    return httpx.request(method, server.address + path, timeout=20, **options)


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("localhost", True),
        ("localhost:8470", True),
        ("a.localhost", True),
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("10.1.2.3", True),
        ("machine", True),
        ("MACHINE.", True),
        ("proxy.example.org", True),
        ("evil.example.org", False),
        ("localhost.evil.example.org", False),
        ("127.0.0.1.evil.example.org", False),
        ("proxy.example.org.evil.example", False),
        ("localhost@evil.example.org", False),
        ("localhost/evil", False),
        ("", False),
        ("[::1", False),
        ("a b", False),
        ("localhost:99999999", False),
    ],
)
def test_a_service_answers_to_its_own_names_alone(host: str, is_allowed: bool) -> None:
    settings = ServiceSettings(
        Path("r"), Path("s"), machine="machine", allowed_hosts=("proxy.example.org",)
    )
    assert is_allowed_host(host, settings) is is_allowed


def test_a_rebound_name_is_refused(server: ServiceServer) -> None:
    answer = ask(server, "GET", "/v1/caches", headers={"Host": "evil.example.org"})
    assert (answer.status_code, answer.json()["code"]) == (400, "wrong_host")


def test_writing_needs_the_token_of_its_scope(server: ServiceServer) -> None:
    tokens = server.service.tokens
    path = "/v1/session"
    assert ask(server, "GET", path).json() == {"scope": None}
    for token, scope in ((tokens.write, "write"), (tokens.read, "read"), ("wrong", None)):
        headers = {"Authorization": f"Bearer {token}"}
        assert ask(server, "GET", path, headers=headers).json() == {"scope": scope}
    assert ask(server, "POST", path, json={"token": "wrong"}).status_code == 401
    assert ask(server, "POST", path, json={"token": 3}).status_code == 400
    assert ask(server, "POST", path, json=[1]).status_code == 400


def test_a_session_is_a_cookie_that_scripts_and_other_pages_lack(server: ServiceServer) -> None:
    token = server.service.tokens.write
    answer = ask(server, "POST", "/v1/session", json={"token": token})
    cookie = answer.headers["set-cookie"]
    assert answer.json() == {"scope": "write"}
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert token not in cookie
    value = cookie.partition("=")[2].partition(";")[0]
    for given, scope in ((value, "write"), (value[:-1] + "x", None)):
        headers = {"Cookie": f"residua_session={given}"}
        assert ask(server, "GET", "/v1/session", headers=headers).json() == {"scope": scope}


def test_pages_of_other_origins_may_not_write(server: ServiceServer) -> None:
    body = {"token": server.service.tokens.write}
    for origin in ("http://evil.example.org", "http://127.0.0.1:1", "null"):
        answer = ask(server, "POST", "/v1/session", json=body, headers={"Origin": origin})
        assert (answer.status_code, answer.json()["code"]) == (403, "wrong_origin"), origin
    answer = ask(server, "POST", "/v1/session", json=body, headers={"Origin": server.address})
    assert answer.status_code == 200


def test_pages_of_this_machine_alone_may_read_unless_others_are_named(tmp_path: Path) -> None:
    name = "access-control-allow-origin"
    with running_service(tmp_path, allowed_origins=("https://viewer.example.org",)) as server:
        for origin, is_allowed in (
            ("http://localhost:3000", True),
            ("https://viewer.example.org", True),
            ("https://evil.example.org", False),
            ("null", False),
        ):
            answer = ask(server, "GET", "/v1/caches", headers={"Origin": origin})
            assert (answer.headers.get(name) == origin) is is_allowed, origin
            asked = ask(server, "OPTIONS", "/v1/caches", headers={"Origin": origin})
            assert asked.status_code == 204
            assert ("access-control-allow-methods" in asked.headers) is is_allowed


def test_every_answer_forbids_scripts_of_its_own_text(server: ServiceServer) -> None:
    for path in ("/v1/caches", "/healthz", "/nothing"):
        policy = ask(server, "GET", path).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy


def test_a_private_service_reads_for_holders_of_a_token_alone(tmp_path: Path) -> None:
    with running_service(tmp_path, private=True) as server:
        assert ask(server, "GET", "/v1/caches").status_code == 401
        assert ask(server, "GET", "/metrics").status_code == 401
        assert ask(server, "GET", "/healthz").status_code == 200
        for token in (server.service.tokens.read, server.service.tokens.write):
            headers = {"Authorization": f"Bearer {token}"}
            assert ask(server, "GET", "/v1/caches", headers=headers).status_code == 200
        headers = {"Authorization": f"Basic {server.service.tokens.write}"}
        assert ask(server, "GET", "/v1/caches", headers=headers).status_code == 401


def test_tokens_are_made_once_and_only_their_user_reads_them(tmp_path: Path) -> None:
    state = tmp_path / "a" / "state"
    tokens = load_tokens(state)
    assert tokens.is_new
    assert (state / "tokens.json").stat().st_mode & 0o777 == 0o600
    again = load_tokens(state)
    assert not again.is_new
    assert (again.write, again.read) == (tokens.write, tokens.read)
    assert load_tokens(state, renew=True).write != tokens.write


def test_a_file_of_tokens_that_others_can_read_is_refused(tmp_path: Path) -> None:
    load_tokens(tmp_path)
    path = tmp_path / "tokens.json"
    path.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        load_tokens(tmp_path)
    path.chmod(0o600)
    path.write_text(json.dumps({"write": "known to a stranger"}))
    with pytest.raises(CorruptError):
        load_tokens(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError):
        load_tokens(tmp_path)


def test_a_given_token_is_used_and_a_short_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESIDUA_TOKEN", "a" * 32)
    assert load_tokens(tmp_path).scope_of("a" * 32) == "write"
    monkeypatch.setenv("RESIDUA_TOKEN", "short")
    with pytest.raises(UsageError, match="5 letters"):
        load_tokens(tmp_path)


def test_nobody_becomes_public_by_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESIDUA_TOKEN", raising=False)
    settings = ServiceSettings(tmp_path, tmp_path / "state", host="0.0.0.0")
    with pytest.raises(UsageError, match="--public"):
        check_exposure(settings, public=False)
    with pytest.raises(UsageError, match="needs a token"):
        check_exposure(settings, public=True)
    load_tokens(tmp_path / "state")
    check_exposure(settings, public=True)


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match="already in use"):
            ServiceServer(ServiceSettings(tmp_path, tmp_path, port=port))
    with pytest.raises(UsageError, match="no address of this machine"):
        ServiceServer(ServiceSettings(tmp_path, tmp_path, host="256.0.0.1"), public=True)

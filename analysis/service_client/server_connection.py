"""HTTP to a service: requests with the token, repeated where the network fails, errors as ours.

What a server sends is bounded and checked: it may be anybody's.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from ...cache import errors
from ...cache.errors import ResiduaError, UsageError
from ...cache.files.json_fields import MAX_JSON_BYTES

if TYPE_CHECKING:
    import httpx

SERVER_VARIABLE = "RESIDUA_SERVER"
TOKEN_VARIABLE = "RESIDUA_TOKEN"
CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Pauses before a request is repeated, in seconds."""
BUSY = (429, 502, 503, 504)
"""Statuses after which a request is repeated."""


class ServerConnection:
    """Requests to the service at `url`; a context manager, or `close` it."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """`token` is by default that of $RESIDUA_TOKEN. Raises `UsageError` for no URL."""
        import httpx

        self.url = check_server_url(url)
        self.token = token or os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        self._client = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            follow_redirects=False,
        )

    def __enter__(self) -> "ServerConnection":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def get(self, path: str, **parameters: Any) -> Any:
        """The JSON value of a GET."""
        return self.request("GET", path, parameters=parameters)

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The JSON value of an answer; every request of this client may be repeated.

        Raises the error that the service names, as the command line would; `ResiduaError` if no
        service answers.
        """
        import httpx

        for pause in (*PAUSES, None):
            try:
                with self._client.stream(
                    method,
                    path,
                    json=None if body is None else dict(body),
                    params=dict(parameters or {}),
                    headers=dict(headers or {}),
                ) as response:
                    raw = _read_bounded(response)
            except httpx.TransportError as error:
                if pause is None:
                    raise self._no_answer(error) from None
                time.sleep(pause)
                continue
            if response.status_code in BUSY and pause is not None:
                time.sleep(pause)
                continue
            return self._value(response, raw)
        raise AssertionError("the last attempt returns or raises")

    def send_file(self, path: str, file: Any, **parameters: Any) -> Any:
        """The JSON value of a PUT of the bytes of an open file."""
        import httpx

        try:
            response = self._client.put(path, content=_blocks(file), params=parameters)
        except httpx.TransportError as error:
            raise self._no_answer(error) from None
        return self._value(response, response.content)

    def download(self, path: str) -> Iterator[bytes]:
        """The bytes of a file, in blocks."""
        import httpx

        try:
            with self._client.stream("GET", path) as response:
                if response.status_code != 200:
                    self._value(response, _read_bounded(response))
                yield from response.iter_bytes(1 << 20)
        except httpx.TransportError as error:
            raise self._no_answer(error) from None

    @contextmanager
    def stream_lines(self, path: str, headers: Mapping[str, str]) -> Iterator[Iterator[str] | None]:
        """Lines of a stream of events as they come; None for an answer without content."""
        with self._client.stream("GET", path, headers=dict(headers)) as response:
            if response.status_code == 204:
                yield None
                return
            if response.status_code != 200:
                self._value(response, _read_bounded(response))
            yield response.iter_lines()

    def _value(self, response: "httpx.Response", raw: bytes) -> Any:
        """The JSON value; raises the error that it names."""
        try:
            value = json.loads(raw) if raw else None
        except (ValueError, RecursionError):
            value = None
        if response.is_success and value is not None:
            return value
        if isinstance(value, dict) and isinstance(value.get("message"), str):
            raise named_error(value)
        raise ResiduaError(
            f"{self.url} answers {response.status_code} {response.reason_phrase}, and is no "
            "service of residua, or a proxy before it fails"
        )

    def _no_answer(self, error: Exception) -> ResiduaError:
        return ResiduaError(
            f"no service answers at {self.url} ({error or type(error).__name__}); start one with "
            "`residua serve`, or check the address"
        )


def check_server_url(url: str) -> str:
    """`url` without a slash at its end; raises `UsageError` unless it is that of a service."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(
            f"{url[:200]!r} is no address of a service; write it like http://host:8470"
        )
    return url.rstrip("/")


def quoted(name: str) -> str:
    """`name` as one part of a path."""
    return quote(name, safe="")


def named_error(value: Mapping[str, Any]) -> ResiduaError:
    """The error of an object `{"error", "message", "exit_code"}`, of the class that it names."""
    name = str(value.get("error", ""))
    kind = getattr(errors, name, None)
    message = str(value.get("message", ""))[: 1 << 20]
    is_ours = isinstance(kind, type) and issubclass(kind, ResiduaError)
    error = kind(message) if is_ours and kind is not None else ResiduaError(message)
    code = value.get("exit_code")
    if type(code) is int and 0 < code < 256:
        error.exit_code = code
    return error


def _read_bounded(response: "httpx.Response") -> bytes:
    """The body; raises `ResiduaError` for more than a JSON file may have."""
    pieces, size = [], 0
    for piece in response.iter_bytes():
        size += len(piece)
        if size > MAX_JSON_BYTES:
            raise ResiduaError(f"the server sends more than {MAX_JSON_BYTES} bytes of JSON")
        pieces.append(piece)
    return b"".join(pieces)


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(1 << 20):
        yield block

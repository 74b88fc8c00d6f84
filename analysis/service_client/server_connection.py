"""HTTP to a service: requests with the token, repeated where the network fails, errors as ours.

What a server sends is bounded and checked: it may be anybody's.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from ...cache import errors
from ...cache.errors import ResiduaError, UnreachableError, UsageError
from ...cache.files.json_fields import MAX_JSON_BYTES

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

SERVER_VARIABLE = "RESIDUA_SERVER"
TOKEN_VARIABLE = "RESIDUA_TOKEN"
CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Pauses before a request is repeated, in seconds."""
MAX_LINE_BYTES = 1 << 20
"""Longest line of a stream."""
BUSY = (429, 502, 503, 504)
"""Statuses after which a request is repeated."""


class ServerConnection:
    """Requests to the service at `url`; a context manager, or `close` it."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """`token` is by default that of $RESIDUA_TOKEN. Raises `UsageError` for no URL."""
        import urllib3

        self.url: str = check_server_url(url)
        self.token: str | None = token or os.environ.get(TOKEN_VARIABLE)
        self._headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        parts = urlsplit(self.url)
        self._prefix = parts.path
        self._pool = urllib3.connection_from_url(
            f"{parts.scheme}://{parts.netloc}",
            retries=False,
        )

    def __enter__(self) -> "ServerConnection":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

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
        seconds: float = READ_SECONDS,
    ) -> Any:
        """The JSON value of an answer; every request of this client may be repeated.

        `seconds` is the longest time between two pieces of the answer.

        Raises the error that the service names, as the command line would; `UnreachableError` if
        no service answers.
        """
        sent = dict(headers or {})
        data = None
        if body is not None:
            data = json.dumps(body, allow_nan=False).encode()
            sent["Content-Type"] = "application/json"
        if parameters:
            path = f"{path}?{urlencode(parameters)}"
        for pause in (*PAUSES, None):
            try:
                with self._open(method, path, sent, data, seconds) as response:
                    raw = _read_bounded(response)
            except UnreachableError:
                if pause is None:
                    raise
                time.sleep(pause)
                continue
            if response.status in BUSY and pause is not None:
                time.sleep(pause)
                continue
            return self._value(response, raw)
        raise AssertionError("the last attempt returns or raises")

    def send_file(self, path: str, file: Any, **parameters: Any) -> Any:
        """The JSON value of a PUT of the bytes of an open file."""
        with self._open("PUT", f"{path}?{urlencode(parameters)}", {}, _blocks(file)) as response:
            return self._value(response, _read_bounded(response))

    def download(self, path: str) -> Iterator[bytes]:
        """The bytes of a file, in blocks."""
        with self._open("GET", path, {}) as response:
            if response.status != 200:
                self._value(response, _read_bounded(response))
            yield from response.stream(1 << 20)

    @contextmanager
    def stream_lines(
        self, path: str, headers: Mapping[str, str]
    ) -> Iterator[Iterator[bytes] | None]:
        """Lines of a stream of events as they come; None for an answer without content."""
        with self._open("GET", path, headers) as response:
            if response.status == 204:
                yield None
                return
            if response.status != 200:
                self._value(response, _read_bounded(response))
            yield _lines(response)

    @contextmanager
    def _open(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Any = None,
        seconds: float = READ_SECONDS,
    ) -> Iterator["BaseHTTPResponse"]:
        """The answer to a request, unread; raises `UnreachableError` where the network fails."""
        import urllib3

        response: BaseHTTPResponse | None = None
        try:
            response = self._pool.urlopen(
                method,
                f"{self._prefix}{path}",
                body=body,
                headers={"Accept": "*/*", **self._headers, **headers},
                timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=seconds),
                preload_content=False,
                redirect=False,
            )
            yield response
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if isinstance(error, ResiduaError):
                raise
            raise UnreachableError(
                f"no service answers at {self.url} ({_reason(error)}); start one with `residua "
                "serve`, or check the address"
            ) from None
        finally:
            if response is not None:
                response.close()  # what was not read is not waited for
                response.release_conn()

    def _value(self, response: "BaseHTTPResponse", raw: bytes) -> Any:
        """The JSON value; raises the error that it names."""
        try:
            value = json.loads(raw) if raw else None
        except (ValueError, RecursionError):
            value = None
        if 200 <= response.status < 300 and value is not None:
            return value
        if isinstance(value, dict) and isinstance(value.get("message"), str):
            raise named_error(value)
        raise UnreachableError(
            f"{self.url} answers {response.status} {response.reason or ''}, and is no service of "
            "residua, or a proxy before it fails"
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


def _read_bounded(response: "BaseHTTPResponse") -> bytes:
    """The body; raises `ResiduaError` for more than a JSON file may have."""
    pieces, size = [], 0
    for piece in response.stream(1 << 16):
        size += len(piece)
        if size > MAX_JSON_BYTES:
            raise ResiduaError(f"the server sends more than {MAX_JSON_BYTES} bytes of JSON")
        pieces.append(piece)
    return b"".join(pieces)


def _lines(response: "BaseHTTPResponse") -> Iterator[bytes]:
    """Lines of a body as they come; ends at one that is too long."""
    rest = b""
    while block := response.read1(1 << 16):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
        if len(rest) > MAX_LINE_BYTES:
            return


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(1 << 20):
        yield block


def _reason(error: BaseException) -> str:
    """What the network said, without the addresses of objects."""
    cause = error.__cause__ or error.__context__ or error
    return str(getattr(cause, "strerror", None) or type(error).__name__)

"""Requests to a residua service for bytes: pooled connections, retries, bounds on what comes.

`shared_client` gives the client of one server; `served_files.py` reads objects through it. Answers
come from a server that is not trusted: a body is read only up to the length that was asked for,
redirects are never followed, so that a token goes to no other server, and every wait is bounded.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from ..errors import UnreachableError, UsageError
from .multipart_ranges import (
    BodyFormatError,
    ContentRange,
    parse_boundary,
    parse_content_range,
    parse_parts,
)

TOKEN_VARIABLE = "RESIDUA_TOKEN"
"""Environment variable with the token that is sent to the server a user names."""
CONNECTIONS = 8
"""Connections to one server that are kept open, and requests that run at the same time."""
ATTEMPTS = 6
"""Trials of one request; the first five waits take 6 seconds together."""
FIRST_WAIT = 0.2
"""Seconds before the second trial; every further wait is twice as long."""
LONGEST_WAIT = 10.0
"""Most seconds that a server may ask to wait."""
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
"""Longest wait for a connection, and for the next bytes of an answer."""
WHOLE_BYTES = 64 << 20
"""Largest object that is read whole from a server that does not give ranges."""
BLOCK_BYTES = 8 << 20
"""Bytes that are read at once from a connection."""
ERROR_BYTES = 64 << 10
"""Longest body of an answer with an error that is read, so that its connection can be used."""
MAX_LISTING_BYTES = 64 << 20
"""Largest page of a listing."""
MULTIPART_OVERHEAD = 1024
"""Most bytes that a part of a body of several ranges has beside its range."""
BUSY = (429, 502, 503, 504)
"""Statuses of a server, or of a proxy before it, that may answer a little later."""
Result = TypeVar("Result")


class Span(NamedTuple):
    """Bytes `start:stop` of an object; the last `-start` bytes if `start` is negative."""

    start: int
    stop: int | None = None
    """None for the end of the object."""


@dataclass(frozen=True)
class ObjectStatus:
    """What a server says of an object."""

    size: int
    """In bytes."""
    modified: float
    """Seconds since 1970; 0 if the server does not say it."""
    etag: str | None


@dataclass(frozen=True)
class RangeReply:
    """Bytes of one object."""

    data: bytes
    start: int
    """Of the first byte, in the object."""
    size: int | None
    """Of the whole object, if the server says it."""
    etag: str | None


class ObjectReplacedError(Exception):
    """An object that is not the one any more whose entity tag was given."""


class _TryAgainError(Exception):
    """A request that may succeed if it is sent again, after `seconds` if the server says so."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


class ByteClient:
    """Connections to one server, such as `http://localhost:8765`. Safe to use from threads.

    All methods raise `FileNotFoundError` for an object that the server does not have, `UsageError`
    where it wants a token, and `UnreachableError` if it does not answer, or not as it should, in
    several trials.
    """

    def __init__(self, origin: str) -> None:
        import urllib3

        self.origin = origin
        self._has_answered = False
        self._pool = urllib3.connection_from_url(
            origin,
            maxsize=CONNECTIONS,
            retries=False,
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
        )

    def read_range(self, path: str, span: Span, etag: str | None = None) -> RangeReply:
        """The bytes of `span` in the object at `path`, as far as the object has them.

        With `etag`, an object with another tag raises `ObjectReplacedError`.
        """
        header = f"bytes={_span_text(span)}"
        return self._request(path, {"Range": header, **_if_match(etag)}, _RangeReader(span))

    def read_spans(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of several spans `start:stop` of one object, by one request.

        Raises `UnreachableError` for spans that the object does not have.
        """
        header = "bytes=" + ",".join(map(_span_text, spans))
        return self._request(path, {"Range": header}, _SpansReader(spans))

    def read_json(self, path: str, query: str = "") -> Any:
        """The JSON value at `path`, such as a listing."""
        return self._request(path, {}, _read_json, query)

    def status(self, path: str) -> ObjectStatus:
        """Size, time and entity tag of the object at `path`."""
        return self._request(path, {}, _read_status, method="HEAD")

    def _request(
        self,
        path: str,
        headers: Mapping[str, str],
        read: "Callable[[Any], Result]",
        query: str = "",
        method: str = "GET",
    ) -> Result:
        """Send a request, again where that may help, and give what `read` makes of the answer."""
        target = quote(path, safe="/+,:@!$&'()*;=~") + query
        all_headers = {"Accept-Encoding": "identity", **_authorization(), **headers}
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._send(method, target, all_headers, read)
            except _TryAgainError as error:
                reason, seconds = str(error), error.seconds
            # A server that never answered is rather misnamed than started again.
            if attempt == ATTEMPTS or (attempt == 2 and not self._has_answered):
                raise UnreachableError(
                    f"{self.origin} does not give {path}: {reason} ({attempt} trials); see whether "
                    "the service runs, and give the same command again"
                )
            time.sleep(min(LONGEST_WAIT, wait if seconds is None else max(seconds, wait)))
            wait *= 2
        raise AssertionError

    def _send(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        read: "Callable[[Any], Result]",
    ) -> Result:
        """Send a request once; raises `_TryAgainError` where another trial may help."""
        from urllib3.exceptions import HTTPError, NameResolutionError

        response = None
        try:
            response = self._pool.urlopen(
                method,
                target,
                headers=dict(headers),
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            self._check_status(response, target)
            self._has_answered = True
            result = read(response)
            response.release_conn()
            response = None
            return result
        except NameResolutionError:
            host = self.origin.partition("://")[2]
            raise UnreachableError(f"no server has the name {host!r}; check the address") from None
        except HTTPError as error:
            raise _TryAgainError(_describe_failure(error)) from None
        except BodyFormatError as error:
            raise _TryAgainError(f"the answer is not that of a residua service, {error}") from None
        finally:
            if response is not None:  # what is left of the answer is not wanted
                response.close()

    def _check_status(self, response: Any, target: str) -> None:
        """Raise unless the server gives the object, or part of it, or says that there is none."""
        status = response.status
        if status in (200, 206, 416):
            return
        if status == 404:
            with suppress(BodyFormatError):
                read_body(response, ERROR_BYTES)
            raise FileNotFoundError(2, "no such object", f"{self.origin}{target}")
        if status in (401, 403):
            given = "was refused" if os.environ.get(TOKEN_VARIABLE) else "is needed"
            raise UsageError(
                f"{self.origin} answers {status}: a token {given}; set ${TOKEN_VARIABLE} to the "
                "one that `residua serve` printed"
            )
        if status in BUSY:
            raise _TryAgainError(f"the server answers {status}", _retry_seconds(response))
        if status == 412:
            raise ObjectReplacedError(target)
        if 300 <= status < 400:
            place = str(response.headers.get("Location", "nowhere"))[:200]
            raise UsageError(
                f"{self.origin} sends requests on to {place!r}, which is not followed; if you "
                "trust it, name that address"
            )
        raise UnreachableError(
            f"{self.origin} answers {status} to {target}: is it a residua service, of this version?"
        )


_CLIENTS: dict[tuple[int, str], ByteClient] = {}
_LOCK = threading.Lock()


def shared_client(origin: str) -> ByteClient:
    """The client of a server, one in each process: connections do not survive a fork."""
    with _LOCK:
        key = os.getpid(), origin
        if key not in _CLIENTS:
            _CLIENTS[key] = ByteClient(origin)
        return _CLIENTS[key]


def _authorization() -> dict[str, str]:
    """The header with the token of the user; none without a token."""
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        return {}
    if not re.fullmatch(r"[\x21-\x7e]{1,512}", token):
        raise UsageError(f"${TOKEN_VARIABLE} is no token: it has spaces or other such characters")
    return {"Authorization": f"Bearer {token}"}


def _if_match(etag: str | None) -> dict[str, str]:
    return {} if etag is None or etag.startswith("W/") else {"If-Match": etag}


def _span_text(span: Span) -> str:
    """A span as the header `Range` has it."""
    if span.start < 0:
        return str(span.start)
    return f"{span.start}-{'' if span.stop is None else span.stop - 1}"


def _describe_failure(error: Exception) -> str:
    """What happened to a connection, in a few words."""
    from urllib3.exceptions import (
        ConnectTimeoutError,
        NewConnectionError,
        ReadTimeoutError,
        SSLError,
    )

    if isinstance(error, NewConnectionError | ConnectTimeoutError):
        return "no connection can be made"
    if isinstance(error, ReadTimeoutError):
        return f"no answer came in {READ_SECONDS:.0f} s"
    if isinstance(error, SSLError):
        return f"no safe connection can be made ({error})"
    return f"the connection broke ({str(error)[:120]})"


def _retry_seconds(response: Any) -> float | None:
    """Seconds that a busy server asks to wait."""
    text = str(response.headers.get("Retry-After", ""))
    return float(text) if re.fullmatch(r"\d{1,4}", text, re.ASCII) else None


def _body_length(response: Any) -> int:
    """The length of the body, which an answer must have."""
    text = str(response.headers.get("Content-Length", ""))
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or "Transfer-Encoding" in response.headers:
        raise BodyFormatError("its body has no length")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise BodyFormatError("its body is encoded")
    return int(text)


def read_body(response: Any, most: int) -> bytes:
    """The body of an answer; raises `BodyFormatError` for one of more than `most` bytes.

    Memory is used as bytes come, never for a length that was only announced.
    """
    length = _body_length(response)
    if length > most:
        raise BodyFormatError(f"its body has {length} bytes, where at most {most} were asked for")
    blocks, missing = [], length
    while missing:
        block = response.read(min(missing, BLOCK_BYTES))
        if not block:
            raise BodyFormatError("its body is cut short")
        blocks.append(block)
        missing -= len(block)
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


class _RangeReader:
    """Reads the answer to a request for one span."""

    def __init__(self, span: Span) -> None:
        self.span = span

    def __call__(self, response: Any) -> RangeReply:
        etag = response.headers.get("ETag")
        if response.status == 416:
            read_body(response, ERROR_BYTES)
            return RangeReply(b"", 0, None, etag)
        if response.status == 200:  # the server gives no ranges
            data = read_body(response, WHOLE_BYTES)
            start, stop = _resolve(self.span, len(data))
            return RangeReply(data[start:stop], start, len(data), etag)
        given = parse_content_range(response.headers.get("Content-Range"))
        if given.size is None:
            raise BodyFormatError("its Content-Range has no size")
        if (given.start, given.stop) != _resolve(self.span, given.size):
            raise BodyFormatError(
                f"it has bytes {given.start}-{given.stop - 1}, not those asked for"
            )
        data = read_body(response, given.stop - given.start)
        if len(data) != given.stop - given.start:
            raise BodyFormatError("its body has another length than its range")
        return RangeReply(data, given.start, given.size, etag)


def _resolve(span: Span, size: int) -> tuple[int, int]:
    """First byte and end of a span in an object of `size` bytes."""
    if span.start < 0:
        return max(0, size + span.start), size
    return min(span.start, size), size if span.stop is None else min(span.stop, size)


class _SpansReader:
    """Reads the answer to a request for several spans, each with its end."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans

    def __call__(self, response: Any) -> list[bytes]:
        parts = self._read_parts(response)
        return [self._cut(parts, span) for span in self.spans]

    def _read_parts(self, response: Any) -> list[tuple[ContentRange, memoryview]]:
        """The parts that came, which may cover several spans each, in order of their start."""
        if response.status == 416:
            raise BodyFormatError("it says that the object has none of the ranges")
        if response.status == 200:
            data = read_body(response, WHOLE_BYTES)
            return [(ContentRange(0, len(data), len(data)), memoryview(data))]
        length = sum((span.stop or 0) - span.start + MULTIPART_OVERHEAD for span in self.spans)
        boundary = parse_boundary(response.headers.get("Content-Type"))
        if boundary is not None:
            return parse_parts(read_body(response, length), boundary)
        given = parse_content_range(response.headers.get("Content-Range"))
        data = read_body(response, max(span.stop or 0 for span in self.spans))
        if len(data) != given.stop - given.start:
            raise BodyFormatError("its body has another length than its range")
        return [(given, memoryview(data))]

    def _cut(self, parts: list[tuple[ContentRange, memoryview]], span: Span) -> bytes:
        """The bytes of one span from the part that has them."""
        stop = span.stop or 0
        for given, data in parts:
            if given.start <= span.start and stop <= given.stop:
                return bytes(data[span.start - given.start : stop - given.start])
        raise BodyFormatError(f"it lacks bytes {span.start}-{stop - 1}")


def _read_json(response: Any) -> Any:
    """The JSON value of an answer."""
    if response.status != 200:
        raise BodyFormatError(f"its status is {response.status}")
    try:
        return json.loads(read_body(response, MAX_LISTING_BYTES))
    except (ValueError, RecursionError):
        raise BodyFormatError("its body is not JSON") from None


def _read_status(response: Any) -> ObjectStatus:
    """The status of an object from the header of an answer."""
    modified = 0.0
    with suppress(ValueError, TypeError, OverflowError):
        modified = parsedate_to_datetime(response.headers.get("Last-Modified", "")).timestamp()
    return ObjectStatus(_body_length(response), modified, response.headers.get("ETag"))

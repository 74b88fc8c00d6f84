"""Bytes of the objects of caches and probes: ranges, entity tags, listings of folders.

`/caches/<id>/<object>` and `/probes/<name>/<file>` are files; a path that ends in a slash lists a
folder. `analysis/served_files/` decides which files are served, and opens and reads them.
"""

import re
import secrets
import time
from collections.abc import Iterator, Sequence
from email.utils import formatdate, parsedate_to_datetime
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..served_files.byte_ranges import ByteRange, select_ranges
from ..served_files.served_objects import CACHES, LIST_LIMIT, PROBES, ServedFiles, ServedObject
from ..web.endpoints import Answer, Endpoint, Parameter, parameters_of
from ..web.json_responses import JsonResponse, ServiceError, error_response

PIECE_BYTES = 2 << 20
"""Bytes of an object that are read at once, and kept in memory for one reader."""
WHOLE_BYTES = 4 << 20
"""Longest range that is read at once: a chunk and a little more."""
MIN_PIECE_BYTES = 256 << 10
"""Bytes that are read at once where very many readers are served."""
PIECES_BYTES = 128 << 20
"""Memory for the pieces of all readers together; pieces of many readers are smaller."""
FOREVER = 31_536_000
"""Age, in seconds, up to which a committed shard need not be asked for again: a year."""
STABLE_SECONDS = 60
"""A time of change is as good as an entity tag once it is so old (RFC 9110, 8.8.2.2)."""
BINARY, JSON, MULTIPART = "application/octet-stream", "application/json", "multipart/byteranges"
_TAG = re.compile(r'\s*(W/)?("[\x21\x23-\x7e\x80-\xff]*")\s*')


def list_endpoints() -> tuple[Endpoint, ...]:
    """Endpoints of this file."""
    path = Parameter("path", "path", {"type": "string"}, "Name of an object, or of a folder and /.")
    limit = {"type": "integer", "minimum": 1, "maximum": LIST_LIMIT, "default": LIST_LIMIT}
    listing = (
        Parameter("recursive", "query", {"type": "boolean", "default": False}, "All files below."),
        Parameter("after", "query", {"type": "string", "default": ""}, "Name to go on after."),
        Parameter("limit", "query", limit, "Most entries."),
    )
    summaries = {
        "Range": "Bytes wanted: one range, a suffix, or several.",
        "If-Range": "Entity tag: with another one, the whole object is sent.",
        "If-None-Match": "Entity tags that are known: nothing is sent for one of them.",
    }
    headers = tuple(Parameter(n, "header", {"type": "string"}, s) for n, s in summaries.items())
    answers = {
        200: Answer("The whole object, or a listing of a folder.", None, BINARY),
        206: Answer("The bytes of the ranges.", None, BINARY),
        304: Answer("The object is one that is known.", None, ""),
    }
    titles = {CACHES: (_give_cache_file, "a cache"), PROBES: (_give_probe_file, "a saved probe")}
    return tuple(
        Endpoint(
            method="GET",
            path=f"/{kind}/{{path:path}}",
            handler=handler,
            summary=f"Bytes of one file of {title}; a path that ends in / lists a folder.",
            scope="read",
            tag="bytes",
            parameters=(path, *listing, *headers),
            answers=answers,
        )
        for kind, (handler, title) in titles.items()
    )


async def _give_cache_file(request: Request) -> Response:
    return await _give(request, CACHES)


async def _give_probe_file(request: Request) -> Response:
    return await _give(request, PROBES)


def served_files(app: Any) -> ServedFiles:
    """The open files of the application `app`, which has one service."""
    files = getattr(app.state, "served_files", None)
    if files is None:
        files = app.state.served_files = ServedFiles(app.state.service.settings.root)
    return files


async def _give(request: Request, kind: str) -> Response:
    """The answer to a request for an object or a folder of one kind."""
    files = served_files(request.app)
    name = str(request.path_params["path"])
    path = f"{kind}/{name}"
    if not name or name.endswith("/"):
        return await _list_folder(request, files, path.removesuffix("/"))
    served = files.find_open(path) or await run_in_threadpool(files.find, path)
    try:
        return answer_object(request, served, path)
    except BaseException:
        served.close()
        raise


async def _list_folder(request: Request, files: ServedFiles, path: str) -> Response:
    """The entries of a folder, as JSON."""
    given = parameters_of(request)
    arguments = given["recursive"], given["after"], given["limit"]
    entries, after = await run_in_threadpool(files.list_entries, path, *arguments)
    value = {"entries": [{"name": e.name, "bytes": e.bytes} for e in entries], "next": after}
    return JsonResponse(value, headers={"Cache-Control": "no-cache"})


def answer_object(request: Request, served: ServedObject, path: str) -> Response:
    """The answer to a request for `served`: whole, ranges of it, or nothing new.

    `served` is closed when the answer is sent, or before a return without its bytes. Raises
    `ServiceError` with `served` still open.
    """
    headers = {
        "Accept-Ranges": "bytes",
        "Cache-Control": _cache_control(request, served, path),
        "ETag": served.etag,
        "Last-Modified": formatdate(served.modified, usegmt=True),
    }
    # Preconditions come in the order of RFC 9110, 13.2.2.
    given = request.headers
    if (tags := given.get("if-match")) is not None and not _names_tag(tags, served.etag):
        raise ServiceError(412, "precondition_failed", f"{path} is not the object expected")
    if (tags := given.get("if-none-match")) is not None:
        is_known = _names_tag(tags, served.etag, weakly=True)
    else:
        is_known = _is_unmodified(given.get("if-modified-since"), served)
    if is_known:
        served.close()
        return Response(status_code=304, headers=headers)
    if (redirect := _proxy_path(request, served, path)) is not None:
        served.close()
        return Response(headers={**headers, "X-Accel-Redirect": redirect}, media_type=BINARY)
    # A range counts for the object that the client has a part of; for another, all is sent.
    ranges = None
    if request.method == "GET" and _is_same(given.get("if-range"), served):
        ranges = select_ranges(given.get("range"), served.size)
    if ranges == []:
        served.close()
        message = f"{path} has {served.size} bytes; its ranges are {given.get('range')!r:.200}"
        response = error_response(ServiceError(416, "range_not_satisfiable", message))
        response.headers["Content-Range"] = f"bytes */{served.size}"
        return response
    return ByteResponse(served, ranges, headers, JSON if path.endswith(".json") else BINARY)


def _cache_control(request: Request, served: ServedObject, path: str) -> str:
    """Committed shards stay as they are; all else is asked for again, leases are never kept."""
    if served.is_immutable:
        is_private = request.app.state.service.settings.private
        return f"{'private' if is_private else 'public'}, max-age={FOREVER}, immutable"
    return "no-store" if "/leases/" in path else "no-cache"


def _proxy_path(request: Request, served: ServedObject, path: str) -> str | None:
    """Where the proxy in front of the service finds a committed shard; None if it is sent here.

    The proxy cuts the ranges, and knows no tags: requests with conditions on the tag stay here.
    """
    prefix = request.app.state.service.settings.accel
    if prefix is None or not served.is_immutable or {"if-match", "if-range"} & {*request.headers}:
        return None
    return prefix + quote(path.removeprefix(f"{CACHES}/"))


def _names_tag(header: str, etag: str, weakly: bool = False) -> bool:
    """Whether a list of entity tags, or `*`, has `etag`; `weakly`, a weak one counts, too."""
    if header.strip() == "*":
        return True
    position, is_named = 0, False
    while match := _TAG.match(header, position):
        is_named |= match[2] == etag and (weakly or not match[1])
        position = match.end() + 1  # a comma
    return is_named


def _is_unmodified(header: str | None, served: ServedObject) -> bool:
    """Whether the object was not changed after the date in `header`."""
    date = _parse_date(header)
    return date is not None and int(served.modified) <= date


def _is_same(header: str | None, served: ServedObject) -> bool:
    """Whether `If-Range`, a strong entity tag or an old date, names the object as it is now."""
    if header is None:
        return True
    if '"' in header:
        return header.strip() == served.etag
    is_stable = served.modified < time.time() - STABLE_SECONDS
    return is_stable and _parse_date(header) == int(served.modified)


def _parse_date(header: str | None) -> int | None:
    """Seconds since 1970 of an HTTP date; None for any other text."""
    if header is None or len(header) > 64:
        return None
    try:
        return int(parsedate_to_datetime(header).timestamp())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


class ByteResponse(Response):
    """An object, or ranges of it, sent piece by piece; the object is closed at the end."""

    readers = 0
    """Answers that this process sends now."""

    def __init__(
        self,
        served: ServedObject,
        ranges: Sequence[ByteRange] | None,
        headers: dict[str, str],
        media_type: str,
    ) -> None:
        self._served = served
        self._segments: list[bytes | ByteRange] = [ByteRange(0, served.size)]
        self.status_code = 200 if ranges is None else 206
        self.background = None
        if ranges is not None and len(ranges) == 1:
            self._segments = [ranges[0]]
            headers["Content-Range"] = _content_range(ranges[0], served.size)
        elif ranges is not None:
            boundary = secrets.token_hex(16)
            self._segments = list(_multipart(ranges, served.size, media_type, boundary))
            media_type = f"{MULTIPART}; boundary={boundary}"
        size = sum(s.size if isinstance(s, ByteRange) else len(s) for s in self._segments)
        headers |= {"Content-Type": media_type, "Content-Length": str(size)}
        self.raw_headers = [(n.lower().encode(), v.encode("latin-1")) for n, v in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ByteResponse.readers += 1
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        try:
            await send(start)
            if scope["method"] == "HEAD" or not self._served.size:
                await send({"type": "http.response.body", "body": b""})
            else:
                await self._send_body(send)
        finally:
            ByteResponse.readers -= 1
            self._served.close()

    async def _send_body(self, send: Send) -> None:
        """Send all segments, none of which is empty."""
        last = self._segments[-1]
        for segment in self._segments:
            if isinstance(segment, bytes):
                more = segment is not last
                await send({"type": "http.response.body", "body": segment, "more_body": more})
                continue
            start = segment.start
            while start < segment.stop:
                stop = start + _piece_bytes(segment.stop - start)
                # What lies in memory is read here, in less time than another thread would need.
                if self._served.is_in_memory(start, stop):
                    body = self._served.read(start, stop)
                else:
                    body = await run_in_threadpool(self._served.read, start, stop)
                more = stop < segment.stop or segment is not last
                await send({"type": "http.response.body", "body": body, "more_body": more})
                start = stop


def _piece_bytes(missing: int) -> int:
    """Bytes of the next piece of an answer that needs `missing` bytes more."""
    share = PIECES_BYTES // max(1, ByteResponse.readers)
    if missing <= min(WHOLE_BYTES, share):
        return missing
    return min(missing, max(MIN_PIECE_BYTES, min(PIECE_BYTES, share)))


def _content_range(part: ByteRange, size: int) -> str:
    return f"bytes {part.start}-{part.stop - 1}/{size}"


def _multipart(
    ranges: Sequence[ByteRange], size: int, media_type: str, boundary: str
) -> Iterator[bytes | ByteRange]:
    """The segments of a body of several ranges: a header before each, an end after all."""
    line_end = ""
    for part in ranges:
        header = f"Content-Type: {media_type}\r\nContent-Range: {_content_range(part, size)}"
        yield f"{line_end}--{boundary}\r\n{header}\r\n\r\n".encode()
        yield part
        line_end = "\r\n"
    yield f"\r\n--{boundary}--\r\n".encode()

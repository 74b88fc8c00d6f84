"""The objects of a residua service as a read-only file system of fsspec.

`ServedPath` gives it to all code that reads caches in object stores (`store_of`). Neighbouring
ranges of an object are fetched by one request, and far ones together where they are small.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from ..errors import UnreachableError, UsageError
from .byte_client import (
    CONNECTIONS,
    ByteClient,
    ObjectReplacedError,
    Span,
    shared_client,
)

RUN_BYTES = 8 << 20
"""Most bytes of one request; longer runs are fetched by several at the same time."""
MAX_RUN_BYTES = 1 << 30
"""Longest range of one chunk; the chunks of residua have at most some hundred MB."""
GAP_BYTES = 64 << 10
"""Bytes between two ranges that are fetched with them, rather than by a further request."""
SMALL_BYTES = 256 << 10
"""Longest run that shares a request with other runs, as several ranges."""
SHARED_BYTES, SHARED_RUNS = 4 << 20, 64
"""Most bytes, and runs, of a request with several ranges."""
MAX_ENTRIES = 1 << 22
"""Most entries of a listing."""
ROUNDS = 3
"""Trials to read an object that is replaced meanwhile."""
KINDS = ("caches", "probes")
"""First parts of the paths of a service's objects."""


class ServedFileSystem(AbstractFileSystem):
    """Objects of the service at `origin`, such as `http://localhost:8765`; paths begin with `/`.

    Everything that writes raises `UsageError`; all else as `ByteClient`.
    """

    protocol = "residua"
    root_marker = ""

    def __init__(self, origin: str, **options: Any) -> None:
        super().__init__(origin, **options)
        self.origin = origin

    @property
    def client(self) -> ByteClient:
        """The connections of this process."""
        return shared_client(self.origin)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return path.rstrip("/") if isinstance(path, str) else [p.rstrip("/") for p in path]

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        """The bytes `start:end` of an object; negative numbers count from its end."""
        if (start or 0) >= 0 and end is not None and end >= 0:
            return self._read_runs(path, (start or 0), end)
        if start is not None and start < 0 and end is None:
            return self.client.read_range(path, Span(start)).data
        size = self.client.status(path).size
        first, last, _ = slice(start, end).indices(size)
        return self._read_runs(path, first, last)

    def _read_runs(self, path: str, start: int, stop: int) -> bytes:
        """Bytes that may be many: by several requests, all for one state of the object."""
        for _ in range(ROUNDS):
            try:
                return b"".join(self._iterate(path, start, stop))
            except ObjectReplacedError:
                continue
        raise UnreachableError(f"{self.origin}{path} changes all the time; try it again later")

    def _iterate(
        self, path: str, start: int, stop: int | None, most: int | None = None
    ) -> Iterator[bytes]:
        """The bytes `start:stop` in pieces, as far as the object has them.

        Raises `UnreachableError` for an object of more than `most` bytes.
        """
        etag, position = None, start
        while stop is None or position < stop:
            end = position + RUN_BYTES if stop is None else min(stop, position + RUN_BYTES)
            reply = self.client.read_range(path, Span(position, end), etag)
            etag = reply.etag
            size = max(reply.size or 0, position + len(reply.data))
            if most is not None and size > most:
                raise UnreachableError(
                    f"{self.origin}{path} has {size} bytes; such a file has at most {most} here"
                )
            yield reply.data
            position += len(reply.data)
            if not reply.data or (reply.size is not None and position >= reply.size):
                return

    def read_whole(self, path: str, most: int | None = None) -> bytes:
        """All bytes of an object.

        Raises `UnreachableError` for more than `most`, and for more than half of the memory.
        """
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = memory // 2 if most is None else min(most, memory // 2)
        for _ in range(ROUNDS):
            try:
                pieces = list(self._iterate(path, 0, None, limit))
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)
            except ObjectReplacedError:
                continue
        raise UnreachableError(f"{self.origin}{path} changes all the time; try it again later")

    def cat_ranges(
        self,
        paths: Sequence[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "raise",
        **_: Any,
    ) -> list[bytes]:
        """The bytes `start:end` of each path; ranges that lie near each other come together.

        Raises the first error whatever `on_error`; `UnreachableError` for a range that an object
        does not have.
        """
        starts = [starts] * len(paths) if isinstance(starts, int) else list(starts)
        ends = [ends] * len(paths) if isinstance(ends, int) else list(ends)
        # path -> numbers of its ranges
        numbers_of: dict[str, list[int]] = {}
        for number, path in enumerate(paths):
            numbers_of.setdefault(path, []).append(number)
        requests = [
            (path, runs)
            for path, numbers in numbers_of.items()
            for runs in plan_requests(
                [Span(starts[n], ends[n]) for n in numbers],
                GAP_BYTES if max_gap is None else max_gap,
            )
        ]
        results = self._fetch_all(requests)
        # Cut the ranges out of the runs, each of which is in memory once.
        return [self._cut(results[path], Span(starts[n], ends[n])) for n, path in enumerate(paths)]

    def _fetch_all(self, requests: list[tuple[str, list[Span]]]) -> dict[str, dict[Span, bytes]]:
        """The bytes of all runs, several requests at the same time."""
        if len(requests) > 1:
            with ThreadPoolExecutor(min(len(requests), CONNECTIONS)) as pool:
                answers = list(pool.map(lambda request: self._fetch(*request), requests))
        else:
            answers = [self._fetch(*request) for request in requests]
        results: dict[str, dict[Span, bytes]] = {}
        for (path, runs), answer in zip(requests, answers, strict=True):
            results.setdefault(path, {}).update(zip(runs, answer, strict=True))
        return results

    def _fetch(self, path: str, runs: list[Span]) -> list[bytes]:
        """The bytes of some runs of one object, by one request."""
        if len(runs) > 1:
            return self.client.read_spans(path, runs)
        if _size(runs[0]) > MAX_RUN_BYTES:
            raise UnreachableError(f"{self.origin}{path} has a chunk of {_size(runs[0])} bytes")
        data = self.client.read_range(path, runs[0]).data if _size(runs[0]) else b""
        if len(data) != _size(runs[0]):
            raise UnreachableError(
                f"{self.origin}{path} has no bytes {runs[0].start}-{_stop(runs[0]) - 1}: it is "
                "shorter than its index says; `residua verify` on the server's machine tells more"
            )
        return [data]

    def _cut(self, runs: dict[Span, bytes], span: Span) -> bytes:
        """The bytes of `span` from the run that has them."""
        if (data := runs.get(span)) is not None:
            return data
        for run, data in runs.items():
            if run.start <= span.start and _stop(span) <= _stop(run):
                return data[span.start - run.start : _stop(span) - run.start]
        raise AssertionError(f"{span} was not fetched")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name, size, type and time of an object, or name and type of a folder."""
        path = self._strip_protocol(path)
        try:
            status = self.client.status(path)
        except FileNotFoundError:
            next(self._list(path, False, 1), None)
            return {"name": path, "size": 0, "type": "directory"}
        return {
            "name": path,
            "size": status.size,
            "type": "file",
            "mtime": status.modified,
            "ETag": status.etag,
        }

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Objects and folders in a folder; of a service as a whole, its caches."""
        path = self._strip_protocol(path)
        if not is_below_kind(path):
            path = f"{path}/{KINDS[0]}"
        entries = [_entry(path, name, size) for name, size in self._list(path, False)]
        return entries if detail else [entry["name"] for entry in entries]

    def find(
        self,
        path: str,
        maxdepth: Any = None,
        withdirs: bool = False,
        detail: bool = False,
        **_: Any,
    ) -> Any:
        """All objects below a folder, by name; none for a missing folder."""
        path = self._strip_protocol(path)
        try:
            entries = [_entry(path, name, size) for name, size in self._list(path, True)]
        except FileNotFoundError:
            entries = []
        if detail:
            return {entry["name"]: entry for entry in entries}
        return [entry["name"] for entry in entries]

    def _list(
        self, path: str, recursive: bool, limit: int | None = None
    ) -> Iterator[tuple[str, int | None]]:
        """Names, relative to a folder, and sizes; page by page."""
        after, count = "", 0
        while True:
            query = f"?recursive={'true' if recursive else 'false'}"
            query += f"&after={_quote(after)}" if after else ""
            query += f"&limit={limit}" if limit else ""
            page = self.client.read_json(f"{path}/", query)
            entries, after_next = _parse_page(page, f"{self.origin}{path}/", recursive)
            yield from entries
            count += len(entries)
            if after_next is None or limit:
                return
            if after_next == after or not entries or count > MAX_ENTRIES:
                raise UnreachableError(f"{self.origin}{path}/ has a listing without an end")
            after = after_next

    def get_file(
        self,
        rpath: str,
        lpath: Any = None,
        callback: Any = None,
        outfile: Any = None,
        **options: Any,
    ) -> None:
        """Copy an object to the file `lpath` of this machine."""
        for _ in range(ROUNDS):
            with open(lpath, "wb") as file:
                try:
                    for piece in self._iterate(rpath, 0, None):
                        file.write(piece)
                    return
                except ObjectReplacedError:
                    continue
        raise UnreachableError(f"{self.origin}{rpath} changes all the time; try it again later")

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: Any = None,
        autocommit: bool = True,
        cache_options: Any = None,
        **options: Any,
    ) -> Any:
        if mode != "rb":
            self._refuse()
        return ServedFile(self, path, mode, block_size or "default", cache_options=cache_options)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise read_only_error(self.origin)

    pipe_file = put_file = cp_file = rm_file = _rm = rm = mv = mkdir = makedirs = rmdir = touch = (  # pyright: ignore[reportAssignmentType]
        _refuse
    )


class ServedFile(AbstractBufferedFile):
    """An object of a service, open for reading."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start, end)


def read_only_error(place: str) -> UsageError:
    """The error of whatever would write to a service by its address."""
    return UsageError(
        f"{place} is a residua service, which is only read by its address: write to a folder of "
        "this machine (--out), or let the service do the work (--server)"
    )


def is_below_kind(path: str) -> bool:
    """Whether a path lies in, or is, `caches/` or `probes/` of a service."""
    return any(part in KINDS for part in path.split("/"))


def plan_requests(spans: Iterable[Span], gap: int) -> list[list[Span]]:
    """The runs of bytes that have all `spans`, in groups of one request each.

    Spans at most `gap` bytes apart are in one run of at most `RUN_BYTES`; a longer span is a run of
    its own. Small runs share requests.
    """
    runs: list[Span] = []
    for span in sorted(set(spans)):
        last = runs[-1] if runs else None
        is_near = last is not None and span.start <= _stop(last) + gap
        if last is not None and is_near and max(_stop(span), _stop(last)) - last.start <= RUN_BYTES:
            runs[-1] = Span(last.start, max(_stop(span), _stop(last)))
        else:
            runs.append(span)
    groups = [[run] for run in runs if not 0 < _size(run) <= SMALL_BYTES]
    shared: list[Span] = []
    for run in (run for run in runs if 0 < _size(run) <= SMALL_BYTES):
        if shared and (
            len(shared) == SHARED_RUNS or sum(map(_size, shared)) + _size(run) > SHARED_BYTES
        ):
            groups.append(shared)
            shared = []
        shared.append(run)
    return [*groups, shared] if shared else groups


def _stop(span: Span) -> int:
    return span.stop or 0


def _size(span: Span) -> int:
    return max(0, _stop(span) - span.start)


def _quote(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def _entry(folder: str, name: str, size: int | None) -> dict[str, Any]:
    """A file or folder as fsspec describes it."""
    kind = "directory" if size is None else "file"
    return {"name": f"{folder}/{name}", "size": size or 0, "type": kind}


def _parse_page(
    page: Any, place: str, recursive: bool
) -> tuple[list[tuple[str, int | None]], str | None]:
    """The entries of a page of a listing, and the name to go on after."""
    entries = []
    try:
        after = page["next"]
        for entry in page["entries"]:
            name, size = entry["name"], entry["bytes"]
            if not _is_plain_name(name, recursive) or not _is_size(size):
                raise ValueError
            entries.append((name, size))
        if not (after is None or _is_plain_name(after, True)):
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UnreachableError(f"{place} is no listing of a residua service") from None
    return entries, after


def _is_plain_name(name: Any, recursive: bool) -> bool:
    """Whether a name leads to a place below its folder."""
    if not isinstance(name, str) or "\\" in name or "\0" in name or len(name) > 4096:
        return False
    parts = name.split("/")
    return (recursive or len(parts) == 1) and all(part not in ("", ".", "..") for part in parts)


def _is_size(size: Any) -> bool:
    return size is None or (type(size) is int and 0 <= size < 1 << 62)

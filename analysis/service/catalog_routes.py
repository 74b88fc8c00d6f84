"""The catalogue: caches and probes under the root, and the parts of a cache."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ...cache.errors import NotFoundError
from ...cache.files.leases import held_leases
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.catalog import describe_cache, find_path, list_caches
from ...probes.saved.library import FOLDER, find_probe
from ...probes.saved.probe_list import describe_probe, list_probes
from ..web.endpoints import Answer, Endpoint, Parameter, Schema, parameters_of
from ..web.json_responses import JsonResponse

LIST_SECONDS = 1.0
"""Age up to which an answer is given again."""
MAX_ANSWERS = 256
"""Most answers of a kind that are kept."""
CACHE_ID = Parameter(
    "cache",
    "path",
    {"type": "string", "pattern": "^[0-9a-f]{1,64}$"},
    "Id of a cache, or its unique beginning",
)
PROBE_NAME = Parameter(
    "probe",
    "path",
    {"type": "string", "pattern": r"^[A-Za-z0-9_][\w.+-]{0,254}$"},
    "Name of a saved probe, or its unique beginning",
)
CACHE_SCHEMA: Schema = {
    "type": "object",
    "required": ["cache", "state", "layers", "bytes"],
    "properties": {
        "cache": {"type": "string"},
        "model": {"type": ["string", "null"]},
        "data": {"type": ["string", "null"]},
        "positions": {"type": ["integer", "null"]},
        "sequences": {"type": ["integer", "null"]},
        "layers": {"type": "array", "items": {"type": "integer"}},
        "d_model": {"type": ["integer", "null"]},
        "bytes": {"type": "integer"},
        "state": {"type": "string"},
    },
}
PROBE_SCHEMA: Schema = {"type": "object", "properties": {"probe": {"type": "string"}}}
PARTS_SCHEMA: Schema = {
    "type": "object",
    "required": ["cache", "parts"],
    "properties": {
        "cache": {"type": "string"},
        "rows": {"type": "integer"},
        "bytes_expected": {"type": "integer"},
        "bytes_written": {"type": "integer"},
        "parts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["part", "start", "stop", "state"],
                "properties": {
                    "part": {"type": "integer"},
                    "start": {"type": "integer"},
                    "stop": {"type": "integer"},
                    "state": {"enum": ["committed", "leased", "free", "quarantined"]},
                    "owner": {"type": ["string", "null"]},
                },
            },
        },
    },
}


def _list_of(name: str, items: Schema) -> Schema:
    return {
        "type": "object",
        "required": ["root", name],
        "properties": {"root": {"type": "string"}, name: {"type": "array", "items": items}},
    }


def list_endpoints() -> tuple[Endpoint, ...]:
    """The endpoints of this file."""
    return (
        Endpoint(
            "GET",
            "/v1/caches",
            answer_caches,
            "All caches, oldest first",
            "read",
            "catalogue",
            answers={200: Answer("As `residua ls --json`", _list_of("caches", CACHE_SCHEMA))},
        ),
        Endpoint(
            "GET",
            "/v1/caches/{cache}",
            answer_cache,
            "One cache",
            "read",
            "catalogue",
            parameters=(CACHE_ID,),
            answers={200: Answer("As `residua info --json`", CACHE_SCHEMA)},
        ),
        Endpoint(
            "GET",
            "/v1/caches/{cache}/parts",
            answer_parts,
            "Which parts of a cache are written",
            "read",
            "catalogue",
            parameters=(CACHE_ID,),
            answers={200: Answer("The parts", PARTS_SCHEMA)},
        ),
        Endpoint(
            "GET",
            "/v1/probes",
            answer_probes,
            "All saved probes",
            "read",
            "catalogue",
            answers={200: Answer("As `residua probes --json`", _list_of("probes", PROBE_SCHEMA))},
        ),
        Endpoint(
            "GET",
            "/v1/probes/{probe}",
            answer_probe,
            "One saved probe",
            "read",
            "catalogue",
            parameters=(PROBE_NAME,),
            answers={200: Answer("As `residua info --json`", PROBE_SCHEMA)},
        ),
    )


class RecentAnswers:
    """Values of folders, each computed at most once in `LIST_SECONDS`, by one thread for all."""

    def __init__(self, compute: Callable[[Path], Any]) -> None:
        self.compute = compute
        self._lock = threading.Lock()
        self._values: OrderedDict[Path, tuple[float, Any]] = OrderedDict()
        self._busy: dict[Path, threading.Lock] = {}

    def get(self, folder: Path) -> Any:
        """The value of `folder`, `LIST_SECONDS` old at most when it is asked for."""
        with self._lock:
            busy = self._busy.setdefault(folder, threading.Lock())
        with busy:
            computed, value = self._values.get(folder, (-1e9, None))
            if time.monotonic() - computed <= LIST_SECONDS:
                return value
            began = time.monotonic()
            value = self.compute(folder)
            with self._lock:
                self._values[folder] = (began, value)
                self._values.move_to_end(folder)
                while len(self._values) > MAX_ANSWERS:
                    del self._busy[self._values.popitem(last=False)[0]]
            return value

    def forget(self) -> None:
        """Compute every value anew when it is next asked for."""
        with self._lock:
            self._values.clear()


_CACHES = RecentAnswers(list_caches)
_PROBES = RecentAnswers(list_probes)
_CACHE = RecentAnswers(lambda path: describe_cache(ActivationCache(path)))
_PROBE = RecentAnswers(describe_probe)
_PARTS = RecentAnswers(lambda path: describe_parts(ActivationCache(path)))


def forget_lists() -> None:
    """Look at caches and probes anew: something was removed."""
    for recent in (_CACHES, _PROBES, _CACHE, _PROBE, _PARTS):
        recent.forget()


async def answer_caches(request: Request) -> Response:
    """All caches under the root."""
    root = request.app.state.service.root
    caches = await run_in_threadpool(_CACHES.get, root)
    return JsonResponse({"root": str(root), "caches": caches})


async def answer_probes(request: Request) -> Response:
    """All probes under the root."""
    root = request.app.state.service.root
    probes = await run_in_threadpool(_PROBES.get, root)
    return JsonResponse({"root": str(root), "probes": probes})


async def answer_cache(request: Request) -> Response:
    """The facts about one cache."""
    path = await _find_cache(request)
    return JsonResponse(await run_in_threadpool(_CACHE.get, path))


async def answer_probe(request: Request) -> Response:
    """The facts about one probe."""
    root, name = request.app.state.service.root, parameters_of(request)["probe"]
    path = await run_in_threadpool(find_probe, name, root)
    if path.parent != root / FOLDER:  # a name that is a path of the server
        raise NotFoundError(f"no probe {name!r} under {root}")
    return JsonResponse(await run_in_threadpool(_PROBE.get, path))


async def answer_parts(request: Request) -> Response:
    """The parts of one cache."""
    path = await _find_cache(request)
    return JsonResponse(await run_in_threadpool(_PARTS.get, path))


async def _find_cache(request: Request) -> Path:
    """Folder of the cache that the request names, which lies in the root."""
    root, name = request.app.state.service.root, parameters_of(request)["cache"]
    path = await run_in_threadpool(find_path, name, root)
    if path.parent != root:
        raise NotFoundError(f"no cache {name!r} under {root}")
    return path


def describe_parts(cache: ActivationCache) -> dict[str, Any]:
    """The parts of `cache` with their state, and its bytes, written and expected.

    `committed`: every layer that the cache is meant to have is there; `quarantined`: likewise, but
    rows of it cannot be used; `leased`: a worker writes it now; `free`: nobody does.
    """
    layout, targets = cache.manifest.layout, set(cache.target_names)
    records = cache.committed
    missing = [
        part
        for part in range(cache.n_parts)
        if part not in records or not targets <= set(records[part].arrays)
    ]
    leased = held_leases(cache.path / "leases", missing)
    parts, absent = [], set(missing)
    for part in range(cache.n_parts):
        start = part * layout.part_rows
        if part not in absent:
            state = "quarantined" if records[part].quarantine else "committed"
        else:
            state = "leased" if part in leased else "free"
        stop = min(start + layout.part_rows, cache.positions)
        owner = leased.get(part)
        parts.append({"part": part, "start": start, "stop": stop, "state": state, "owner": owner})
    return {"cache": cache.id, "rows": layout.part_rows, "parts": parts, **_count_bytes(cache)}


def _count_bytes(cache: ActivationCache) -> dict[str, int]:
    """Bytes of the shards that are written, and that all parts would have together.

    Of an array without shards, the rows are counted as they are before compression.
    """
    written, expected = 0, 0.0
    for name in cache.target_names:
        records = [record for record in cache.committed.values() if name in record.arrays]
        size = sum(record.arrays[name].bytes for record in records)
        rows = sum(record.stop - record.start for record in records)
        layout = cache.array(name).layout
        row_bytes = size / rows if rows else layout.chunk_bytes / layout.chunk_rows
        written, expected = written + size, expected + row_bytes * cache.positions
    return {"bytes_written": written, "bytes_expected": round(expected)}

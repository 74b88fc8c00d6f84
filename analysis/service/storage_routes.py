"""Disk use over HTTP: what lies under the root, collection, pins, removal; as du, gc, pin and rm.

What a probe, an extending cache, a job or a pin still names is not removed: the answer is 409 and
says what names it, unless `force` is true.
"""

from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ...cache.errors import NotFoundError, UsageError
from ...cache.extraction.plan import free_bytes
from ...cache.files.json_fields import (
    FieldError,
    as_text,
    boolean_field,
    check_known_fields,
    list_field,
    number_field,
    optional_field,
    text_field,
)
from ...cache.store.catalog import find_path
from ...probes.saved.library import FOLDER, find_probe
from ..console.saved_actions import pin_item, plan_removals, remove_saved
from ..disk_use.collection import CATEGORIES, LEFTOVERS, collect, plan_collection, possible_savings
from ..disk_use.disk_report import measure_disk
from ..disk_use.pins import MAX_REASON, list_pins, unpin_saved
from ..web.endpoints import Answer, Endpoint, Parameter, Schema, parameters_of, read_object
from ..web.json_responses import JsonResponse
from .catalog_routes import CACHE_ID, PROBE_NAME, forget_lists

LONGEST_AGE = 1e10
"""Largest `older_than`, in seconds."""
FORCE = Parameter(
    "force",
    "query",
    {"type": "boolean", "default": False},
    "Remove also what a probe, an extending cache, a job or a pin still names",
)
PIN_NAME = Parameter(
    "name",
    "path",
    {"type": "string", "pattern": r"^[A-Za-z0-9_][\w.+-]{0,254}$"},
    "Id of a cache or name of a probe, or its unique beginning",
)
USER_SCHEMA: Schema = {
    "type": "object",
    "required": ["kind", "name", "note"],
    "properties": {
        "kind": {"enum": ["probe", "cache", "job", "pin", "fit"]},
        "name": {"type": "string"},
        "note": {"type": "string"},
    },
}
ITEM_SCHEMA: Schema = {
    "type": "object",
    "required": ["kind", "name", "bytes", "freed", "shared", "in_use", "named_by"],
    "properties": {
        "kind": {"type": "string"},
        "name": {"type": "string"},
        "files": {"type": "integer"},
        "bytes": {"type": "integer"},
        "freed": {"type": "integer", "description": "Bytes that go free when it goes alone."},
        "shared": {"type": "integer"},
        "state": {"type": "string"},
        "last_used": {"type": ["number", "null"]},
        "notes_reading": {"type": "boolean"},
        "in_use": {"type": "boolean"},
        "named_by": {"type": "array", "items": USER_SCHEMA},
        "contents": {"type": ["object", "null"]},
    },
}
PIN_SCHEMA: Schema = {
    "type": "object",
    "required": ["kind", "name", "reason", "pinned"],
    "properties": {
        "kind": {"type": "string"},
        "name": {"type": "string"},
        "reason": {"type": "string"},
        "pinned": {"type": "number", "description": "Seconds since 1970."},
    },
}
DISK_SCHEMA: Schema = {
    "type": "object",
    "required": ["root", "bytes", "items", "would_free", "pins"],
    "properties": {
        "root": {"type": "string"},
        "bytes": {"type": "integer"},
        "items": {"type": "array", "items": ITEM_SCHEMA},
        "unreadable": {"type": "array", "items": {"type": "string"}},
        "would_free": {"type": "object", "additionalProperties": {"type": "integer"}},
        "pins": {"type": "array", "items": PIN_SCHEMA},
        "free": {
            "type": ["integer", "null"],
            "description": "Bytes that are free on the disk; null for an object store.",
        },
    },
}
COLLECT_BODY: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "categories": {
            "type": "array",
            "minItems": 1,
            "maxItems": len(CATEGORIES),
            "items": {"enum": list(CATEGORIES)},
            "description": f"What to remove; {LEFTOVERS} if none is given.",
        },
        "older_than": {
            "type": ["number", "null"],
            "minimum": 0,
            "maximum": LONGEST_AGE,
            "description": "Leave alone what was used in the last so many seconds.",
        },
        "dry_run": {
            "type": "boolean",
            "default": True,
            "description": "Only say what would go.",
        },
    },
}
COLLECTED_SCHEMA: Schema = {
    "type": "object",
    "required": ["root", "freed", "items", "kept", "removed"],
    "properties": {
        "root": {"type": "string"},
        "freed": {"type": "integer"},
        "items": {"type": "array", "items": ITEM_SCHEMA},
        "kept": {"type": "array", "items": {"type": "object"}},
        "removed": {"type": "boolean"},
    },
}
PIN_BODY: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"reason": {"type": "string", "maxLength": MAX_REASON}},
}
REMOVED_SCHEMA: Schema = {
    "type": "object",
    "required": ["kind", "path", "freed", "shared", "extended_by", "named_by"],
    "properties": {
        "kind": {"enum": ["cache", "probe"]},
        "path": {"type": "string"},
        "freed": {"type": "integer"},
        "shared": {"type": "integer"},
        "extended_by": {"type": "array", "items": {"type": "string"}},
        "named_by": {"type": "array", "items": USER_SCHEMA},
    },
}


def list_endpoints() -> tuple[Endpoint, ...]:
    """The endpoints of this file."""
    return (
        Endpoint(
            "GET",
            "/v1/disk",
            answer_disk,
            "What takes the disk, what names it, what could go",
            "read",
            "disk",
            answers={200: Answer("As `residua du --json`, and the pins", DISK_SCHEMA)},
        ),
        Endpoint(
            "POST",
            "/v1/disk/collect",
            answer_collect,
            "Remove what is not needed, by category",
            "write",
            "disk",
            body=COLLECT_BODY,
            answers={200: Answer("As `residua gc --json`", COLLECTED_SCHEMA)},
        ),
        Endpoint(
            "PUT",
            "/v1/pins/{name}",
            answer_pin,
            "Keep a cache or probe from collection and removal",
            "write",
            "disk",
            parameters=(PIN_NAME,),
            body=PIN_BODY,
            answers={200: Answer("The pin", PIN_SCHEMA)},
        ),
        Endpoint(
            "DELETE",
            "/v1/pins/{name}",
            answer_unpin,
            "Take a pin away",
            "write",
            "disk",
            parameters=(PIN_NAME,),
            answers={200: Answer("The pin that was", PIN_SCHEMA)},
        ),
        Endpoint(
            "DELETE",
            "/v1/caches/{cache}",
            answer_remove_cache,
            "Remove a cache",
            "write",
            "disk",
            parameters=(CACHE_ID, FORCE),
            answers={200: Answer("An entry of `residua rm --json`", REMOVED_SCHEMA)},
        ),
        Endpoint(
            "DELETE",
            "/v1/probes/{probe}",
            answer_remove_probe,
            "Remove a saved probe",
            "write",
            "disk",
            parameters=(PROBE_NAME, FORCE),
            answers={200: Answer("An entry of `residua rm --json`", REMOVED_SCHEMA)},
        ),
    )


async def answer_disk(request: Request) -> Response:
    """Everything under the root, with its bytes."""
    settings = request.app.state.service.settings

    def describe() -> dict[str, Any]:
        report = measure_disk(settings.root, settings.state)
        pins = [pin.to_dict() for pin in list_pins(settings.root)]
        savings, free = possible_savings(report), free_bytes(settings.root)
        return {**report.to_dict(), "would_free": savings, "pins": pins, "free": free}

    return JsonResponse(await run_in_threadpool(describe))


async def answer_collect(request: Request) -> Response:
    """Remove by category, or say what would go."""
    settings = request.app.state.service.settings
    body = await read_object(request)
    try:
        check_known_fields(body, COLLECT_BODY["properties"], "the body")
        older_than = optional_field(number_field, body, "older_than", 0, LONGEST_AGE)
        dry_run = boolean_field(body, "dry_run") if "dry_run" in body else True
        categories: list[Any] = [LEFTOVERS]
        if "categories" in body:
            categories = list_field(body, "categories", 1, len(CATEGORIES))
            categories = [as_text(category, "a category") for category in categories]
    except FieldError as error:
        raise UsageError(f"the body is wrong: {error}") from None

    def run() -> dict[str, Any]:
        plan = plan_collection(settings.root, categories, older_than, settings.state)
        if dry_run:
            return {**plan.to_dict(), "removed": False}
        try:
            return {**collect(plan).to_dict(), "removed": True}
        finally:
            forget_lists()

    return JsonResponse(await run_in_threadpool(run))


async def answer_pin(request: Request) -> Response:
    """Pin a cache or probe."""
    root, name = request.app.state.service.root, parameters_of(request)["name"]
    body = await read_object(request)
    try:
        check_known_fields(body, PIN_BODY["properties"], "the body")
        reason = optional_field(text_field, body, "reason", MAX_REASON) or ""
    except FieldError as error:
        raise UsageError(f"the body is wrong: {error}") from None

    def run() -> dict[str, Any]:
        return pin_item(str(_find_item(root, name)), root, reason).to_dict()

    return JsonResponse(await run_in_threadpool(run))


async def answer_unpin(request: Request) -> Response:
    """Take a pin away."""
    root, name = request.app.state.service.root, parameters_of(request)["name"]
    return JsonResponse(await run_in_threadpool(lambda: unpin_saved(root, name).to_dict()))


async def answer_remove_cache(request: Request) -> Response:
    """Remove a cache that nothing names, or by force."""
    return await _remove(request, "cache")


async def answer_remove_probe(request: Request) -> Response:
    """Remove a probe that nothing names, or by force."""
    return await _remove(request, "probe")


async def _remove(request: Request, kind: str) -> Response:
    settings, parameters = request.app.state.service.settings, parameters_of(request)

    def run() -> dict[str, Any]:
        find = _find_cache_folder if kind == "cache" else _find_probe_folder
        path = find(settings.root, parameters[kind])
        force = parameters["force"]
        (removal,) = plan_removals([str(path)], settings.root, force, settings.state)
        try:
            remove_saved(removal, force)
        finally:
            forget_lists()
        return removal.to_dict()

    return JsonResponse(await run_in_threadpool(run))


def _find_cache_folder(root: Path, name: str) -> Path:
    """Folder of the cache that `name` begins, in the root itself; raises `NotFoundError`."""
    path = find_path(name, root)
    if path.parent != root:
        raise NotFoundError(f"no cache {name!r} under {root}")
    return path


def _find_probe_folder(root: Path, name: str) -> Path:
    """Folder of the probe that `name` begins, under the root; raises `NotFoundError`."""
    path = find_probe(name, root)
    if path.parent != root / FOLDER:
        raise NotFoundError(f"no probe {name!r} under {root}")
    return path


def _find_item(root: Path, name: str) -> Path:
    """Folder of the cache or probe that `name` begins."""
    try:
        return _find_cache_folder(root, name)
    except NotFoundError:
        return _find_probe_folder(root, name)

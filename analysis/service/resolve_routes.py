"""Which cache under the root answers an extraction, and what it lacks.

The texts are tokenized by a process of its own, as `residua extract --find` does it: the service
itself loads no tokenizer and reads no texts.
"""

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ...cache.errors import UsageError
from ..jobs.job_commands import check_request
from ..service_client.server_connection import named_error
from ..web.endpoints import Answer, Endpoint, read_object
from ..web.json_responses import JsonResponse, ServiceError

FIND_SECONDS = 300
"""Longest time to read and tokenize the texts; those that were read before take no time."""
FINDS = asyncio.Semaphore(2)
"""Requests that are resolved at the same time."""
MATCH_SCHEMA = {
    "type": "object",
    "required": ["answer", "cache", "missing_layers", "missing_sequences", "unfinished"],
    "properties": {
        "answer": {"enum": ["hit", "covers", "partial", "miss"]},
        "cache": {
            "type": ["string", "null"],
            "description": "Id of the cache; of a miss, of the nearest one",
        },
        "path": {"type": ["string", "null"]},
        "missing_layers": {"type": "array", "items": {"type": "integer"}},
        "missing_sequences": {"type": "integer"},
        "unfinished": {"type": "boolean"},
        "differences": {"type": "array", "items": {"type": "object"}},
    },
}


def list_endpoints() -> tuple[Endpoint, ...]:
    """The endpoints of this file."""
    return (
        Endpoint(
            "POST",
            "/v1/resolve",
            resolve_extraction,
            "Which cache answers an extraction, and what it lacks",
            "write",
            "catalogue",
            body={
                "type": "object",
                "required": ["model", "data"],
                "properties": {"model": {"type": "string"}, "data": {"type": "string"}},
                "description": "Arguments of `residua extract`, as of a job",
            },
            answers={200: Answer("The best cache", MATCH_SCHEMA)},
        ),
    )


async def resolve_extraction(request: Request) -> Response:
    """Find the cache that answers the arguments of `residua extract` in the body."""
    service = request.app.state.service
    if service.jobs is None:
        raise UsageError("this service takes no jobs, and so reads no texts")
    arguments = {**await read_object(request), "find": True}
    checked = await run_in_threadpool(check_request, service.jobs.settings, "extract", arguments)
    async with FINDS:
        return JsonResponse(await _run_command([*checked.words[:1], "--json", *checked.words[1:]]))


async def _run_command(words: list[str]) -> dict[str, Any]:
    """What `residua` with these words and --json prints; raises its error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-P", "-m", "residua", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(FIND_SECONDS):
            printed, _ = await process.communicate()
    except TimeoutError:
        raise ServiceError(
            503, "too_long", f"reading the texts took more than {FIND_SECONDS} seconds"
        ) from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    try:
        value = json.loads(printed)
    except ValueError:
        raise ServiceError(500, "internal", "the search ended without an answer") from None
    if process.returncode != 0:
        raise named_error(value)
    return value

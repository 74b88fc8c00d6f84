"""Jobs over HTTP: ask for one, watch it, cancel it, read its log and files; texts for jobs."""

import asyncio
import json
import mimetypes
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from ...cache.errors import CorruptError, LimitError, NotFoundError, UsageError
from ...cache.files.confined_files import is_confined_name, read_confined
from ..jobs.job_commands import JOB_COMMANDS
from ..jobs.job_events import JobEvent, JobEventReader
from ..jobs.job_files import STATES
from ..jobs.job_inputs import TEXT_NAME, TextUpload, find_upload
from ..jobs.job_queue import JobQueue
from ..web.endpoints import Answer, Endpoint, Parameter, Schema, parameters_of, read_object
from ..web.json_responses import JsonResponse, ServiceError

POLL_SECONDS = 0.25
"""Pause between two looks at the events of a job."""
HEARTBEAT_SECONDS = 10.0
"""Longest silence of a stream of events."""
RETRY_MILLISECONDS = 2000
"""Pause after which a browser connects again."""
MAX_STREAMS = 256
"""Most streams of events at the same time."""
MAX_FILE_BYTES = 512 << 20
PAGE_POLICY = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline' "
    "'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
"""A report brings its own scripts: it runs apart from the dashboard, and loads nothing."""
JOB_ID = Parameter(
    "job",
    "path",
    {"type": "string", "pattern": "^[0-9a-f]{1,32}$", "maxLength": 32},
    "Id of a job, or its unique beginning",
)
NULLABLE_NUMBER: Schema = {"type": ["number", "null"]}
NULLABLE_TEXT: Schema = {"type": ["string", "null"]}
PROGRESS_SCHEMA: Schema = {
    "type": "object",
    "required": ["stage", "done", "total", "unit"],
    "properties": {
        "stage": {"type": "string"},
        "done": {"type": "integer"},
        "total": {"type": "integer"},
        "unit": {"type": "string"},
        "rate": {**NULLABLE_NUMBER, "description": "Units per second."},
        "eta": {**NULLABLE_NUMBER, "description": "Seconds that are left."},
        "note": NULLABLE_TEXT,
    },
}
JOB_SCHEMA: Schema = {
    "type": "object",
    "required": ["id", "command", "arguments", "state", "created", "attempts", "progress"],
    "properties": {
        "id": {"type": "string"},
        "command": {"type": "string"},
        "arguments": {"type": "object"},
        "state": {"enum": list(STATES)},
        "created": {"type": "number", "description": "Seconds since 1970."},
        "started": NULLABLE_NUMBER,
        "ended": NULLABLE_NUMBER,
        "attempts": {"type": "integer"},
        "worker": NULLABLE_TEXT,
        "progress": {"type": "array", "items": PROGRESS_SCHEMA},
        "exit_code": {"type": ["integer", "null"]},
        "error": {"type": ["object", "null"]},
        "message": {**NULLABLE_TEXT, "description": "Why the job waits."},
        "value": {"description": "What the command prints with --json."},
        "text": {**NULLABLE_TEXT, "description": "What the command prints otherwise."},
        "files": {"type": "array", "items": {"type": "string"}},
    },
}
JOBS_SCHEMA: Schema = {
    "type": "object",
    "required": ["jobs"],
    "properties": {"jobs": {"type": "array", "items": JOB_SCHEMA}},
}
REQUEST_SCHEMA: Schema = {
    "type": "object",
    "required": ["command"],
    "additionalProperties": False,
    "properties": {
        "command": {"enum": list(JOB_COMMANDS)},
        "arguments": {"type": "object", "description": "As /v1/commands describes them."},
    },
}
TEXT_DIGEST = Parameter(
    "sha256",
    "path",
    {"type": "string", "pattern": "^[0-9a-f]{64}$", "maxLength": 64},
    "sha256 of the text, in hexadecimal",
)
TEXT_FILE_NAME = Parameter(
    "name",
    "query",
    {"type": "string", "pattern": f"^{TEXT_NAME.pattern}$", "maxLength": 100},
    "Name of the file, whose ending says the format",
    required=True,
)
TEXT_SCHEMA: Schema = {
    "type": "object",
    "required": ["data", "bytes"],
    "properties": {
        "data": {"type": "string", "description": "For the argument `data` of a job."},
        "bytes": {"type": "integer"},
    },
}


def list_endpoints() -> tuple[Endpoint, ...]:
    """The endpoints of this file."""
    job = (JOB_ID,)
    after = (
        Parameter(
            "Last-Event-ID",
            "header",
            {"type": "string", "maxLength": 40},
            "Number of the last event that the client has",
        ),
        Parameter(
            "after",
            "query",
            {"type": "integer", "minimum": 0, "maximum": 1 << 53, "default": 0},
            "The same, for clients that cannot send the header",
        ),
    )
    key = Parameter(
        "Idempotency-Key",
        "header",
        {"type": "string", "minLength": 1, "maxLength": 200},
        "Makes another job of the same arguments; the same key and arguments are one job",
    )
    attempt = Parameter(
        "attempt",
        "query",
        {"type": "integer", "minimum": 1, "maximum": 99999},
        "Number of an attempt; by default the latest",
    )
    name = Parameter("name", "path", {"type": "string", "maxLength": 500}, "Name of the file")
    jobs, found = Answer("The jobs", JOBS_SCHEMA), Answer("The job", JOB_SCHEMA)
    taken = {200: Answer("The job, known before", JOB_SCHEMA), 201: Answer("A new job", JOB_SCHEMA)}
    stream = {
        200: Answer("Server-sent events: state, progress, log", media="text/event-stream"),
        204: Answer("The job has ended, and the client has every event", media=""),
    }
    texts = {200: Answer("Known before", TEXT_SCHEMA), 201: Answer("Kept", TEXT_SCHEMA)}
    return (
        Endpoint(
            "POST",
            "/v1/jobs",
            submit_job,
            "Ask for a job; equal requests are one job",
            "write",
            "jobs",
            parameters=(key,),
            body=REQUEST_SCHEMA,
            answers=taken,
        ),
        Endpoint(
            "GET",
            "/v1/jobs",
            answer_jobs,
            "All jobs, the latest first, without their values",
            "read",
            "jobs",
            answers={200: jobs},
        ),
        Endpoint(
            "GET",
            "/v1/jobs/{job}",
            answer_job,
            "One job, with its result",
            "read",
            "jobs",
            parameters=job,
            answers={200: found},
        ),
        Endpoint(
            "GET",
            "/v1/jobs/{job}/events",
            answer_job_events,
            "Events of a job, as they come",
            "read",
            "jobs",
            parameters=(*job, *after),
            answers=stream,
        ),
        Endpoint(
            "POST",
            "/v1/jobs/{job}/cancel",
            cancel_job,
            "End a job; what it did is kept",
            "write",
            "jobs",
            parameters=job,
            answers={200: found},
        ),
        Endpoint(
            "GET",
            "/v1/jobs/{job}/log",
            answer_job_log,
            "What the process of a job printed",
            "read",
            "jobs",
            parameters=(*job, attempt),
            answers={200: Answer("The log", media="text/plain")},
        ),
        Endpoint(
            "GET",
            "/v1/jobs/{job}/files/{name:path}",
            answer_job_file,
            "A report or picture that a job wrote",
            "read",
            "jobs",
            parameters=(*job, name),
            answers={200: Answer("The file", media="application/octet-stream")},
        ),
        Endpoint(
            "GET",
            "/v1/commands",
            answer_commands,
            "The commands that run as jobs, with JSON schemas of their arguments",
            "open",
            "jobs",
            answers={200: Answer("Command -> schema", {"type": "object"})},
        ),
        Endpoint(
            "PUT",
            "/v1/texts/{sha256}",
            take_text,
            "Send a text for jobs",
            "write",
            "jobs",
            parameters=(TEXT_DIGEST, TEXT_FILE_NAME),
            body={"type": "string", "format": "binary"},
            body_media="application/octet-stream",
            answers=texts,
        ),
        Endpoint(
            "GET",
            "/v1/texts/{sha256}",
            answer_text,
            "Whether a text was sent before",
            "write",
            "jobs",
            parameters=(TEXT_DIGEST, TEXT_FILE_NAME),
            answers={200: texts[200]},
        ),
    )


def queue_of(request: Request) -> JobQueue:
    """The queue of the service; raises `ServiceError` in a service without jobs."""
    jobs = request.app.state.service.jobs
    if jobs is None:
        raise ServiceError(503, "no_jobs", "this service takes no jobs: it only reads")
    return jobs


async def submit_job(request: Request) -> Response:
    """Make a job, or find that of an equal request."""
    queue, body = queue_of(request), await read_object(request)
    if unknown := sorted(set(body) - {"command", "arguments"}):
        raise UsageError(f"a job has a command and arguments, and no {unknown[0][:100]!r}")
    command, arguments = body.get("command"), body.get("arguments", {})
    if not isinstance(command, str) or not isinstance(arguments, dict):
        raise UsageError(
            'a job is an object such as {"command": "fit ridge", "arguments": {"cache": "3f2a"}}'
        )
    key = parameters_of(request).get("Idempotency-Key")
    job, is_new = await run_in_threadpool(queue.submit, command, arguments, key)
    headers = {"Location": f"/v1/jobs/{job['id']}"}
    return JsonResponse(job, 201 if is_new else 200, headers)


async def answer_jobs(request: Request) -> Response:
    """All jobs."""
    return JsonResponse({"jobs": await run_in_threadpool(queue_of(request).list_jobs)})


async def answer_job(request: Request) -> Response:
    """One job."""
    name = parameters_of(request)["job"]
    return JsonResponse(await run_in_threadpool(queue_of(request).find, name))


async def cancel_job(request: Request) -> Response:
    """End one job."""
    name = parameters_of(request)["job"]
    return JsonResponse(await run_in_threadpool(queue_of(request).cancel, name))


async def answer_job_log(request: Request) -> Response:
    """The log of one job."""
    parameters = parameters_of(request)
    log = await run_in_threadpool(
        queue_of(request).log, parameters["job"], parameters.get("attempt")
    )
    return Response(log, media_type="text/plain; charset=utf-8")


async def answer_job_file(request: Request) -> Response:
    """A file of one job."""
    parameters = parameters_of(request)
    name = parameters["name"]
    folder = await run_in_threadpool(queue_of(request).file_folder, parameters["job"])
    if not is_confined_name(name) or any(part.startswith(".") for part in name.split("/")):
        raise NotFoundError(f"the job has no file {name[:100]!r}")
    try:
        data = await run_in_threadpool(read_confined, folder, name, MAX_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, CorruptError):
        raise NotFoundError(f"the job has no file {name[:100]!r}") from None
    media = mimetypes.guess_type(name)[0] or "application/octet-stream"
    headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
    return Response(data, media_type=media, headers=headers)


async def answer_commands(request: Request) -> Response:
    """The commands of jobs."""
    return JsonResponse({"commands": await run_in_threadpool(queue_of(request).commands)})


async def answer_job_events(request: Request) -> Response:
    """The events of one job, from the number that the client has on."""
    queue, parameters = queue_of(request), parameters_of(request)
    last = parameters.get("Last-Event-ID", "")
    after = int(last) if last.isascii() and last.isdigit() else parameters["after"]
    job = (await run_in_threadpool(queue.find, parameters["job"]))["id"]
    reader = await run_in_threadpool(queue.events, job, after)
    state = request.app.state
    streams = getattr(state, "event_streams", 0)
    if streams >= MAX_STREAMS:
        raise ServiceError(429, "too_many_streams", f"{streams} clients watch jobs; ask later")
    if await run_in_threadpool(queue.has_ended, job):
        events = await run_in_threadpool(reader.read_new)
        if not events:  # tells a browser not to connect again
            return Response(status_code=204)
        reader = await run_in_threadpool(queue.events, job, after)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _stream_events(request, queue, job, reader),
        media_type="text/event-stream",
        headers=headers,
    )


async def _stream_events(
    request: Request, queue: JobQueue, job: str, reader: JobEventReader
) -> AsyncIterator[bytes]:
    """Events as the standard writes them; ends with the job, or where the service stops."""
    state = request.app.state
    state.event_streams = getattr(state, "event_streams", 0) + 1
    try:
        yield f"retry: {RETRY_MILLISECONDS}\n\n".encode()
        last_sign = time.monotonic()
        while not state.service.draining:
            # In this order: the event of the end is there once the job has ended.
            has_ended, events = await run_in_threadpool(
                lambda: (queue.has_ended(job), reader.read_new())
            )
            if events:
                yield b"".join(map(_format_event, events))
                last_sign = time.monotonic()
            elif has_ended:
                return
            elif time.monotonic() - last_sign > HEARTBEAT_SECONDS:
                yield b": waits\n\n"
                last_sign = time.monotonic()
            await asyncio.sleep(POLL_SECONDS)
    finally:
        state.event_streams -= 1


def _format_event(event: JobEvent) -> bytes:
    data: dict[str, Any] = event.data
    return f"id: {event.number}\nevent: {event.kind}\ndata: {json.dumps(data)}\n\n".encode()


async def take_text(request: Request) -> Response:
    """Keep a text, piece by piece."""
    settings, parameters = queue_of(request).settings, parameters_of(request)
    digest, name = parameters["sha256"], parameters["name"]
    try:
        path = await run_in_threadpool(find_upload, settings, digest, name)
        return JsonResponse(_text_value(digest, name, path.stat().st_size))
    except NotFoundError:
        pass
    upload = await run_in_threadpool(TextUpload, settings, digest, name)
    try:
        async for piece in request.stream():
            await run_in_threadpool(upload.write, piece)
        path = await run_in_threadpool(upload.finish)
    except ClientDisconnect:
        raise UsageError("the text ended before its length") from None
    except LimitError as error:
        raise ServiceError(413, "too_large", str(error)) from None
    finally:
        await run_in_threadpool(upload.discard)
    return JsonResponse(_text_value(digest, name, path.stat().st_size), 201)


async def answer_text(request: Request) -> Response:
    """Whether a text is there."""
    settings, parameters = queue_of(request).settings, parameters_of(request)
    digest, name = parameters["sha256"], parameters["name"]
    path = await run_in_threadpool(find_upload, settings, digest, name)
    return JsonResponse(_text_value(digest, name, path.stat().st_size))


def _text_value(digest: str, name: str, size: int) -> dict[str, Any]:
    return {"data": f"upload:{digest}/{name}", "bytes": size}

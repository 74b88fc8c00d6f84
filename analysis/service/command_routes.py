"""Commands that answer within a request: which cache answers an extraction; du, gc and pin.

Each runs in a process of its own (analysis/jobs/short_command.py): the service itself loads no
tokenizer and reads no texts.
"""

from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ...cache.errors import UsageError
from ...cache.files.paths import is_remote
from ..console.command_arguments import command_words, find_command, parse_arguments
from ..jobs.job_commands import check_request
from ..jobs.short_command import run_short_command
from ..service_client.server_connection import named_error
from ..web.access_control import check_scope
from ..web.endpoints import Answer, Endpoint, read_object
from ..web.json_responses import JsonResponse

MOST_SECONDS = 300.0
"""Longest time of a command, in seconds."""
SHORT_COMMANDS = {"du": "read", "gc": "write", "pin": "write"}
"""Commands that clients run by name -> who may."""
RESULT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["value", "text"],
    "properties": {
        "value": {"type": "object", "description": "What the command prints with --json"},
        "text": {"type": "string", "description": "What it prints for people"},
    },
}
MATCH_SCHEMA: dict[str, Any] = {
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
        Endpoint(
            "POST",
            "/v1/run",
            run_command,
            "Run du, gc or pin, and give what it prints",
            "open",  # that of the command counts
            "disk",
            body={
                "type": "object",
                "required": ["command"],
                "properties": {
                    "command": {"enum": list(SHORT_COMMANDS)},
                    "arguments": {"type": "object"},
                },
            },
            answers={200: Answer("As the command line", RESULT_SCHEMA)},
        ),
    )


async def resolve_extraction(request: Request) -> Response:
    """Find the cache that answers the arguments of `residua extract` in the body."""
    service = request.app.state.service
    if service.jobs is None:
        raise UsageError("this service takes no jobs, and so reads no texts")
    arguments = {**await read_object(request), "find": True}
    checked = await run_in_threadpool(check_request, service.jobs.settings, "extract", arguments)
    result = await run_short_command(checked.words, checked.uses_hub, MOST_SECONDS)
    return JsonResponse(_value_of(result)["value"])


async def run_command(request: Request) -> Response:
    """Run the short command that the body names, on the root of the service."""
    body = await read_object(request)
    name, arguments = body.get("command"), body.get("arguments", {})
    if not isinstance(name, str) or name not in SHORT_COMMANDS or not isinstance(arguments, dict):
        raise UsageError(
            f'the body is {{"command": ..., "arguments": {{...}}}}; commands are '
            f"{', '.join(SHORT_COMMANDS)}, others are jobs"
        )
    check_scope(request, "write" if SHORT_COMMANDS[name] == "write" else "read")
    if name == "gc" and not (arguments.get("yes") or arguments.get("dry_run")):
        raise UsageError("gc asks before it removes, and a service cannot: give yes or dry_run")
    root = request.app.state.service.root
    words = await run_in_threadpool(_words_of, name, arguments)
    place = str(root if is_remote(root) else root.resolve())
    result = await run_short_command([name, f"--root={place}", *words], False, MOST_SECONDS)
    return JsonResponse(_value_of(result))


def _words_of(name: str, arguments: Mapping[str, Any]) -> list[str]:
    """The arguments as words of the command line, checked as the command checks them."""
    command = find_command([name])
    parse_arguments(command, arguments)
    return command_words(command, arguments)


def _value_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Value and text of a command that ended well; raises its error."""
    if result["error"] is not None:
        raise named_error(result["error"])
    return {"value": result["value"], "text": result["text"]}

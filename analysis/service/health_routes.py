"""Whether the service lives and can work, its metrics, its OpenAPI document, browser sessions."""

import os
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ...cache.errors import UsageError
from ...cache.files.paths import is_remote, list_folder
from ..web.access_control import COOKIE, held_scope, set_session
from ..web.endpoints import Answer, Endpoint, read_object
from ..web.json_responses import JsonResponse, ServiceError
from ..web.open_api import describe_api

STATE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"type": "string"}},
}
SESSION_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["scope"],
    "properties": {"scope": {"type": ["string", "null"], "enum": ["read", "write", None]}},
}


def list_endpoints() -> tuple[Endpoint, ...]:
    """The endpoints of this file."""
    return (
        Endpoint(
            "GET",
            "/healthz",
            answer_health,
            "Whether the service lives",
            "open",
            "health",
            answers={200: Answer("It lives", STATE_SCHEMA)},
        ),
        Endpoint(
            "GET",
            "/readyz",
            answer_readiness,
            "Whether the service can work",
            "open",
            "health",
            answers={
                200: Answer("The root can be read", STATE_SCHEMA),
                503: Answer("It cannot, or the service was told to stop", STATE_SCHEMA),
            },
        ),
        Endpoint(
            "GET",
            "/metrics",
            answer_metrics,
            "Figures for Prometheus",
            "read",
            "health",
            answers={200: Answer("The figures", media="text/plain")},
        ),
        Endpoint(
            "GET",
            "/v1/openapi.json",
            answer_api,
            "This document",
            "open",
            "health",
            answers={200: Answer("OpenAPI 3.1", {"type": "object"})},
        ),
        Endpoint(
            "GET",
            "/v1/session",
            answer_session,
            "What the token or session may do",
            "open",
            "session",
            answers={200: Answer("Its scope, null for none", SESSION_SCHEMA)},
        ),
        Endpoint(
            "POST",
            "/v1/session",
            open_session,
            "Give a browser a session for a token",
            "open",
            "session",
            body={
                "type": "object",
                "required": ["token"],
                "properties": {"token": {"type": "string", "maxLength": 256}},
            },
            answers={200: Answer("The scope of the session, in a cookie", SESSION_SCHEMA)},
        ),
        Endpoint(
            "DELETE",
            "/v1/session",
            close_session,
            "End the session of a browser",
            "open",
            "session",
            answers={200: Answer("It has ended", SESSION_SCHEMA)},
        ),
    )


async def answer_health(request: Request) -> Response:
    """The service answers, so it lives."""
    return JsonResponse({"status": "ok"})


async def answer_readiness(request: Request) -> Response:
    """Whether the root can be read and the service was not told to stop."""
    service = request.app.state.service
    if service.draining:
        return JsonResponse({"status": "stopping"}, 503)

    def look() -> str:
        try:
            if not is_remote(service.root):
                os.listdir(service.root)
            else:
                list_folder(service.root)
        except FileNotFoundError:  # made with the first cache
            return "ok"
        except OSError as error:
            return f"the root cannot be read: {error.strerror or type(error).__name__}"
        return "ok"

    status = await run_in_threadpool(look)
    return JsonResponse({"status": status}, 200 if status == "ok" else 503)


async def answer_metrics(request: Request) -> Response:
    """The figures of `ServiceMetrics`."""
    text = await run_in_threadpool(request.app.state.service.metrics.to_text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def answer_api(request: Request) -> Response:
    """The OpenAPI document."""
    return JsonResponse(describe_api(request.app.state.service.endpoints))


async def answer_session(request: Request) -> Response:
    """What the request may do with its token or session."""
    service = request.app.state.service
    return JsonResponse({"scope": held_scope(request, service.tokens)})


async def open_session(request: Request) -> Response:
    """Exchange a token for a cookie that no script can read."""
    tokens = request.app.state.service.tokens
    token = (await read_object(request)).get("token")
    if not isinstance(token, str):
        raise UsageError('the body is {"token": "..."}')
    scope = tokens.scope_of(token)
    if scope is None:
        raise ServiceError(401, "no_token", "this is not a token of this service")
    response = JsonResponse({"scope": scope})
    set_session(response, request, tokens, scope)
    return response


async def close_session(request: Request) -> Response:
    """Take the cookie back."""
    response = JsonResponse({"scope": None})
    response.delete_cookie(COOKIE)
    return response

"""Who may ask for what: tokens and scopes, names of the service, origins of web pages.

`AccessControl` is the outermost middleware. It refuses requests that call the service by a strange
name (a web page whose name was bound to this machine's address), and writing requests that come
from pages of other origins; it adds the headers of CORS and of safe pages.
"""

import ipaddress
import re
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .access_tokens import AccessScope, AccessTokens
from .json_responses import ServiceError, error_response
from .service_settings import ServiceSettings

COOKIE = "residua_session"
READING_METHODS = ("GET", "HEAD", "OPTIONS")
EXPOSED_HEADERS = "Content-Range, Content-Length, Accept-Ranges, ETag, Last-Modified, Retry-After"
"""Headers that pages of other origins may read."""
PAGE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "SAMEORIGIN",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; object-src 'none'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'self'"
    ),
}
"""Headers of every answer: pages load nothing from elsewhere and run no script of their own text.
"""
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(?::(\d{1,5}))?", re.ASCII | re.IGNORECASE)


def check_scope(request: HTTPConnection, scope: AccessScope) -> None:
    """Raise `ServiceError` unless the request may do what needs `scope`."""
    service = request.app.state.service
    if scope == "open" or (scope == "read" and not service.settings.private):
        return
    held = held_scope(request, service.tokens)
    if held is None:
        given = (
            "the token is not one of this service" if has_token(request) else "no token is given"
        )
        raise ServiceError(
            401,
            "no_token",
            f"{given}; send it as `Authorization: Bearer TOKEN` (clients take it from "
            "$RESIDUA_TOKEN); `residua serve` printed it when it first started",
        )
    if scope == "write" and held != "write":
        raise ServiceError(403, "read_only_token", "this token may read and not write")


def held_scope(request: HTTPConnection, tokens: AccessTokens) -> str | None:
    """The scope of the token or session of a request: `write`, `read` or None."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme:
        return tokens.scope_of(token.strip()) if scheme.lower() == "bearer" else None
    return tokens.scope_of_session(request.cookies.get(COOKIE, ""))


def has_token(request: HTTPConnection) -> bool:
    """Whether a request has a token or a session, right or wrong."""
    return "authorization" in request.headers or COOKIE in request.cookies


def set_session(response: Response, request: Request, tokens: AccessTokens, scope: str) -> None:
    """Give the browser a session of `scope`, which no script of a page can read."""
    response.set_cookie(
        COOKIE,
        tokens.session_of(scope),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


class AccessControl:
    """Middleware: names of the service, origins, headers of CORS and of safe pages."""

    def __init__(self, app: ASGIApp, settings: ServiceSettings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        allowed = self._allowed_origin(headers)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                for name, value in PAGE_HEADERS.items():
                    answered.setdefault(name, value)
                if allowed is not None:
                    answered["Access-Control-Allow-Origin"] = allowed
                    answered["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
                    answered.add_vary_header("Origin")
            await send(message)

        try:
            self._check_host(headers)
            self._check_origin(scope["method"], headers)
        except ServiceError as error:
            await error_response(error)(scope, receive, send_with_headers)
            return
        if scope["method"] == "OPTIONS":
            await _preflight(allowed)(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def _check_host(self, headers: Headers) -> None:
        """Raise unless the request calls the service by one of its names."""
        host = headers.get("host", "")
        if not is_allowed_host(host, self.settings):
            raise ServiceError(
                400,
                "wrong_host",
                f"this service has no name {host[:100]!r}; `residua serve --allow-host NAME` adds "
                "one",
            )

    def _check_origin(self, method: str, headers: Headers) -> None:
        """Raise if a page of another origin writes; what a page may not read is the browser's."""
        origin = headers.get("origin")
        if method in READING_METHODS or origin is None:
            return
        if urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            raise ServiceError(
                403, "wrong_origin", f"pages of {origin[:100]!r} may not write to this service"
            )

    def _allowed_origin(self, headers: Headers) -> str | None:
        """The value of Access-Control-Allow-Origin; None if a page of this origin may not read."""
        origin = headers.get("origin")
        if origin is None:
            return None
        allowed = self.settings.allowed_origins
        name = urlsplit(origin).hostname or ""
        if "*" in allowed or origin in allowed or is_loopback(name):
            return origin
        return None


def is_allowed_host(host: str, settings: ServiceSettings) -> bool:
    """Whether `host`, of a request's header, names the service.

    Addresses always do: only names can be bound to the address of another machine.
    """
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = match[1].strip("[]").lower().rstrip(".")
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        pass
    allowed = {known.lower() for known in (*settings.allowed_hosts, settings.machine)}
    return is_loopback(name) or name in allowed or "*" in allowed


def is_loopback(name: str) -> bool:
    """Whether `name` is that of this machine: localhost, 127.0.0.1, ::1."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _preflight(allowed: str | None) -> Response:
    """The answer to a browser that asks what a page of another origin may do: read."""
    headers: dict[str, Any] = {"Allow": "GET, HEAD, OPTIONS"}
    if allowed is not None:
        headers |= {
            "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS",
            "Access-Control-Allow-Headers": "Range, If-None-Match, If-Range, Authorization",
            "Access-Control-Max-Age": "600",
        }
    return Response(status_code=204, headers=headers)

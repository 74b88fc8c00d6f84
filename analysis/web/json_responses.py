"""Answers in JSON: values, and errors with a stable code and the message of the command line."""

import json
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ...cache.errors import (
    CorruptError,
    InUseError,
    LimitError,
    MismatchError,
    NoSpaceError,
    NotFoundError,
    ResiduaError,
    UnreachableError,
    UsageError,
)
from ...cache.files.disk_errors import system_error
from ...cache.files.json_files import plain_value

STATUS_OF: dict[type[ResiduaError], int] = {
    NotFoundError: 404,
    InUseError: 409,
    UsageError: 400,
    MismatchError: 409,
    CorruptError: 422,
    LimitError: 503,
    NoSpaceError: 507,
    UnreachableError: 502,
}
"""Class of an error -> HTTP status; the first class that fits counts."""
CODES = {401: "no_token", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}
"""Status -> code of errors that have no class of their own."""
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error", "code", "message", "exit_code"],
    "properties": {
        "error": {"type": "string", "description": "Class of the error, as `--json` names it."},
        "code": {"type": "string", "description": "Stable name of the kind of error."},
        "message": {"type": "string", "description": "Expected, found, what to do."},
        "exit_code": {"type": "integer", "description": "Exit code of the command line."},
    },
}
"""JSON schema of an error."""


class JsonResponse(Response):
    """A JSON body. Numbers that JSON lacks (NaN) are null, paths are strings."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(plain_value(content), default=str, allow_nan=False).encode()


class ServiceError(ResiduaError):
    """An error of the service alone, with its HTTP status: no token, too many requests."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def error_response(error: BaseException) -> Response:
    """The answer to a request that failed with `error`."""
    if isinstance(error, ServiceError):
        status, code = error.status, error.code
    elif isinstance(error, HTTPException):
        code = CODES.get(error.status_code, "http_error")
        return _respond(
            error.status_code, "HTTPException", code, str(error.detail), 1, error.headers
        )
    elif isinstance(error, ResiduaError):
        status = next((s for kind, s in STATUS_OF.items() if isinstance(error, kind)), 500)
        name = type(error).__name__.removesuffix("Error")
        code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    elif (limit := system_error(error)) is not None:
        return error_response(limit)
    else:
        message = f"the service failed ({type(error).__name__}); its log says more"
        return _respond(500, "InternalError", "internal", message, 1)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return _respond(status, type(error).__name__, code, str(error), error.exit_code, headers)


def _respond(
    status: int, name: str, code: str, message: str, exit_code: int, headers: Any = None
) -> Response:
    value = {"error": name, "code": code, "message": message, "exit_code": exit_code}
    return JsonResponse(value, status, headers)


async def answer_error(request: Request, error: Exception) -> Response:
    """Handler of exceptions for Starlette."""
    return error_response(error)

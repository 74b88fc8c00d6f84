"""Endpoints of the service as one table, from which both the routes and the OpenAPI document come.

A file of routes exports `list_endpoints()`. Its handlers take a request whose query parameters
were checked against the table (`parameters_of`), and raise a `ResiduaError` for what is wrong.
"""

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ...cache.errors import UsageError
from .access_control import check_scope
from .access_tokens import AccessScope
from .json_responses import ServiceError

Handler = Callable[[Request], Awaitable[Response]]
Schema = dict[str, Any]
"""A JSON schema, as OpenAPI 3.1 has it."""
MAX_BODY_BYTES = 1 << 20
"""Largest JSON body of a request."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of an endpoint."""

    name: str
    where: Literal["query", "path", "header"]
    schema: Schema
    """Of one value: `type` string, integer, number or boolean, with bounds, `enum` or `pattern`."""
    summary: str
    required: bool = False
    """Path parameters are always required."""


@dataclass(frozen=True)
class Answer:
    """What an endpoint answers under one status."""

    summary: str
    schema: Schema | None = None
    """None for an answer that is not JSON."""
    media: str = "application/json"
    """Media type of the body; empty for an answer without one."""


@dataclass(frozen=True)
class Endpoint:
    """One method of one path."""

    method: str
    path: str
    """As Starlette writes it: `/v1/jobs/{job}`, `/caches/{path:path}`."""
    handler: Handler
    summary: str
    scope: AccessScope
    """Who may: `open` for everybody, or a holder of a token of this scope."""
    tag: str
    """Heading under which the OpenAPI document lists the endpoint."""
    parameters: tuple[Parameter, ...] = ()
    body: Schema | None = None
    """Schema of the JSON body; None if the endpoint reads none."""
    answers: Mapping[int, Answer] = field(default_factory=dict)
    """Status -> answer; errors need no mention."""
    body_media: str = "application/json"
    """Media type of the body."""


def make_routes(endpoints: Sequence[Endpoint]) -> list[Route]:
    """Routes of Starlette that check scope and parameters before they call a handler.

    A GET endpoint answers HEAD, too.
    """
    return [
        Route(endpoint.path, _checked_handler(endpoint), methods=[endpoint.method])
        for endpoint in endpoints
    ]


def _checked_handler(endpoint: Endpoint) -> Handler:
    async def handle(request: Request) -> Response:
        check_scope(request, endpoint.scope)
        request.state.parameters = read_parameters(request, endpoint.parameters)
        return await endpoint.handler(request)

    return handle


def parameters_of(request: Request) -> dict[str, Any]:
    """Name -> value of the parameters that the request has; those with a default always."""
    return request.state.parameters


def read_parameters(request: Request, parameters: Sequence[Parameter]) -> dict[str, Any]:
    """The values of `parameters`, converted and checked; raises `UsageError` for a wrong one."""
    values = {}
    for parameter in parameters:
        if parameter.where == "path":
            text = request.path_params.get(parameter.name)
        elif parameter.where == "header":
            text = request.headers.get(parameter.name)
        else:
            given = request.query_params.getlist(parameter.name)
            if len(given) > 1:
                raise UsageError(f"the parameter {parameter.name} is given {len(given)} times")
            text = given[0] if given else None
        if text is not None:
            values[parameter.name] = _convert(parameter, str(text))
        elif "default" in parameter.schema:
            values[parameter.name] = parameter.schema["default"]
        elif parameter.required:
            raise UsageError(f"the parameter {parameter.name} is missing: {parameter.summary}")
    names = {parameter.name for parameter in parameters if parameter.where == "query"}
    if unknown := sorted(set(request.query_params) - names):
        known = ", ".join(sorted(names)) or "none"
        raise UsageError(f"unknown parameter {unknown[0]!r}; {request.url.path} takes: {known}")
    return values


def _convert(parameter: Parameter, text: str) -> Any:
    """The value of `text`, as the schema of `parameter` wants it."""
    schema, name = parameter.schema, parameter.name
    kind = schema.get("type", "string")
    value: Any = text
    if kind == "boolean":
        if text not in ("true", "false"):
            raise UsageError(f"{name} is true or false, not {text!r}")
        return text == "true"
    if kind in ("integer", "number"):
        pattern = r"-?\d{1,18}" if kind == "integer" else r"-?\d{1,18}(\.\d{1,18})?(e[+-]?\d\d?)?"
        if not re.fullmatch(pattern, text, re.ASCII):
            raise UsageError(
                f"{name} is {'a whole' if kind == 'integer' else 'a'} number: {text!r}"
            )
        value = int(text) if kind == "integer" else float(text)
        low, high = schema.get("minimum"), schema.get("maximum")
        if (low is not None and value < low) or (high is not None and value > high):
            raise UsageError(f"{name} is {value}, and must be between {low} and {high}")
        return value
    if len(text) > schema.get("maxLength", 4096):
        raise UsageError(f"{name} has {len(text)} letters, the most is {schema['maxLength']}")
    if len(text) < schema.get("minLength", 0):
        raise UsageError(f"{name} is empty: {parameter.summary}")
    if "enum" in schema and text not in schema["enum"]:
        raise UsageError(f"{name} is one of {', '.join(schema['enum'])}, not {text!r}")
    if "pattern" in schema and not re.search(schema["pattern"], text):
        raise UsageError(f"{name} is {text!r}, which is not right: {parameter.summary}")
    return value


async def read_object(request: Request, most: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The JSON object of the body; raises `UsageError` if it is none, or of more than `most` bytes.

    Constants that JSON does not have (NaN), and numbers beyond any float, are refused.
    """
    pieces, size = [], 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > most:
                raise ServiceError(413, "too_large", f"the body has more than {most:,} bytes")
            pieces.append(piece)
    except ClientDisconnect:
        raise UsageError("the body ended before its length") from None
    try:
        value = json.loads(b"".join(pieces) or b"{}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"the body is a JSON {type(value).__name__}, and must be an object")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")

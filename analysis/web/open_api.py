"""The OpenAPI 3.1 document of the endpoints."""

import re
from collections.abc import Sequence
from typing import Any

from ... import __version__
from .endpoints import Answer, Endpoint, Parameter
from .json_responses import ERROR_SCHEMA

ERROR = {"$ref": "#/components/schemas/Error"}


def describe_api(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The document: paths with their parameters, bodies and answers."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _describe_operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "residua",
            "version": __version__,
            "summary": "Caches of residual streams, probes fitted from them, and jobs",
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR_SCHEMA},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _describe_operation(endpoint: Endpoint) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": endpoint.handler.__name__,
        "tags": [endpoint.tag],
        "parameters": [_describe_parameter(found) for found in endpoint.parameters],
        "responses": {
            **{str(status): _describe_answer(found) for status, found in endpoint.answers.items()},
            "default": _describe_answer(Answer("An error", ERROR)),
        },
    }
    if endpoint.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {endpoint.body_media: {"schema": endpoint.body}},
        }
    if endpoint.scope == "write":
        operation["security"] = [{"token": []}]
    elif endpoint.scope == "read":  # without a token unless the service is private
        operation["security"] = [{}, {"token": []}]
    return operation


def _describe_parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.where,
        "required": parameter.required or parameter.where == "path",
        "description": parameter.summary,
        "schema": parameter.schema,
    }


def _describe_answer(answer: Answer) -> dict[str, Any]:
    described: dict[str, Any] = {"description": answer.summary}
    if answer.media:
        described["content"] = {answer.media: {"schema": answer.schema or {}}}
    return described

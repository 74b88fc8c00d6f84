"""Results over HTTP: passages of caches, lens maps and their cells, evaluations, causal bases.

`ResultCalculator` computes and keeps the answers; evaluations are what jobs printed.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ...cache.errors import UsageError
from ..web.endpoints import Answer, Endpoint, Parameter, Schema, parameters_of
from ..web.json_responses import JsonResponse
from .catalog_routes import CACHE_ID, PROBE_NAME
from .evaluation_jobs import list_evaluations, read_evaluation
from .result_calculator import MAX_TOKENS, LensMapQuery, ResultCalculator, parse_layers

MAX_NUMBER = 1 << 40
MAX_CELL_TOKENS = 100


def _number(name: str, summary: str, **bounds: int) -> Parameter:
    schema = {"type": "integer", "minimum": 0, "maximum": MAX_NUMBER, **bounds}
    return Parameter(name, "query", schema, summary)


CACHE_QUERY = Parameter("cache", "query", CACHE_ID.schema, CACHE_ID.summary, required=True)
PROBE_QUERY = Parameter(
    "probe",
    "query",
    {**PROBE_NAME.schema, "default": "logit"},
    "Name of a saved probe, its unique beginning, or `logit` for the logit lens",
)
OFFSET = _number("offset", "Offset N; the smallest of the probe without it", maximum=10_000)
TRACK = Parameter(
    "track",
    "query",
    {"type": "string", "minLength": 1, "maxLength": 200},
    "Text of a token whose probability and rank are shown",
)
TRACK_ID = _number("track_id", "Id of a token to track, instead of its text")
SEQUENCE = _number("sequence", "Number of a sequence of the cache")
JOB = Parameter(
    "job",
    "path",
    {"type": "string", "pattern": r"^[A-Za-z0-9_-]{1,64}$"},
    "Id of an evaluation's job",
)
MEASURE_SCHEMA: Schema = {
    "type": "array",
    "items": {"type": "array", "items": {"type": ["number", "null"]}},
}
MAP_SCHEMA: Schema = {
    "type": "object",
    "required": ["cache", "probe", "sequence", "first", "layers", "tokens", "top", "values"],
    "properties": {
        "cache": {"type": "string"},
        "probe": {"type": "string"},
        "sequence": {"type": "integer"},
        "first": {"type": "integer"},
        "offset": {"type": "integer"},
        "tracked": {"type": ["string", "null"]},
        "layers": {"type": "array", "items": {"type": "integer"}},
        "tokens": {"type": "array", "items": {"type": "string"}},
        "targets": {"type": "array", "items": {"type": "string"}},
        "top": {"type": "array", "items": {"type": "array"}},
        "values": {"type": "object", "additionalProperties": MEASURE_SCHEMA},
    },
}
EVALUATIONS_SCHEMA: Schema = {
    "type": "object",
    "required": ["evaluations"],
    "properties": {"evaluations": {"type": "array", "items": {"type": "object"}}},
}


def list_endpoints() -> tuple[Endpoint, ...]:
    """The endpoints of this file."""
    return (
        Endpoint(
            "GET",
            "/v1/caches/{cache}/passages",
            answer_passages,
            "Places in the texts of a cache, or the tokens of one sequence",
            "read",
            "results",
            parameters=(
                CACHE_ID,
                Parameter(
                    "search",
                    "query",
                    {"type": "string", "minLength": 1, "maxLength": 200},
                    "Text to find; without it and `sequence`, a telling passage is chosen",
                ),
                SEQUENCE,
            ),
            answers={200: Answer("The places, the sequence or the passage", {"type": "object"})},
        ),
        Endpoint(
            "GET",
            "/v1/lens-map",
            answer_lens_map,
            "What a lens reads in a passage, layer by token",
            "read",
            "results",
            parameters=(
                CACHE_QUERY,
                PROBE_QUERY,
                SEQUENCE,
                _number("first", "Index of the first token in the sequence"),
                _number("tokens", "Most tokens", minimum=1, maximum=MAX_TOKENS),
                Parameter(
                    "layers",
                    "query",
                    {"type": "string", "maxLength": 400},
                    "Layers to show, such as `0-3,6`; all without it",
                ),
                OFFSET,
                TRACK,
                TRACK_ID,
            ),
            answers={200: Answer("The cells, with all measures", MAP_SCHEMA)},
        ),
        Endpoint(
            "GET",
            "/v1/lens-cell",
            answer_lens_cell,
            "The likeliest tokens of one cell of a lens map, and the model's own",
            "read",
            "results",
            parameters=(
                CACHE_QUERY,
                PROBE_QUERY,
                Parameter("sequence", "query", SEQUENCE.schema, SEQUENCE.summary, required=True),
                _number("first", "Index of the token in the sequence"),
                Parameter(
                    "layer",
                    "query",
                    {"type": "integer", "minimum": 0, "maximum": 10_000},
                    "Layer",
                    required=True,
                ),
                OFFSET,
                Parameter(
                    "count",
                    "query",
                    {"type": "integer", "minimum": 1, "maximum": MAX_CELL_TOKENS, "default": 10},
                    "Number of tokens",
                ),
                TRACK,
                TRACK_ID,
            ),
            answers={200: Answer("The tokens", {"type": "object"})},
        ),
        Endpoint(
            "GET",
            "/v1/evaluations",
            answer_evaluations,
            "Evaluations that jobs have finished, newest first",
            "read",
            "results",
            answers={200: Answer("The evaluations, without their rows", EVALUATIONS_SCHEMA)},
        ),
        Endpoint(
            "GET",
            "/v1/evaluations/{job}",
            answer_evaluation,
            "One evaluation: what `residua evaluate --json` printed",
            "read",
            "results",
            parameters=(JOB,),
            answers={200: Answer("The evaluation", {"type": "object"})},
        ),
        Endpoint(
            "GET",
            "/v1/bases/{probe}",
            answer_basis,
            "A causal basis: its spectra, and what the directions of a layer mean",
            "read",
            "results",
            parameters=(
                PROBE_NAME,
                _number("layer", "Layer whose directions are read, too", maximum=10_000),
            ),
            answers={200: Answer("The basis", {"type": "object"})},
        ),
    )


async def answer_passages(request: Request) -> Response:
    """Matches of a search, the tokens of a sequence, or a passage to begin with."""
    given = parameters_of(request)
    results = _calculator(request)
    return await _compute(
        results, results.passages, given["cache"], given.get("search"), given.get("sequence")
    )


async def answer_lens_map(request: Request) -> Response:
    """The cells of a lens in a passage."""
    results = _calculator(request)
    return await _compute(results, results.lens_map, _query(parameters_of(request)))


async def answer_lens_cell(request: Request) -> Response:
    """The likeliest tokens of one cell."""
    given = parameters_of(request)
    results = _calculator(request)
    return await _compute(results, results.lens_cell, _query(given), given["layer"], given["count"])


async def answer_evaluations(request: Request) -> Response:
    """The evaluations of finished jobs."""
    jobs = request.app.state.service.jobs
    return JsonResponse({"evaluations": await run_in_threadpool(list_evaluations, jobs)})


async def answer_evaluation(request: Request) -> Response:
    """One evaluation."""
    jobs, job = request.app.state.service.jobs, parameters_of(request)["job"]
    return JsonResponse(await run_in_threadpool(read_evaluation, jobs, job))


async def answer_basis(request: Request) -> Response:
    """One causal basis."""
    given = parameters_of(request)
    results = _calculator(request)
    return await _compute(results, results.basis, given["probe"], given.get("layer"))


def _query(given: dict[str, Any]) -> LensMapQuery:
    """The query of a lens map or cell from the parameters of a request."""
    if "track" in given and "track_id" in given:
        raise UsageError("give track or track_id, not both")
    fields = {
        name: given[name] for name in ("sequence", "first", "tokens", "offset") if name in given
    }
    if given.get("layers"):
        fields["layers"] = parse_layers(given["layers"])
    track = given.get("track", given.get("track_id"))
    return LensMapQuery(given["cache"], given["probe"], track=track, **fields)


def _calculator(request: Request) -> ResultCalculator:
    """The calculator of the service, made at the first request for a result."""
    state = request.app.state
    if not hasattr(state, "results"):
        state.results = ResultCalculator(state.service.root)
    return state.results


async def _compute(results: ResultCalculator, work: Callable[..., bytes], *args: Any) -> Response:
    """The JSON that `work` gives on the calculator's threads.

    Waiting takes no thread of the service: its catalogue answers while maps are computed.
    """
    await run_in_threadpool(results.start)
    content = await asyncio.wrap_future(results.submit(work, *args))
    return Response(content, media_type="application/json")

"""The application: one service over one root, its endpoints and its middleware."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from ...cache.errors import ResiduaError
from ..jobs.job_queue import JobQueue
from ..web.access_control import AccessControl
from ..web.access_tokens import AccessTokens
from ..web.endpoints import Endpoint, make_routes
from ..web.json_responses import answer_error
from ..web.request_limits import RequestLimits
from ..web.request_records import RequestRecords
from ..web.service_metrics import ServiceMetrics
from ..web.service_settings import ServiceSettings
from . import (
    byte_routes,
    catalog_routes,
    command_routes,
    health_routes,
    job_routes,
    page_routes,
    result_routes,
    storage_routes,
)


@dataclass
class Service:
    """What the handlers share: `request.app.state.service`."""

    settings: ServiceSettings
    tokens: AccessTokens
    jobs: "JobQueue | None" = None
    """The queue of jobs; None in a service that only reads."""
    metrics: ServiceMetrics = field(default_factory=ServiceMetrics)
    started: float = field(default_factory=time.time)
    """Seconds since 1970."""
    draining: bool = False
    """Whether the service was told to stop: it answers, and takes no new jobs."""
    endpoints: Sequence[Endpoint] = ()
    """All endpoints, for the OpenAPI document."""

    @property
    def answered(self) -> int:
        """Number of requests that were answered so far."""
        return self.metrics.answered

    @property
    def root(self) -> Path:
        """Folder or object store of the caches."""
        return self.settings.root


def list_all_endpoints() -> tuple[Endpoint, ...]:
    """The endpoints of every file of routes."""
    files = (
        byte_routes,
        catalog_routes,
        health_routes,
        job_routes,
        page_routes,
        command_routes,
        result_routes,
        storage_routes,
    )
    return tuple(endpoint for file in files for endpoint in file.list_endpoints())


def make_application(
    service: Service,
    lifespan: "Callable[[Starlette], AbstractAsyncContextManager[None]] | None" = None,
) -> Starlette:
    """The application that serves `service`."""
    service.endpoints = list_all_endpoints()
    errors: tuple[Any, ...] = (ResiduaError, HTTPException, Exception)
    application = Starlette(
        routes=make_routes(service.endpoints),
        middleware=[
            Middleware(RequestRecords, service.metrics),
            Middleware(AccessControl, service.settings),
            Middleware(RequestLimits, service.settings),
        ],
        exception_handlers=dict.fromkeys(errors, answer_error),
        lifespan=lifespan,
    )
    application.router.redirect_slashes = False
    application.state.service = service
    return application

"""A record of every answered request: a JSON line in the access log, and counts for the metrics."""

import json
import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .service_metrics import ServiceMetrics

ACCESS_LOGGER = logging.getLogger("residua.access")
"""One JSON object a line: time, client, method, path, status, bytes, seconds."""
MAX_PATH = 500
"""Most letters of a path in the log."""


class RequestRecords:
    """Middleware that records requests once their answer was sent, or cut off."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, sent = time.perf_counter(), 0, 0

        async def count(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            sent += len(message.get("body", b""))

        self.metrics.open.inc()
        try:
            await self.app(scope, receive, count)
        finally:
            self.metrics.open.dec()
            self._record(scope, status, sent, time.perf_counter() - began)

    def _record(self, scope: Scope, status: int, sent: int, seconds: float) -> None:
        # The path of the route, not that of the request: of those there is no end.
        route: Any = scope.get("route")
        path = getattr(route, "path", "other")
        # Likewise of methods.
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.metrics.requests.labels(method, path, str(status)).inc()
        self.metrics.answered += 1
        self.metrics.seconds.labels(path).observe(seconds)
        self.metrics.bytes.inc(sent)
        if ACCESS_LOGGER.isEnabledFor(logging.INFO):
            client = scope.get("client") or ("",)
            line = {
                "time": round(time.time(), 3),
                "client": client[0],
                "method": method,
                "path": scope["path"][:MAX_PATH],
                "status": status,
                "bytes": sent,
                "seconds": round(seconds, 6),
            }
            ACCESS_LOGGER.info("%s", json.dumps(line))


METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")

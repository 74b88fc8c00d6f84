"""Figures of a running service, in the text format of Prometheus."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)
"""Bounds of the classes of answering times."""


class JobCounts(Collector):
    """How many jobs are in each state, counted when asked."""

    def __init__(self, count: Callable[[], Mapping[str, int]]) -> None:
        self.count = count

    def collect(self) -> list[GaugeMetricFamily]:
        family = GaugeMetricFamily("residua_jobs", "Jobs by state", labels=["state"])
        for state, number in sorted(self.count().items()):
            family.add_metric([state], number)
        return [family]


class ServiceMetrics:
    """Counters of requests, answering times and bytes; a registry of its own for each service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "residua_requests",
            "Answered requests",
            ["method", "path", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "residua_request_seconds",
            "Time until an answer was sent",
            ["path"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self.bytes = Counter("residua_sent_bytes", "Bytes of answers", registry=self.registry)
        self.open = Gauge(
            "residua_open_requests", "Requests being answered", registry=self.registry
        )

        self.answered = 0
        """Number of answered requests."""

    def count_jobs(self, count: Callable[[], Mapping[str, int]]) -> None:
        """Add `residua_jobs`; `count` gives the number of jobs by state."""
        self.registry.register(JobCounts(count))

    def to_text(self) -> bytes:
        """All figures."""
        return generate_latest(self.registry)

"""Evaluations of the service: what its finished `evaluate` jobs printed."""

import threading
from collections import OrderedDict
from typing import Any

from ...cache.errors import NotFoundError
from ..jobs.job_queue import JobQueue

COMMAND = "evaluate"
MAX_LISTED = 100
"""Most evaluations of a list, the newest ones."""
_summaries: OrderedDict[tuple[str, float], dict[str, Any]] = OrderedDict()
"""Job and its end -> summary, so that a list reads each result once."""
_lock = threading.Lock()


def list_evaluations(jobs: JobQueue | None) -> list[dict[str, Any]]:
    """The evaluations of the queue `jobs`, newest first, without rows; empty without a queue."""
    if jobs is None:
        return []
    finished = [
        job for job in jobs.list_jobs() if job["command"] == COMMAND and job["state"] == "done"
    ]
    finished.sort(key=lambda job: job["ended"] or 0, reverse=True)
    found = [_obtain_summary(jobs, job) for job in finished[:MAX_LISTED]]
    return [summary for summary in found if summary is not None]


def read_evaluation(jobs: JobQueue | None, name: str) -> dict[str, Any]:
    """The evaluation of the job `name`, with its rows; raises `NotFoundError` for another job."""
    job = None if jobs is None else jobs.find(name)
    summary = None if job is None else summarize_evaluation(job)
    if job is None or summary is None:
        raise NotFoundError(f"no finished evaluation {name[:64]!r}; GET /v1/evaluations lists them")
    return {**job["value"], **summary}


def _obtain_summary(jobs: JobQueue, job: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a finished job, remembered; None if its result was removed."""
    key = (job["id"], job["ended"] or 0.0)
    with _lock:
        if key in _summaries:
            return _summaries[key]
    summary = summarize_evaluation(jobs.find(job["id"]))
    if summary is not None:
        with _lock:
            _summaries[key] = summary
            while len(_summaries) > 4 * MAX_LISTED:
                _summaries.popitem(last=False)
    return summary


def summarize_evaluation(job: dict[str, Any]) -> dict[str, Any] | None:
    """What a list shows of the evaluation of one job; None if the job holds none."""
    value = job["value"]
    if job["command"] != COMMAND or not isinstance(value, dict) or "rows" not in value:
        return None
    return {
        "job": job["id"],
        "cache": value.get("cache"),
        "split": value.get("split"),
        "probes": list(dict.fromkeys(str(row.get("probe")) for row in value["rows"])),
        "ended": job["ended"],
        "n": value.get("n"),
    }

"""Evaluations of the service: what its finished `evaluate` jobs printed."""

from typing import Any

from ...cache.errors import NotFoundError

COMMAND = "evaluate"
MAX_LISTED = 200
"""Most evaluations of a list, the newest ones."""


def list_evaluations(jobs: Any) -> list[dict[str, Any]]:
    """The evaluations of the queue `jobs`, newest first, without rows; empty without a queue."""
    if jobs is None:
        return []
    finished = [job for job in jobs.list_jobs() if job["command"] == COMMAND and job["state"] == "done"]
    finished.sort(key=lambda job: job["ended"] or 0, reverse=True)
    return [summarize_evaluation(job) for job in finished[:MAX_LISTED] if job["value"]]


def read_evaluation(jobs: Any, name: str) -> dict[str, Any]:
    """The evaluation of the job `name`, with its rows; raises `NotFoundError` for another job."""
    job = None if jobs is None else jobs.describe_job(name)
    if job is None or job["command"] != COMMAND or not job["value"]:
        raise NotFoundError(f"no finished evaluation {name[:64]!r}; GET /v1/evaluations lists them")
    return {**job["value"], **summarize_evaluation(job)}


def summarize_evaluation(job: dict[str, Any]) -> dict[str, Any]:
    """What a list shows of the evaluation of one job."""
    value = job["value"]
    names = list(dict.fromkeys(row["probe"] for row in value["rows"]))
    return {
        "job": job["id"],
        "cache": value["cache"],
        "split": value["split"],
        "probes": names,
        "ended": job["ended"],
        "n": value["n"],
    }

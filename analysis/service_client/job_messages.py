"""What `residua jobs` prints: a table of jobs, or one job with its progress and log."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..console.terminal import Meter, print_table
from .job_following import ENDED, follow_job
from .server_connection import ServerConnection, quoted

SHOWN_LETTERS = 12
LOG_LINES = 20
"""Last lines of a log that are shown."""


def jobs_command(
    server: str, name: str | None, *, cancel: bool, follow: bool, quiet: bool
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Value and printer of `residua jobs`: all jobs, or the one that `name` begins."""
    with ServerConnection(server) as connection:
        if name is None:
            jobs = connection.get("/v1/jobs")["jobs"]
            return {"server": connection.url, "jobs": jobs}, lambda: print_jobs(jobs)
        path = f"/v1/jobs/{quoted(name)}"
        job = connection.request("POST", f"{path}/cancel") if cancel else connection.get(path)
        if follow and job["state"] not in ENDED:
            with Meter(quiet) as meter:
                job = follow_job(connection, job, stage=meter.stage)
        log = b"".join(connection.download(f"/v1/jobs/{job['id']}/log")).decode("utf-8", "replace")
    return job, lambda: print_job(job, log)


def print_jobs(jobs: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of jobs, the latest first."""
    rows = [
        (
            str(job["id"])[:SHOWN_LETTERS],
            job["command"],
            _about(job["arguments"]),
            job["state"],
            progress_text(job),
            _age(job["created"]),
        )
        for job in jobs
    ]
    print_table("", ("job", "command", "about", "state", "progress", "asked"), rows)


def print_job(job: Mapping[str, Any], log: str) -> None:
    """Print one job: facts, progress, error, the end of its log, and its text."""
    print(f"job {job['id']}: {job['command']}, {job['state']}")
    for name, value in job["arguments"].items():
        print(f"  {name}: {value}")
    for name in ("worker", "message"):
        if job.get(name):
            print(f"{name}: {job[name]}")
    if job["state"] not in ENDED and (text := progress_text(job)):
        print(f"progress: {text}")
    if job.get("error"):
        print(f"error: {job['error'].get('message')}")
    if log.strip():
        print("log:")
        for line in log.splitlines()[-LOG_LINES:]:
            print(f"  {line}")
    if job.get("text"):
        print(job["text"], end="")


def progress_text(job: Mapping[str, Any]) -> str:
    """`moments 40 %, 12 s left` of the latest stage; empty without any."""
    if not job["progress"]:
        return ""
    stage = job["progress"][-1]
    share = 100 * stage["done"] / stage["total"] if stage["total"] else 100.0
    left = f", {stage['eta']:.0f} s left" if stage.get("eta") else ""
    return f"{stage['stage']} {share:.0f} %{left}"


def _about(arguments: Mapping[str, Any]) -> str:
    """The cache of a job, or its model."""
    about = arguments.get("cache") or arguments.get("model") or ""
    return str(about)[:SHOWN_LETTERS] if "cache" in arguments else str(about)


def _age(created: float) -> str:
    """`3 min ago`."""
    seconds = max(0.0, time.time() - created)
    for unit, size in (("s", 60), ("min", 60), ("h", 48)):
        if seconds < size:
            return f"{seconds:.0f} {unit} ago"
        seconds /= 60 if unit != "h" else 24
    return f"{seconds:.0f} days ago"

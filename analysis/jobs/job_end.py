"""What the end of an attempt means: the job is done, failed, cancelled, queued again, or died."""

import signal
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...cache.errors import NoSpaceError, ResiduaError
from ...cache.files.disk_errors import system_error
from ..console.job_report import error_value
from .job_attempt import INTERRUPTED, WORKER_DIED
from .job_files import AttemptRecord, JobFolder

LOG_END_BYTES = 2000
"""Bytes of the log that an error quotes."""


@dataclass(frozen=True)
class JobEnd:
    """The end of an attempt."""

    state: Literal["queued", "done", "failed", "cancelled"]
    exit_code: int | None = None
    error: dict[str, Any] | None = None
    message: str | None = None
    is_death: bool = False
    """Whether the process or its worker died; a job that dies again and again fails."""

    def as_failure(self, deaths: int, log: bytes) -> "JobEnd":
        """The end of a job that died too often."""
        text = f"the job's process died {deaths} times; the last time, {self.message}"
        if end := log_end(log):
            text += f". Its log ends: {end}"
        return replace(
            self, state="failed", exit_code=1, error=_error(text), message=text, is_death=False
        )


def judge_end(folder: JobFolder, attempt: AttemptRecord | None, future: Any) -> JobEnd:
    """What the files of `attempt`, and the dask task that ran it, say about its end.

    `attempt` is None if none began; `future` None if the scheduler or the worker is lost.
    """
    if attempt is None:
        return _judge_without_attempt(future)
    result = folder.read_result(attempt.number)
    outcome = attempt.outcome or _returned_outcome(future)
    reason = outcome.get("reason") if outcome else None
    is_interrupted = result is not None and result["exit_code"] == INTERRUPTED
    if result is not None and not is_interrupted:
        if result["error"] is None:
            return JobEnd("done", result["exit_code"])
        return JobEnd("failed", result["exit_code"], result["error"])
    if reason == "cancelled":
        return JobEnd("cancelled", INTERRUPTED)
    if reason == "interrupted":
        return JobEnd("queued", message="the server was stopped; goes on")
    if outcome is None or is_interrupted or reason == WORKER_DIED:
        return JobEnd("queued", message="its worker died", is_death=True)
    if outcome["signal"] is not None:
        return JobEnd("queued", message=_signal_text(outcome["signal"]), is_death=True)
    return _judge_without_result(folder, attempt, outcome["exit_code"])


def _judge_without_attempt(future: Any) -> JobEnd:
    """The end of a task that began no attempt: it was refused, or its worker died before."""
    outcome = _returned_outcome(future)
    if outcome is not None and outcome.get("reason") == "cancelled":
        return JobEnd("cancelled", INTERRUPTED)
    if outcome is not None:
        return JobEnd("queued", message="the server was stopped; goes on")
    if future is None:
        return JobEnd("queued")
    error = future.exception(timeout=5) if future.status == "error" else None
    if error is None or type(error).__module__.startswith("distributed"):
        return JobEnd("queued", message="its worker died", is_death=True)
    limit = system_error(error)
    if limit is not None:
        return JobEnd("failed", limit.exit_code, error_value(limit))
    text = f"the worker cannot run the job: {type(error).__name__}: {error}"
    return JobEnd("failed", 1, _error(text))


def _judge_without_result(
    folder: JobFolder, attempt: AttemptRecord, exit_code: int | None
) -> JobEnd:
    """A process that ended by itself and wrote no result."""
    log = log_end(folder.read_log(attempt.number))
    if exit_code == NoSpaceError.exit_code:
        error = NoSpaceError(f"no space, or a limit of the process, on the server: {log}")
        return JobEnd("failed", exit_code, error_value(error))
    text = f"the job's process ended with exit code {exit_code}, without a result: {log}"
    return JobEnd("failed", exit_code or 1, _error(text))


def _returned_outcome(future: Any) -> dict[str, Any] | None:
    """The outcome that the task returned, if it did."""
    if future is None or future.status != "finished":
        return None
    try:
        value = future.result(timeout=5)
    except Exception:  # the scheduler may have gone meanwhile
        return None
    return value if isinstance(value, dict) else None


def _signal_text(number: int) -> str:
    """`its process was ended by signal 9 (SIGKILL: out of memory?)`."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown"
    hint = ": out of memory?" if number == signal.SIGKILL else ""
    return f"its process was ended by signal {number} ({name}{hint})"


def log_end(log: bytes) -> str:
    """The last lines of a log, for a message."""
    lines = log[-LOG_END_BYTES:].decode("utf-8", "replace").split("\n")
    return " | ".join(line.strip() for line in lines[-6:] if line.strip())[-LOG_END_BYTES:]


def _error(text: str) -> dict[str, Any]:
    return error_value(ResiduaError(text))

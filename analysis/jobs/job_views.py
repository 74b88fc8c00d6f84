"""A job as a JSON object, as the service shows it."""

from typing import Any

from .job_files import JobFolder, JobStatus


def describe_job(folder: JobFolder, status: JobStatus, with_result: bool = True) -> dict[str, Any]:
    """The job in `folder`: request, state, progress, and with its result what it printed.

    `value` is what the command prints with --json, `text` what it prints otherwise; both are None
    until the job is done.
    """
    request = folder.read_request()
    result = None
    if with_result and status.state == "done":
        result = folder.read_result(status.attempts)
    return {
        "id": folder.id,
        "command": request.command,
        "arguments": request.arguments,
        "state": status.state,
        "created": request.created,
        "started": status.started,
        "ended": status.ended,
        "attempts": status.attempts,
        "worker": status.worker,
        "progress": folder.read_progress(status.attempts),
        "exit_code": status.exit_code,
        "error": status.error,
        "message": status.message,
        "value": result["value"] if result else None,
        "text": result["text"] if result else None,
        "files": folder.list_files() if status.state in ("done", "failed") else [],
    }

"""Follows a job of a service to its end: progress on bars, warnings, over lost connections."""

import json
import time
from collections.abc import Callable
from typing import Any

from ...cache.errors import UnreachableError
from .server_connection import ServerConnection

ENDED = ("done", "failed", "cancelled")
LOST_SECONDS = 600.0
"""Time without any contact after which a client gives up; the job goes on."""
PAUSE_SECONDS = 1.0
"""Pause before a stream is read on."""
WARNING = "Warning: "


class JobEvents:
    """What a client knows of the events of a job: the last number, and who is told."""

    def __init__(
        self,
        stage: Callable[[str, int, int], None] | None,
        note: Callable[[str, str], None] | None,
        warn: Callable[[str], None] | None,
    ) -> None:
        self._stage = stage
        self._note = note
        self._warn = warn
        self.last = 0

    def take(self, kind: str, data: dict[str, Any]) -> None:
        """Pass on one event; whatever is not as it should be is passed over."""
        if kind == "progress" and self._stage is not None:
            for entry in data.get("progress", []):
                name, done, total = (entry.get(key) for key in ("stage", "done", "total"))
                if isinstance(name, str) and type(done) is int and type(total) is int:
                    self._stage(name[:100], done, total)
                    if self._note is not None and isinstance(entry.get("note"), str):
                        self._note(name[:100], entry["note"][:500])
        elif kind == "log" and self._warn is not None:
            text = data.get("text")
            if isinstance(text, str) and text.startswith(WARNING):
                self._warn(text)


def follow_job(
    connection: ServerConnection,
    job: dict[str, Any],
    *,
    stage: Callable[[str, int, int], None] | None = None,
    note: Callable[[str, str], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Wait for the end of `job`; returns it with its result.

    `stage(name, done, total)`, `note(stage, text)` and `warn(line)` are told what comes. A lost
    connection is made again, and the events are read on from the last one. Raises
    `UnreachableError` if the service stays away for `LOST_SECONDS`.
    """
    events = JobEvents(stage, note, warn)
    path = f"/v1/jobs/{job['id']}"
    last_contact = time.monotonic()
    while True:
        try:
            _read_stream(connection, f"{path}/events", events)
            job = connection.get(path)
            last_contact = time.monotonic()
        except UnreachableError as error:
            if time.monotonic() - last_contact > LOST_SECONDS:
                raise UnreachableError(
                    f"{error}; the job {job['id'][:12]} goes on there: ask the same again"
                ) from None
        if job["state"] in ENDED:
            return job
        time.sleep(PAUSE_SECONDS)


def _read_stream(connection: ServerConnection, path: str, events: JobEvents) -> None:
    """Read events until the stream ends or breaks."""
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(events.last)}
    fields: dict[str, str] = {}
    try:
        with connection.stream_lines(path, headers) as lines:
            for line in lines or ():
                if line:
                    name, _, value = line.decode("utf-8", "replace").partition(":")
                    fields[name] = value.removeprefix(" ")
                    continue
                if fields.get("id", "").isdigit():
                    events.last = int(fields["id"][:18])
                if "data" in fields:
                    data = json.loads(fields["data"])
                    if isinstance(data, dict):
                        events.take(fields.get("event", ""), data)
                        if fields.get("event") == "state" and data.get("state") in ENDED:
                            return
                fields = {}
    except (UnreachableError, ValueError):
        return  # read on from the last number

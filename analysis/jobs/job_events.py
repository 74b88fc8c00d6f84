"""Numbered events of a job in a file of JSON lines: state, progress, log; read on by number.

The server that owns the job appends; any server reads. Numbers only grow, also over a restart. A
line that a crash tore is dropped by the next writer and skipped by readers. The file stays bounded:
once it is large, old progress and log lines are left out, events of states stay.
"""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache.errors import CorruptError
from ...cache.files.json_fields import (
    FieldError,
    choice_field,
    integer_field,
    object_field,
    parse_json_object,
)
from ...cache.files.json_files import canonical_json, write_atomically

EVENTS_FILE = "events.jsonl"
KINDS = ("state", "progress", "log")
MAX_FILE_BYTES = 2 << 20
"""Size at which old events are left out."""
KEPT_EVENTS = 1000
"""Latest events that stay then."""
MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True)
class JobEvent:
    """One event of a job."""

    number: int
    kind: str
    """`state`, `progress` or `log`."""
    data: dict[str, Any]


class JobEventWriter:
    """Appends events of the job in `folder`; for the one owner of the job."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS_FILE
        self._lock = threading.Lock()
        self._number = 0
        raw = self._path.read_bytes() if self._path.exists() else b""
        if raw and not raw.endswith(b"\n"):  # a crash tore the last line
            os.truncate(self._path, raw.rfind(b"\n") + 1)
        self._number = max((event.number for event in parse_events(raw)), default=0)

    def append(self, kind: str, data: dict[str, Any]) -> int:
        """Append an event; returns its number."""
        with self._lock:
            line = canonical_json({"id": self._number + 1, "event": kind, "data": data}) + b"\n"
            if len(line) > MAX_LINE_BYTES:
                line = canonical_json({"id": self._number + 1, "event": kind, "data": {}}) + b"\n"
            if self._path.exists() and self._path.stat().st_size > MAX_FILE_BYTES:
                self._leave_out_old()
            with self._path.open("ab") as file:
                file.write(line)
            self._number += 1
            return self._number

    def _leave_out_old(self) -> None:
        """Keep the events of states, and the latest others."""
        events = parse_events(self._path.read_bytes())
        kept = [event for event in events[:-KEPT_EVENTS] if event.kind == "state"][-KEPT_EVENTS:]
        lines = [
            canonical_json({"id": event.number, "event": event.kind, "data": event.data}) + b"\n"
            for event in [*kept, *events[-KEPT_EVENTS:]]
        ]
        write_atomically(self._path, b"".join(lines))


class JobEventReader:
    """Reads the events of the job in `folder` that come after the number `after`, bit by bit."""

    def __init__(self, folder: Path, after: int = 0) -> None:
        self._path = folder / EVENTS_FILE
        self._after = after
        self._file = (0, 0)
        """Inode and position up to which the file was read."""

    def read_new(self) -> list[JobEvent]:
        """Events that were appended since the last call."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode == self._file[0]:
                    file.seek(self._file[1])
                start = file.tell()
                raw = file.read(MAX_FILE_BYTES + 2 * MAX_LINE_BYTES)
        except FileNotFoundError:
            return []
        whole = raw[: raw.rfind(b"\n") + 1]
        self._file = (inode, start + len(whole))
        events = [event for event in parse_events(whole) if event.number > self._after]
        if events:
            self._after = events[-1].number
        return events


def parse_events(raw: bytes) -> list[JobEvent]:
    """The events of whole lines, in order; lines that are no event are skipped."""
    events = []
    for line in raw.splitlines():
        if len(line) > MAX_LINE_BYTES:
            continue
        try:
            value = parse_json_object(line, EVENTS_FILE)
            events.append(
                JobEvent(
                    integer_field(value, "id", 1),
                    choice_field(value, "event", KINDS),
                    object_field(value, "data"),
                )
            )
        except (CorruptError, FieldError, json.JSONDecodeError):
            continue
    return events

"""The files of one job: request, state, attempts, marks for its worker; re-read with bounds.

<state>/jobs/<id>/request.json        command and arguments; made once, with the folder
<state>/jobs/<id>/state.json          state, replaced as a whole by the server that owns the job
<state>/jobs/<id>/events.jsonl        numbered events (job_events.py)
<state>/jobs/<id>/owner.lock          locked by the server that runs the job
<state>/jobs/<id>/attempt.lock        locked by the worker, and the process, of the running attempt
<state>/jobs/<id>/cancel              there once somebody has asked for the end of the job
<state>/jobs/<id>/files/              reports and pictures that the command writes
<state>/jobs/<id>/attempts/00001/     start.json, progress.json, result.json, outcome.json, log.txt

The folder is made under another name and renamed: it appears whole, and of two servers that make
the same job one succeeds. Every file is written whole, or is only appended to; what a crash left is
read as what was there before it.
"""

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from ...cache.errors import CorruptError, NotFoundError, ResiduaError
from ...cache.files.confined_files import read_confined
from ...cache.files.json_fields import (
    FieldError,
    as_object,
    as_text,
    checking_fields,
    choice_field,
    integer_field,
    number_field,
    object_field,
    optional_field,
    parse_json_object,
    text_field,
)
from ...cache.files.json_files import make_folder, parse_json, write_json
from ...cache.files.leases import LOCK_FLAGS, try_lock
from ...cache.files.staging import staging_folder

STATES = ("queued", "running", "done", "failed", "cancelled")
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")
"""States that end a job; asking for a failed or cancelled job again begins a new round."""
ID_LETTERS = 32
JOB_ID = re.compile(rf"[0-9a-f]{{{ID_LETTERS}}}")
MAX_STATE_BYTES = 1 << 20
MAX_RESULT_BYTES = 128 << 20
MAX_ATTEMPTS = 100_000
ATTEMPT_LOCK = "attempt.lock"
CANCEL_MARK = "cancel"
INTERRUPT_MARK = "interrupt"


@dataclass(frozen=True)
class JobRequest:
    """What was asked: the identity of a job."""

    command: str
    """Words of the command, such as `fit ridge`."""
    arguments: dict[str, Any]
    """Arguments as they were given, with whole names of caches and probes."""
    identity: dict[str, Any]
    """Values of all arguments, defaults too, and what else makes two requests equal."""
    created: float
    """Unix time of the first request."""


@dataclass(frozen=True)
class JobStatus:
    """State of a job, as its `state.json` says."""

    state: JobState
    round: int = 1
    """Times that the job was asked for anew, after it had failed or was cancelled."""
    started: float | None = None
    """Unix time at which the first attempt of the round began."""
    ended: float | None = None
    """Unix time at which the job ended."""
    attempts: int = 0
    """Number of the latest attempt."""
    worker: str | None = None
    """Worker and machine of the latest attempt."""
    exit_code: int | None = None
    error: dict[str, Any] | None = None
    """Error of a failed job, as --json prints it."""
    message: str | None = None
    """Why the job waits, or how its last attempt ended."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The status of a file; raises `FieldError`."""
        state: Any = choice_field(value, "state", STATES)
        return cls(
            state=state,
            round=integer_field(value, "round", 1, MAX_ATTEMPTS),
            started=optional_field(number_field, value, "started"),
            ended=optional_field(number_field, value, "ended"),
            attempts=integer_field(value, "attempts", 0, MAX_ATTEMPTS),
            worker=optional_field(text_field, value, "worker"),
            exit_code=optional_field(integer_field, value, "exit_code", -255, 255),
            error=optional_field(object_field, value, "error"),
            message=optional_field(text_field, value, "message", 1 << 16),
        )


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt of a job, as its files say."""

    number: int
    round: int
    session: str
    """Random name of the run of the server that ordered the attempt."""
    worker: str
    started: float
    outcome: dict[str, Any] | None
    """`{"exit_code", "signal", "reason", "ended"}`; None while it runs, or if its worker died."""


class JobFolder:
    """Reads and writes the files of the job in the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id: str = path.name

    # Request and state.

    @staticmethod
    def create(jobs: Path, job_id: str, request: JobRequest) -> bool:
        """Make the folder of a new job, queued; returns False if the job exists."""
        make_folder(jobs)
        with staging_folder(jobs, ".new-") as staging:
            (staging / "attempts").mkdir()
            (staging / "files").mkdir()
            write_json(staging / "request.json", asdict(request))
            write_json(staging / "state.json", JobStatus("queued").to_json())
            try:
                os.rename(staging, jobs / job_id)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return False
                raise
        return True

    def exists(self) -> bool:
        """Whether the folder holds a job."""
        return (self.path / "request.json").is_file()

    def read_request(self) -> JobRequest:
        """The request; raises `CorruptError` for a damaged or forged file."""
        value = self._read("request.json", MAX_STATE_BYTES)
        with checking_fields(self.path / "request.json", "the request of a job"):
            return JobRequest(
                command=text_field(value, "command", 100),
                arguments=object_field(value, "arguments"),
                identity=object_field(value, "identity"),
                created=number_field(value, "created", 0),
            )

    def read_status(self) -> JobStatus:
        """The state; raises `CorruptError` for a damaged or forged file."""
        value = self._read("state.json", MAX_STATE_BYTES)
        with checking_fields(self.path / "state.json", "the state of a job"):
            return JobStatus.from_json(value)

    def write_status(self, status: JobStatus) -> None:
        """Replace the state, durably."""
        write_json(self.path / "state.json", status.to_json())

    def _read(self, name: str, most: int) -> dict[str, Any]:
        try:
            return parse_json(read_confined(self.path, name, most), self.path / name)
        except FileNotFoundError:
            raise NotFoundError(f"{self.path / name} is missing") from None

    # Ownership.

    def take_ownership(self) -> int | None:
        """Descriptor of the lock of the job's owner; None if another server has the job."""
        return self._try_lock("owner.lock")

    def _try_lock(self, name: str) -> int | None:
        descriptor = os.open(self.path / name, LOCK_FLAGS, 0o600)
        if try_lock(descriptor) is False:
            os.close(descriptor)
            return None
        return descriptor

    @contextmanager
    def attempt_lock(self) -> Iterator[int | None]:
        """The lock of the running attempt, by its descriptor; None while an attempt runs.

        The process of the attempt inherits the descriptor: the lock lasts as long as either the
        worker or the process.
        """
        descriptor = self._try_lock(ATTEMPT_LOCK)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    # Marks.

    def mark(self, name: str) -> None:
        """Make the empty file `name`, `cancel` or `interrupt`, which the worker looks for."""
        (self.path / name).touch()

    def clear_mark(self, name: str) -> None:
        """Remove a mark."""
        (self.path / name).unlink(missing_ok=True)

    def is_marked(self, name: str) -> bool:
        """Whether the mark is there."""
        return os.path.lexists(self.path / name)

    # Attempts.

    def attempt_path(self, number: int) -> Path:
        """Folder of an attempt."""
        return self.path / "attempts" / f"{number:05d}"

    def count_attempts(self) -> int:
        """Number of the latest attempt; 0 before the first."""
        names = os.listdir(self.path / "attempts")
        return max((int(name) for name in names if re.fullmatch(r"[0-9]{5}", name)), default=0)

    def begin_attempt(self, record: dict[str, Any]) -> int:
        """Make the folder of the next attempt, with its `start.json`; returns its number."""
        number = self.count_attempts() + 1
        folder = self.attempt_path(number)
        folder.mkdir()
        write_json(folder / "start.json", record)
        return number

    def read_attempt(self, number: int) -> AttemptRecord | None:
        """The attempt; None if its files are missing or damaged."""
        try:
            start = self._read(f"attempts/{number:05d}/start.json", MAX_STATE_BYTES)
            return AttemptRecord(
                number=number,
                round=integer_field(start, "round", 1, MAX_ATTEMPTS),
                session=text_field(start, "session", 64),
                worker=text_field(start, "worker", 200),
                started=number_field(start, "started", 0),
                outcome=self._read_outcome(number),
            )
        except (ResiduaError, OSError):
            return None

    def _read_outcome(self, number: int) -> dict[str, Any] | None:
        try:
            value = self._read(f"attempts/{number:05d}/outcome.json", MAX_STATE_BYTES)
            return {
                "exit_code": optional_field(integer_field, value, "exit_code", 0, 255),
                "signal": optional_field(integer_field, value, "signal", 1, 64),
                "reason": optional_field(text_field, value, "reason", 40),
                "ended": number_field(value, "ended", 0),
            }
        except (ResiduaError, OSError):
            return None

    def write_outcome(self, number: int, outcome: dict[str, Any]) -> None:
        """Record how the process of an attempt ended."""
        write_json(self.attempt_path(number) / "outcome.json", outcome)

    def read_result(self, number: int) -> dict[str, Any] | None:
        """`{"value", "text", "error", "exit_code"}` that the command wrote; None without any."""
        try:
            result = self._read(f"attempts/{number:05d}/result.json", MAX_RESULT_BYTES)
            integer_field(result, "exit_code", 0, 255)
            optional_field(text_field, result, "text", MAX_RESULT_BYTES)
            if (value := optional_field(text_field, result, "value", MAX_RESULT_BYTES)) is not None:
                result["value"] = parse_json_object(value.encode(), "the value of a job")
            if (error := optional_field(object_field, result, "error")) is not None:
                text_field(error, "error", 100)
                text_field(error, "message", 1 << 20)
        except (ResiduaError, OSError):
            return None
        return result

    def read_progress(self, number: int) -> list[dict[str, Any]]:
        """Stages of an attempt, as job_report.py writes them; empty without any."""
        if number < 1:
            return []
        name = f"attempts/{number:05d}/progress.json"
        try:
            value = parse_json_object(read_confined(self.path, name, MAX_STATE_BYTES), name)
            notes = {
                as_text(key, "stage", 100): as_text(note, "note", 500)
                for key, note in as_object(value.get("notes", {}), "notes").items()
            }
            return [
                {
                    "stage": text_field(stage, "stage", 100),
                    "done": integer_field(stage, "done"),
                    "total": integer_field(stage, "total"),
                    "unit": text_field(stage, "unit", 100),
                    "rate": optional_field(number_field, stage, "rate"),
                    "eta": optional_field(number_field, stage, "eta"),
                    "note": notes.get(stage["stage"]) or None,
                }
                for stage in value.get("progress", [])[:100]
                if isinstance(stage, dict)
            ]
        except (FieldError, CorruptError, OSError, TypeError, AttributeError):
            return []

    def read_log(self, number: int, most: int = 4 << 20) -> bytes:
        """What the process of an attempt wrote, at most `most` bytes; empty without any."""
        if number < 1:
            return b""
        try:
            return read_confined(self.path, f"attempts/{number:05d}/log.txt", most)
        except (CorruptError, OSError):
            return b""

    def list_files(self) -> list[str]:
        """Names of the reports and pictures that the command wrote, such as `report.html`."""
        folder = self.path / "files"
        names = []
        for place, folders, files in os.walk(folder):
            folders.sort()
            for name in sorted(files):
                path = Path(place, name)
                if not name.startswith(".") and path.is_file() and not path.is_symlink():
                    names.append(path.relative_to(folder).as_posix())
            if len(names) > 1000:
                break
        return names[:1000]

    def clear_files(self) -> None:
        """Remove the files that the command of an earlier attempt wrote."""
        shutil.rmtree(self.path / "files", ignore_errors=True)
        (self.path / "files").mkdir(exist_ok=True)


def next_round(status: JobStatus) -> JobStatus:
    """The state of a job that ended, and is asked for again."""
    return JobStatus("queued", round=status.round + 1, attempts=status.attempts)


def now() -> float:
    """Unix time, to milliseconds."""
    return round(time.time(), 3)


def ended(status: JobStatus, state: JobState, **fields: Any) -> JobStatus:
    """`status` at the end of the job."""
    return replace(status, state=state, ended=now(), **fields)

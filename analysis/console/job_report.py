"""What a command reports when it runs as a job: progress and result, as files of its attempt.

A job of the service is a command in a process of its own, which finds the folder of its attempt in
`RESIDUA_JOB_FOLDER`. It writes `progress.json` there while it works and `result.json` at its end,
and takes the end of its standard input for the death of the worker that started it.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...cache.errors import ResiduaError
from ...cache.progress import UNITS, StageDisplay

FOLDER_VARIABLE = "RESIDUA_JOB_FOLDER"
"""Environment variable with the folder of the attempt; set for the process of a job alone."""
PROGRESS_FILE = "progress.json"
RESULT_FILE = "result.json"
REPORT_SECONDS = 0.5
"""Time between two writes of the progress."""
MAX_STAGES = 32
"""Most stages that are reported."""
ORPHAN_SECONDS = 20.0
"""Time that a command has to keep its work after its worker died."""


def job_folder() -> Path | None:
    """Folder of the attempt that this process runs; None for a command that is no job."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return Path(folder) if folder else None


def follow_parent() -> None:
    """Interrupt this process when its standard input ends, as that of a dead worker does."""
    threading.Thread(target=_wait_for_orphanhood, daemon=True, name="parent").start()


def _wait_for_orphanhood() -> None:
    """Read standard input to its end; then interrupt this process, and end it if that is vain."""
    while True:
        try:
            if not os.read(0, 4096):
                break
        except OSError:
            break
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(ORPHAN_SECONDS)
    if os.getpgid(0) == os.getpid():  # the group of the job alone
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def write_value(folder: Path, value: Any, text: str) -> None:
    """Write the result of a command: what --json prints, and the text that it prints otherwise."""
    from ...cache.files.json_files import plain_value

    plain = json.loads(json.dumps(plain_value(value), default=str, allow_nan=False))
    exit_code = plain.get("exit_code", 0) if isinstance(plain, dict) else 0
    # As text: the files of an attempt sort their keys, and the command does not.
    content = json.dumps(plain)
    _write(folder, {"value": content, "text": text, "error": None, "exit_code": exit_code})


def write_error(folder: Path, error: ResiduaError) -> None:
    """Write the error that ended a command, as --json prints it."""
    value = error_value(error)
    _write(folder, {"value": None, "text": None, "error": value, "exit_code": error.exit_code})


def error_value(error: ResiduaError) -> dict[str, Any]:
    """The JSON object of an error: its class, message and exit code."""
    return {
        "error": type(error).__name__,
        "message": str(error),
        "exit_code": error.exit_code,
    }


def _write(folder: Path, result: dict[str, Any]) -> None:
    from ...cache.files.json_files import write_json

    # Halves of surrogate pairs, of names of files that are no UTF-8, would break the JSON.
    text = json.dumps(result, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    write_json(folder / RESULT_FILE, json.loads(text))


class JobProgress:
    """Shows stages as `log` does, and writes them to `progress.json` of the attempt `folder`.

    The file holds `{"progress": [{"stage", "done", "total", "unit", "rate", "eta"}], "notes":
    {stage: text}}`: rate per second, eta in seconds, both null until they are known.
    """

    def __init__(self, folder: Path, log: StageDisplay) -> None:
        self._folder = folder
        self._log = log
        self._stages: dict[str, _ReportedStage] = {}
        self._notes: dict[str, Callable[[], str]] = {}
        self._lock = threading.Lock()
        self._last_write = 0.0

    def __enter__(self) -> Self:
        self._log.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._write()
        self._log.__exit__(kind, value, trace)

    def stage(self, name: str, done: int, total: int) -> None:
        """Report that stage `name` has done `done` of `total`; called from any thread."""
        self._log.stage(name, done, total)
        now = time.monotonic()
        with self._lock:
            stage = self._stages.get(name)
            if stage is None:
                if len(self._stages) >= MAX_STAGES:
                    return
                stage = self._stages[name] = _ReportedStage(now, done)
            stage.done, stage.total, stage.latest = int(done), int(total), now
            if done >= total or now - self._last_write >= REPORT_SECONDS:
                self._write()

    def note(self, name: str, text: Callable[[], str]) -> None:
        """Report `text()` beside stage `name`."""
        with self._lock:
            self._notes[name] = text

    def _write(self) -> None:
        """Replace the file; a reader sees the old or the new one. A full disk is no error here."""
        self._last_write = time.monotonic()
        stages = [stage.to_dict(name) for name, stage in self._stages.items()]
        notes = {name: text()[:500] for name, text in self._notes.items()}
        temporary = self._folder / f".{PROGRESS_FILE}.tmp"
        try:
            temporary.write_text(json.dumps({"progress": stages, "notes": notes}))
            os.replace(temporary, self._folder / PROGRESS_FILE)
        except OSError:
            return


class _ReportedStage:
    """State of one stage of a `JobProgress`."""

    def __init__(self, began: float, done: int) -> None:
        self.began = self.latest = began
        self.first_done = self.done = done
        self.total = done

    def to_dict(self, name: str) -> dict[str, Any]:
        """The stage as JSON."""
        seconds = self.latest - self.began
        rate = (self.done - self.first_done) / seconds if seconds > 0 else None
        return {
            "stage": name,
            "done": self.done,
            "total": self.total,
            "unit": UNITS.get(name, "positions"),
            "rate": rate,
            "eta": (self.total - self.done) / rate if rate else None,
        }

"""`JobQueue`: makes jobs of requests, runs them on workers, and knows each to its end.

    queue = JobQueue(JobSettings(root, state=root / ".service"))
    queue.start()
    job, is_new = queue.submit("fit ridge", {"cache": "3f2a", "offsets": "0-3"})
    queue.find(job["id"])["state"]      # queued, running, done, failed or cancelled
    queue.stop()

The state lies in files (job_files.py): a queue that is started again goes on with what it finds. Of
several queues on one state, the one that holds a job's lock runs the job. One thread talks with
dask; all methods may be called from any thread.
"""

import os
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...cache.errors import LimitError, NoSpaceError, NotFoundError, ResiduaError, UsageError
from ...cache.files.disk_errors import system_error, translate_disk_errors
from ...cache.files.json_files import make_folder
from ...cache.files.paths import is_remote
from ..console.job_report import error_value
from .job_attempt import WORKER_DIED, AttemptOrder, make_outcome
from .job_commands import (
    JOB_COMMANDS,
    LOOKS,
    CheckedRequest,
    check_request,
    describe_commands,
)
from .job_end import JobEnd, judge_end
from .job_events import JobEventReader, JobEventWriter
from .job_files import (
    CANCEL_MARK,
    ENDED,
    INTERRUPT_MARK,
    JOB_ID,
    JobFolder,
    JobRequest,
    JobStatus,
    next_round,
    now,
)
from .job_files import ended as ended_status
from .job_settings import JobSettings
from .job_views import describe_job
from .job_workers import JobWorkers

TICK_SECONDS = 0.25
"""Pause between two looks at the running jobs."""
LOOK_SECONDS = 1.0
"""Pause between two questions to the scheduler."""
RETRY_SECONDS = 2.0
"""The same while no worker is there."""
ADOPT_SECONDS = 5.0
"""Pause between two searches for jobs of servers that died."""
PROGRESS_SECONDS = 1.0
"""Least time between two events of progress."""
LOG_LINES = 500
"""Most events with lines of the log, for one attempt."""
LOG_BLOCK = 16 << 10
STOP_SECONDS = 5.0
"""Time for the workers to say how the jobs ended, after the grace."""
MAX_KEY = 200
"""Longest Idempotency-Key, in characters."""


@dataclass
class OwnedJob:
    """A job that this queue runs."""

    folder: JobFolder
    request: JobRequest
    checked: CheckedRequest
    status: JobStatus
    events: JobEventWriter
    lock: int
    """Descriptor of the owner's lock."""
    base: int
    """Attempts up to this number have been dealt with."""
    future: Any = None
    worker: str = ""
    deaths: int = 0
    """Times that the process or its worker died, since this queue has the job."""
    is_excused: bool = False
    """Whether the next death counts for nothing: the scheduler vanished, and took workers along."""
    is_unsaved: bool = False
    """Whether the state on disk is older, because the disk is full."""
    progress: list[dict[str, Any]] = field(default_factory=list)
    progress_time: float = 0.0
    log_position: tuple[int, int, int] = (0, 0, 0)
    """Attempt, bytes and lines of its log that became events."""


class JobQueue:
    """Jobs of one service; see the module."""

    def __init__(self, settings: JobSettings) -> None:
        self.settings = settings
        self.folder: Path = settings.state / "jobs"
        self._workers = JobWorkers(settings)
        self._session = uuid.uuid4().hex
        self._owned: dict[str, OwnedJob] = {}
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._stopping = False
        self._has_ended = False
        self._message: str | None = "waits for the workers to start"
        self._thread: threading.Thread | None = None
        self._ended_views: dict[str, tuple[int, dict[str, Any]]] = {}

    # Life of the queue.

    def start(self) -> None:
        """Take up the jobs that are on disk, and run the queue in a thread."""
        with translate_disk_errors(self.settings.state):
            make_folder(self.folder)
            os.chmod(self.settings.state, 0o700)
        self._adopt_orphans()
        self._thread = threading.Thread(target=self._run, daemon=True, name="job queue")
        self._thread.start()

    def stop(self) -> None:
        """Interrupt the running jobs, which go back to the queue, and end workers and thread.

        Jobs keep what they did; the next queue on this state goes on with them.
        """
        with self._lock:
            self._stopping = True
            for job in self._owned.values():
                if job.future is not None:
                    with suppress(OSError):
                        job.folder.mark(INTERRUPT_MARK)
        deadline = time.monotonic() + self.settings.grace_seconds + STOP_SECONDS
        while time.monotonic() < deadline and self._thread is not None:
            with self._lock:
                if all(job.future is None for job in self._owned.values()):
                    break
            time.sleep(TICK_SECONDS / 2)
        self._has_ended = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._workers.close()
        with self._lock:
            for job in self._owned.values():
                os.close(job.lock)
            self._owned.clear()

    @property
    def is_ready(self) -> bool:
        """Whether there are workers for jobs."""
        return self._message is None and not self._stopping

    @property
    def message(self) -> str | None:
        """Why no job runs; None while there are workers."""
        return self._message

    def count_states(self) -> dict[str, int]:
        """Number of the jobs of this queue that wait and that run."""
        with self._lock:
            states = [job.status.state for job in self._owned.values()]
        return {name: states.count(name) for name in ("queued", "running")}

    def commands(self) -> dict[str, Any]:
        """Words of each command -> JSON schema of its arguments."""
        return describe_commands(self.settings)

    # Requests.

    def submit(
        self, command: str, arguments: Mapping[str, Any], key: str | None = None
    ) -> tuple[dict[str, Any], bool]:
        """The job of a request, as JSON, and whether it is new.

        Equal requests are one job; one that failed, was cancelled, or whose result was removed runs
        again. `key`, an Idempotency-Key, makes another job of equal arguments. Raises `UsageError`
        and `NotFoundError` for arguments that cannot be right, `LimitError` if too many jobs wait,
        `NoSpaceError` for a full disk.
        """
        if key is not None and not 0 < len(key) <= MAX_KEY:
            raise UsageError(f"an Idempotency-Key has 1 to {MAX_KEY} characters")
        checked = check_request(self.settings, command, arguments, key)
        folder = JobFolder(self.folder / checked.job_id)
        with self._lock, translate_disk_errors(self.settings.state):
            if self._stopping:
                raise LimitError("the server is stopping; ask again when it is back")
            is_new = False
            if not folder.exists():
                if len(self._owned) >= self.settings.most_waiting:
                    raise LimitError(
                        f"{len(self._owned)} jobs wait or run, the most that this server takes; "
                        "ask again later"
                    )
                request = JobRequest(checked.command, checked.arguments, checked.identity, now())
                is_new = JobFolder.create(self.folder, checked.job_id, request)
            if folder.id not in self._owned:
                self._take_up(folder, asked_again=True)
        self._wake.set()
        return self.find(folder.id), is_new

    def find(self, name: str) -> dict[str, Any]:
        """The job whose id begins with `name`, as JSON with its result; raises `NotFoundError`."""
        folder = self._find_folder(name)
        with self._lock:
            job = self._owned.get(folder.id)
            status = job.status if job else folder.read_status()
        view = describe_job(folder, status)
        if status.state == "queued" and view["message"] is None:
            view["message"] = self._message
        return view

    def list_jobs(self) -> list[dict[str, Any]]:
        """All jobs, the latest first, without values and texts."""
        views = []
        for name in os.listdir(self.folder):
            if JOB_ID.fullmatch(name):
                with suppress(ResiduaError, OSError):
                    views.append(self._short_view(JobFolder(self.folder / name)))
        return sorted(views, key=lambda view: (-view["created"], view["id"]))

    def _short_view(self, folder: JobFolder) -> dict[str, Any]:
        """The job without its result; those that ended are remembered."""
        with self._lock:
            job = self._owned.get(folder.id)
            status = job.status if job else None
        if status is not None:
            return describe_job(folder, status, with_result=False)
        time_ns = os.stat(folder.path / "state.json").st_mtime_ns
        known = self._ended_views.get(folder.id)
        if known is not None and known[0] == time_ns:
            return known[1]
        status = folder.read_status()
        view = describe_job(folder, status, with_result=False)
        if status.state in ENDED:
            self._ended_views[folder.id] = (time_ns, view)
        return view

    def has_ended(self, name: str) -> bool:
        """Whether a job is done, failed or cancelled."""
        folder = self._find_folder(name)
        with self._lock:
            job = self._owned.get(folder.id)
            return (job.status if job else folder.read_status()).state in ENDED

    def cancel(self, name: str) -> dict[str, Any]:
        """Ask for the end of a job; returns the job. A job that has ended stays as it is."""
        folder = self._find_folder(name)
        with self._lock:
            job = self._owned.get(folder.id)
            if job is not None:
                folder.mark(CANCEL_MARK)
                if job.future is None:
                    self._end(job, JobEnd("cancelled"))
            elif folder.read_status().state not in ENDED:  # another server runs the job
                folder.mark(CANCEL_MARK)
        self._wake.set()
        return self.find(folder.id)

    def events(self, name: str, after: int = 0) -> JobEventReader:
        """Reader of the events of a job that come after the number `after`."""
        return JobEventReader(self._find_folder(name).path, after)

    def log(self, name: str, attempt: int | None = None) -> bytes:
        """What the process of a job printed, by default in its latest attempt."""
        folder = self._find_folder(name)
        return folder.read_log(folder.count_attempts() if attempt is None else attempt)

    def file_folder(self, name: str) -> Path:
        """Folder of the reports and pictures of a job; read it with cache/files/confined_files."""
        return self._find_folder(name).path / "files"

    def _find_folder(self, name: str) -> JobFolder:
        if JOB_ID.fullmatch(name) and (self.folder / name).is_dir():
            return JobFolder(self.folder / name)
        matches = [
            known
            for known in (os.listdir(self.folder) if name else ())
            if JOB_ID.fullmatch(known) and known.startswith(name)
        ]
        if len(matches) > 1:
            raise UsageError(f"{name!r} begins the ids of {len(matches)} jobs; give more of it")
        if not matches:
            raise NotFoundError(f"no job {name[:100]!r}; `residua jobs` lists them")
        return JobFolder(self.folder / matches[0])

    # Taking up jobs of the disk. The lock is held.

    def _adopt_orphans(self) -> None:
        """Take up jobs that no server runs: those of a server that died, or was stopped."""
        for name in sorted(os.listdir(self.folder)):
            folder = JobFolder(self.folder / name)
            if not JOB_ID.fullmatch(name) or name in self._owned or name in self._ended_views:
                continue
            with self._lock, suppress(ResiduaError, OSError):
                if folder.read_status().state not in ENDED:
                    self._take_up(folder)

    def _take_up(self, folder: JobFolder, asked_again: bool = False) -> None:
        """Own a job that waits; one that ended begins a new round if it was `asked_again`."""
        status = folder.read_status()
        if status.state in ENDED and not (asked_again and self._runs_again(folder, status)):
            return
        lock = folder.take_ownership()
        if lock is None:  # another server runs the job
            return
        try:
            status = folder.read_status()
            if status.state in ENDED and not asked_again:
                os.close(lock)
                return
            latest = folder.count_attempts()
            attempt = folder.read_attempt(latest)
            if status.state in ENDED:
                status = next_round(status)
                folder.clear_mark(CANCEL_MARK)
                base = latest
            else:
                # An attempt without an end may still run, on a worker of another machine.
                is_open = attempt is not None and attempt.round == status.round
                base = latest - 1 if is_open and status.state == "running" else latest
                status = replace(status, state="queued")
            folder.clear_mark(INTERRUPT_MARK)
            request = folder.read_request()
            events = JobEventWriter(folder.path)
        except BaseException:
            os.close(lock)
            raise
        checked = CheckedRequest(request.command, request.arguments, request.identity)
        job = OwnedJob(folder, request, checked, status, events=events, lock=lock, base=base)
        self._owned[folder.id] = job
        self._ended_views.pop(folder.id, None)
        self._set_status(job, status)
        try:  # what lies on disk is checked again: folders and rights may have changed
            job.checked = check_request(
                self.settings, request.command, request.arguments, request.identity.get("salt")
            )
        except ResiduaError as error:
            self._end(job, JobEnd("failed", error.exit_code, error_value(error)))

    def _runs_again(self, folder: JobFolder, status: JobStatus) -> bool:
        """Whether asking again runs an ended job: it failed, or its result is gone or old."""
        request = folder.read_request()
        command = JOB_COMMANDS.get(request.command)
        is_look = any(request.arguments.get(name) for name in LOOKS)
        if status.state != "done" or command is None or command.is_repeated or is_look:
            return True
        result = folder.read_result(status.attempts)
        if result is None:
            return True
        value = result["value"] if isinstance(result["value"], dict) else {}
        fits = value.get("probes", []) if isinstance(value.get("probes"), list) else []
        paths = [value.get("probe"), value.get("path")]
        paths += [fit.get("probe") for fit in fits if isinstance(fit, dict)]
        if is_remote(self.settings.root):
            return False
        return any(isinstance(path, str) and not os.path.exists(path) for path in paths)

    # The thread of the queue.

    def _run(self) -> None:
        last_look = last_adoption = -RETRY_SECONDS
        while not self._has_ended:
            moment = time.monotonic()
            if moment - last_look >= (RETRY_SECONDS if self._message else LOOK_SECONDS):
                self._look_at_workers()
                last_look = time.monotonic()
            if moment - last_adoption >= ADOPT_SECONDS and not self._stopping:
                with suppress(OSError):
                    self._adopt_orphans()
                last_adoption = moment
            with self._lock:
                for job in sorted(self._owned.values(), key=lambda job: job.request.created):
                    try:
                        self._care_for(job)
                    except OSError as error:  # a full disk: the next tick tries again
                        job.is_unsaved = True
                        job.status = replace(job.status, message=f"the state is not kept: {error}")
            self._wake.wait(TICK_SECONDS)
            self._wake.clear()

    def _look_at_workers(self) -> None:
        """Connect if need be, and see which workers there are."""
        message = self._workers.connect() or self._workers.look()
        self._message = message
        with self._lock:
            for job in list(self._owned.values()):
                future = job.future
                if future is None or future.done() or self._workers.has_worker(job.worker):
                    continue
                job.is_excused = not self._workers.is_connected
                self._lose_future(job, message or "its worker is gone")

    def _lose_future(self, job: OwnedJob, reason: str) -> None:
        """The scheduler or the worker of a job vanished: what its files say decides."""
        future, job.future = job.future, None
        with suppress(Exception):  # the connection may be broken
            future.cancel()
        self._deal_with_end(job, None, reason)

    def _care_for(self, job: OwnedJob) -> None:
        """One look at one job."""
        if job.is_unsaved:
            job.folder.write_status(job.status)
            job.is_unsaved = False
            if job.status.state in ENDED:
                self._release(job)
                return
        if job.future is not None:
            if job.future.done():
                future, job.future = job.future, None
                self._deal_with_end(job, future, None)
            else:
                self._report(job)
            return
        if job.folder.is_marked(CANCEL_MARK):
            self._end(job, JobEnd("cancelled"))
        elif not self._stopping and self._message is None:
            busy = {other.worker for other in self._owned.values() if other.future is not None}
            worker = self._workers.idle_worker(busy, job.checked.prefers_gpu)
            if worker is not None:
                job.folder.clear_mark(INTERRUPT_MARK)
                job.worker = worker
                job.future = self._workers.submit(self._order(job), worker)

    def _order(self, job: OwnedJob) -> AttemptOrder:
        return AttemptOrder(
            folder=str(job.folder.path.resolve()),
            round=job.status.round,
            session=self._session,
            words=tuple(job.checked.words),
            grace_seconds=self.settings.grace_seconds,
            threads=self._workers.threads,
            uses_hub=job.checked.uses_hub,
        )

    def _report(self, job: OwnedJob, is_last: bool = False) -> None:
        """Note the beginning of an attempt, and make events of its progress and its log."""
        number = job.folder.count_attempts()
        if number <= job.base:
            return
        if job.status.attempts != number or job.status.state != "running":
            attempt = job.folder.read_attempt(number)
            if attempt is None:
                return
            started = job.status.started or attempt.started
            self._set_status(
                job,
                replace(
                    job.status,
                    state="running",
                    started=started,
                    attempts=number,
                    worker=attempt.worker,
                    message=None,
                ),
            )
        moment = time.monotonic()
        if moment - job.progress_time >= PROGRESS_SECONDS or is_last:
            progress = job.folder.read_progress(number)
            if progress != job.progress:
                job.progress, job.progress_time = progress, moment
                job.events.append("progress", {"progress": progress})
        self._report_log(job, number)

    def _report_log(self, job: OwnedJob, number: int) -> None:
        """Make events of the new lines of the log."""
        attempt, position, lines = job.log_position
        if attempt != number:
            position = lines = 0
        with suppress(OSError), (job.folder.attempt_path(number) / "log.txt").open("rb") as file:
            file.seek(position)
            block = file.read(LOG_BLOCK)
            whole = block[: block.rfind(b"\n") + 1] or (block if len(block) == LOG_BLOCK else b"")
            position += len(whole)
            for line in whole.decode("utf-8", "replace").splitlines():
                if lines < LOG_LINES and line.strip():
                    job.events.append("log", {"text": line[:2000], "attempt": number})
                    lines += 1
        job.log_position = (number, position, lines)

    def _deal_with_end(self, job: OwnedJob, future: Any, lost: str | None) -> None:
        """What follows the end of an attempt: the end of the job, or its next attempt."""
        self._report(job, is_last=True)
        number = job.folder.count_attempts()
        attempt = job.folder.read_attempt(number) if number > job.base else None
        if lost is not None and attempt is not None and attempt.outcome is None:
            # Only a new attempt, which waits for the lock of this one, tells whether it died.
            is_running = not self._is_lock_free(job)
            if is_running:
                self._set_status(job, replace(job.status, state="queued", message=lost))
                job.base = number - 1
                return
            with suppress(OSError):
                job.folder.write_outcome(number, make_outcome(None, WORKER_DIED))
        end = judge_end(job.folder, attempt, future)
        if attempt is not None:
            job.base = number
        if end.is_death and job.is_excused:
            job.is_excused = False
            end = JobEnd("queued", message=lost or end.message)
        if end.is_death:
            job.deaths += 1
            if job.deaths >= self.settings.most_deaths:
                end = end.as_failure(job.deaths, job.folder.read_log(number))
            else:
                message = (
                    f"{end.message}; tries again ({job.deaths} of {self.settings.most_deaths})"
                )
                self._set_status(job, replace(job.status, state="queued", message=message))
                return
        if end.state == "queued":
            if job.folder.is_marked(CANCEL_MARK):
                end = JobEnd("cancelled")
            else:
                message = end.message or lost
                self._set_status(job, replace(job.status, state="queued", message=message))
                return
        self._end(job, end)

    def _is_lock_free(self, job: OwnedJob) -> bool:
        """Whether no process of an attempt runs any more."""
        with job.folder.attempt_lock() as lock:
            return lock is not None

    def _end(self, job: OwnedJob, end: JobEnd) -> None:
        """End the job, and let go of it."""
        assert end.state != "queued"
        status = ended_status(
            job.status,
            end.state,
            exit_code=end.exit_code,
            error=end.error,
            message=end.message,
            attempts=max(job.status.attempts, job.folder.count_attempts()),
        )
        self._set_status(job, status)
        if not job.is_unsaved:
            self._release(job)

    def _release(self, job: OwnedJob) -> None:
        with suppress(OSError):
            job.folder.clear_mark(CANCEL_MARK)
        self._owned.pop(job.folder.id, None)
        os.close(job.lock)

    def _set_status(self, job: OwnedJob, status: JobStatus) -> None:
        """Keep a new state, on disk first; without space, in memory until there is some."""
        job.status = status
        try:
            job.folder.write_status(status)
            error = status.error and {**status.error, "message": status.error["message"][:4000]}
            job.events.append("state", {**status.to_json(), "error": error})
            job.is_unsaved = False
        except OSError as error:
            job.is_unsaved = True
            reason = system_error(error)
            if isinstance(reason, NoSpaceError):
                job.status = replace(status, message=f"the state is not kept yet: {reason}")

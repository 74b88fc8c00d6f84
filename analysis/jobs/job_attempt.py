"""One attempt of a job, as a dask worker runs it: a process of the command, watched to its end.

`run_attempt` is the task. The process has a group of its own, a bounded environment and a bounded
log. It ends with its worker: the worker holds the other end of its standard input. All that matters
is written into the folder of the attempt, as the scheduler may be gone when the process ends.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..console.job_report import FOLDER_VARIABLE
from .job_files import CANCEL_MARK, INTERRUPT_MARK, JobFolder, now

POLL_SECONDS = 0.1
INTERRUPTED = 130
"""Exit code of a command that was interrupted, and can go on."""
WORKER_DIED = "worker died"
"""Reason in the outcome of an attempt that lost its worker."""
LOG_BYTES = 1 << 20
"""Size of the log; of more, the last `TAIL_BYTES` are kept."""
TAIL_BYTES = 64 << 10
KEPT_VARIABLES = (
    "PATH", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV",
    "PYTHONPATH", "PYTHONHOME", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "CUDA_HOME",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
"""Environment variables that a job gets from its worker."""
KEPT_PREFIXES = ("LC_", "AWS_", "NVIDIA_", "ROCR_", "HIP_", "PYTORCH_", "TORCH_")
HUB_PREFIX = "HF_"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class AttemptOrder:
    """What a worker needs to run an attempt; sent by dask."""

    folder: str
    """Folder of the job, which the worker must see."""
    round: int
    session: str
    """Random name of the run of the server that orders the attempt."""
    words: tuple[str, ...]
    """Words of the command line, after `residua`."""
    grace_seconds: float
    threads: int | None = None
    uses_hub: bool = False


def run_attempt(order: AttemptOrder) -> dict[str, Any]:
    """Run the command of `order` to its end; returns the outcome, which is on disk too.

    While an earlier attempt still runs, as after a restart of the server, its end is waited for,
    and is the outcome.
    """
    folder = JobFolder(Path(order.folder))
    waited = False
    while True:
        with folder.attempt_lock() as lock:
            if lock is not None:
                earlier = _end_of_earlier(folder, order, waited)
                return earlier or _run_process(folder, order, lock)
        waited = True
        if folder.is_marked(INTERRUPT_MARK):
            return make_outcome(None, "interrupted")
        time.sleep(POLL_SECONDS)


def _end_of_earlier(folder: JobFolder, order: AttemptOrder, waited: bool) -> dict[str, Any] | None:
    """The outcome of an earlier attempt for the same order, if there was one; None without.

    An attempt whose worker died has no outcome. If its process did the work nevertheless, that
    counts; if not, it is given one, and the queue decides what follows. Of an earlier run of the
    server, only an attempt that still ran is a death: others went down with the server.
    """
    number = folder.count_attempts()
    attempt = folder.read_attempt(number)
    if attempt is None or attempt.round != order.round:
        return None
    if attempt.outcome is not None:
        return attempt.outcome if waited else None
    result = folder.read_result(number)
    is_done = result is not None and result["exit_code"] != INTERRUPTED
    if not is_done and not waited and attempt.session != order.session:
        return None
    outcome = make_outcome(result["exit_code"] if is_done and result else None, WORKER_DIED)
    with suppress(OSError):
        folder.write_outcome(number, outcome)
    return outcome


def _run_process(folder: JobFolder, order: AttemptOrder, lock: int) -> dict[str, Any]:
    """Start the process and wait for its end."""
    for mark, reason in ((CANCEL_MARK, "cancelled"), (INTERRUPT_MARK, "interrupted")):
        if folder.is_marked(mark):
            return make_outcome(None, reason)
    number = folder.begin_attempt(
        {
            "round": order.round,
            "session": order.session,
            "worker": f"{_worker_name()} on {socket.gethostname()}"[:200],
            "pid": os.getpid(),
            "started": now(),
        }
    )
    folder.clear_files()
    attempt = folder.attempt_path(number)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "residua", *order.words],
        cwd=folder.path,
        env=job_environment(os.environ, order, attempt),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(lock,),
    )
    assert process.stdout is not None
    log = threading.Thread(target=_write_log, args=(process.stdout, attempt / "log.txt"))
    log.start()
    try:
        reason = _wait(process, folder, order.grace_seconds)
    finally:
        _kill_group(process)
        process.wait()
        log.join(order.grace_seconds)
        if process.stdin is not None:
            process.stdin.close()
    outcome = make_outcome(process.returncode, reason)
    with suppress(OSError):  # a full disk: the scheduler has the outcome, too
        folder.write_outcome(number, outcome)
    return outcome


def _wait(process: "subprocess.Popen[bytes]", folder: JobFolder, grace: float) -> str | None:
    """Wait for the process; interrupt it once somebody asks for that. Returns who did."""
    reason, deadline = None, 0.0
    while process.poll() is None:
        if reason is None:
            for mark, word in ((CANCEL_MARK, "cancelled"), (INTERRUPT_MARK, "interrupted")):
                if folder.is_marked(mark):
                    reason, deadline = word, time.monotonic() + grace
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGINT)
                    break
        elif time.monotonic() > deadline:
            _kill_group(process)
        time.sleep(POLL_SECONDS)
    return reason


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def make_outcome(returncode: int | None, reason: str | None) -> dict[str, Any]:
    """The JSON object of the end of a process."""
    died = returncode is not None and returncode < 0
    return {
        "exit_code": None if died else returncode,
        "signal": -returncode if died and returncode is not None else None,
        "reason": reason,
        "ended": now(),
    }


def _worker_name() -> str:
    """Name of the dask worker that runs this task."""
    from distributed import get_worker

    try:
        return str(get_worker().name)
    except ValueError:  # called without dask
        return f"process {os.getpid()}"


def job_environment(
    environment: "os._Environ[str] | dict[str, str]", order: AttemptOrder, attempt: Path
) -> dict[str, str]:
    """Environment of the process of a job: no token of the server, no setting of its own."""
    prefixes = (*KEPT_PREFIXES, HUB_PREFIX)
    kept = {
        name: value
        for name, value in environment.items()
        if name in KEPT_VARIABLES or name.startswith(prefixes)
    }
    if not order.uses_hub:
        kept.pop("HF_TOKEN", None)
        kept["HF_HUB_OFFLINE"] = "1"
    # A nanny of dask sets one thread for its worker; the job has its share of the cores.
    threads = order.threads or len(os.sched_getaffinity(0))
    kept |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    return {**kept, FOLDER_VARIABLE: str(attempt), "PYTHONUNBUFFERED": "1"}


def _write_log(stream: IO[bytes], path: Path) -> None:
    """Copy what the process prints into its log, the first and the last of it."""
    size, left_out = 0, 0
    tail: deque[bytes] = deque()
    tail_size = 0
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while block := os.read(stream.fileno(), 1 << 16):
            if size + len(block) <= LOG_BYTES:
                size += len(block)
                with suppress(OSError):  # a full disk must not stop the process
                    file.write(block)
                continue
            tail.append(block)
            tail_size += len(block)
            while tail_size - len(tail[0]) >= TAIL_BYTES:
                tail_size -= len(tail[0])
                left_out += len(tail.popleft())
        if tail:
            file.write(f"\n... {left_out} bytes left out ...\n".encode())
            file.write(b"".join(tail))

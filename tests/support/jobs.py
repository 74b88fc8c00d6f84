"""Queues of jobs and services for tests: with real workers, bounded in time, always stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from residua.analysis.jobs.job_queue import JobQueue
from residua.analysis.jobs.job_settings import JobSettings

SECONDS = 240.0
"""Longest time for anything."""
ENDED = ("done", "failed", "cancelled")
TOKEN = "a-token-for-tests-alone"
ENDLESS = {"layers": "1", "lr": "1e-7", "epochs": 1_000_000, "checkpoint_seconds": 1}
"""Arguments of a `fit vocab` that takes for ever."""


def wait_for(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"nothing came of it in {seconds:.0f} s")


@contextmanager
def running_queue(settings: JobSettings) -> Iterator[JobQueue]:
    """A started queue, stopped at the end."""
    queue = JobQueue(settings)
    queue.start()
    try:
        yield queue
    finally:
        queue.stop()


def wait_for_end(queue: JobQueue, job: str) -> dict[str, Any]:
    """The job once it has ended."""
    return wait_for(lambda: view if (view := queue.find(job))["state"] in ENDED else None)


def attempt_folders(queue: JobQueue, job: str) -> list[Path]:
    """Folders of the attempts of a job, in order."""
    return sorted((queue.folder / job / "attempts").iterdir())


def start_of(folder: Path) -> dict[str, Any]:
    """What an attempt noted at its start."""
    return json.loads((folder / "start.json").read_text())


def wait_for_work(queue: JobQueue, job: str, attempt: int = 1) -> Path:
    """Folder of the attempt, once its command reports progress."""
    folder = queue.folder / job / "attempts" / f"{attempt:05d}"
    wait_for(lambda: (folder / "progress.json").exists())
    return folder


def process_of(folder: Path) -> psutil.Process:
    """The process of an attempt: the child of its worker that runs residua."""
    worker = psutil.Process(start_of(folder)["pid"])

    def find() -> psutil.Process | None:
        for child in worker.children(recursive=True):
            if "residua" in child.cmdline():
                return child
        return None

    return wait_for(find)


def kill_worker(folder: Path) -> None:
    """Kill the worker of an attempt, as the system does when memory runs out."""
    os.kill(start_of(folder)["pid"], signal.SIGKILL)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running_process(*command: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process, ended with all its children at the end."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        end_process(process)


def end_process(process: "subprocess.Popen[str]") -> None:
    """Kill a process and its children."""
    children: Sequence[psutil.Process] = ()
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    process.wait()
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout=30)
    if process.stdout is not None:
        process.stdout.close()


@contextmanager
def service_process(root: Path, *options: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A service in a process of its own: address and process."""
    command = ("-m", "residua", "serve", "--root", root, "--port", 0, *options)
    with running_process(*command, RESIDUA_TOKEN=TOKEN) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        while line and "Serving" not in line:
            line = process.stdout.readline()
        assert line, "the service ended"
        yield line.rsplit(" ", 1)[1].strip(), process

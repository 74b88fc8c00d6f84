"""Runs of the command line in processes that tests may kill: `shared_driver().start(...)`.

Importing torch and transformers takes seconds, so one driver process imports all modules and forks
a `Child` per command. Run as a script this file is the driver: it answers each JSON line with a
JSON line: {"start": arguments, "out", "err"} with a process id, {"poll": id} with its exit status,
{"shell": command} with an exit code. If the system allows, the driver has mounts of its own;
`Driver.visible_path` leads to them.
"""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")
MODULES = (
    "datasets",
    "fsspec",
    "numcodecs.zstd",
    "rich.progress",
    "safetensors.numpy",
    "safetensors.torch",
    "torch",
    "transformers",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "zarr",
    "residua.cli",
    "residua.analysis.console.terminal",
    "residua.cache.checks.model_checks",
    "residua.cache.extraction.answer",
    "residua.cache.forward.kept_logits",
    "residua.cache.model.model_loading",
    "residua.cache.checks.compression_ratio",
    "residua.cache.store.activation_cache",
)


@dataclass
class Child:
    """A process that runs one command line, with the files of its standard output and error."""

    driver: "Driver"
    pid: int
    out: Path
    err: Path
    code: int | None = None
    """Exit code after the end, negative for a signal; None while running."""

    def ended(self) -> bool:
        """Return whether the process has ended."""
        if self.code is None:
            self.code = self.driver.poll(self.pid)
        return self.code is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if not self.ended():
            os.kill(self.pid, number)

    def wait(self, seconds: float = 180) -> int:
        """Exit code; fails the test if the process still runs after `seconds`."""
        wait_until(self.ended, seconds)
        assert self.code is not None
        return self.code

    def kill(self) -> bool:
        """Send SIGKILL; return False if the process had ended before."""
        self.signal(signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def json(self) -> dict[str, Any]:
        """Standard output, parsed as JSON."""
        return json.loads(self.out.read_text())


class Driver:
    """The driver process, as tests see it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mounts = subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
        """Whether `shell` may run mount."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [*(UNSHARE if self.mounts else ()), sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._started = 0
        self.shell("true")  # waits until all modules are imported

    def _request(self, **question: Any) -> Any:
        """Answer of the driver process to one request."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def poll(self, pid: int) -> int | None:
        """Exit code of a child; None while the child runs."""
        return self._request(poll=pid)

    def start(self, *args: object) -> Child:
        """Start the command line with `args` and `--json`."""
        self._started += 1
        out, err = (self.folder / f"{self._started}.{name}" for name in ("out", "err"))
        words = [*map(str, args), "--json"]
        return Child(self, self._request(start=words, out=str(out), err=str(err)), out, err)

    def run(self, *args: object, code: int = 0) -> dict[str, Any]:
        """Run the command line, which must exit with `code`, and return its output."""
        child = self.start(*args)
        assert child.wait() == code, child.out.read_text() + child.err.read_text()
        return child.json()

    def shell(self, *command: object) -> int:
        """Exit code of a command run by the driver, with its mounts."""
        return self._request(shell=[*map(str, command)])

    def visible_path(self, path: Path) -> Path:
        """Path by which the test reaches `path` of the driver's mounts."""
        return Path(f"/proc/{self._process.pid}/root{path}") if self.mounts else path

    def close(self) -> None:
        """End the driver process."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@cache
def shared_driver() -> Driver:
    """The driver of all tests of a session."""
    # A TemporaryDirectory goes when a forked child drops the exit handler that holds it.
    folder = Path(tempfile.mkdtemp(prefix="residua-driver-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    driver = Driver(folder)
    atexit.register(driver.close)
    return driver


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until `condition()` is true; fails the test after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.001)


def drive() -> None:
    """Main function of the driver: answer requests until standard input ends."""
    import importlib

    for name in MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    running: set[int] = set()
    for line in sys.stdin:
        print(json.dumps(_handle_request(json.loads(line), running)), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _handle_request(question: dict[str, Any], running: set[int]) -> int | None:
    if "shell" in question:
        return subprocess.run(question["shell"], stdout=subprocess.DEVNULL).returncode
    if "poll" in question:
        pid, status = os.waitpid(question["poll"], os.WNOHANG)
        running.discard(pid)
        return os.waitstatus_to_exitcode(status) if pid else None
    pid = os.fork()
    if pid == 0:
        _run_command_line(**question)
    running.add(pid)
    return pid


def _run_command_line(start: list[str], out: str, err: str) -> None:
    """Become the command line `start`; never returns."""
    from residua.cli import main

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    code: Any = 1
    try:
        main(start)
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    drive()

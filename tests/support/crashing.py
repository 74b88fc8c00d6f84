"""Command lines of residua in processes that may be killed: one driver imports all, then forks.

As a script it is the driver, which answers one JSON line per line: {"start": arguments, "out",
"err"} with a process id, {"poll": id} with its exit status, {"shell": command} with an exit code.
Where the system allows it the driver has mounts of its own, which `Driver.see` looks into.
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
    "datasets", "fsspec", "numcodecs.zstd", "rich.progress", "safetensors.numpy",
    "safetensors.torch", "torch", "transformers", "transformers.models.gpt_neox.modeling_gpt_neox",
    "zarr", "residua.cli", "residua.analysis.console.terminal", "residua.cache.checks.model_checks",
    "residua.cache.extraction.answer_request",
    "residua.cache.forward.kept_logits", "residua.cache.model.load_model",
    "residua.cache.checks.compression_ratio",
    "residua.cache.store.activation_cache",
)  # fmt: skip


@dataclass
class Child:
    """A process that runs one command line."""

    driver: "Driver"
    pid: int
    out: Path
    err: Path
    code: int | None = None
    """Exit code once it ended, negative for a signal."""

    def ended(self) -> bool:
        if self.code is None:
            self.code = self.driver.ask(poll=self.pid)
        return self.code is not None

    def signal(self, number: signal.Signals) -> None:
        if not self.ended():
            os.kill(self.pid, number)

    def wait(self, seconds: float = 180) -> int:
        """The exit code; fails the test if there is none after `seconds`."""
        wait_until(self.ended, seconds)
        assert self.code is not None
        return self.code

    def kill(self) -> bool:
        """SIGKILL; False if the process had ended by itself."""
        self.signal(signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def json(self) -> dict[str, Any]:
        """What it printed."""
        return json.loads(self.out.read_text())


class Driver:
    """The driver process, from the side of the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mounts = subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
        """Whether `shell` can mount."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [*(UNSHARE if self.mounts else ()), sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._started = 0
        self.shell("true")  # answered when all is imported

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *args: object) -> Child:
        """Run `residua` with `args`, `--json` added."""
        self._started += 1
        out, err = (self.folder / f"{self._started}.{name}" for name in ("out", "err"))
        words = [*map(str, args), "--json"]
        return Child(self, self.ask(start=words, out=str(out), err=str(err)), out, err)

    def run(self, *args: object, code: int = 0) -> dict[str, Any]:
        """Run `residua` to its end, which must be `code`; what it printed."""
        child = self.start(*args)
        assert child.wait() == code, child.out.read_text() + child.err.read_text()
        return child.json()

    def shell(self, *command: object) -> int:
        return self.ask(shell=[*map(str, command)])

    def see(self, path: Path) -> Path:
        """`path` with the driver's mounts."""
        return Path(f"/proc/{self._process.pid}/root{path}") if self.mounts else path

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@cache
def shared_driver() -> Driver:
    """One driver for all tests of a session: importing everything takes seconds."""
    # A TemporaryDirectory goes when a forked child drops the exit handler that holds it.
    folder = Path(tempfile.mkdtemp(prefix="residua-driver-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    driver = Driver(folder)
    atexit.register(driver.close)
    return driver


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for `condition`, looking every millisecond."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.001)


def drive() -> None:
    """Answer questions until there are no more."""
    import importlib

    for name in MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    running: set[int] = set()
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), running)), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _answer(question: dict[str, Any], running: set[int]) -> int | None:
    if "shell" in question:
        return subprocess.run(question["shell"], stdout=subprocess.DEVNULL).returncode
    if "poll" in question:
        pid, status = os.waitpid(question["poll"], os.WNOHANG)
        running.discard(pid)
        return os.waitstatus_to_exitcode(status) if pid else None
    pid = os.fork()
    if pid == 0:
        _child(**question)
    running.add(pid)
    return pid


def _child(start: list[str], out: str, err: str) -> None:
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

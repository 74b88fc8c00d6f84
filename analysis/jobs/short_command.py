"""Commands that answer within a request: a process of their own, and no job that is kept.

Such are `extract --find`, `du`, `gc` and `pin`: their answer holds for the moment, so that asking
again is another request. Value, text and errors are those of the command line, as of a job.
"""

import asyncio
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...cache.errors import LimitError, ResiduaError
from .job_attempt import AttemptOrder, job_environment
from .job_files import JobFolder

MOST_AT_ONCE = 2
"""Short commands that run at the same time, in one service; others wait."""
_RUNNING = asyncio.Semaphore(MOST_AT_ONCE)


async def run_short_command(words: list[str], uses_hub: bool, seconds: float) -> dict[str, Any]:
    """Run `residua` with these words; returns `{"value", "text", "error", "exit_code"}`.

    Raises `LimitError` if that takes more than `seconds`, and `ResiduaError` if the process ends
    without a result.
    """
    async with _RUNNING:
        with tempfile.TemporaryDirectory(prefix="residua-command-") as name:
            folder = JobFolder(Path(name))
            attempt = folder.attempt_path(1)
            attempt.mkdir(parents=True)
            order = AttemptOrder(
                folder=name,
                round=1,
                session="",
                words=tuple(words),
                grace_seconds=0.0,
                threads=None,
                uses_hub=uses_hub,
            )
            await _run_process(words, job_environment(os.environ, order, attempt), seconds)
            result = folder.read_result(1)
    if result is None:
        raise ResiduaError(f"`residua {words[0]}` ended without a result")
    return result


async def _run_process(words: list[str], environment: dict[str, str], seconds: float) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-P", "-m", "residua", *words),
        env=environment,
        # Its end is the death of the service, which ends the command.
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(seconds):
            await process.wait()
    except TimeoutError:
        raise LimitError(f"`residua {words[0]}` took more than {seconds:.0f} seconds") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if process.stdin is not None:
            process.stdin.close()

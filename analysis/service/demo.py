"""Jobs of `residua serve --demo`: a cache of the sample model, its probes, their evaluation."""

import threading
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...cache.errors import ResiduaError
from ...sample import MODEL_DIR, TEXT_PATH
from ..console.quickstart import CONTEXT, check_transformers
from ..jobs.job_queue import JobQueue
from ..web.service_settings import ServiceSettings

LOOK_SECONDS = 0.5
LAYERS = "1-4"
LENS_STEPS = 60
BASIS_POSITIONS = 2048
MAX_TOKENS = 60_000


def allow_sample(settings: ServiceSettings) -> ServiceSettings:
    """`settings` whose jobs may read the sample model and its text, too.

    Raises `UsageError` if transformers is too old for the sample model.
    """
    check_transformers(version("transformers"))
    folders = tuple({MODEL_DIR.parent.resolve(), TEXT_PATH.parent.resolve()})
    return replace(
        settings,
        models=tuple(dict.fromkeys((*settings.models, *folders))),
        texts=tuple(dict.fromkeys((*settings.texts, *folders))),
    )


def start_demo(queue: JobQueue) -> threading.Thread:
    """Ask for the jobs of the demo one after the other, in a thread; those done stay done."""
    thread = threading.Thread(target=_run, args=(queue,), daemon=True, name="demo")
    thread.start()
    return thread


def _run(queue: JobQueue) -> None:
    steps = demo_requests()
    value: Any = None
    # A service that stops takes no more jobs; the next start asks for the rest.
    with suppress(ResiduaError, OSError):
        while True:
            try:
                command, arguments = steps.send(value)
            except StopIteration:
                return
            job, _ = queue.submit(command, arguments)
            while job["state"] in ("queued", "running"):
                time.sleep(LOOK_SECONDS)
                job = queue.find(job["id"])
            if job["state"] != "done":
                return
            value = job["value"]


def demo_requests() -> Generator[tuple[str, dict[str, Any]], Any, None]:
    """Command and arguments of one job after the other; is sent the value of each."""
    extraction = yield (
        "extract",
        {
            "model": str(MODEL_DIR.resolve()),
            "data": str(TEXT_PATH.resolve()),
            "context": CONTEXT,
            "max_tokens": MAX_TOKENS,
        },
    )
    cache = extraction["cache"]
    ridge = yield "fit ridge", {"cache": cache, "offsets": "0-3"}
    lens = yield "fit lens", {"cache": cache, "steps": LENS_STEPS}
    probes = [Path(fitted["probe"]).name for fitted in (ridge, lens)]
    yield "evaluate", {"cache": cache, "probes": ["logit", *probes], "html": "report.html"}
    yield (
        "fit basis",
        {
            "cache": cache,
            "lens": probes[1],
            "layers": LAYERS,
            "positions": BASIS_POSITIONS,
            "test_positions": BASIS_POSITIONS,
        },
    )

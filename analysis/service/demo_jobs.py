"""What `residua serve --demo` shows: a cache of the sample model, probes, a basis, measures.

`start_demo` asks the service's own queue for the jobs, one after the other, so that a newcomer sees
them run; on a second start all of them are done already.
"""

import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...sample import MODEL_DIR, TEXT_PATH
from ..jobs.job_queue import JobQueue
from ..web.service_settings import ServiceSettings

CONTEXT = 256
MAX_TOKENS = 20_000
LAYERS = "2-5"
"""Layers of the basis and of the tuned lens."""
QUICK_LENS = {"steps": 100, "lr": 0.05}
"""Options of a tuned lens that is fitted in seconds, before its KL stops falling."""
QUICK_STUDY = {"max_positions": 2048, "transfer_positions": 256}
"""Options of a study that takes seconds."""
POLL_SECONDS = 0.3
"""Pause between two looks at the running job."""

JobStep = tuple[str, dict[str, Any]]
"""Words of a command, and its arguments."""


def demo_settings(settings: ServiceSettings) -> ServiceSettings:
    """`settings` that also allow jobs on the sample model and its text.

    Raises `UsageError` if the installed transformers cannot load the model.
    """
    # It imports torch, which a service without the demo can do without.
    from ..console.quickstart import check_transformers

    check_transformers(version("transformers"))
    models = (*settings.models, MODEL_DIR.parent.resolve())
    return replace(settings, models=models, texts=(*settings.texts, TEXT_PATH.parent.resolve()))


def list_demo_steps() -> Generator[JobStep, Any, None]:
    """The jobs of the demo in their order; each is sent what the job before it printed.

    The quick ones come first: a map and curves are there in half a minute.
    """
    extraction = yield (
        "extract",
        {
            "model": str(MODEL_DIR),
            "data": str(TEXT_PATH),
            "context": CONTEXT,
            "max_tokens": MAX_TOKENS,
        },
    )
    cache = extraction["cache"]
    ridge = yield "fit ridge", {"cache": cache, "offsets": "0-3"}
    ridge_name = Path(ridge["probe"]).name
    yield "evaluate", {"cache": cache, "probes": [ridge_name]}
    yield (
        "fit basis",
        {"cache": cache, "lens": ridge_name, "layers": LAYERS, "k": 8, "positions": 2048},
    )
    lens = yield "fit lens", {"cache": cache, "layers": LAYERS, **QUICK_LENS}
    lenses = [ridge_name, Path(lens["probe"]).name]
    yield "study tuned-lens", {"cache": cache, "probes": lenses, **QUICK_STUDY}
    yield "evaluate", {"cache": cache, "probes": lenses}


def start_demo(jobs: JobQueue, tell: Callable[[str], None]) -> threading.Event:
    """Run the jobs of the demo in a thread; returns the event that ends it early.

    `tell` is called with a sentence on a job that failed, and once all are done.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_run_steps, args=(jobs, tell, stop), daemon=True)
    thread.start()
    return stop


def _run_steps(jobs: JobQueue, tell: Callable[[str], None], stop: threading.Event) -> None:
    steps = list_demo_steps()
    value: Any = None
    while True:
        try:
            command, arguments = steps.send(value)
        except StopIteration:
            tell("the demo is complete")
            return
        try:
            job, _ = jobs.submit(command, arguments)
            while not jobs.has_ended(job["id"]):
                if stop.wait(POLL_SECONDS):
                    return
            job = jobs.find(job["id"])
        except Exception as error:
            tell(f"the demo ends: {error}")
            return
        value = job["value"]
        if value is None:
            tell(f"the demo ends, as its {command} {job['state']}")
            return

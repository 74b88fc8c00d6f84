"""Services for tests: in a thread of the test's process, at a free port of the loopback address."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from residua.analysis.service.server import ServiceServer
from residua.analysis.web.service_settings import ServiceSettings, default_state

STOP_SECONDS = 30


@contextmanager
def running_service(
    root: Path, public: bool = False, jobs: bool = False, **settings: Any
) -> Iterator[ServiceServer]:
    """A service of `root` that answers within the context: `.address`, `.service.tokens.write`.

    With `jobs` it has a worker process and takes jobs.
    """
    settings.setdefault("state", default_state(root))
    ready = threading.Event()
    server = ServiceServer(
        ServiceSettings(root=root, **settings),
        public,
        lambda service, address: ready.set(),
        read_only=not jobs,
    )
    thread = threading.Thread(target=server.serve_until_told, name="service", daemon=True)
    thread.start()
    try:
        assert ready.wait(STOP_SECONDS), "the service did not start"
        while not server.started:
            time.sleep(0.005)
        yield server
    finally:
        server.stop()
        thread.join(STOP_SECONDS)
        assert not thread.is_alive(), "the service did not stop"

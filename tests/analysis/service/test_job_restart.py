"""A server that is killed in the middle of a job goes on with it, and so does its client."""

import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

import residua

from ...support.jobs import TOKEN, free_port, service_process, wait_for


@pytest.mark.slow
def test_a_killed_server_goes_on_and_its_client_with_it(
    tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    root, port = tmp_path / "root", free_port()
    root.mkdir()
    shutil.copytree(tiny_cache.path, root / tiny_cache.id)
    arguments = {"cache": tiny_cache.id, "layers": "1", "lr": "1e-5", "epochs": 3000}
    arguments["checkpoint_seconds"] = "1"
    found: list[Any] = []
    with service_process(root, "--port", port) as (address, process):
        service = residua.connect(address, TOKEN)
        client = threading.Thread(
            target=lambda: found.append(service.run("fit vocab", arguments, progress=None)),
            daemon=True,
        )
        client.start()
        job = wait_for(lambda: next((job["id"] for job in service.jobs() if job["progress"]), None))
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        # No process of the dead server stays: the job's own ends with its worker.
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert alive == []
    with service_process(root, "--port", port):
        client.join(240)
        assert not client.is_alive()
        ended = service.job(job)
        assert (ended["state"], ended["attempts"]) == ("done", 2)
        assert found == [ended["value"]]
        numbers = [event["id"] for event in read_numbers(root, job)]
        assert numbers == sorted(set(numbers))
        service.close()


def read_numbers(root: Path, job: str) -> list[dict[str, Any]]:
    """Events of a job, as they lie on disk."""
    import json

    path = root / ".service" / "jobs" / job / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]

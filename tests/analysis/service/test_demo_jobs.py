"""The demo's jobs run one after the other, and give every view of the dashboard something."""

import threading
from pathlib import Path

import httpx
import pytest

from residua.analysis.service.demo_jobs import demo_settings, list_demo_steps, start_demo
from residua.analysis.web.service_settings import ServiceSettings

from ...support.services import running_service


def test_each_job_of_the_demo_names_what_the_one_before_made() -> None:
    steps = list_demo_steps()
    command, arguments = next(steps)
    assert command == "extract"
    assert Path(arguments["model"]).is_dir()
    assert Path(arguments["data"]).is_file()
    seen = []
    values = {"extract": {"cache": "0123"}, "fit ridge": {"probe": "/r/ridge-1"}}
    values |= {"fit lens": {"probe": "/r/lens-1"}, "fit basis": {"probe": "/r/basis-1"}}
    while True:
        try:
            command, arguments = steps.send(values.get(command, {}))
        except StopIteration:
            break
        assert arguments["cache"] == "0123"
        seen.append((command, arguments.get("probes", arguments.get("lens"))))
    assert ("evaluate", ["ridge-1"]) in seen
    assert ("fit basis", "ridge-1") in seen
    assert ("study tuned-lens", ["ridge-1", "lens-1"]) in seen
    assert seen[-1] == ("evaluate", ["ridge-1", "lens-1"])


@pytest.mark.slow
def test_the_demo_gives_every_view_something(tmp_path: Path) -> None:
    settings = demo_settings(ServiceSettings(root=tmp_path, state=tmp_path / ".service"))
    with running_service(
        tmp_path, jobs=True, models=settings.models, texts=settings.texts
    ) as server:
        assert server.service.jobs is not None
        told: list[str] = []
        ended = threading.Event()
        start_demo(server.service.jobs, lambda text: told.append(text) or ended.set())
        assert ended.wait(1800)
        assert told == ["the demo is complete"]
        jobs = httpx.get(f"{server.address}/v1/jobs", timeout=30).json()["jobs"]
        assert {job["state"] for job in jobs} == {"done"}, [job["error"] for job in jobs]
        assert len(jobs) == 7
        evaluations = httpx.get(f"{server.address}/v1/evaluations", timeout=30).json()
        assert [len(entry["probes"]) for entry in evaluations["evaluations"]] == [4, 3]
        probes = httpx.get(f"{server.address}/v1/probes", timeout=30).json()["probes"]
        assert {probe["kind"] for probe in probes} == {"ridge", "lens", "basis"}

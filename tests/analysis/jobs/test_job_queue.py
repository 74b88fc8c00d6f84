"""Jobs run in processes on real workers; killed workers, schedulers and servers lose none."""

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

import residua
from residua.analysis.jobs.job_files import JobFolder
from residua.analysis.jobs.job_queue import JobQueue
from residua.analysis.jobs.job_settings import JobSettings
from residua.analysis.jobs.job_workers import JobWorkers
from residua.cache.errors import LimitError, NotFoundError

from ...support.jobs import (
    ENDLESS,
    attempt_folders,
    free_port,
    kill_worker,
    process_of,
    running_process,
    running_queue,
    wait_for,
    wait_for_end,
    wait_for_work,
)

RIDGE = {"offsets": "0-1", "keep_moments": False}
VOCAB = {"layers": "1", "lr": "1e-5", "epochs": 25, "checkpoint_seconds": 1}
"""A fit of some seconds."""


@pytest.fixture
def settings(tiny_cache: residua.ActivationCache, tmp_path: Path) -> JobSettings:
    """Settings with a root that has the cache, and nothing else."""
    root = tmp_path / "root"
    root.mkdir()
    (root / tiny_cache.id).symlink_to(tiny_cache.path)
    return JobSettings(root=root, state=root / ".service", gpus=0, grace_seconds=10, threads=1)


@pytest.fixture
def queue(settings: JobSettings) -> Iterator[JobQueue]:
    with running_queue(settings) as running:
        yield running


def states_of(queue: JobQueue, job: str) -> list[str]:
    """States of a job, in the order of its events."""
    events = queue.events(job).read_new()
    states = [event.data["state"] for event in events if event.kind == "state"]
    return [s for number, s in enumerate(states) if not number or s != states[number - 1]]


@pytest.mark.slow
def test_a_job_gives_what_the_command_prints(
    queue: JobQueue, settings: JobSettings, tiny_cache: residua.ActivationCache
) -> None:
    arguments = {"cache": tiny_cache.id[:8], **RIDGE}
    job, is_new = queue.submit("fit ridge", arguments)
    assert is_new
    assert queue.submit("fit ridge", {**arguments, "offsets": [0, 1]})[1] is False
    ended = wait_for_end(queue, job["id"])
    assert ended["state"] == "done", ended
    assert ended["exit_code"] == 0
    assert ended["progress"][0]["done"] == ended["progress"][0]["total"] > 0
    assert states_of(queue, job["id"]) == ["queued", "running", "done"]
    command = ["fit", "ridge", tiny_cache.id, "--offsets", "0-1", "--no-keep-moments"]
    for more, printed in (([], ended["text"]), (["--json"], json.dumps(ended["value"]) + "\n")):
        with running_process(
            "-m", "residua", *command, "--root", settings.root, *more, OMP_NUM_THREADS="1"
        ) as process:
            assert process.communicate(timeout=120)[0] == printed

    # The same again is the same job, unless its result is gone.
    same, is_new = queue.submit("fit ridge", arguments)
    assert (same["id"], same["state"], is_new) == (job["id"], "done", False)
    residua.load_probe(ended["value"]["probe"])
    for path in Path(ended["value"]["probe"]).iterdir():
        path.unlink()
    Path(ended["value"]["probe"]).rmdir()
    assert queue.submit("fit ridge", arguments)[0]["state"] == "queued"
    assert wait_for_end(queue, job["id"])["attempts"] == 2


@pytest.mark.slow
def test_a_command_that_fails_is_a_failed_job_with_its_message(
    queue: JobQueue, tiny_cache: residua.ActivationCache
) -> None:
    arguments = {"cache": tiny_cache.id, "alpha": -1.0}
    job = queue.submit("fit ridge", arguments)[0]
    ended = wait_for_end(queue, job["id"])
    assert (ended["state"], ended["exit_code"]) == ("failed", 2)
    assert ended["error"]["error"] == "UsageError"
    assert "penalties" in ended["error"]["message"]
    assert ended["value"] is None
    again, is_new = queue.submit("fit ridge", arguments)
    assert (again["state"], is_new) == ("queued", False)
    assert wait_for_end(queue, job["id"])["attempts"] == 2


@pytest.mark.slow
def test_two_equal_simultaneous_requests_of_two_servers_are_one_job(
    settings: JobSettings, tiny_cache: residua.ActivationCache
) -> None:
    arguments = {"cache": tiny_cache.id, **RIDGE}
    answers: list[tuple[dict[str, Any], bool]] = []
    with running_queue(settings) as one, running_queue(settings) as other:
        barrier = threading.Barrier(6)

        def ask(queue: JobQueue) -> None:
            barrier.wait()
            answers.append(queue.submit("fit ridge", arguments))

        threads = [threading.Thread(target=ask, args=(q,)) for q in (one, other) * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 6
        assert sum(is_new for _, is_new in answers) == 1
        (job,) = {view["id"] for view, _ in answers}
        assert wait_for_end(one, job)["state"] == "done"
        assert wait_for_end(other, job)["state"] == "done"
        assert len(attempt_folders(one, job)) == 1


@pytest.mark.slow
def test_a_killed_worker_costs_an_attempt_and_the_job_is_done(
    queue: JobQueue, tiny_cache: residua.ActivationCache
) -> None:
    job = queue.submit("fit vocab", {"cache": tiny_cache.id, **VOCAB})[0]["id"]
    folder = wait_for_work(queue, job)
    process = process_of(folder)
    kill_worker(folder)
    ended = wait_for_end(queue, job)
    assert ended["state"] == "done", ended
    assert ended["attempts"] == 2
    assert not process.is_running()
    events = [event.data for event in queue.events(job).read_new() if event.kind == "state"]
    assert any("its worker died; tries again (1 of 3)" in str(data["message"]) for data in events)


@pytest.mark.slow
def test_a_job_that_dies_thrice_fails_with_a_clear_end(
    queue: JobQueue, tiny_cache: residua.ActivationCache
) -> None:
    job = queue.submit("fit vocab", {"cache": tiny_cache.id, **ENDLESS})[0]["id"]
    for attempt in (1, 2, 3):
        process_of(wait_for_work(queue, job, attempt)).kill()
    ended = wait_for_end(queue, job)
    assert (ended["state"], ended["exit_code"], ended["attempts"]) == ("failed", 1, 3)
    message = ended["error"]["message"]
    assert "died 3 times" in message
    assert "signal 9 (SIGKILL: out of memory?)" in message
    assert queue.count_states() == {"queued": 0, "running": 0}


@pytest.mark.slow
def test_a_cancelled_job_ends_and_the_next_runs(
    queue: JobQueue, tiny_cache: residua.ActivationCache
) -> None:
    endless = queue.submit("fit vocab", {"cache": tiny_cache.id, **ENDLESS})[0]["id"]
    waiting = queue.submit("fit ridge", {"cache": tiny_cache.id, **RIDGE})[0]["id"]
    unwanted = queue.submit("fit ridge", {"cache": tiny_cache.id, "offsets": "5"})[0]["id"]
    assert queue.cancel(unwanted)["state"] == "cancelled"
    folder = wait_for_work(queue, endless)
    process = process_of(folder)
    assert queue.find(waiting)["state"] == "queued"
    queue.cancel(endless[:10])
    ended = wait_for_end(queue, endless)
    assert (ended["state"], ended["exit_code"]) == ("cancelled", 130)
    assert not process.is_running()
    assert wait_for_end(queue, waiting)["state"] == "done"
    assert attempt_folders(queue, unwanted) == []
    # A cancelled job runs again when it is asked for again.
    assert queue.submit("fit vocab", {"cache": tiny_cache.id, **ENDLESS})[0]["state"] == "queued"
    wait_for_work(queue, endless, 2)
    queue.cancel(endless)
    assert wait_for_end(queue, endless)["state"] == "cancelled"


@pytest.mark.slow
def test_a_stopped_queue_goes_on_where_it_was(
    settings: JobSettings, tiny_cache: residua.ActivationCache
) -> None:
    with running_queue(settings) as queue:
        job = queue.submit("fit vocab", {"cache": tiny_cache.id, **VOCAB})[0]["id"]
        waiting = queue.submit("fit ridge", {"cache": tiny_cache.id, **RIDGE})[0]["id"]
        process = process_of(wait_for_work(queue, job))
    assert not process.is_running()
    assert queue.find(job)["state"] == "queued"
    with pytest.raises(LimitError, match="stopping"):
        queue.submit("fit ridge", {"cache": tiny_cache.id, "offsets": "7"})
    with running_queue(settings) as queue:
        ended = wait_for_end(queue, job)
        assert (ended["state"], ended["attempts"]) == ("done", 2)
        assert wait_for_end(queue, waiting)["state"] == "done"
        numbers = [event.number for event in queue.events(job).read_new()]
        assert numbers == sorted(set(numbers))


@pytest.mark.slow
def test_a_scheduler_that_vanishes_is_waited_for(
    settings: JobSettings, tiny_cache: residua.ActivationCache
) -> None:
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    settings = replace(settings, scheduler=address)
    scheduler = ("-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port)
    worker = ("-m", "distributed.cli.dask_worker", address, "--nthreads", 1, "--no-dashboard")
    with running_queue(settings) as queue:
        job = queue.submit("fit vocab", {"cache": tiny_cache.id, **VOCAB})[0]["id"]
        wait_for(lambda: address in (queue.find(job)["message"] or ""))
        with running_process(*scheduler, "--no-dashboard"), running_process(*worker):
            wait_for_work(queue, job)
        message = wait_for(lambda: queue.find(job)["message"])
        assert "scheduler" in message or "worker" in message
        with running_process(*scheduler, "--no-dashboard"), running_process(*worker):
            ended = wait_for_end(queue, job)
    assert ended["state"] == "done", ended
    assert ended["attempts"] == 2


@pytest.mark.slow
def test_a_full_disk_is_the_end_of_a_job_with_its_name(
    settings: JobSettings, tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system")
    try:
        with running_queue(replace(settings, state=disk / "state")) as queue:
            job = queue.submit("fit vocab", {"cache": tiny_cache.id, **ENDLESS})[0]["id"]
            process = process_of(wait_for_work(queue, job))
            ballast = disk / "ballast"
            with pytest.raises(OSError, match="No space"), ballast.open("wb", 0) as file:
                file.writelines(repeat(bytes(4096)))
            process.send_signal(signal.SIGKILL)
            view = wait_for(lambda: v if "No space" in str(v := queue.find(job)) else None)
            assert view["state"] in ("queued", "running", "failed")
            ballast.unlink()
            assert wait_for(lambda: queue.find(job)["state"] in ("running", "failed"))
            queue.cancel(job)
            wait_for_end(queue, job)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_gpu_is_kept_for_the_work_that_runs_the_model(settings: JobSettings) -> None:
    workers = JobWorkers(settings)
    workers._resources = {"a": {"GPU": 1.0}, "b": {}, "c": {}}
    assert workers.idle_worker(set(), prefers_gpu=True) == "a"
    assert workers.idle_worker({"a"}, prefers_gpu=True) is None
    assert workers.idle_worker(set(), prefers_gpu=False) == "b"
    assert workers.idle_worker({"b"}, prefers_gpu=False) == "c"
    workers._resources = {"b": {}}
    assert workers.idle_worker(set(), prefers_gpu=True) == "b"
    workers._resources = {"a": {"GPU": 1.0}}
    assert workers.idle_worker(set(), prefers_gpu=False) == "a"


@pytest.mark.slow
def test_an_extraction_runs_on_the_worker_with_a_gpu(
    settings: JobSettings,
    tiny_cache: residua.ActivationCache,
    model_folder: Path,
    texts_file: Path,
) -> None:
    folders = {"models": (model_folder.parent,), "texts": (texts_file.parent,)}
    with running_queue(replace(settings, gpus=1, **folders)) as queue:
        wait_for(lambda: queue.is_ready)
        arguments = {"model": model_folder.name, "data": texts_file.name, "device": "cpu"}
        extraction = queue.submit("extract", {**arguments, "context": 16, "max_tokens": 200})[0]
        fit = queue.submit("fit ridge", {"cache": tiny_cache.id, **RIDGE})[0]
        done = [wait_for_end(queue, job["id"]) for job in (extraction, fit)]
    assert [job["state"] for job in done] == ["done", "done"], done
    assert [job["worker"].split()[0] for job in done] == ["gpu-0", "cpu-0"]


def test_forged_files_of_a_job_are_an_error_of_that_job_alone(
    settings: JobSettings, tiny_cache: residua.ActivationCache
) -> None:
    queue = JobQueue(settings)
    queue.folder.mkdir(parents=True)
    job = queue.submit("fit ridge", {"cache": tiny_cache.id, **RIDGE})[0]["id"]
    forged = queue.folder / ("f" * 32)
    forged.mkdir()
    for name in ("request.json", "state.json"):
        (forged / name).write_text('{"state": "queued"}')
    link = queue.folder / ("e" * 32)
    link.mkdir()
    (link / "request.json").symlink_to("/etc/passwd")
    assert [view["id"] for view in queue.list_jobs()] == [job]
    assert JobFolder(forged).read_progress(1) == []
    with pytest.raises(NotFoundError, match="no job"):
        queue.find("0" * 32)
    with pytest.raises(NotFoundError):
        queue.find("../..")
    queue.stop()


def test_a_request_on_disk_is_checked_again(
    settings: JobSettings, tiny_cache: residua.ActivationCache
) -> None:
    """Whoever can write the state cannot make the server run another command."""
    from residua.cache.files.json_files import read_json, write_json

    queue = JobQueue(settings)
    queue.folder.mkdir(parents=True)
    job = queue.submit("fit ridge", {"cache": tiny_cache.id, **RIDGE})[0]["id"]
    queue.stop()
    path = queue.folder / job / "request.json"
    request = read_json(path)
    write_json(path, {**request, "arguments": {"cache": "/etc", "out": "/tmp/x"}})
    queue = JobQueue(settings)
    queue._adopt_orphans()
    view = queue.find(job)
    assert view["state"] == "failed"
    assert "a job takes no out" in view["error"]["message"]
    queue.stop()


def test_too_many_jobs_are_refused(
    settings: JobSettings, tiny_cache: residua.ActivationCache
) -> None:
    queue = JobQueue(replace(settings, most_waiting=2))
    queue.folder.mkdir(parents=True)
    for offset in (1, 2):
        queue.submit("fit ridge", {"cache": tiny_cache.id, "offsets": offset})
    with pytest.raises(LimitError, match="2 jobs wait or run"):
        queue.submit("fit ridge", {"cache": tiny_cache.id, "offsets": 3})
    assert queue.submit("fit ridge", {"cache": tiny_cache.id, "offsets": 1})[1] is False
    queue.stop()


def test_a_job_gets_no_token_of_the_server(tmp_path: Path) -> None:
    from residua.analysis.jobs.job_attempt import AttemptOrder, job_environment

    order = AttemptOrder(str(tmp_path), 1, "session", (), 1.0, threads=2)
    environment = {"PATH": "/bin", "RESIDUA_TOKEN": "x", "RESIDUA_SERVER": "y", "HF_TOKEN": "z"}
    made = job_environment(environment, order, tmp_path)
    assert made["PATH"] == "/bin"
    assert made["OMP_NUM_THREADS"] == "2"
    assert made["HF_HUB_OFFLINE"] == "1"
    assert not {"RESIDUA_TOKEN", "RESIDUA_SERVER", "HF_TOKEN"} & set(made)

"""Workers of a dask cluster share an extraction; those that die or fail are not missed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from distributed import Client, LocalCluster

import residua
from residua.cache import cluster as cluster_module
from residua.cache.errors import DataError, UsageError
from residua.cache.extraction import distributed
from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.distributed import answer_on_cluster
from residua.cache.extraction.request import ExtractionRequest
from residua.cli import main

from ...support.local import local_client
from .test_crash import array_files

SIZE: dict[str, Any] = {"context": 40, "part_positions": 128, "batch_tokens": 200}


@pytest.fixture(scope="module")
def cluster(private_folders: None) -> Iterator[Any]:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in dask's workers: another number of threads may change the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files_of_one_process(
    one_thread: None,
    model_folder: Path,
    texts_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, bytes]:
    """Files of a cache that one process made."""
    root = tmp_path_factory.mktemp("whole")
    answer_request(ExtractionRequest(str(model_folder), str(texts_file), root, **SIZE))
    return array_files(root)


def progress_that_kills(calls: int, client: Client, count: int) -> Any:
    """A progress callback that kills `count` workers once it was called often enough."""
    found: Any = client.run(os.getpid)
    pids = list(found.values())[:count]
    seen: list[tuple[str, int, int]] = []

    def progress(stage: str, extraction: int, total: int) -> None:
        seen.append((stage, extraction, total))
        if len(seen) == calls:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    return progress


@pytest.mark.slow
def test_workers_share_a_request_and_the_bytes_are_those_of_one_process(
    client: Client,
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
    files_of_one_process: dict[str, bytes],
) -> None:
    seen: list[tuple[str, int, int]] = []
    request = ExtractionRequest(str(model_folder), str(texts_file), tmp_path, **SIZE)
    extraction = answer_on_cluster(client, request, lambda *said: seen.append(said))
    assert extraction.status == "extracted"
    assert extraction.written == extraction.cache.positions
    assert array_files(tmp_path) == files_of_one_process
    assert seen == sorted(seen)
    assert seen[-1] == ("extract", extraction.cache.positions, extraction.cache.positions)
    assert extraction.stages.tokens >= extraction.cache.positions
    again = answer_on_cluster(client, request)
    assert (again.status, again.written) == ("hit", 0)
    cache = residua.extract(
        str(model_folder), str(texts_file), root=tmp_path, client=client, **SIZE
    )
    assert cache.id == extraction.cache.id


@pytest.mark.slow
def test_the_command_line_gives_the_work_to_a_scheduler(
    cluster: LocalCluster,
    client: Client,
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files_of_one_process: dict[str, bytes],
) -> None:
    monkeypatch.chdir(texts_file.parent)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    command = [
        "extract",
        str(model_folder),
        texts_file.name,
        "--root",
        str(tmp_path),
        *words,
        "--scheduler",
        cluster.scheduler_address,
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "extracted: cache" in result.stdout
    assert "bottleneck" in result.stdout
    assert array_files(tmp_path) == files_of_one_process


def test_a_mistake_is_the_error_it_is_without_a_cluster(
    client: Client, model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="does not exist"):
        answer_on_cluster(client, ExtractionRequest(str(model_folder), "missing.jsonl", tmp_path))
    with pytest.raises(UsageError, match="its workers share all parts"):
        answer_on_cluster(
            client, ExtractionRequest(str(model_folder), str(texts_file), tmp_path, part="1/2")
        )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("tcp://127.0.0.1:1", "no dask scheduler answers at tcp://127.0.0.1:1"),
        ("nonsense://host", "'nonsense://host' is no address"),
    ],
)
def test_no_scheduler_at_the_address_is_a_usage_error(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "ANSWER_SECONDS", 1)
    with pytest.raises(UsageError, match=message), cluster_module.connected(address):
        pass


def test_a_scheduler_without_workers_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "GRACE_SECONDS", 0.2)
    with (
        local_client(workers=0) as client,
        pytest.raises(UsageError, match="has no workers"),
    ):
        answer_on_cluster(client, ExtractionRequest("model", "data", tmp_path))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("count", "back"), [(1, False), (2, False), (2, True)])
def test_workers_that_die_are_replaced_by_others_or_by_the_driver(
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files_of_one_process: dict[str, bytes],
    count: int,
    back: bool,
) -> None:
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 10.0 if back else 0.2)
    monkeypatch.setattr(distributed, "POLL_SECONDS", 0.02)
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0")
    with cluster, Client(cluster, set_as_default=False) as client:
        progress = progress_that_kills(3, client, count)
        request = ExtractionRequest(str(model_folder), str(texts_file), tmp_path, **SIZE)
        extraction = answer_on_cluster(client, request, progress)
    assert extraction.cache.finished
    assert array_files(tmp_path) == files_of_one_process
    assert residua.verify(extraction.cache.path).ok

"""Jobs over HTTP: who may ask, what is refused, events by number, files, texts that are sent."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import residua
from residua.analysis.jobs.job_queue import JobQueue
from residua.analysis.jobs.job_settings import JobSettings
from residua.analysis.service.application import Service, make_application
from residua.analysis.web.access_tokens import load_tokens
from residua.analysis.web.service_settings import ServiceSettings


@pytest.fixture
def queue(tiny_cache: residua.ActivationCache, tmp_path: Path) -> Iterator[JobQueue]:
    """A queue without workers: its jobs wait."""
    root = tmp_path / "root"
    root.mkdir()
    (root / tiny_cache.id).symlink_to(tiny_cache.path)
    queue = JobQueue(JobSettings(root=root, state=tmp_path / "state", most_upload_bytes=10_000))
    queue.folder.mkdir(parents=True)
    yield queue
    queue.stop()


@pytest.fixture
def client(queue: JobQueue) -> Iterator[TestClient]:
    """A client with the token for writing."""
    settings = ServiceSettings(root=queue.settings.root, state=queue.settings.state)
    tokens = load_tokens(settings.state)
    application = make_application(Service(settings, tokens, queue))
    with TestClient(application, base_url="http://127.0.0.1") as client:
        client.headers["Authorization"] = f"Bearer {tokens.write}"
        yield client


def ridge(cache: residua.ActivationCache, **arguments: Any) -> dict[str, Any]:
    return {"command": "fit ridge", "arguments": {"cache": cache.id, **arguments}}


def test_asking_needs_the_token_and_reading_does_not(
    client: TestClient, tiny_cache: residua.ActivationCache
) -> None:
    job = client.post("/v1/jobs", json=ridge(tiny_cache)).json()["id"]
    del client.headers["Authorization"]
    assert client.post("/v1/jobs", json=ridge(tiny_cache)).status_code == 401
    assert client.post(f"/v1/jobs/{job}/cancel").status_code == 401
    assert client.put(f"/v1/texts/{'0' * 64}?name=a.txt", content=b"x").status_code == 401
    for path in ("/v1/jobs", f"/v1/jobs/{job}", f"/v1/jobs/{job}/log", "/v1/commands"):
        assert client.get(path).status_code == 200, path


def test_equal_requests_are_one_job_and_a_key_makes_another(
    client: TestClient, tiny_cache: residua.ActivationCache
) -> None:
    first = client.post("/v1/jobs", json=ridge(tiny_cache, offsets="0-1"))
    assert first.status_code == 201
    job = first.json()
    assert first.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["command"]) == ("queued", "fit ridge")
    again = client.post("/v1/jobs", json=ridge(tiny_cache, offsets=[0, 1], folds="5"))
    assert (again.status_code, again.json()["id"]) == (200, job["id"])
    key = {"Idempotency-Key": "mine"}
    other = client.post("/v1/jobs", json=ridge(tiny_cache, offsets="0-1"), headers=key)
    assert other.status_code == 201
    assert other.json()["id"] != job["id"]
    assert (
        client.post("/v1/jobs", json=ridge(tiny_cache, offsets="0-1"), headers=key).json()
        == other.json()
    )
    listed = client.get("/v1/jobs").json()["jobs"]
    assert {entry["id"] for entry in listed} == {job["id"], other.json()["id"]}
    # What a job says of its arguments can be asked for again.
    same = client.post("/v1/jobs", json={"command": "fit ridge", "arguments": job["arguments"]})
    assert same.json()["id"] == job["id"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "usage"),
        ({"command": "rm"}, 400, "usage"),
        ({"command": "fit ridge"}, 400, "usage"),
        ({"command": "fit ridge", "arguments": []}, 400, "usage"),
        ({"command": 3, "arguments": {}}, 400, "usage"),
        ({"command": "fit ridge", "arguments": {"cache": "zz"}}, 404, "not_found"),
        ({"command": "fit ridge", "arguments": {}, "root": "/"}, 400, "usage"),
    ],
)
def test_wrong_requests_are_answered_at_once(
    client: TestClient, body: dict[str, Any], status: int, code: str
) -> None:
    answer = client.post("/v1/jobs", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["exit_code"] == 2
    assert client.get("/v1/jobs").json()["jobs"] == []


def test_a_wrong_layer_has_the_message_of_the_command_line(
    client: TestClient, tiny_cache: residua.ActivationCache
) -> None:
    answer = client.post("/v1/jobs", json=ridge(tiny_cache, layers="99"))
    assert answer.status_code == 404
    assert answer.json()["message"] == "layer 99 is not in this cache; it holds 0-3"


def read_events(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Numbers, kinds and data of a stream of events."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "id" in fields:
            events.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return events


def test_events_go_on_after_the_last_that_the_client_has(
    client: TestClient, tiny_cache: residua.ActivationCache
) -> None:
    job = client.post("/v1/jobs", json=ridge(tiny_cache)).json()["id"]
    assert client.post(f"/v1/jobs/{job[:9]}/cancel").json()["state"] == "cancelled"
    stream = client.get(f"/v1/jobs/{job}/events")
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = read_events(stream.text)
    assert [(number, data["state"]) for number, _, data in events] == [
        (1, "queued"),
        (2, "cancelled"),
    ]
    for path, headers in (
        (f"/v1/jobs/{job}/events", {"Last-Event-ID": "1"}),
        (f"/v1/jobs/{job}/events?after=1", {}),
    ):
        rest = read_events(client.get(path, headers=headers).text)
        assert [number for number, _, _ in rest] == [2]
    done = client.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": "2"})
    assert (done.status_code, done.content) == (204, b"")
    odd = client.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": "x" * 30})
    assert len(read_events(odd.text)) == 2


def test_only_files_of_the_job_are_given(
    client: TestClient, queue: JobQueue, tiny_cache: residua.ActivationCache
) -> None:
    job = client.post("/v1/jobs", json=ridge(tiny_cache)).json()["id"]
    folder = queue.file_folder(job)
    (folder / "pictures").mkdir()
    (folder / "report.html").write_text("<p>report</p>")
    (folder / "pictures" / "kl.png").write_bytes(b"png")
    (folder / "link").symlink_to("/etc/passwd")
    (folder / ".hidden").write_text("x")
    page = client.get(f"/v1/jobs/{job}/files/report.html")
    assert page.text == "<p>report</p>"
    assert "sandbox" in page.headers["Content-Security-Policy"]
    assert client.get(f"/v1/jobs/{job}/files/pictures/kl.png").content == b"png"
    names = (
        "link", ".hidden", "nothing", "pictures", "../request.json", "%2e%2e/request.json",
        "..%2frequest.json", "/etc/passwd", "%2fetc%2fpasswd", "report.html/x", "a%00b",
    )  # fmt: skip
    for name in names:
        answer = client.get(f"/v1/jobs/{job}/files/{name}")
        assert answer.status_code in (400, 404), name
        assert "root:" not in answer.text


def test_a_text_is_sent_once(client: TestClient) -> None:
    text = b'{"text": "some words"}\n'
    path = f"/v1/texts/{hashlib.sha256(text).hexdigest()}?name=texts.jsonl"
    assert client.get(path).status_code == 404
    sent = client.put(path, content=text)
    assert sent.status_code == 201
    assert sent.json()["data"] == f"upload:{hashlib.sha256(text).hexdigest()}/texts.jsonl"
    assert client.put(path, content=b"").status_code == 200
    assert client.get(path).json() == sent.json()
    assert client.put(f"/v1/texts/{'0' * 64}?name=a.txt", content=text).status_code == 409
    assert client.put(f"/v1/texts/{'0' * 64}?name=..%2fa", content=text).status_code == 400
    assert client.put(f"/v1/texts/{'0' * 64}?name=a.txt", content=bytes(10_001)).status_code == 413


def test_a_service_that_only_reads_has_no_jobs(queue: JobQueue) -> None:
    settings = ServiceSettings(root=queue.settings.root, state=queue.settings.state)
    application = make_application(Service(settings, load_tokens(settings.state), None))
    with TestClient(application, base_url="http://127.0.0.1") as client:
        answer = client.get("/v1/jobs")
    assert (answer.status_code, answer.json()["code"]) == (503, "no_jobs")

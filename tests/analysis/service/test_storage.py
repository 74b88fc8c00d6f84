"""Disk use over HTTP: as the commands print it; what is named is left alone unless forced."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

import residua
from residua.analysis.service.server import ServiceServer
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import main
from residua.probes.saved.library import probe_path

from ...support.base_install import run_base_install
from ...support.services import running_service


@pytest.fixture
def root(tiny_cache: ActivationCache, tmp_path: Path) -> Path:
    """A root with a cache, a probe of it, and a leftover."""
    root = tmp_path / "root"
    without_moments = shutil.ignore_patterns("moments")
    shutil.copytree(tiny_cache.path, root / tiny_cache.id, ignore=without_moments)
    probe = residua.RidgeProbe([0], layers=[1]).fit(ActivationCache(root / tiny_cache.id))
    residua.save_probe(probe, probe_path(root, probe))
    (root / f".new-{'0' * 32}").mkdir()
    (root / f".new-{'0' * 32}" / "rows").write_bytes(b"rows")
    return root


@pytest.fixture
def server(root: Path) -> Any:
    with running_service(root) as running:
        yield running


def ask(server: ServiceServer, method: str, path: str, body: Any = None, **options: Any) -> Any:
    """The answer to a request with the token that may write."""
    headers = {"Authorization": f"Bearer {server.service.tokens.write}"}
    url = server.address + path
    return httpx.request(method, url, json=body, headers=headers, timeout=60, **options)


def test_the_report_is_that_of_the_command(server: ServiceServer, root: Path) -> None:
    report = httpx.get(f"{server.address}/v1/disk", timeout=60).json()
    printed = CliRunner().invoke(main, ["du", "--root", str(root), "--json"])
    assert report.pop("pins") == []
    assert report.pop("free") > 0
    assert report == json.loads(printed.output)
    kinds = {item["kind"] for item in report["items"]}
    assert {"cache", "moments", "probe", "leftover", "service"} <= kinds
    assert report["would_free"]["leftovers"] == 4


def test_collection_only_says_what_would_go_unless_told(server: ServiceServer, root: Path) -> None:
    plan = ask(server, "POST", "/v1/disk/collect", {}).json()
    assert (plan["removed"], plan["freed"], len(plan["items"])) == (False, 4, 1)
    assert (root / f".new-{'0' * 32}").is_dir()
    done = ask(server, "POST", "/v1/disk/collect", {"dry_run": False}).json()
    assert (done["removed"], done["freed"]) == (True, 4)
    assert not (root / f".new-{'0' * 32}").exists()
    body = {"categories": ["unused-caches", "moments"], "older_than": 0, "dry_run": False}
    answer = ask(server, "POST", "/v1/disk/collect", body).json()
    assert [item["kind"] for item in answer["items"]] == ["moments"]
    assert "named by probe ridge-" in answer["kept"][0]["reason"]
    assert residua.verify(next(root.glob("[0-9a-f]*"))).ok


@pytest.mark.parametrize(
    "body",
    [
        {"categories": ["everything"]},
        {"categories": []},
        {"categories": "moments"},
        {"older_than": -1},
        {"older_than": "30d"},
        {"dry_run": 0},
        {"force": True},
        [],
    ],
)
def test_wrong_bodies_remove_nothing(server: ServiceServer, root: Path, body: Any) -> None:
    answer = ask(server, "POST", "/v1/disk/collect", body)
    assert (answer.status_code, answer.json()["code"]) == (400, "usage")
    assert (root / f".new-{'0' * 32}").is_dir()


def test_writing_needs_the_token(server: ServiceServer, root: Path) -> None:
    name = next(root.glob("[0-9a-f]*")).name
    for method, path in (
        ("POST", "/v1/disk/collect"),
        ("PUT", f"/v1/pins/{name}"),
        ("DELETE", f"/v1/pins/{name}"),
        ("DELETE", f"/v1/caches/{name}"),
        ("DELETE", "/v1/probes/ridge"),
    ):
        answer = httpx.request(method, server.address + path, timeout=60)
        assert answer.status_code == 401, path
    assert (root / name).is_dir()


def test_what_is_named_is_removed_only_by_force(server: ServiceServer, root: Path) -> None:
    name = next(root.glob("[0-9a-f]*")).name
    refused = ask(server, "DELETE", f"/v1/caches/{name[:12]}")
    assert (refused.status_code, refused.json()["code"]) == (409, "in_use")
    assert "still named by probe ridge-" in refused.json()["message"]
    probe = httpx.get(f"{server.address}/v1/probes", timeout=60).json()["probes"][0]["probe"]
    assert ask(server, "PUT", f"/v1/pins/{probe}", {"reason": "mine"}).json()["reason"] == "mine"
    refused = ask(server, "DELETE", f"/v1/probes/{probe}")
    assert refused.status_code == 409
    assert "a pin (mine)" in refused.json()["message"]
    assert httpx.get(f"{server.address}/v1/disk", timeout=60).json()["pins"][0]["name"] == probe
    assert ask(server, "DELETE", f"/v1/pins/{probe}").json()["kind"] == "probe"
    assert ask(server, "DELETE", f"/v1/pins/{probe}").status_code == 404
    removed = ask(server, "DELETE", f"/v1/caches/{name}?force=true").json()
    assert removed["named_by"][0]["name"] == probe
    assert httpx.get(f"{server.address}/v1/caches", timeout=60).json()["caches"] == []
    assert ask(server, "DELETE", f"/v1/probes/{probe}").status_code == 200
    assert httpx.get(f"{server.address}/v1/probes", timeout=60).json()["probes"] == []
    assert ask(server, "DELETE", f"/v1/caches/{name}").status_code == 404


def test_nothing_outside_the_root_can_be_named(
    server: ServiceServer, tiny_cache: ActivationCache, root: Path
) -> None:
    for path in (f"/v1/caches/{tiny_cache.path}", f"/v1/caches/..%2f{root.name}", "/v1/probes/.."):
        assert ask(server, "DELETE", f"{path}?force=true").status_code in (400, 404)
    assert ask(server, "PUT", "/v1/pins/..%2fother", {}).status_code in (400, 404)
    assert residua.verify(tiny_cache.path).ok


@pytest.mark.slow
def test_a_collected_job_is_gone_and_can_be_asked_for_again(root: Path) -> None:
    cache = next(root.glob("[0-9a-f]*")).name
    request = {"command": "verify", "arguments": {"cache": cache}}
    body = {"categories": ["jobs"], "dry_run": False}
    with running_service(root, jobs=True) as server:
        for _ in range(2):
            answer = ask(server, "POST", "/v1/jobs", request)
            assert answer.status_code == 201
            (job,) = [entry["id"] for entry in ask(server, "GET", "/v1/jobs").json()["jobs"]]
            deadline = time.monotonic() + 120
            while ask(server, "GET", f"/v1/jobs/{job}").json()["state"] != "done":
                assert time.monotonic() < deadline
                time.sleep(0.1)
            items: list[Any] = []
            while not items:  # until the queue has let go of it
                items = ask(server, "POST", "/v1/disk/collect", body).json()["items"]
                assert time.monotonic() < deadline
            assert items[0]["name"] == f".service/jobs/{job}"
            assert ask(server, "GET", "/v1/jobs").json()["jobs"] == []
            assert ask(server, "GET", f"/v1/jobs/{job}").status_code == 404


def test_a_service_with_its_own_extra_alone_lists_and_keeps_house(root: Path) -> None:
    """Reading, disk use and removal need neither torch nor transformers."""
    code = f"""
import urllib.request
from pathlib import Path
from tests.support.services import running_service
with running_service(Path({str(root)!r})) as server:
    for path in ("/readyz", "/v1/caches", "/v1/probes", "/v1/disk"):
        last = json.loads(urllib.request.urlopen(server.address + path, timeout=60).read())
print(json.dumps(last["bytes"]))
"""
    hidden = ("torch", "transformers", "datasets", "matplotlib", "plotly", "tokenizers", "sklearn")
    assert run_base_install(code, *hidden) > 0

"""The catalogue over HTTP says what the command line says; its document is true."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from residua import RidgeProbe
from residua.analysis.service import catalog_routes
from residua.analysis.service.server import ServiceServer
from residua.cache.files.leases import lease_part
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import main
from residua.probes.saved.library import new_probe_path

from ...support.services import running_service
from ...support.synthetic import make_cache, random_head


def random_cache(root: Path) -> ActivationCache:
    """A cache of three parts, of random rows."""
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(640, 8)).astype(np.float32) for _ in range(3)]
    return make_cache(root, layers, [40] * 16, random_head(8, 32))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    cache = random_cache(folder)
    probe = RidgeProbe([1]).fit(cache, progress=None)
    probe.save(new_probe_path(folder, probe, cache.id))
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Any:
    with running_service(root) as running:
        yield running


def get(server: ServiceServer, path: str) -> httpx.Response:
    return httpx.get(server.address + path, timeout=20)


def printed(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    return json.loads(result.output)


def test_the_catalogue_says_what_the_commands_print(server: ServiceServer, root: Path) -> None:
    caches = get(server, "/v1/caches").json()
    assert caches == printed("ls", "--root", root)
    cache = caches["caches"][0]["cache"]
    described = get(server, f"/v1/caches/{cache[:6]}").json()
    assert described == printed("info", cache, "--root", root)
    probes = get(server, "/v1/probes").json()
    assert probes == printed("probes", "--root", root)
    name = Path(probes["probes"][0]["path"]).name
    assert get(server, f"/v1/probes/{name}").json() == printed("info", name, "--root", root)


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/caches/0123", 404, "not_found"),
        ("/v1/caches/..%2f..", 404, "not_found"),
        ("/v1/caches/XYZ", 400, "usage"),
        ("/v1/probes/nothing", 404, "not_found"),
        ("/v1/probes/.hidden", 400, "usage"),
        ("/v1/caches?x=1", 400, "usage"),
        ("/nothing", 404, "not_found"),
    ],
)
def test_a_mistake_has_a_stable_code(
    server: ServiceServer, path: str, status: int, code: str
) -> None:
    answer = get(server, path)
    assert answer.status_code == status
    assert answer.json()["code"] == code
    assert set(answer.json()) == {"error", "code", "message", "exit_code"}


def test_parts_are_seen_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_routes, "LIST_SECONDS", -1.0)
    cache = random_cache(tmp_path)
    removed = sorted((cache.path / "journal").glob("0*.json"))[-1]
    number = int(removed.name[:8])
    with running_service(tmp_path) as server:
        path = f"/v1/caches/{cache.id[:12]}/parts"
        parts = get(server, path).json()
        assert {part["state"] for part in parts["parts"]} == {"committed"}
        assert parts["bytes_written"] == parts["bytes_expected"]
        assert sum(part["stop"] - part["start"] for part in parts["parts"]) == cache.positions
        removed.unlink()
        assert get(server, path).json()["parts"][number]["state"] == "free"
        with lease_part(cache.path / "leases", number) as lease:
            assert lease is not None
            part = get(server, path).json()["parts"][number]
            assert part["state"] == "leased"
            assert part["owner"].startswith("process ")
        assert get(server, path).json()["parts"][number]["state"] == "free"


def test_the_document_names_every_route_and_its_errors(server: ServiceServer) -> None:
    document = get(server, "/v1/openapi.json").json()
    described = {
        (method, path) for path, methods in document["paths"].items() for method in methods
    }
    served = {
        (endpoint.method.lower(), endpoint.path.replace(":path", ""))
        for endpoint in server.service.endpoints
    }
    assert described == served
    for path in ("/v1/caches", "/v1/caches/{cache}", "/v1/probes", "/healthz", "/metrics"):
        assert "get" in document["paths"][path]
    operation = document["paths"]["/v1/caches/{cache}"]["get"]
    assert operation["parameters"][0]["required"] is True
    assert "default" in operation["responses"]


def test_metrics_count_requests_by_route(server: ServiceServer) -> None:
    get(server, "/v1/caches/0123")
    text = get(server, "/metrics").text
    line = 'residua_requests_total{method="GET",path="/v1/caches/{cache}",status="404"}'
    value = next(float(row.split()[-1]) for row in text.splitlines() if row.startswith(line))
    assert value >= 1


def test_many_who_ask_at_once_cost_one_look() -> None:
    looks: list[Path] = []

    def look(path: Path) -> int:
        looks.append(path)
        time.sleep(0.05)
        return len(looks)

    answers = catalog_routes.RecentAnswers(look)
    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(answers.get, [Path("a")] * 40))
    assert first == [1] * 40
    for number in range(catalog_routes.MAX_ANSWERS + 10):
        answers.compute = lambda path: path.name
        assert answers.get(Path(f"b{number}")) == f"b{number}"
    assert len(answers._values) == len(answers._busy) == catalog_routes.MAX_ANSWERS
    assert looks == [Path("a")]

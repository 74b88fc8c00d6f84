"""Results over HTTP are those of the library; they are bounded, kept, and of this root alone."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

import residua
from residua.analysis.display.lens_cells import plain_lens_map
from residua.analysis.service import result_calculator
from residua.analysis.service.result_calculator import (
    LensMapQuery,
    RecentValues,
    ResultCalculator,
    parse_layers,
)
from residua.analysis.service.server import ServiceServer
from residua.cache.errors import LimitError, NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.saved.library import new_probe_path

from ...support.services import running_service


@pytest.fixture(scope="module")
def root(tiny_cache: ActivationCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a cache with a ridge probe, a basis and a bigram."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(tiny_cache.path, folder / tiny_cache.id)
    ridge = residua.RidgeProbe([0, 2]).fit(tiny_cache, keep=False)
    basis = residua.CausalBasis(k=2, layers=[1, 2], positions=128, test_positions=64)
    basis.fit(tiny_cache, residua.LogitLens.of(tiny_cache, 0), progress=None)
    bigram = residua.Bigram().fit(tiny_cache)
    for probe in (ridge, basis, bigram):
        probe.save(new_probe_path(folder, probe, tiny_cache.id))
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Any:
    with running_service(root) as running:
        yield running


def get(server: ServiceServer, path: str, **parameters: Any) -> httpx.Response:
    return httpx.get(server.address + path, params=parameters, timeout=60)


def test_a_map_over_http_is_that_of_the_library(
    server: ServiceServer, root: Path, tiny_cache: ActivationCache
) -> None:
    answer = get(
        server,
        "/v1/lens-map",
        cache=tiny_cache.id[:8],
        probe="ridge",
        sequence=1,
        first=2,
        tokens=6,
        layers="1-2",
        offset=2,
        track_id=7,
    ).json()
    name = answer["probe"]
    probe = residua.load_probe(root / "probes" / name)
    passage = residua.CachePassage(tiny_cache, 1, 2, 6)
    maps = residua.read_lens_maps(
        {name: probe}, passage, layers=[1, 2], offsets=2, track=7, device="cpu"
    )
    assert answer["tracked"] == maps.tracked
    expected = plain_lens_map(maps[0])
    assert {key: answer[key] for key in expected} == expected


def test_the_first_map_is_a_telling_passage(
    server: ServiceServer, tiny_cache: ActivationCache
) -> None:
    chosen = get(server, f"/v1/caches/{tiny_cache.id}/passages").json()
    answer = get(server, "/v1/lens-map", cache=tiny_cache.id).json()
    assert (answer["sequence"], answer["first"]) == (chosen["sequence"], chosen["first"])
    assert answer["probe"] == "logit"


def test_a_cell_has_ten_tokens_of_the_lens_and_of_the_model(
    server: ServiceServer, tiny_cache: ActivationCache
) -> None:
    where = {"cache": tiny_cache.id, "probe": "ridge", "sequence": 1, "first": 3, "layer": 1}
    cell = get(server, "/v1/lens-cell", **where).json()
    assert len(cell["top"]) == len(cell["model_top"]) == 10
    assert cell["top"][0]["probability"] >= cell["top"][9]["probability"] > 0


def test_a_search_over_http_finds_places(
    server: ServiceServer, tiny_cache: ActivationCache
) -> None:
    path = f"/v1/caches/{tiny_cache.id}/passages"
    tokens = get(server, path, sequence=1).json()["tokens"]
    word = max((token.strip("␣") for token in tokens if token.strip("␣").isalpha()), key=len)
    found = get(server, path, search=word).json()
    assert found["matches"]
    assert all(match["matched"].lower() == word.lower() for match in found["matches"])


def test_a_basis_over_http_has_spectra_and_readings(server: ServiceServer) -> None:
    spectra = get(server, "/v1/bases/basis").json()
    assert spectra["layers"] == [1, 2]
    assert spectra["readings"] is None
    layer = get(server, "/v1/bases/basis", layer=2).json()
    assert layer["note"] is None
    assert len(layer["readings"]["directions"]) == 2
    assert get(server, "/v1/bases/basis", layer=5).status_code == 404
    assert get(server, "/v1/bases/ridge").status_code == 400


def test_a_service_without_jobs_has_no_evaluations(server: ServiceServer) -> None:
    assert get(server, "/v1/evaluations").json() == {"evaluations": []}
    assert get(server, "/v1/evaluations/0123").status_code == 404


@pytest.mark.parametrize(
    ("path", "parameters", "status"),
    [
        ("/v1/lens-map", {}, 400),
        ("/v1/lens-map", {"cache": "../root"}, 400),
        ("/v1/lens-map", {"cache": "CACHE", "probe": "../probes/x"}, 400),
        ("/v1/lens-map", {"cache": "CACHE", "probe": "nothing"}, 404),
        ("/v1/lens-map", {"cache": "CACHE", "probe": "bigram"}, 404),
        ("/v1/lens-map", {"cache": "CACHE", "probe": "basis"}, 400),
        ("/v1/lens-map", {"cache": "CACHE", "tokens": 129}, 400),
        ("/v1/lens-map", {"cache": "CACHE", "layers": "0-99999"}, 400),
        ("/v1/lens-map", {"cache": "CACHE", "layers": "77"}, 404),
        ("/v1/lens-map", {"cache": "CACHE", "offset": 9999}, 404),
        ("/v1/lens-map", {"cache": "CACHE", "track": "two words of text"}, 400),
        ("/v1/lens-map", {"cache": "CACHE", "track": "a", "track_id": 1}, 400),
        ("/v1/lens-map", {"cache": "CACHE", "sequence": 10**9}, 400),
        ("/v1/lens-cell", {"cache": "CACHE", "sequence": 0, "layer": 0, "first": 10**9}, 400),
        ("/v1/lens-cell", {"cache": "CACHE", "sequence": 0, "layer": 99}, 404),
        ("/v1/bases/..%2fprobes", {}, 404),
    ],
)
def test_requests_that_cannot_be_right_are_refused_with_a_message(
    server: ServiceServer,
    tiny_cache: ActivationCache,
    path: str,
    parameters: dict[str, Any],
    status: int,
) -> None:
    given = {k: tiny_cache.id if v == "CACHE" else v for k, v in parameters.items()}
    answer = get(server, path, **given)
    assert answer.status_code == status, answer.text
    assert answer.json()["message"]


def test_an_answer_is_computed_once_and_anew_for_another_fit(
    root: Path, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ResultCalculator(root)
    computed = []
    plain = result_calculator.plain_value
    monkeypatch.setattr(
        result_calculator, "plain_value", lambda value: computed.append(1) or plain(value)
    )
    query = LensMapQuery(tiny_cache.id, "ridge", 0, 0, 4)
    first = results.lens_map(query)
    assert results.lens_map(query) == first
    assert len(computed) == 1

    path = results.probe_path("ridge")
    residua.RidgeProbe([0, 2], alphas=[1e12]).fit(tiny_cache, keep=False).save(path)
    assert results.lens_map(query) != first
    assert len(computed) == 2
    results.close()


def test_names_are_never_paths(root: Path, tiny_cache: ActivationCache) -> None:
    results = ResultCalculator(root)
    for name in (
        str(tiny_cache.path),
        "..",
        "",
        ".",
        f"../{root.name}/{tiny_cache.id}",
        "%00",
        "A",
    ):
        with pytest.raises(NotFoundError):
            results.cache(name)
        with pytest.raises(NotFoundError):
            results.probe_path(name)


def test_kept_values_stay_within_their_size() -> None:
    recent: RecentValues[bytes] = RecentValues(10, len)
    made: list[str] = []

    def value(key: str, size: int) -> bytes:
        return recent.obtain(key, lambda: made.append(key) or bytes(size))

    for key in "aba":
        value(key, 4)
    assert made == ["a", "b"]
    value("c", 4)  # drops b, the least recently used
    value("a", 4)
    assert made == ["a", "b", "c"]
    assert len(value("large", 99)) == 99
    assert len(recent) == 0  # a value larger than the whole leaves nothing, not even itself

    threads = [threading.Thread(target=value, args=(str(n % 7), 3)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recent) == 3


def test_layers_are_ranges_and_numbers() -> None:
    assert parse_layers("0-2, 5") == (0, 1, 2, 5)
    for text in ("", "a", "1-", "-1", "1,,2", "10001", "1;2"):
        with pytest.raises(UsageError, match="layers"):
            parse_layers(text)


def test_results_run_on_few_threads(root: Path) -> None:
    results = ResultCalculator(root, threads=2)
    names: set[str] = set()

    def work() -> bytes:
        names.add(threading.current_thread().name)
        return json.dumps(len(names)).encode()

    callers = [threading.Thread(target=results.run, args=(work,)) for _ in range(12)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    results.close()
    assert 1 <= len(names) <= 2


def test_more_requests_than_may_wait_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_calculator, "MAX_WAITING", 3)
    results = ResultCalculator(root, threads=1)
    go = threading.Event()
    waiting = [results.submit(lambda: bytes(go.wait(60))) for _ in range(3)]
    with pytest.raises(LimitError, match="3 requests"):
        results.submit(bytes)
    go.set()
    for future in waiting:
        future.result(60)
    assert results.run(bytes) == b""
    results.close()

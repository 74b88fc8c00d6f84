"""Caches of a service read by its address: the same bytes, numbers and messages as on disk."""

import json
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import residua
from residua.analysis.service.server import ServiceServer
from residua.cache.errors import CorruptError, NotFoundError, UnreachableError, UsageError
from residua.cache.files.paths import as_path, list_folder, total_bytes
from residua.cache.format.remote_shard import FETCHED_CHUNKS
from residua.cache.http import byte_client as client_module
from residua.cache.http.byte_client import Span
from residua.cache.http.served_file_system import ServedFileSystem, plan_requests
from residua.cache.http.served_path import ServedPath
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.catalog import cache_root, find_cache, list_caches
from residua.cli import main
from residua.probes.saved.library import new_probe_path

from ...support.scripted_server import http_answer, range_answer, scripted_server
from ...support.services import running_service
from ...support.synthetic import make_cache, random_head


@pytest.fixture(scope="module")
def local(tiny_cache: ActivationCache, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """A cache on disk, with a probe beside it, in a root that no other test changes."""
    path = tmp_path_factory.mktemp("served") / tiny_cache.id
    shutil.copytree(tiny_cache.path, path, ignore=shutil.ignore_patterns("moments"))
    cache = ActivationCache(path)
    probe = residua.RidgeProbe([0, 1]).fit(cache, progress=None)
    probe.save(new_probe_path(path.parent, probe, cache.id))
    return ActivationCache(path)


@pytest.fixture(scope="module")
def server(local: ActivationCache) -> Any:
    with running_service(local.path.parent) as running:
        yield running


@pytest.fixture
def served(server: ServiceServer, local: ActivationCache) -> ActivationCache:
    """The same cache by its address, with nothing of it in memory."""
    FETCHED_CHUNKS.clear()
    return residua.open(f"{server.address}/caches/{local.id}")


def random_cache(root: Path, rows: int = 640, **options: Any) -> ActivationCache:
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(rows, 8)).astype(np.float32) for _ in range(2)]
    return make_cache(root, layers, [40] * (rows // 40), random_head(8, 32), **options)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def json_of(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json"))


def test_a_cache_reads_as_on_disk(served: ActivationCache, local: ActivationCache) -> None:
    assert served.id == local.id
    # All but the file that says where model and texts lie on the other machine.
    assert served.bytes == local.bytes - (local.path / "local.json").stat().st_size
    rng = np.random.default_rng(0)
    for layer in local.layers:
        ours, theirs = served.residual_array(layer), local.residual_array(layer)
        assert np.array_equal(ours[:], theirs[:])
        rows = rng.integers(0, local.positions, 300)
        assert np.array_equal(ours.take(rows), theirs.take(rows))
    assert np.array_equal(served.tokens[:], local.tokens[:])
    for split in ("train", "validation", "test"):
        assert np.array_equal(served.sequences(split), local.sequences(split))
    rows = local.residual_array(local.n_blocks)[:20]
    assert np.array_equal(served.head.logits(rows), local.head.logits(rows))
    assert np.array_equal(np.asarray(served.residual(1)[:50]), local.residual_array(1)[:50])


def test_names_find_caches_and_probes_of_a_service(
    server: ServiceServer, local: ActivationCache
) -> None:
    for root in (server.address, f"{server.address}/", f"{server.address}/caches"):
        assert find_cache(local.id[:8], root).id == local.id
        assert residua.open(local.id[:8], root).path == as_path(
            f"{server.address}/caches/{local.id}"
        )
    assert [c["cache"] for c in list_caches(cache_root(server.address))] == [local.id]
    with pytest.raises(NotFoundError, match="no cache 'zz'"):
        residua.open("zz", server.address)
    with pytest.raises(NotFoundError, match="no cache"):
        residua.open(f"{server.address}/caches/{'0' * 64}")


@pytest.mark.parametrize("command", ["ls", "info", "probes", "verify"])
def test_commands_print_of_a_service_what_they_print_of_its_folder(
    server: ServiceServer, local: ActivationCache, command: str
) -> None:
    names = [local.id[:8]] if command in ("info", "verify") else []
    there = json_of(command, *names, "--root", server.address)
    here = json_of(command, *names, "--root", local.path.parent)

    def without_places(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {
                k: v
                for k, v in value.items()
                if k not in ("path", "root", "folder", "origin", "bytes")
            }
            return {key: without_places(item) for key, item in kept.items()}
        return [without_places(item) for item in value] if isinstance(value, list) else value

    assert without_places(there) == without_places(here)


def test_a_fit_and_an_evaluation_over_http_have_equal_bits(
    server: ServiceServer, served: ActivationCache, local: ActivationCache, tmp_path: Path
) -> None:
    name = local.id[:8]
    words = ["--offsets", "0-1"]
    here = json_of(
        "fit", "ridge", name, "--root", local.path.parent, *words, "--out", tmp_path / "a"
    )
    there = json_of("fit", "ridge", name, "--root", server.address, *words, "--out", tmp_path / "b")
    data = [(tmp_path / folder / "probe.safetensors").read_bytes() for folder in "ab"]
    assert data[0] == data[1]
    assert here["metrics"] == there["metrics"]
    # Without kept moments, too: from the rows.
    arguments: dict[str, Any] = {"offsets": [0, 2], "alphas": [0.1, 10.0]}
    ours = residua.RidgeProbe(**arguments).fit(served, progress=None)
    theirs = residua.RidgeProbe(**arguments).fit(local, progress=None)
    for key, tensor in theirs.state()[1].items():
        assert np.array_equal(ours.state()[1][key], tensor)
    # The saved probe of the service is found by its name, and evaluates alike.
    values = [
        json_of("evaluate", name, "ridge", "--root", root)
        for root in (server.address, local.path.parent)
    ]
    assert values[0]["rows"] == values[1]["rows"]
    assert residua.evaluate(served, [ours], progress=None) == residua.evaluate(
        local, [ours], progress=None
    )


@pytest.mark.slow
def test_lenses_bases_and_vocabulary_probes_over_http_have_equal_bits(
    served: ActivationCache, local: ActivationCache
) -> None:
    def state_of(cache: ActivationCache, kind: str) -> dict[str, np.ndarray]:
        probe: Any
        if kind == "lens":
            probe = residua.TunedLens().fit(cache, progress=None)
        elif kind == "vocabulary":
            probe = residua.VocabProbe([1]).fit(cache, progress=None)
        else:
            lens = residua.RidgeProbe().fit(cache, progress=None)
            probe = residua.CausalBasis(k=2, layers=[1], positions=300).fit(cache, lens)
        return probe.state()[1]

    for kind in ("lens", "vocabulary", "basis"):
        ours, theirs = state_of(served, kind), state_of(local, kind)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs), kind


def test_whatever_writes_is_refused_and_says_what_to_do(
    server: ServiceServer, served: ActivationCache, local: ActivationCache, model_folder: Path,
    texts_file: Path, tmp_path: Path,
) -> None:  # fmt: skip
    before = sorted((p, p.stat().st_mtime_ns) for p in local.path.rglob("*"))
    name, root = local.id[:8], ["--root", server.address]
    for words in (
        ["fit", "ridge", name, *root],
        ["extract", model_folder, texts_file, *root],
    ):
        output = run(*words, code=2)
        assert "only read by its address" in output
        assert "--out" in output
        assert "--server" in output
        assert "Traceback" not in output
    for words in (["serve"], ["du"], ["gc"], ["pin"], ["rm", name, "--yes"]):
        assert "is a residua service; " in run(*words, *root, code=2)
    probe = residua.RidgeProbe().fit(served, progress=None)
    for write in (
        lambda: probe.save(f"{server.address}/probes/x"),
        lambda: residua.RidgeProbe([3]).fit(served, keep=True),
        lambda: (served.path / "x.json").write_bytes(b""),
        lambda: (served.path / "manifest.json").unlink(),
        lambda: (served.path / "manifest.json").open("wb"),
        lambda: residua.extract(str(model_folder), str(texts_file), root=server.address),
    ):
        with pytest.raises(UsageError, match="only read by its address"):
            write()
    assert sorted((p, p.stat().st_mtime_ns) for p in local.path.rglob("*")) == before


def test_few_requests_read_many_rows(tmp_path: Path) -> None:
    """The index of a shard is fetched once; neighbouring chunks, and far small ones, together."""
    cache = random_cache(tmp_path, rows=6400, part_rows=6400, chunk_rows=64)
    with running_service(tmp_path) as server:
        array = residua.open(f"{server.address}/caches/{cache.id}").residual_array(1)
        FETCHED_CHUNKS.clear()

        def requests_of(rows: np.ndarray) -> int:
            before = server.service.answered
            assert np.array_equal(array.take(rows), cache.residual_array(1).take(rows))
            return server.service.answered - before

        assert requests_of(np.arange(0, 6400, 7)) == 2  # the index, and all 100 chunks
        FETCHED_CHUNKS.clear()
        assert requests_of(np.array([5, 70, 133])) == 1
        assert requests_of(np.array([5, 70, 133])) == 0  # in memory


def test_requests_cover_the_spans_and_keep_their_bounds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        starts = rng.integers(0, 100 << 20, rng.integers(1, 100))
        sizes = rng.choice([100, 5000, 300_000, 3 << 20, 20 << 20], len(starts))
        spans = [Span(int(a), int(a + n)) for a, n in zip(starts, sizes, strict=True)]
        groups = plan_requests(spans, gap=64 << 10)
        runs = [run for group in groups for run in group]
        for span in spans:
            assert any(r.start <= span.start and (span.stop or 0) <= (r.stop or 0) for r in runs)
        fetched = sum((run.stop or 0) - run.start for run in runs)
        assert fetched <= sum(sizes) + (64 << 10) * len(spans)
        for group in groups:
            assert len(group) <= 64
            total = sum((run.stop or 0) - run.start for run in group)
            assert total <= (4 << 20 if len(group) > 1 else 20 << 20)


def test_a_compact_cache_reads_alike(model_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    cache = residua.extract(
        str(model_folder), str(texts_file), root=tmp_path, context=64, max_tokens=1500,
        codec="compact",
    )  # fmt: skip
    with running_service(tmp_path) as server:
        served = residua.open(f"{server.address}/caches/{cache.id}")
        assert np.array_equal(served.residual_array(2)[:], cache.residual_array(2)[:])


def test_a_damaged_chunk_is_found_by_its_checksum(tmp_path: Path) -> None:
    cache = random_cache(tmp_path)
    shard = cache.path / "arrays.zarr" / "residual" / "1" / "c" / "1" / "0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    FETCHED_CHUNKS.clear()
    with running_service(tmp_path) as server:
        served = residua.open(f"{server.address}/caches/{cache.id}")
        assert served.residual_array(1)[:256].shape == (256, 8)
        with pytest.raises(CorruptError, match="do not match their checksum"):
            served.residual_array(1)[256:300]
        output = run("verify", cache.id[:8], "--root", server.address, code=4)
        assert "residual/1" in output


def test_a_server_that_is_started_again_is_read_on(tmp_path: Path) -> None:
    cache = random_cache(tmp_path)
    FETCHED_CHUNKS.clear()
    with running_service(tmp_path) as first:
        port = first.service.settings.port
        array = residua.open(f"{first.address}/caches/{cache.id}").residual_array(1)
        assert np.array_equal(array[:10], cache.residual_array(1)[:10])
    rows: list[np.ndarray] = []
    reader = threading.Thread(target=lambda: rows.append(array[300:640]))
    reader.start()
    time.sleep(0.5)
    with running_service(tmp_path, port=port):
        reader.join(30)
    assert np.array_equal(rows[0], cache.residual_array(1)[300:640])


def test_a_server_that_ends_for_good_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT", 0.005)
    cache = random_cache(tmp_path)
    FETCHED_CHUNKS.clear()
    with running_service(tmp_path) as server:
        served = residua.open(f"{server.address}/caches/{cache.id}")
        array = served.residual_array(1)
    with pytest.raises(UnreachableError, match="see whether the service runs"):
        array[:]
    for command in ("ls", "verify"):
        names = [cache.id[:8]] if command == "verify" else []
        output = run(command, *names, "--root", server.address, code=5)
        assert "no connection can be made" in output
        assert "damage" not in output


def _sum_of(array: Any) -> float:
    return float(array[:].sum())


def test_other_processes_open_their_own_connections(
    served: ActivationCache, local: ActivationCache
) -> None:
    array = served.residual_array(1)
    expected = _sum_of(local.residual_array(1))
    assert _sum_of(pickle.loads(pickle.dumps(array))) == expected
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_sum_of, [array] * 2) == [expected] * 2


def test_paths_of_a_service_behave_like_paths(
    server: ServiceServer, local: ActivationCache
) -> None:
    root = as_path(server.address)
    path = root / "caches" / local.id
    assert isinstance(path, ServedPath)
    assert str(path) == f"{server.address}/caches/{local.id}"
    assert path == as_path(f"{str(path)}/") == pickle.loads(pickle.dumps(path))
    assert hash(path) == hash(as_path(str(path)))
    assert (path / "head" / "head.json").parent.name == "head"
    assert path.with_name("x").name == "x"
    assert list_folder(root) == [path]
    assert {p.name for p in path.iterdir()} >= {"manifest.json", "journal"}
    assert [p.name for p in sorted((path / "journal").glob("base*"))] == ["base.json"]
    assert (path / "manifest.json").read_bytes() == (local.path / "manifest.json").read_bytes()
    assert (path / "manifest.json").stat().st_size == (local.path / "manifest.json").stat().st_size
    assert (path / "head").is_dir()
    assert not (path / "head").is_file()
    assert (path / "head" / "head.json").is_file()
    assert not (path / "nothing").exists()
    assert list_folder(path / "nothing") == []
    assert not root.is_file()
    hidden = (local.path / "local.json").stat().st_size
    assert total_bytes(path) == total_bytes(local.path) - hidden
    with (path / "manifest.json").open("rb") as file:
        assert json.load(file)["id"] == local.id
    with pytest.raises(UsageError, match="no file of this machine"):
        os.fspath(path)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///caches/x",
        "http://host:99999/",
        "http://host:x/",
        "http://[::1",
        "http://host/caches/x?y=1",
        "http://host/caches/x#y",
        "http://user:secret@host/",
        "http://host/caches/../x",
        "http://host\\x/",
    ],
)
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(UsageError) as error:
        as_path(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "page",
    [
        b"[]",
        b"{}",
        b'{"entries": 5, "next": null}',
        b'{"entries": [{"name": "../x", "bytes": 1}], "next": null}',
        b'{"entries": [{"name": "..", "bytes": 1}], "next": null}',
        b'{"entries": [{"name": "a/b", "bytes": 1}], "next": null}',
        b'{"entries": [{"name": "a", "bytes": -1}], "next": null}',
        b'{"entries": [{"name": "a", "bytes": true}], "next": null}',
        b'{"entries": [{"name": 1, "bytes": 1}], "next": null}',
        b'{"entries": [{"name": "a\\u0000", "bytes": 1}], "next": null}',
        b'{"entries": [{"name": "a", "bytes": 1}], "next": 7}',
        b'{"entries": [{"name": "a", "bytes": 1}], "next": "a"}',  # for ever
        b"[" * 100_000,
        b"nonsense",
    ],
)
def test_forged_listings_are_refused(page: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT", 0.005)
    with (
        scripted_server(lambda head, number: http_answer("200 OK", page)) as server,
        pytest.raises(UnreachableError),
    ):
        list_folder(as_path(f"{server.address}/caches"))


def test_a_forged_shard_asks_for_no_more_than_its_layout_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index of right checksum names chunks that the object does not have."""
    import google_crc32c

    monkeypatch.setattr(client_module, "FIRST_WAIT", 0.005)
    cache = random_cache(tmp_path)
    files = {
        p.relative_to(cache.path).as_posix(): p.read_bytes()
        for p in cache.path.rglob("*")
        if p.is_file()
    }
    name = "arrays.zarr/residual/1/c/0/0"
    size = cache.residual_array(1).layout.chunk_bytes

    def forge(offset: int, length: int) -> bytes:
        index = np.array([[offset, length]] * 4, "<u8").tobytes()
        return (
            files[name][: -len(index) - 4]
            + index
            + google_crc32c.value(index).to_bytes(4, "little")
        )

    def answer(head: str, number: int) -> bytes:
        path = head.split(" ")[1].partition(f"{cache.id}/")[2]
        if path.startswith("journal/?"):
            entries = [
                {"name": n.partition("/")[2], "bytes": len(b)}
                for n, b in files.items()
                if n.startswith("journal/")
            ]
            return http_answer("200 OK", json.dumps({"entries": entries, "next": None}).encode())
        if path not in files:
            return http_answer("404 Not Found", b"{}")
        answered = range_answer(files[path], head)
        return (
            answered.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
            if head.startswith("HEAD")
            else answered
        )

    for offset, length, error in (
        (0, 1 << 40, CorruptError),
        (1 << 40, size, UnreachableError),
        ((1 << 64) - 100, size, UnreachableError),
        (0, 3, CorruptError),
    ):
        files[name] = forge(offset, length)
        FETCHED_CHUNKS.clear()
        with scripted_server(answer) as server:
            served = residua.open(f"{server.address}/caches/{cache.id}")
            with pytest.raises(error):
                served.residual_array(1)[:10]


def test_a_file_system_of_a_service_gives_ranges_as_others_do(
    server: ServiceServer, local: ActivationCache
) -> None:
    system = ServedFileSystem(server.address)
    key = f"/caches/{local.id}/arrays.zarr/residual/1/c/0/0"
    data = (local.path / "arrays.zarr" / "residual" / "1" / "c" / "0" / "0").read_bytes()
    for start, end in ((None, None), (5, 50), (-9, None), (None, -9), (-20, -3), (7, None), (9, 3)):
        assert system.cat_file(key, start, end) == data[start:end]
    starts = [9000, 5, 40, 200, 200]
    ends = [9100, 50, 60, 200, 260]
    assert system.cat_ranges([key] * 5, starts, ends) == [
        data[a:b] for a, b in zip(starts, ends, strict=True)
    ]
    with pytest.raises(UnreachableError, match="shorter than its index says"):
        system.cat_ranges([key], [len(data) - 5], [len(data) + 5])
    with pytest.raises(FileNotFoundError):
        system.cat_file(key.replace("c/0", "c/900"), 0, 5)
    with pytest.raises(FileNotFoundError):
        system.ls(f"/caches/{local.id}/nothing")
    assert system.info(f"/caches/{local.id}/head")["type"] == "directory"
    assert system.find(f"/caches/{local.id}/nothing") == []

"""Roots in an object store: everything as on a disk, through a real HTTP server."""

import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

import residua
from residua.cache.errors import UsageError
from residua.cache.extraction.answer import answer_request, find_match
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.files.paths import (
    as_path,
    check_creates,
    create_object,
    list_folder,
    store_of,
    write_object,
)
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.catalog import list_paths

from ...support.crashing import Driver, wait_until
from ...support.models import texts
from ...support.servers import Server

OPTIONS: dict[str, Any] = {"context": 40, "part_positions": 128, "batch_tokens": 200}


@pytest.fixture(scope="module")
def server(s3_server: Server) -> Iterator[Server]:
    """The mock of S3, and in slow runs real servers; every client of the module talks to it."""
    from s3fs import S3FileSystem

    if not s3_server.atomic:
        pytest.skip("this store is refused: two can create one object")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()  # its keys do not tell one server from another
        yield s3_server
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def driver(
    server: Server, private_folders: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Driver]:
    """Starts command lines that talk to the server."""
    started = Driver(tmp_path_factory.mktemp("driver"))
    yield started
    started.close()


@pytest.fixture
def root(server: Server) -> str:
    """A root of its own for each test."""
    return f"s3://{server.bucket}/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("<|endoftext|>".join(texts(30, seed=1)))
    return path


@pytest.fixture(scope="module")
def local_cache(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """The same cache on a disk."""
    return residua.extract(model_folder, data, root=tmp_path_factory.mktemp("disk"), **OPTIONS)


def stable_contents(cache: ActivationCache) -> dict[str, bytes]:
    """Bytes of everything that is the same on every machine and at every time."""
    names = ["manifest.json", *(f"arrays.zarr/{name}" for name in array_files(cache))]
    names += [f"head/{name}" for name in ("head.json", "head.safetensors", "canary.safetensors")]
    names += [f"journal/{part:08d}.json" for part in range(cache.n_parts)]
    return {name: (cache.path / name).read_bytes() for name in names}


def array_files(cache: ActivationCache) -> list[str]:
    """Shards and metadata of all arrays."""
    arrays, files = cache.journal.base()
    shards = {name: [int(number) for number in record] for name, record in arrays.items()}
    shards |= {name: list(range(cache.n_parts)) for name in cache.target_names}
    names = [name.removeprefix("arrays.zarr/") for name in files if name.startswith("arrays.zarr")]
    return names + [
        f"{name}/{cache.array(name).layout.shard_key(number)}"
        for name, numbers in shards.items()
        for number in numbers
    ]


def extract_command(model: Path, data: Path, root: str) -> tuple[object, ...]:
    options = [word for name, value in OPTIONS.items()
               for word in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    return ("extract", model, data, *options, "--root", root)


def only_cache(root: str) -> ActivationCache:
    (path,) = list_paths(as_path(root))
    return ActivationCache(path)


def commit_records(root: str) -> dict[str, bytes]:
    """Bytes of the commit records of the cache under `root`, if there is one."""
    paths = [path for cache in list_paths(as_path(root)) for path in cache.glob("journal/*.json")]
    return {path.name: path.read_bytes() for path in paths}


def test_a_cache_in_an_object_store_has_the_bytes_of_one_on_a_disk(
    root: str, model_folder: Path, data: Path, local_cache: ActivationCache
) -> None:
    remote_cache = residua.extract(model_folder, data, root=root, **OPTIONS)
    assert remote_cache.id == local_cache.id
    assert stable_contents(remote_cache) == stable_contents(local_cache)
    assert local_cache.n_parts > 3
    assert residua.verify(remote_cache.path).ok
    assert not list((remote_cache.path / "leases").glob("*"))
    assert residua.find_cache(remote_cache.id[:6], as_path(root)).positions == local_cache.positions


@pytest.mark.slow
def test_compact_caches_with_logits_are_the_same_afar(
    root: str, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    options = {**OPTIONS, "codec": "compact", "logits": "topk:4"}
    for path in (root, tmp_path):
        residua.extract(model_folder, data, root=path, layers=(1,), **options)
        residua.extract(model_folder, data, root=path, **OPTIONS)  # adds the other layers
    remote_cache, local_cache = only_cache(root), only_cache(str(tmp_path))
    assert remote_cache.layers == local_cache.layers == (0, 1, 2, 3)
    assert stable_contents(remote_cache) == stable_contents(local_cache)
    rows = np.random.default_rng(0).integers(0, local_cache.positions, 200)
    for name in local_cache.target_names:
        assert remote_cache.array(name).layout.compact
        np.testing.assert_array_equal(remote_cache.array(name)[:], local_cache.array(name)[:])
        np.testing.assert_array_equal(
            remote_cache.array(name).take(rows), local_cache.array(name).take(rows)
        )
    assert residua.verify(remote_cache.path).ok
    shard = (
        remote_cache.path
        / "arrays.zarr"
        / "logits/ids"
        / remote_cache.array("logits/ids").layout.shard_key(2)
    )
    damaged = bytearray(shard.read_bytes())
    damaged[9] ^= 1
    write_object(shard, bytes(damaged))
    (damage,) = residua.verify(remote_cache.path).damages
    assert (damage.array, damage.start) == (
        "logits/ids",
        2 * remote_cache.manifest.layout.part_rows,
    )


@pytest.fixture(scope="module")
def remote_cache(server: Server, model_folder: Path, data: Path) -> ActivationCache:
    """A cache in the store that no test changes."""
    return residua.extract(
        model_folder, data, root=f"s3://{server.bucket}/{uuid.uuid4().hex}", **OPTIONS
    )


def test_every_way_of_reading_gives_what_the_disk_gives(
    remote_cache: ActivationCache, local_cache: ActivationCache
) -> None:
    rows = np.random.default_rng(0).integers(0, local_cache.positions, 300)
    for layer in local_cache.layers:
        np.testing.assert_array_equal(
            remote_cache.residual_array(layer)[:], local_cache.residual_array(layer)[:]
        )
        np.testing.assert_array_equal(
            remote_cache.residual_array(layer).take(rows),
            local_cache.residual_array(layer).take(rows),
        )
        np.testing.assert_array_equal(
            remote_cache.residual_array(layer)[100:400], local_cache.residual_array(layer)[100:400]
        )
    np.testing.assert_array_equal(
        remote_cache.residual_array(1)[rows, 3:5], local_cache.residual_array(1)[rows, 3:5]
    )
    np.testing.assert_array_equal(
        remote_cache.residual(2).compute(), local_cache.residual(2).compute()
    )
    remote_logits, local_logits = (
        remote_cache.logits()[:50].compute(),
        local_cache.logits()[:50].compute(),
    )
    np.testing.assert_allclose(remote_logits, local_logits, rtol=1e-5, atol=1e-5)
    assert remote_cache.tokenizer().to_str() == local_cache.tokenizer().to_str()
    loaders = (
        residua.RowLoader(c, 1, batch_rows=64, seed=3, slab_rows=32)
        for c in (remote_cache, local_cache)
    )
    for ours, theirs in zip(*loaders, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_probes_fitted_from_the_store_are_those_of_the_disk(
    remote_cache: ActivationCache, local_cache: ActivationCache
) -> None:
    local_probe, remote_probe = (
        residua.RidgeProbe(offsets=[0, 1]).fit(cache) for cache in (local_cache, remote_cache)
    )
    for pair, affine in local_probe.maps_.items():
        np.testing.assert_allclose(
            remote_probe.maps_[pair].weight, affine.weight, rtol=1e-5, atol=1e-6
        )
    again = residua.RidgeProbe(offsets=[0, 1]).fit(remote_cache, keep=True)
    refitted = residua.RidgeProbe(offsets=[0, 1]).fit(remote_cache)
    assert again.moments_["computed"] or again.moments_["kept"]
    assert (refitted.moments_["computed"], refitted.moments_["kept"]) == (0, len(local_probe.maps_))
    weight = local_probe.maps_[1, 1].weight
    np.testing.assert_allclose(refitted.maps_[1, 1].weight, weight, rtol=1e-5, atol=1e-6)
    path = residua.save_probe(remote_probe, remote_cache.path.parent / "probes" / "one")
    again = residua.load_probe(path)
    np.testing.assert_array_equal(again.maps_[1, 1].weight, remote_probe.maps_[1, 1].weight)


@pytest.mark.slow
def test_asking_again_is_a_hit_and_more_layers_and_tokens_extend(
    root: str, model_folder: Path, data: Path, local_cache: ActivationCache, tmp_path: Path
) -> None:
    def request_for(**options: Any) -> Any:
        return ExtractionRequest(
            str(model_folder), str(data), root=as_path(root), **OPTIONS, **options
        )

    first = answer_request(request_for(layers=(1,), max_tokens=600))
    assert first.status == "extracted"
    assert find_match(request_for(layers=(1,), max_tokens=600)).answer == "hit"
    layers = answer_request(request_for(max_tokens=600))
    assert (layers.status, layers.cache.id) == ("extended", first.cache.id)
    assert layers.cache.layers == (0, 1, 2, 3)
    longer = answer_request(request_for())
    assert longer.status == "extended"
    assert longer.cache.manifest.extra["extends"] == first.cache.id
    assert longer.written < longer.cache.positions
    requests: list[dict[str, Any]] = [{"layers": (1,), "max_tokens": 600}, {"max_tokens": 600}, {}]
    local_caches = [
        residua.extract(model_folder, data, root=tmp_path, **OPTIONS, **options)
        for options in requests
    ]
    assert stable_contents(longer.cache) == stable_contents(local_caches[-1])
    assert residua.verify(longer.cache.path).ok


def test_a_flipped_byte_is_found_and_repaired(
    root: str, model_folder: Path, data: Path, local_cache: ActivationCache
) -> None:
    cache = residua.extract(model_folder, data, root=root, **OPTIONS)
    name = f"arrays.zarr/residual/2/{cache.array('residual/2').layout.shard_key(1)}"
    store, key = store_of(cache.path / name)
    raw = bytearray(store.cat_file(key))
    raw[100] ^= 1
    store.pipe_file(key, bytes(raw))
    (damage,) = residua.verify(cache.path).damages
    assert (damage.file, damage.array, damage.start) == (name, "residual/2", 128)
    with pytest.raises(residua.ResiduaError, match="do not match their checksum"):
        ActivationCache(cache.path).residual_array(2)[:]
    assert residua.repair(cache.path).mended == (name,)
    assert stable_contents(cache) == stable_contents(local_cache)


def test_a_cut_and_a_missing_shard_are_found(root: str, model_folder: Path, data: Path) -> None:
    cache = residua.extract(model_folder, data, root=root, **OPTIONS)
    array = cache.array("residual/0")
    store, first = store_of(array.path / array.layout.shard_key(0))
    store.pipe_file(first, store.cat_file(first)[:-1])
    _, second = store_of(array.path / array.layout.shard_key(1))
    store.rm_file(second)
    messages = {damage.start: damage.message for damage in residua.verify(cache.path).damages}
    assert set(messages) == {0, 128}
    assert "missing" in messages[128]


@pytest.mark.slow
def test_the_command_line_takes_urls(
    driver: Driver, remote_cache: ActivationCache, tmp_path: Path
) -> None:
    root = str(remote_cache.path.parent)
    (listed,) = driver.run("ls", "--root", root)["caches"]
    assert listed["path"] == str(remote_cache.path)
    assert driver.run("info", str(remote_cache.path))["cache"] == remote_cache.id
    fitted = driver.run("fit", "ridge", remote_cache.id[:6], "--offsets", "1", "--root", root)
    page = tmp_path / "report.html"
    driver.run("evaluate", remote_cache.id[:6], fitted["probe"], "--html", page, "--root", root)
    assert page.stat().st_size > 10_000
    assert (
        driver.run("export", remote_cache.id[:6], tmp_path / "flat", "--root", root)["positions"]
        > 0
    )


def test_mistakes_end_with_a_message(driver: Driver, model_folder: Path, data: Path) -> None:
    output = driver.run(*extract_command(model_folder, data, "s3://no-such-bucket/x"), code=2)
    assert "make the bucket" in output["message"]
    output = driver.run(*extract_command(model_folder, data, "nosuch://x/y"), code=2)
    assert "nosuch" in output["message"]


def test_a_store_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, root: str, server: Server
) -> None:
    from residua.cache.files.disk_errors import translate_store_errors

    # Another cache of instances, which would keep the old address.
    path = as_path(root)
    unreachable: Any = type(path)(root, endpoint_url="http://127.0.0.1:1", config_kwargs={
        "retries": {"total_max_attempts": 1}, "connect_timeout": 1})  # fmt: skip
    with pytest.raises(UsageError, match="AWS_ENDPOINT_URL"), translate_store_errors(unreachable):
        list(unreachable.iterdir())


def test_a_store_that_ignores_conditions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_path("memory://careless/root")
    store, _ = store_of(path)
    check_creates(path)
    plain = type(store).pipe_file
    monkeypatch.setattr(
        type(store), "pipe_file", lambda self, path, value, mode=None: plain(self, path, value)
    )
    with pytest.raises(UsageError, match="let two create one object"):
        check_creates(path)
    assert not list(path.glob("*"))


def test_only_stores_that_let_one_of_two_create_an_object_are_taken(
    s3_server: Server, s3_root: str
) -> None:
    if s3_server.atomic:
        check_creates(as_path(s3_root))
    else:
        with pytest.raises(UsageError, match="let two create one object"):
            check_creates(as_path(s3_root))


def test_a_url_in_a_pathlib_path_is_caught() -> None:
    with pytest.raises(UsageError, match="lost a slash"):
        as_path(Path("s3://bucket/root"))


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    assert as_path(f"file://{tmp_path}/with%20space") == tmp_path / "with space"


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "upath", None)
    with pytest.raises(UsageError, match=r"residua\[s3\]"):
        as_path("s3://bucket/root")


def test_push_of_a_remote_cache_says_what_to_do(remote_cache: ActivationCache) -> None:
    with pytest.raises(UsageError, match="copy the folder"):
        residua.push_cache(remote_cache, "someone/repo")


@pytest.mark.slow
def test_three_workers_share_a_root_and_write_no_part_twice(
    driver: Driver, root: str, model_folder: Path, data: Path, local_cache: ActivationCache
) -> None:
    children = [driver.start(*extract_command(model_folder, data, root)) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0], [c.out.read_text() for c in children]
    output = [child.json() for child in children]
    assert sum(s["written"] for s in output) == local_cache.positions
    cache = only_cache(root)
    assert len(cache.journal.paths()) == cache.n_parts
    assert stable_contents(cache) == stable_contents(local_cache)


class Proxy:
    """Passes bytes on to a server until one big request has passed in part; then it stands still.

    What a network that dies looks like to the store: half of an object came.
    """

    def __init__(self, server: Server, after: int) -> None:
        self._to = urlsplit(server.endpoint)
        self._after = after
        self.stuck = threading.Event()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            upstream = socket.create_connection((self._to.hostname, self._to.port))
            self._sockets += [client, upstream]
            threading.Thread(target=self._send, args=(client, upstream), daemon=True).start()
            threading.Thread(target=self._pass, args=(upstream, client), daemon=True).start()

    def _send(self, client: socket.socket, upstream: socket.socket) -> None:
        sent = 0
        with suppress(OSError):
            while data := client.recv(1024):
                if re.search(rb"PUT \S*/residual/\d+/c/", data):
                    sent = 1
                sent += bool(sent)
                upstream.sendall(data)
                if sent > self._after:
                    self.stuck.set()
                    return  # the rest of the object never comes

    def _pass(self, upstream: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := upstream.recv(1 << 16):
                client.sendall(data)

    def close(self) -> None:
        self._listener.close()
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_an_upload_leaves_nothing_and_another_goes_on(
    server: Server, driver: Driver, root: str, model_folder: Path, data: Path,
    local_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    proxy = Proxy(server, after=4)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    slow = Driver(tmp_path)
    try:
        child = slow.start(*extract_command(model_folder, data, root))
        wait_until(lambda: proxy.stuck.is_set() or child.ended())
        assert proxy.stuck.is_set(), child.out.read_text()
        assert child.kill()
    finally:
        proxy.close()
        slow.close()
    monkeypatch.undo()
    cache = only_cache(root)
    arrived = list(cache.path.glob("arrays.zarr/residual/*/c/*/0"))
    for path in arrived:  # whole, or not there
        assert path.read_bytes() == (local_cache.path / path.relative_to(cache.path)).read_bytes()
    assert len(arrived) < len(local_cache.layers) * local_cache.n_parts
    assert driver.run(*extract_command(model_folder, data, root))["status"] == "resumed"
    assert stable_contents(only_cache(root)) == stable_contents(local_cache)


@pytest.mark.slow
def test_kills_lose_nothing(
    driver: Driver, root: str, model_folder: Path, data: Path, local_cache: ActivationCache
) -> None:
    random = np.random.default_rng(5)
    killed = 0
    for _ in range(6):
        children = [driver.start(*extract_command(model_folder, data, root)) for _ in range(2)]
        time.sleep(random.uniform(0.5, 2.0))
        before = commit_records(root)
        killed += sum([child.kill() for child in children])
        after = commit_records(root)
        assert {name: after[name] for name in before} == before
    driver.run(*extract_command(model_folder, data, root))
    assert stable_contents(only_cache(root)) == stable_contents(local_cache)
    assert residua.verify(only_cache(root).path).ok
    assert killed


RACING_WORKER = """
import sys
from residua.cache.files.leases import lease_part
from residua.cache.files.paths import as_path
folder = as_path(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    with lease_part(folder, int(line)) as held:
        print("won" if held else "lost", flush=True)
        sys.stdin.readline()
"""


def test_of_two_workers_that_race_for_a_part_one_gets_it(root: str) -> None:
    import subprocess
    import sys

    workers = [
        subprocess.Popen(
            [sys.executable, "-c", RACING_WORKER, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for _ in range(2)
    ]

    def send_to_workers(word: str) -> None:
        for worker in workers:
            assert worker.stdin
            worker.stdin.write(word + "\n")

    def read_answers() -> list[str]:
        return [worker.stdout.readline().strip() for worker in workers if worker.stdout]

    assert read_answers() == ["ready", "ready"]
    for part in range(30):
        send_to_workers(str(part))
        assert sorted(read_answers()) == ["lost", "won"], part
        send_to_workers("let go")
    for worker in workers:
        worker.communicate()
    assert not list((as_path(root)).glob("*"))


def test_of_many_who_create_one_object_one_succeeds(root: str) -> None:
    path = as_path(root) / "object"
    won = []
    ready = threading.Barrier(8)

    def attempt(number: int) -> None:
        ready.wait()
        try:
            create_object(path, b"%d" % number)
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=attempt, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(path.read_bytes())] == won


@pytest.mark.slow
def test_a_worker_that_was_stopped_gives_up_its_part(
    driver: Driver, root: str, model_folder: Path, data: Path, local_cache: ActivationCache
) -> None:
    """It takes as long as a lease lives: the stopped process cannot be told from a slow one."""
    first = driver.start(*extract_command(model_folder, data, root))
    path = as_path(root)
    wait_until(lambda: any(list_folder(cache / "leases") for cache in list_paths(path)))
    first.signal(signal.SIGSTOP)
    if first.ended():
        pytest.skip("it was too fast to be stopped")
    second = driver.start(*extract_command(model_folder, data, root))
    assert second.wait(120) == 0
    records = commit_records(root)
    first.signal(signal.SIGCONT)
    assert first.wait() == 0, first.err.read_text()
    assert commit_records(root) == records
    assert stable_contents(only_cache(root)) == stable_contents(local_cache)
    assert first.json()["complete"]


@pytest.mark.slow
def test_workers_of_dask_share_a_root_in_a_store(
    root: str, model_folder: Path, data: Path, local_cache: ActivationCache
) -> None:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        cache = residua.extract(model_folder, data, root=root, client=client, **OPTIONS)
        fitted = residua.RidgeProbe().fit(cache, client=client)
    assert stable_contents(cache) == stable_contents(local_cache)
    near = residua.RidgeProbe().fit(local_cache)
    np.testing.assert_allclose(fitted.maps_[1, 0].weight, near.maps_[1, 0].weight, rtol=1e-5)


def test_a_dry_run_knows_that_a_store_has_no_end(root: str, model_folder: Path, data: Path) -> None:
    from click.testing import CliRunner

    from residua.cli import main

    args = [str(word) for word in (*extract_command(model_folder, data, root), "--dry-run")]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    assert "in all, largest" in result.stdout
    assert "free" not in result.stdout

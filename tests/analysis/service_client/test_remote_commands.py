"""Commands with --server: the output, exit code and messages of the same command without."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import residua
from residua.cache.errors import UsageError

from ...support.jobs import ENDLESS, TOKEN, service_process, wait_for

SECONDS = 240


@pytest.fixture(scope="module")
def root(tiny_cache: residua.ActivationCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served") / "root"
    root.mkdir()
    shutil.copytree(tiny_cache.path, root / tiny_cache.id)
    return root


@pytest.fixture(scope="module")
def server(root: Path, model_folder: Path) -> Iterator[str]:
    with service_process(root, "--models", model_folder.parent) as (address, _):
        yield address


def run(*words: object, token: str = TOKEN, **environment: str) -> "subprocess.CompletedProcess":
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "residua", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "RESIDUA_TOKEN": token, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def assert_same(words: Sequence[object], root: Path, server: str) -> str:
    """The command must print and return the same with the server and without; what it prints."""
    there = run(*words, "--server", server)
    here = run(*words, "--root", root)
    assert there.returncode == here.returncode, there.stderr
    assert there.stdout == here.stdout
    assert there.stderr == here.stderr
    return there.stdout


@pytest.mark.slow
def test_fits_print_the_same(root: Path, server: str, tiny_cache: residua.ActivationCache) -> None:
    fit = ["fit", "ridge", tiny_cache.id[:8], "--offsets", "0-1", "--no-keep-moments"]
    assert "ridge" in assert_same(fit, root, server)
    value = json.loads(assert_same([*fit, "--json"], root, server))
    assert Path(value["probe"]).parent == root / "probes"
    by_environment = run(*fit, "--json", RESIDUA_SERVER=server)
    assert json.loads(by_environment.stdout) == value


@pytest.mark.slow
def test_mistakes_have_the_same_message_and_exit_code(
    root: Path, server: str, tiny_cache: residua.ActivationCache
) -> None:
    mistakes = (
        ["fit", "ridge", tiny_cache.id, "--layers", "99"],
        ["fit", "ridge", tiny_cache.id, "--layers", "99", "--json"],
        ["fit", "ridge", tiny_cache.id, "--layers", "x"],
        ["fit", "ridge", tiny_cache.id, "--alpha", "-1"],
        ["evaluate", tiny_cache.id, "nothing-of-this-name"],
    )
    for words in mistakes:
        assert run(*words, "--server", server).returncode == 2
        assert_same(words, root, server)


@pytest.mark.slow
def test_reports_and_pictures_come_to_this_machine(
    root: Path, server: str, tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    outputs = []
    for name, place in (("there", ["--server", server]), ("here", ["--root", root])):
        folder = tmp_path / name
        folder.mkdir()
        page, pictures = folder / "r.html", folder / "p"
        words = ["evaluate", tiny_cache.id, "--max-positions", "200", "--html", page]
        result = run(*words, "--png", pictures, *place)
        assert result.returncode == 0, result.stderr
        assert page.stat().st_size > 10_000
        names = sorted(path.name for path in pictures.iterdir())
        outputs.append((result.stdout.replace(str(folder), "FOLDER"), names))
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_studies_print_the_same_and_their_files_come_to_this_machine(
    root: Path, server: str, tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    outputs = []
    for name, place in (("there", ["--server", server]), ("here", ["--root", root])):
        folder = tmp_path / name
        folder.mkdir()
        words = ["study", "all", tiny_cache.id, "--split", "all", "--max-positions", "200"]
        words += ["--html", folder / "s.html", "--png", folder / "p", "--csv", folder / "c"]
        result = run(*words, *place)
        assert result.returncode == 0, result.stderr
        names = sorted(path.name for path in folder.rglob("*"))
        outputs.append((result.stdout.replace(str(folder), "FOLDER"), names))
    assert outputs[0] == outputs[1]
    assert "s.html" in outputs[0][1]


@pytest.mark.slow
def test_interventions_print_the_same_and_their_sentences_are_sent(
    root: Path, server: str, tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    few = ["--max-positions", "100"]
    assert "blocks" in assert_same(["intervene", "exit", tiny_cache.id, *few], root, server)
    patch = ["intervene", "patch", tiny_cache.id, "--layers", "1", "--kinds", "mean", *few]
    assert "mean at offset 0" in assert_same(patch, root, server)
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("the cat sat here\na dog ran there\n")
    words = ["intervene", "edit", tiny_cache.id, "--sentences", sentences, "--words", "cat,dog"]
    words += ["--layers", "2", "--directions", "random", "--amounts", "0,1", *few]
    there, here = run(*words, "--server", server), run(*words, "--root", root)
    assert there.returncode == here.returncode, there.stderr + here.stderr


@pytest.mark.slow
def test_texts_of_this_machine_are_sent(
    root: Path, server: str, model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    """The server reads no folder of texts: the file must have come over the network."""
    words = ["extract", model_folder, texts_file, "--context", "32", "--max-tokens", "1k", "--json"]
    there = run(*words, "--server", server)
    assert there.returncode == 0, there.stderr + there.stdout
    here = run(*words, "--root", tmp_path / "here")
    assert json.loads(there.stdout)["cache"] == json.loads(here.stdout)["cache"]
    assert (root / json.loads(there.stdout)["cache"] / "manifest.json").is_file()
    # Several files are the same texts in the same order.
    shards, lines = tmp_path / "shards", texts_file.read_text().splitlines(keepends=True)
    shards.mkdir()
    for name, part in (("b.jsonl", lines[20:]), ("a.jsonl", lines[:20])):
        (shards / name).write_text("".join(part))
    for data in (shards, shards / "*.jsonl"):
        several = run(*words[:2], data, *words[3:], "--server", server)
        assert several.returncode == 0, several.stderr + several.stdout
        assert json.loads(several.stdout)["cache"] == json.loads(here.stdout)["cache"]
    (tmp_path / "empty").mkdir()
    folder = run("extract", model_folder, tmp_path / "empty", "--server", server)
    assert folder.returncode == 2
    assert "no folder of text files" in folder.stderr


@pytest.mark.slow
def test_an_interrupted_client_leaves_the_job_and_says_how_to_find_it(
    server: str, tiny_cache: residua.ActivationCache
) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in ENDLESS.items()]
    words = ["fit", "vocab", tiny_cache.id, *options, "--server", server]
    client = subprocess.Popen(
        [sys.executable, "-m", "residua", *words],
        env={**os.environ, "RESIDUA_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore Ctrl-C, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        job = wait_for(
            lambda: next(
                (
                    job["id"]
                    for job in json.loads(run("jobs", "--server", server, "--json").stdout)["jobs"]
                    if job["command"] == "fit vocab" and job["state"] == "running"
                ),
                None,
            )
        )
        client.send_signal(signal.SIGINT)
        _, errors = client.communicate(timeout=60)
    finally:
        client.kill()
        client.wait()
    assert client.returncode == 130
    assert f"residua jobs {job[:12]} --server {server}" in errors
    shown = run("jobs", job[:12], "--server", server)
    assert "running" in shown.stdout
    table = run("jobs", "--server", server)
    assert job[:12] in table.stdout
    assert run("jobs", job[:12], "--cancel", "--server", server).returncode == 0
    followed = run("jobs", job[:12], "--follow", "--server", server)
    assert "cancelled" in followed.stdout


@pytest.mark.slow
def test_reading_and_removing_are_done_by_the_server(
    root: Path, server: str, tiny_cache: residua.ActivationCache
) -> None:
    for words in (["ls"], ["info", tiny_cache.id[:8]], ["probes"]):
        there = run(*words, "--server", server, "--json")
        here = run(*words, "--root", root, "--json")
        assert there.returncode == here.returncode == 0, there.stderr
        assert json.loads(there.stdout.replace(f"{server}/caches", str(root))).keys() == (
            json.loads(here.stdout).keys()
        )
    entry, local = (
        next(
            cache
            for cache in json.loads(run("ls", *place, "--json").stdout)["caches"]
            if cache["cache"] == tiny_cache.id
        )
        for place in (("--server", server), ("--root", root))
    )
    # The file that says where model and texts lay on the server is not served.
    private = (root / tiny_cache.id / "local.json").stat().st_size
    assert {**entry, "path": "", "bytes": entry["bytes"] + private} == {**local, "path": ""}

    fit = ["fit", "ridge", tiny_cache.id, "--offsets", "2", "--no-keep-moments", "--json"]
    path = Path(json.loads(run(*fit, "--server", server).stdout)["probe"])
    assert path.is_dir()
    assert run("rm", path.name, "--server", server).returncode == 2
    assert run("rm", path.name, "--yes", "--server", server, token="x").returncode != 0
    removed = run("rm", path.name, "--yes", "--server", server)
    assert removed.returncode == 0, removed.stderr
    assert removed.stdout.startswith(f"removed: probe {path}")
    assert not path.exists()


@pytest.mark.slow
def test_the_disk_of_a_server_is_looked_after_from_here(
    tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    # Of its own: probes of other tests name the cache.
    root = tmp_path / "root"
    shutil.copytree(tiny_cache.path, root / tiny_cache.id)
    with service_process(root) as (server, _):
        look_after_the_disk(root, server, tiny_cache)


def look_after_the_disk(root: Path, server: str, tiny_cache: residua.ActivationCache) -> None:
    def without_time(text: str) -> str:
        return re.sub(r"[0-9.]+(?= (s|min) ago)|used [^,]*", "", text)

    there = run("du", "--server", server, token="")
    assert there.returncode == 0, there.stderr
    assert without_time(there.stdout) == without_time(run("du", "--root", root).stdout)
    assert run("pin", tiny_cache.id[:8], "--server", server, token="").returncode == 1
    pinned = run("pin", tiny_cache.id[:8], "--reason", "a figure", "--server", server)
    assert pinned.returncode == 0, pinned.stderr
    assert "a figure" in assert_same(["pin"], root, server)
    gc = ["gc", "--unused-caches", "--leftovers", "--server", server]
    planned = json.loads(run(*gc, "--dry-run", "--json").stdout)
    assert tiny_cache.id not in [item["name"] for item in planned["items"]]
    assert "a pin (a figure)" in json.dumps(planned["kept"])
    assert run("pin", "--remove", tiny_cache.id[:8], "--server", server).returncode == 0
    planned = json.loads(run(*gc, "--dry-run", "--json").stdout)
    assert tiny_cache.id in [item["name"] for item in planned["items"]]
    # Without --yes it shows what would go, and asks here.
    assert "give --yes" in run(*gc, "--json").stdout
    unanswered = run(*gc)
    assert unanswered.returncode == 2
    assert tiny_cache.id[:12] in unanswered.stderr
    assert (root / tiny_cache.id).is_dir()
    left = root / f".new-{'0' * 32}"
    left.mkdir()
    collected = json.loads(run("gc", "--yes", "--json", "--server", server).stdout)
    assert (collected["removed"], left.exists()) == (True, False)
    assert (root / tiny_cache.id).is_dir()


def test_a_server_that_is_none_is_one_message() -> None:
    nobody = "http://127.0.0.1:9"
    result = run("jobs", "--server", "ftp://x")
    assert result.returncode == 2
    assert "is no address of a service" in result.stderr
    result = run("jobs", "--server", nobody)
    assert result.returncode == 5
    assert f"no service answers at {nobody}" in result.stderr
    assert "Traceback" not in result.stderr
    assert "give --server URL" in run("jobs").stderr


def test_what_no_server_can_do_is_said() -> None:
    for words, message in (
        (["quickstart", "--server", "http://127.0.0.1:9"], "runs on this machine"),
        (["ls", "--server", "http://127.0.0.1:9", "--root", "x"], "exclude each other"),
        (["fit", "ridge", "3f", "--out", "x", "--server", "http://127.0.0.1:9"], "exclude"),
    ):
        result = run(*words)
        assert result.returncode == 2
        assert message in result.stderr


def test_errors_of_a_server_are_ours() -> None:
    from residua.analysis.service_client.server_connection import check_server_url, named_error
    from residua.cache.errors import MismatchError, ResiduaError

    error = named_error({"error": "MismatchError", "message": "x", "exit_code": 3})
    assert type(error) is MismatchError
    assert error.exit_code == 3
    for forged in ("__builtins__", "os", "Callable", "", "Nothing"):
        assert type(named_error({"error": forged, "message": "x"})) is ResiduaError
    assert check_server_url("http://host:1/") == "http://host:1"
    for url in ("host:1", "http://", "file:///x", "http://h?x=1"):
        with pytest.raises(UsageError):
            check_server_url(url)

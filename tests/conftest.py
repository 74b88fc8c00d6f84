"""Fixtures: a model folder, a file of texts, and a cache of both, made once."""

import json
import os
import random
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # One process per core runs tests: none needs the other cores' threads as well.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


LONG_PART = "RESIDUA_LONG_PART"
"""Name of a variable: if it is set, to a seed, only a part of the long tests runs."""
DRAWN = {"test_many_kills_lose_nothing": 4}
"""Cases of a long test that the part has; one of each other test."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out all long tests but a part drawn by the seed in `LONG_PART`."""
    seed = os.environ.get(LONG_PART)
    if seed is None:
        return
    cases: dict[str, list[str]] = {}
    for item in items:
        if item.get_closest_marker("long"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item.nodeid)
    drawn: set[str] = set()
    for test, names in cases.items():
        number = min(len(names), DRAWN.get(test.rpartition("::")[2], 1))
        drawn |= set(random.Random(f"{seed} {test}").sample(sorted(names), number))
    left = {name for names in cases.values() for name in names} - drawn
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left])
    items[:] = [item for item in items if item.nodeid not in left]


@pytest.fixture(autouse=True, scope="session")
def private_folders(tmp_path_factory: pytest.TempPathFactory):
    """Keep everything that libraries write out of the user's folders."""
    home = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(home / "huggingface"))
    patch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    patch.delenv("RESIDUA_ROOT", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-NeoX with its tokenizer."""
    from .support.models import save_model

    return save_model(tmp_path_factory.mktemp("models") / "neox")


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents as .jsonl."""
    from .support.models import texts

    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(120)))
    return path


@pytest.fixture(scope="session")
def tiny_cache(model_folder: Path, texts_file: Path, tmp_path_factory: pytest.TempPathFactory):
    """A complete cache of `model_folder` on `texts_file`, in several parts."""
    import residua

    root = tmp_path_factory.mktemp("root")
    return residua.extract(
        str(model_folder), str(texts_file), root=root, context=64, part_positions=1024
    )


@pytest.fixture(scope="session")
def moto_server():
    """The mock of S3, in a process of its own."""
    from .support.servers import serving

    with serving("moto") as server:
        yield server


@pytest.fixture(
    scope="session",
    params=["moto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("radosgw", "swift"))],
)
def s3_server(request: pytest.FixtureRequest):
    """Each S3 server in turn: the mock, and with `-m slow` the real ones that are installed."""
    from .support.servers import reason_unavailable, serving

    if request.param == "moto":
        yield request.getfixturevalue("moto_server")
        return
    if reason := reason_unavailable(request.param):
        pytest.skip(reason)
    with serving(request.param) as server:
        yield server


@pytest.fixture
def s3_root(s3_server, monkeypatch: pytest.MonkeyPatch):
    """An empty root on `s3_server`, which the environment of this process now names."""
    from uuid import uuid4

    from s3fs import S3FileSystem

    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    # instances are kept by their arguments, which do not tell one server from another
    S3FileSystem.clear_instance_cache()
    yield f"s3://{s3_server.bucket}/{uuid4().hex}"
    S3FileSystem.clear_instance_cache()

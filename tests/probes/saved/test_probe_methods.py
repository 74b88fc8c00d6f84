"""`save`, `load`, `push` and `pull` of probes do what the functions do, and check the class."""

from pathlib import Path
from typing import Any

import pytest
from sklearn.exceptions import NotFittedError

import residua
from residua.cache.errors import MismatchError, NotFoundError, UsageError
from residua.probes.saved.kinds import KINDS, probe_class
from residua.probes.saved.probe_methods import ProbeFiles

from .test_hub import LocalHub, hub, small_cache  # noqa: F401

STEPS: dict[str, Any] = {"steps": 4, "batch": 64, "lr": 0.1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> residua.ActivationCache:
    return small_cache(tmp_path_factory.mktemp("caches"))


def test_every_kind_of_probe_has_the_four_methods() -> None:
    classes = [probe_class(kind) for kind in KINDS] + [probe_class("ridge/shuffled")]
    assert all(issubclass(kind, ProbeFiles) for kind in classes)


@pytest.mark.parametrize(
    "probe",
    [
        residua.RidgeProbe([0, 1], layers=[0]),
        residua.TunedLens(layers=[0], **STEPS),
        residua.Bigram([1]),
        residua.ControlProbe(residua.RidgeProbe([1], layers=[0])),
    ],
    ids=lambda probe: probe.kind,
)
def test_save_and_load_are_those_of_the_functions(
    cache: residua.ActivationCache, probe: Any, tmp_path: Path
) -> None:
    probe.fit(cache)
    folder = probe.save(tmp_path / "a")
    residua.save_probe(probe, tmp_path / "b")
    for name in ("config.json", "probe.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = type(probe).load(folder)
    assert type(loaded) is type(probe)
    assert loaded.metrics() == residua.load_probe(folder).metrics()


def test_a_folder_with_another_class_is_refused_by_name(
    cache: residua.ActivationCache, tmp_path: Path
) -> None:
    folder = residua.FutureLens((0, 1), layers=[0], **STEPS).fit(cache).save(tmp_path / "lens")
    assert isinstance(residua.TunedLens.load(folder), residua.FutureLens)  # one of its kind
    with pytest.raises(MismatchError, match=r"holds a FutureLens \(kind future\), not a RidgeP"):
        residua.RidgeProbe.load(folder)


def test_a_probe_that_is_not_fitted_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NotFittedError, match="call fit first"):
        residua.RidgeProbe().save(tmp_path / "probe")
    with pytest.raises(NotFittedError, match="call fit first"):
        residua.TunedLens().push("someone/lens")
    assert not list(tmp_path.iterdir())


def test_push_and_pull(
    cache: residua.ActivationCache,
    hub: LocalHub,  # noqa: F811
) -> None:
    ridge = residua.RidgeProbe([0], layers=[1]).fit(cache)
    url = ridge.push("someone/ridge", cache=cache)
    assert url == "https://huggingface.co/someone/ridge"
    pulled = residua.RidgeProbe.pull("someone/ridge")
    assert pulled.metrics() == ridge.metrics()
    with pytest.raises(MismatchError, match="someone/ridge holds a RidgeProbe"):
        residua.Bigram.pull("someone/ridge")


def test_notes_of_an_evaluation_say_where_a_loaded_probe_is_from(
    cache: residua.ActivationCache, tmp_path: Path
) -> None:
    folder = residua.RidgeProbe([0], layers=[0], alpha=1.0).fit(cache).save(tmp_path / "weak")
    probe = residua.RidgeProbe.load(folder)
    options: Any = {"split": "all", "max_positions": 100}
    (note,) = [
        note
        for note in residua.evaluate(cache, {"weak": probe}, **options).notes
        if note.startswith("weak is")
    ]
    assert note.endswith(f"of cache {cache.id[:12]} in {folder}")
    probe.fit(cache)  # no longer the one of the folder
    notes = residua.evaluate(cache, {"weak": probe}, **options).notes
    assert not any(str(folder) in note for note in notes)


def test_open_takes_a_path_or_the_beginning_of_an_id(
    cache: residua.ActivationCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = cache.path.parent
    assert residua.open(cache.path).id == cache.id
    assert residua.open(str(cache.path)).id == cache.id
    assert residua.open(cache.id[:8], root).id == cache.id
    monkeypatch.setenv("RESIDUA_ROOT", str(root))
    assert residua.open(cache.id[:8]).id == cache.id
    with pytest.raises(NotFoundError, match="give a prefix of an id, or a path"):
        residua.open("nothing")
    folder = residua.Bigram([1]).fit(cache).save(tmp_path / "bigram")
    with pytest.raises(UsageError, match="holds a probe, not a cache"):
        residua.open(folder)


def test_a_star_import_leaves_the_open_of_python_alone() -> None:
    names: dict[str, Any] = {}
    exec("from residua import *", names)
    assert "extract" in names
    assert "open" not in names
    assert "open" in dir(residua)

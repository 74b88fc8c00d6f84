"""`residua.connect`: the verbs of the library on a service; parameters of probes as arguments."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residua
from residua.analysis.service_client.job_following import JobEvents
from residua.analysis.service_client.probe_commands import command_of_probe
from residua.cache.errors import NotFoundError, ResiduaError, UsageError
from residua.cache.progress import StageProgress

from ...support.jobs import TOKEN, service_process


@pytest.fixture(scope="module")
def service(
    tiny_cache: residua.ActivationCache,
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[residua.RemoteService]:
    root = tmp_path_factory.mktemp("served") / "root"
    root.mkdir()
    shutil.copytree(tiny_cache.path, root / tiny_cache.id)
    with (
        service_process(root, "--models", model_folder.parent) as (address, _),
        residua.connect(address, TOKEN) as service,
    ):
        yield service


@pytest.mark.parametrize(
    ("probe", "command", "arguments"),
    [
        (
            residua.RidgeProbe(offsets=range(2), layers=[1, 2], alpha=0.5),
            "fit ridge",
            {"offsets": [0, 1], "layers": [1, 2], "alpha": 0.5},
        ),
        (residua.TunedLens(), "fit lens", {"offsets": 0}),
        (residua.FutureLens(offsets=(0, 3), steps=7), "fit lens", {"offsets": [0, 3], "steps": 7}),
        (residua.Trigram(), "fit baseline", {"kinds": ["trigram"]}),
        (residua.CausalBasis(k=3), "fit basis", {"k": 3}),
    ],
)
def test_parameters_of_a_probe_are_arguments_of_its_command(
    probe: Any, command: str, arguments: dict[str, Any]
) -> None:
    found, given = command_of_probe(probe)
    assert found == command
    assert {name: given[name] for name in arguments} == arguments
    control = residua.ControlProbe(residua.RidgeProbe(), "shuffled")
    assert command_of_probe(control)[1]["control"] == "shuffled"


def test_a_probe_that_no_command_fits_is_refused() -> None:
    with pytest.raises(UsageError, match="does not fit LogitLens"):
        command_of_probe(residua.LogitLens.__new__(residua.LogitLens))


def test_forged_events_are_passed_over() -> None:
    stages: list[tuple[str, int, int]] = []
    stage: StageProgress = lambda *arguments: stages.append(arguments)  # noqa: E731
    events = JobEvents(stage, None, None)
    events.take("progress", {"progress": [{"stage": "fit", "done": 1, "total": 2}]})
    for entry in ({}, {"stage": 3, "done": 1, "total": 2}, {"stage": "x", "done": "1"}):
        events.take("progress", {"progress": [entry]})
    events.take("log", {"text": 3})
    assert stages == [("fit", 1, 2)]


def test_nobody_answers_is_an_error_of_ours() -> None:
    with pytest.raises(ResiduaError, match="no service answers"):
        residua.connect("http://127.0.0.1:9")


@pytest.mark.slow
def test_a_service_fits_and_evaluates_as_the_library_does(
    service: residua.RemoteService, tiny_cache: residua.ActivationCache
) -> None:
    stages: list[str] = []
    ridge = residua.RidgeProbe(offsets=[0, 1], layers=[1, 2])
    fitted = service.fit(ridge, tiny_cache.id[:9], progress=lambda name, *_: stages.append(name))
    local = residua.RidgeProbe(offsets=[0, 1], layers=[1, 2]).fit(tiny_cache, progress=None)
    assert not hasattr(ridge, "coef_")
    assert "moments" in stages
    for name, tensor in local.state()[1].items():
        np.testing.assert_allclose(fitted.state()[1][name], tensor, rtol=1e-5, atol=1e-6)

    assert [entry["cache"] for entry in service.caches()] == [tiny_cache.id]
    (entry,) = service.probes()
    assert entry["kind"] == "ridge"
    cache = service.open(tiny_cache.id[:9])
    np.testing.assert_array_equal(cache.residual_array(1)[:9], tiny_cache.residual_array(1)[:9])
    with pytest.raises(NotFoundError):
        service.open("0" * 20)

    there = service.evaluate(cache, [fitted], max_positions=500, progress=None)
    here = residua.evaluate(tiny_cache, [local], max_positions=500, progress=None)
    assert [row.probe for row in there.rows] == [row.probe for row in here.rows]
    for one, other in zip(there.rows, here.rows, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-4)
        assert one.n == other.n
    assert there.facts()[0] == here.facts()[0]

    jobs = {job["id"]: job for job in service.jobs()}
    assert [job["command"] for job in jobs.values()] == ["evaluate", "fit ridge"]
    again = service.submit("evaluate", {"cache": tiny_cache.id, "probes": [entry["probe"]]})
    assert service.cancel(again["id"])["id"] == again["id"]
    assert service.wait(again["id"], progress=None)["state"] == "cancelled"


@pytest.mark.slow
def test_texts_in_python_are_sent(
    service: residua.RemoteService, model_folder: Path, tmp_path: Path
) -> None:
    texts = [f"the {number}. text has some words in it" for number in range(60)]
    cache = service.extract(model_folder.name, texts, context=32, progress=None)
    local = residua.extract(str(model_folder), texts, context=32, root=tmp_path, progress=None)
    np.testing.assert_array_equal(cache.tokens[:], local.tokens[:])

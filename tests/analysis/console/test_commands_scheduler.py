"""`residua fit ... --scheduler`: the workers of a cluster fit, and the probe is the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from distributed import LocalCluster

import residua
from residua.cli import main

FITS = {
    "ridge": ["--offsets", "0-1", "--no-keep-moments"],
    "ridge of a control": ["--offsets", "0-1", "--control", "shuffled"],
    "lens": ["--layers", "1-2", "--steps", "8", "--batch", "128"],
    "vocab": ["--layers", "1-2", "--epochs", "1", "--lr", "0.01"],
}


@pytest.fixture(scope="module")
def address():
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0"
    ) as cluster:
        yield str(getattr(cluster, "scheduler_address"))  # noqa: B009, its type has it async too


@pytest.mark.parametrize("kind", FITS)
def test_workers_fit_the_same_probe(
    kind: str, address: str, tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    found = []
    for name, more in (("here", []), ("there", ["--scheduler", address])):
        command = [
            "fit",
            kind.split()[0],
            tiny_cache.id,
            "--root",
            str(tiny_cache.path.parent),
            *FITS[kind],
            "--out",
            str(tmp_path / name),
            *more,
            "--json",
        ]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        found.append(residua.load_probe(json.loads(result.stdout)["probe"]).state()[1])
    here, there = found
    assert here.keys() == there.keys()
    for name in here:
        np.testing.assert_allclose(there[name], here[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_workers_count_the_same_baselines(
    address: str, tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    found = []
    for name, more in (("here", []), ("there", ["--scheduler", address])):
        command = ["fit", "baseline", str(tiny_cache.path), "--root", str(tmp_path / name), *more]
        result = CliRunner().invoke(main, [*command, "--json"])
        assert result.exit_code == 0, result.output
        probes = json.loads(result.stdout)["probes"]
        found.append({one["kind"]: residua.load_probe(one["probe"]).state() for one in probes})
    here, there = found
    assert len(here) == 6
    for kind, (about, tensors) in here.items():
        assert there[kind][0] == about
        for name, values in tensors.items():
            np.testing.assert_array_equal(there[kind][1][name], values)


@pytest.mark.parametrize("address", ["nonsense", "nonsense://host:1", "tcp://host", "tcp://h:port"])
def test_what_is_no_address_is_said_at_once(
    tiny_cache: residua.ActivationCache, address: str
) -> None:
    root = ["--root", str(tiny_cache.path.parent)]
    result = CliRunner().invoke(
        main, ["fit", "ridge", tiny_cache.id, *root, "--scheduler", address]
    )
    assert result.exit_code == 2
    assert f"{address!r} is no address of a dask scheduler" in result.output
    assert "write it like tcp://host:8786" in result.output

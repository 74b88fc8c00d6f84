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
    "ridge": ["--offsets", "0-1"],
    "lens": ["--layers", "1-2", "--steps", "8", "--batch", "128"],
    "vocab": ["--layers", "1-2", "--epochs", "1", "--lr", "0.01"],
}


@pytest.fixture(scope="module")
def address():
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False,
                      dashboard_address=":0") as cluster:  # fmt: skip
        yield str(getattr(cluster, "scheduler_address"))  # noqa: B009, its type has it async too


@pytest.mark.parametrize("kind", FITS)
def test_workers_fit_the_same_probe(
    kind: str, address: str, tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    found = []
    for name, more in (("here", []), ("there", ["--scheduler", address])):
        command = ["fit", kind, tiny_cache.id, "--root", str(tiny_cache.path.parent), *FITS[kind],
                   "--out", str(tmp_path / name), *more, "--json"]  # fmt: skip
        if kind == "ridge":
            command.append("--no-keep-moments")
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        found.append(residua.load_probe(json.loads(result.stdout)["probe"]).state()[1])
    here, there = found
    assert here.keys() == there.keys()
    for name in here:
        np.testing.assert_allclose(there[name], here[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_wrong_address_is_a_message(tiny_cache: residua.ActivationCache) -> None:
    root = ["--root", str(tiny_cache.path.parent)]
    command = ["fit", "ridge", tiny_cache.id, *root, "--scheduler", "nonsense://host"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "no dask scheduler answers at nonsense://host" in result.output

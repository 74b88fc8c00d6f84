"""The commands `study compare`, `study transfer` and `study jacobian`, from names to files."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from residua.cli import main
from residua.probes.lens.jacobian_lens import JacobianLens
from residua.probes.lens.jacobian_lens_files import write_jacobian_lens
from residua.probes.ridge.ridge_probe import RidgeProbe

from ....support.parted_models import BLOCKS, WIDTH, parted_pair


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of two caches that part at layer 2, a ridge lens of each, and a Jacobian lens."""
    root = tmp_path_factory.mktemp("root")
    first, other = parted_pair(root, 2)
    found = {"first": str(first.path), "other": str(other.path)}
    for name, cache in (("one", first), ("two", other)):
        found[name] = str(RidgeProbe(offsets=[0]).fit(cache).save(root / "probes" / name))
    jacobians = {layer: np.eye(WIDTH, dtype=np.float32) for layer in range(BLOCKS)}
    lens = JacobianLens.of(jacobians, depth=BLOCKS)
    found["lens"] = str(write_jacobian_lens(lens, root / "lens.safetensors"))
    return found


def run_json(*arguments: str) -> dict:
    result = CliRunner().invoke(main, ["study", *arguments, "--split", "all", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_compare_sorts_caches_from_probes(names: dict[str, str], tmp_path: Path) -> None:
    value = run_json(
        "compare",
        names["first"],
        names["one"],
        names["other"],
        names["two"],
        "--csv",
        str(tmp_path),
    )
    assert value["settings"]["by"] == "tokens"
    assert {row["lens"] for row in value["tables"]["depths"]} == {"logit", "ridge"}
    assert [row["layer"] for row in value["tables"]["parting"]][0] == 2
    assert (tmp_path / "compare-passages.csv").read_text().startswith("sequence,index,js")
    beside = run_json("compare", names["first"], "--beside", names["other"], "--by", "depth")
    assert [row["model"] for row in beside["tables"]["models"]] == ["one", "two"]


def test_transfer_and_jacobian_take_names_files_and_own_names(names: dict[str, str]) -> None:
    value = run_json("transfer", names["first"], f"mine={names['one']}", "--to", names["other"])
    assert {row["lens"] for row in value["tables"]["lenses"]} == {"logit", "mine"}
    value = run_json("jacobian", names["first"], names["lens"], names["one"], "--offsets", "0")
    kl = {(row["lens"], row["layer"]): row["kl"] for row in value["tables"]["lenses"]}
    assert kl["jacobian", 1] == pytest.approx(kl["logit", 1], rel=1e-5)  # the identity
    assert {row["ridge"] for row in value["tables"]["maps"]} == {"ridge"}


def test_mistakes_are_one_message(names: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 no archive")
    for arguments, code, text in (
        (["compare", names["first"]], 2, "1 cache given"),
        (["jacobian", names["first"], names["one"]], 2, "give a Jacobian lens"),
        (["jacobian", names["first"], str(tmp_path / "broken.pt")], 4, "no whole torch file"),
        (["jacobian", names["first"], str(tmp_path / "none.pt")], 2, "there is no file"),
        (["transfer", names["first"], "--to", names["other"]], 2, "give a probe"),
    ):
        result = CliRunner().invoke(main, ["study", *arguments, "--split", "all"])
        assert result.exit_code == code, (arguments, result.output)
        assert text in result.output
        assert "Traceback" not in result.output

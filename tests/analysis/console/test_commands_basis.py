"""`residua fit basis`: what it prints, keeps, measures in the model and goes on from."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import residua
from residua.cli import main
from residua.probes.basis import fit_settings, layer_fit
from residua.probes.basis.causal_basis import CausalBasis

from ...support.models import save_model


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def json_of(*args: object, code: int = 0) -> dict[str, Any]:
    return json.loads(run(*args, "--json", code=code).stdout)


@pytest.fixture
def command(tiny_cache: residua.ActivationCache, tmp_path: Path) -> list[object]:
    """A fit of two layers with a ridge lens."""
    lens = residua.save_probe(residua.RidgeProbe().fit(tiny_cache), tmp_path / "lens")
    root = tiny_cache.path.parent
    words = ["fit", "basis", tiny_cache.id[:12], "--root", root, "--lens", lens]
    return [*words, "--layers", "1-2", "-k", 3, "--positions", 300, "--out", tmp_path / "basis"]


def test_a_basis_is_fitted_kept_and_loaded(command: list[object]) -> None:
    value = json_of(*command)
    assert [row["layer"] for row in value["metrics"]] == [1, 2]
    for row in value["metrics"]:
        assert set(row["span"]) == set(row["pca"]) == set(row["random"]) == {"1", "2", "3"}
        assert set(row["span"]["3"]) == {"kl", "low", "high"}
        assert len(row["energies"]) == 3
        assert row["evaluations"] > 0
        assert row["cpu_seconds"] > 0
        assert "model_span" not in row
    loaded = residua.load_probe(value["probe"])
    assert list(loaded.bases_) == [1, 2]
    assert "next: the same command with --html" in run(*command).stdout


def test_the_model_is_measured_on_demand(
    command: list[object], model_folder: Path, tmp_path: Path
) -> None:
    page, pictures = tmp_path / "new" / "basis.html", tmp_path / "pictures"
    value = json_of(*command, "--model", model_folder, "--html", page, "--png", pictures)
    for row in value["metrics"]:
        assert set(row["model_span"]) == {"1", "2", "3"}
        assert set(row["spearman"]) == {"value", "low", "high"}
        assert row["model"]["alignment"]["n"] > 0
    assert value["written"] == [str(page), str(pictures / "basis-spectra.png")]
    assert "layer 2" in page.read_text()
    # The saved basis has the measures in the model, too.
    metrics = residua.load_probe(value["probe"]).metrics()
    assert metrics[0]["model_span"][3]["kl"] == value["metrics"][0]["model_span"]["3"]["kl"]
    assert "in the model" in run(*command, "--model", model_folder).stdout


def test_the_last_layer_of_a_logit_lens_is_the_model(
    tiny_cache: residua.ActivationCache, model_folder: Path, tmp_path: Path
) -> None:
    last = tiny_cache.n_blocks
    words = ["fit", "basis", tiny_cache.id[:12], "--root", tiny_cache.path.parent, "--lens"]
    options = ["logit", "--layers", last, "-k", 2, "--model", model_folder, "--out", tmp_path / "b"]
    row = json_of(*words, *options)["metrics"][0]
    for size in ("1", "2"):
        lens, model = (row["model"][name][size]["kl"] for name in ("lens_span", "model_span"))
        assert lens == pytest.approx(model, rel=1e-3)


def test_another_lens_is_another_probe(
    command: list[object], tiny_cache: residua.ActivationCache
) -> None:
    without_out = command[:-2]
    first = json_of(*without_out, "--method", "one-shot")["probe"]
    lens = without_out.index("--lens") + 1
    other = [*without_out[:lens], "logit", *without_out[lens + 1 :]]
    second = json_of(*other, "--method", "one-shot")["probe"]
    assert first != second
    assert Path(first).parent == tiny_cache.path.parent / "probes"


def test_an_interrupted_fit_goes_on(
    command: list[object], tiny_cache: residua.ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json_of(*command)["metrics"]
    monkeypatch.setattr(layer_fit, "CHECKPOINT_SECONDS", 0)
    save = layer_fit.save_progress

    def save_and_stop(checkpoint: Any, progress: Any) -> None:
        save(checkpoint, progress)
        if progress.evaluations > 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer_fit, "save_progress", save_and_stop)
        json_of(*command, code=130)
    checkpoints = tiny_cache.path.parent / "checkpoints"
    assert list(checkpoints.rglob("fit.json"))
    resumed = json_of(*command)["metrics"]
    assert [row["span"] for row in resumed] == [row["span"] for row in whole]
    assert not list(checkpoints.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-k", 0], "k must be 1 or more"),
        (["-k", 1000], "directions only, fewer than k = 1000"),
        (["--layers", "77"], "layer 77"),
        (["--offset", 2], "no map for layer 1, offset 2"),
        (["--lens", "nothing"], "no probe 'nothing'"),
        (["--model", "nowhere"], "nowhere"),
        (["--offset", 1, "--model", "m"], "measured at offset 0"),
        (["--scratch", "no-folder", "--memory", "0.0001"], "must be an existing folder"),
        (["--reference", "resample", "--positions", 1], "needs two rows at least"),
        (["--html", "."], "is a folder; name a file"),
    ],
)
def test_mistakes_end_with_one_message(
    command: list[object], options: list[object], message: str
) -> None:
    result = run(*command, *options, code=2)
    assert message in result.output
    assert "Traceback" not in result.output


def test_the_options_are_the_parameters_of_the_probe() -> None:
    fit: Any = main.commands["fit"]
    choices = {p.name: getattr(p.type, "choices", None) for p in fit.commands["basis"].params}
    assert set(CausalBasis().get_params()) <= set(choices)
    for name in ("methods", "metrics", "references"):
        names = getattr(fit_settings, name.upper())
        assert tuple(choices[name.removesuffix("s")] or ()) == names
    defaults = {p.name: p for p in fit.commands["basis"].params}
    for name, value in CausalBasis().get_params().items():
        if value is not None:
            assert defaults[name].default == value


def test_a_basis_is_no_readout(command: list[object], tiny_cache: residua.ActivationCache) -> None:
    probe = json_of(*command, "--method", "one-shot")["probe"]
    root = tiny_cache.path.parent
    result = run("evaluate", tiny_cache.id[:12], probe, "--root", root, code=2)
    assert "a basis predicts nothing" in result.output


@pytest.mark.parametrize("kind", ["missing", "another"])
def test_a_wrong_model_is_found_before_the_fit(
    command: list[object], tmp_path: Path, kind: str
) -> None:
    name = save_model(tmp_path / "other", "llama") if kind == "another" else tmp_path / "none"
    run(*command, "--model", name, code=3 if kind == "another" else 2)
    assert not (tmp_path / "basis").exists()

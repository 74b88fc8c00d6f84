"""The commands of prompts and Jacobian lenses, from a cache to a page."""

import json
import shutil
from pathlib import Path

from click.testing import CliRunner

import residua
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import main


def test_commands_fit_a_prompt_and_a_jacobian_lens_and_read_states(
    tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    shared = ["--root", str(tiny_cache.path.parent), "--json"]

    def run(group: str, command: str, *words: str) -> dict:
        result = CliRunner().invoke(main, [group, command, tiny_cache.id[:12], *words, *shared])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    kept = ["--checkpoint", str(tmp_path / "checkpoints")]
    prompt = str(tmp_path / "prompt")
    fitted = run(
        "fit", "prompt", "--layers", "1", "--tokens", "2", "--steps", "2", "--batch", "4",
        "--lr", "0.1", "--positions", "20", "--out", prompt, *kept,
    )  # fmt: skip
    assert [(row["layer"], row["offset"]) for row in fitted["metrics"]] == [(1, 1)]
    lens = str(tmp_path / "jacobian")
    fitted = run(
        "fit", "jacobian", "--layers", "2", "--prompts", "3", "--length", "12",
        "--skip-first", "2", "--out", lens, *kept,
    )  # fmt: skip
    assert fitted["metrics"][0]["prompts"] == 3
    assert isinstance(residua.load_probe(lens), residua.JacobianLens)
    read = run(
        "intervene", "prompt", prompt, "--prompt", "simlens", "--offsets", "1", "--layers", "1",
        "--max-positions", "20", "--no-rivals", "--passage-tokens", "4",
    )  # fmt: skip
    assert {row["prompt"] for row in read["tables"]["prompts"]} == {"learned", "simlens"}
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]


def test_other_fits_have_other_folders(tiny_cache: ActivationCache, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny_cache.path, root / tiny_cache.id)

    def fit(*words: str) -> Path:
        command = ["fit", "jacobian", tiny_cache.id[:12], "--length", "8", "--skip-first", "2"]
        result = CliRunner().invoke(main, [*command, *words, "--root", str(root), "--json"])
        assert result.exit_code == 0, result.output
        return Path(json.loads(result.stdout)["probe"])

    two, three = fit("--layers", "2", "--prompts", "2"), fit("--layers", "2", "--prompts", "3")
    assert two != three
    assert two.is_dir()
    assert fit("--layers", "2", "--prompts", "3") == three

"""`residua extract --dry-run` shows the tokens that the model will read, special ones included."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from residua.cli import main

LABELS = {"<|endoftext|>", "␣the", "\\n"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three documents, each with a line break and several words."""
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"{word}\nthe cat sat on the mat " * 9} for word in ("a", "and", "then")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_dry_run_prints_the_first_tokens_of_three_sequences(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    command = ["extract", str(model_folder), str(data), "--context", "32", "--dry-run"]
    command += ["--bos", "context", "--root", str(tmp_path / "root")]
    value = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert len(value["beginnings"]) == 3
    for beginning in value["beginnings"]:
        assert beginning["tokens"][0] == "<|endoftext|>"
        assert len(beginning["tokens"]) == len(beginning["ids"]) == min(24, beginning["length"])
    assert {t for beginning in value["beginnings"] for t in beginning["tokens"]} >= LABELS
    assert sum(value["splits"].values()) == value["sequences"]

    printed = CliRunner().invoke(main, command).stdout
    assert f"{value['sequences']} sequences that the model reads:" in printed
    for beginning in value["beginnings"]:
        assert f"sequence {beginning['sequence']} ({beginning['split']}, " in printed
        assert f"  {' '.join(beginning['tokens'])}" in printed
    assert not (tmp_path / "root").exists()


def test_standard_input_is_read(model_folder: Path, data: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    command = ["extract", str(model_folder), "--context", "32", "--root", root, "--json"]
    runner = CliRunner()
    made = json.loads(runner.invoke(main, [*command, "-"], input=data.read_text()).stdout)
    again = json.loads(runner.invoke(main, [*command, str(data)]).stdout)
    assert (made["status"], again["status"]) == ("extracted", "hit")
    assert made["cache"] == again["cache"]
    assert "standard input is read as .jsonl" in made["reading"]["notes"][0]
    empty = runner.invoke(main, [*command, "-"], input="")
    assert empty.exit_code == 2
    assert "standard input is empty" in empty.stdout

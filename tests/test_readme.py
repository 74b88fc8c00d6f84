"""The README is true: its example runs, its commands exist, its tree is the tree."""

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import residua
from residua.cli import main

ROOT = Path(residua.__file__ or "").parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    cache, found = names["cache"], names["found"]
    assert cache.residual(3).shape == (cache.positions, cache.d_model)
    assert cache.logits().shape == (cache.positions, cache.vocab)
    assert {row.probe for row in found.rows} == {"logit", "ridge", "bigram"}
    assert "ridge" in (tmp_path / "report.html").read_text()


def test_every_command_of_the_readme_is_one_that_parses() -> None:
    lines = re.findall(r"^    (residua .*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert len(lines) >= 7
    for line in lines:
        words = [word for word in shlex.split(line)[1:] if word != "MODEL"]
        command: click.Command = main
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        options = {option for p in command.params for option in p.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_every_command_is_in_the_readme() -> None:
    out = CliRunner().invoke(main, ["--help"]).output
    for name in main.commands:
        assert name in out
        assert f"residua {name}" in README


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = README.split("## Where things are")[1]
    for name in re.findall(r"^    (\S+)", tree, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target

"""README.md and docs/ are true: examples run, command lines parse, links and trees exist."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import residua
from residua.cli import main

ROOT = Path(residua.__file__ or "").parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()


def page_id(page: Path) -> str:
    return page.name


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def command_lines(page: Path) -> list[str]:
    """The indented lines of a page that call residua, without comments and shell loops."""
    lines = re.findall(r"^ {4}(?:.*\bdo )?(residua .*?)(?:;.*|\s+#.*)?$", page.read_text(), re.M)
    return [line.replace("$kind", "ridge") for line in lines]


@pytest.fixture(scope="module")
def script_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where scripts run: pages that extract the same cache find the first one's."""
    return tmp_path_factory.mktemp("scripts")


def run_script(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Run the Python blocks of a page in order, as one script, in `folder`; its variables."""
    monkeypatch.chdir(folder)
    variables: dict = {}
    for code in python_blocks(page):
        exec(compile(code, page.name, "exec"), variables)
    return variables


def test_the_example_runs_as_it_stands(
    script_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(python_blocks(ROOT / "README.md")) == 1
    variables = run_script(ROOT / "README.md", script_folder, monkeypatch)
    cache, evaluation = variables["cache"], variables["evaluation"]
    assert variables["states"].shape == (cache.positions, cache.d_model)
    assert variables["logits"].shape == (cache.positions, cache.vocab)
    assert {row.probe for row in evaluation.rows} == {"logit", "ridge", "bigram"}
    assert "ridge" in (script_folder / "report.html").read_text()


LONG_PAGES = ("python.md", "tutorial.md")
"""Pages whose Python takes more than a few seconds."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.name in LONG_PAGES else ())
        for page in PAGES[1:]
        if python_blocks(page)
    ],
    ids=page_id,
)
def test_the_python_of_a_page_runs_as_one_script(
    page: Path, script_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = run_script(page, script_folder, monkeypatch)
    assert "residua" in variables


@pytest.mark.parametrize("page", [p for p in PAGES if command_lines(p)], ids=page_id)
def test_every_command_line_of_a_page_is_one_that_parses(page: Path) -> None:
    for line in command_lines(page):
        words = shlex.split(line)[1:]
        command: click.Command = main
        while isinstance(command, click.Group):
            assert words, line
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        # Click itself checks options, values and the number of arguments; nothing is run.
        command.make_context(line, words)


def test_every_command_is_on_the_page_of_commands() -> None:
    help_text = CliRunner().invoke(main, ["--help"]).output
    page = (ROOT / "docs" / "commands.md").read_text()
    for name, command in main.commands.items():
        assert name in help_text
        assert f"residua {name}" in page
        for kind in command.commands if isinstance(command, click.Group) else ():
            assert f"residua {name} {kind}" in page


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = README.split("## Where things are")[1]
    names = re.findall(r"^    (\S+)", tree, re.MULTILINE)
    assert len(names) >= 7
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_rooms_of_the_architecture_page_are_the_folders() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawing = page.split("## Floors and rooms")[1].split("## Six ways in")[0]
    drawn: set[str] = set()
    path: list[str] = []
    for indent, name in re.findall(r"^ {4}( *)(\w+)/ ", drawing, re.MULTILINE):
        path = [*path[: len(indent) // 2], name]
        drawn.add("/".join(path))
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for floor in ("analysis", "probes", "cache")
        for path in (ROOT / floor).rglob("__init__.py")
    }
    assert drawn == folders


def test_the_files_of_the_architecture_page_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    ways = page.split("## Six ways in")[1].split("## Rooms to come")[0]
    paths = re.findall(r"`((?:analysis|probes|cache)/[\w/]+\.py)`", ways)
    assert len(paths) >= 20
    for path in paths:
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_environment_variable_is_on_its_page() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    folders = ("cache", "probes", "analysis", "tests")
    files = [ROOT / "cli.py", *(path for name in folders for path in (ROOT / name).rglob("*.py"))]
    named = {name for path in files for name in re.findall(r"\bRESIDUA_[A-Z_]+", path.read_text())}
    assert named >= {"RESIDUA_ROOT"}
    assert {name for name in named if name not in page} == set()


def test_the_citation_names_the_version_and_the_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == residua.__version__
    assert (citation["license"], citation["type"]) == ("MIT", "software")
    templates = (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    assert all(
        {"name", "description", "body"} <= set(yaml.safe_load(p.read_text())) for p in templates
    )

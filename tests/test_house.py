"""The shape of the house: imports run one way, heavy libraries have one door, names are listed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import residua

ROOT = Path(residua.__file__ or "").parent
ROOMS = ("cache", "probes", "analysis")
DOORS = {
    "zarr": {"cache/format/array_writer.py", "cache/format/array.py"},
    "numcodecs": {"cache/format/compression.py"},
    "transformers": {
        "cache/model/load_model.py",
        "cache/model/tokenizer.py",
        "cache/model/transformers_guard.py",
        "cache/extraction/prepare.py",
    },
    "datasets": {"cache/documents/load_documents.py"},
    "click": {"cli.py", "analysis/console/options.py"},
}
"""Library -> files that may import it; the sample's training script stands outside."""
HEAVY = ("torch", "transformers", "zarr", "dask", "sklearn", "datasets", "matplotlib", "plotly")


def sources() -> list[Path]:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [*files, ROOT / "cli.py", ROOT / "__init__.py"]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names of all imported modules with their line."""
    package = ["residua", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *(node.module or "").split(".")]).strip("."), node.lineno


def test_imports_run_one_way() -> None:
    order = {"cache": 0, "probes": 1, "analysis": 2}
    for path in sources():
        room = path.relative_to(ROOT).parts[0]
        for name, line in imports(path):
            parts = name.split(".")
            if room in order and parts[0] == "residua" and len(parts) > 1 and parts[1] in order:
                assert order[parts[1]] <= order[room], f"{path}:{line} imports {name}"


def test_libraries_are_imported_only_at_their_doors() -> None:
    for path in sources():
        here = path.relative_to(ROOT).as_posix()
        for name, line in imports(path):
            allowed = DOORS.get(name.split(".")[0])
            assert allowed is None or here in allowed, f"{here}:{line} imports {name}"


def test_the_packages_import_relatively_and_the_command_line_absolutely() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("residua"):
                assert path.name == "cli.py", f"{path}:{node.lineno}"


def test_help_loads_nothing_heavy() -> None:
    code = f"import sys, residua, residua.cli\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_reading_a_cache_needs_no_torch(tiny_cache: residua.ActivationCache) -> None:
    code = (
        "import sys\n"
        "from residua.cache.store.activation_cache import ActivationCache\n"
        f"cache = ActivationCache({str(tiny_cache.path)!r})\n"
        "cache.layer(1)[:5]; cache.head.logits(cache.layer(cache.depth)[:5])\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'zarr') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_can_be_imported_and_has_a_docstring() -> None:
    for name in residua.__all__:
        assert getattr(residua, name).__doc__, name


def test_every_module_says_first_what_it_is_for() -> None:
    for path in sources():
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_every_error_is_drawn_in_the_tree() -> None:
    from residua.cache import errors

    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.ResiduaError):
            line = next(x for x in (errors.__doc__ or "").splitlines() if f" {name} " in f" {x} ")
            assert str(value.exit_code) in line.split(), name


def test_packages_of_the_wheel_are_the_folders_that_exist() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["setuptools"]["packages"])
    folders = [path.parent for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    named = {".".join(["residua", *folder.relative_to(ROOT).parts]) for folder in folders}
    assert packages == {"residua", "residua.sample", *named}
    with_code = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert with_code == set(folders)  # a folder without __init__.py is no package
    assert {p.name for p in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}

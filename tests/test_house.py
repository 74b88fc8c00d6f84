"""The shape of the house: imports run one way, heavy libraries have one door, names are listed."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest

import residua

ROOT = Path(residua.__file__ or "").parent
ROOMS = ("cache", "probes", "analysis")
DOORS = {
    "zarr": {"cache/format/array_writer.py", "cache/format/array.py"},
    "numcodecs": {"cache/format/compression.py"},
    "transformers": {
        "cache/model/model_loading.py",
        "cache/model/tokenizer.py",
        "cache/model/transformers_guard.py",
        "cache/model/config_check.py",
        "cache/extraction/chat_template.py",
        "cache/extraction/prepare.py",
        "cache/resuming/upper_blocks.py",
        "cache/images/classifier_source.py",
        "cache/images/classifier_blocks.py",
    },
    "datasets": {"cache/documents/document_loading.py", "cache/images/image_rows.py"},
    "PIL": {"cache/images/image_rows.py", "cache/images/classifier_source.py"},
    "click": {
        "cli.py",
        "analysis/console/options.py",
        "analysis/console/command_arguments.py",
        "analysis/commands/data_commands.py",
        "analysis/commands/intervention_commands.py",
        "analysis/commands/prompt_commands.py",
        "analysis/commands/study_calls.py",
        "analysis/commands/study_commands.py",
    },
}
"""Library -> files that may import it; the sample's training script stands outside."""
FLOORS = (
    "",
    "analysis",
    "analysis.service",
    "analysis.dashboard",
    "analysis.web",
    "analysis.service_client",
    "analysis.jobs",
    "analysis.commands",
    "analysis.console",
    "analysis.disk_use",
    "analysis.interventions",
    "analysis.interventions.prompts",
    "analysis.studies",
    "analysis.studies.anomaly",
    "analysis.studies.comparison",
    "analysis.studies.jacobian",
    "analysis.studies.vision",
    "analysis.studies.essential_layers",
    "analysis.studies.in_context",
    "analysis.studies.future_lens",
    "analysis.studies.tuned_lens",
    "analysis.studies.prediction_depth",
    "analysis.studies.texts",
    "analysis.studies.trajectories",
    "analysis.studies.results",
    "analysis.basis_report",
    "analysis.display",
    "analysis.report",
    "analysis.basis",
    "analysis.evaluation",
    "analysis.token_texts",
    "analysis.served_files",
    "probes",
    "probes.jacobian",
    "probes.prompts",
    "probes.controls",
    "probes.baselines",
    "probes.basis",
    "probes.lens",
    "probes.vocabulary",
    "probes.ridge",
    "probes.moments",
    "probes.training",
    "probes.saved",
    "probes.base",
    "cache.resuming",
    "cache.extraction",
    "cache.images",
    "cache.checks",
    "cache.forward",
    "cache.sharing",
    "cache.store",
    "cache.head",
    "cache.model",
    "cache.tokens",
    "cache.documents",
    "cache.format",
    "cache.files",
    "cache.http",
    "cache",
)
"""Folders from the top down; files import from their own folder and from those further down."""
HEAVY = ("torch", "transformers", "zarr", "dask", "sklearn", "datasets", "matplotlib", "plotly")


def sources() -> list[Path]:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [*files, ROOT / "cli.py", ROOT / "__init__.py", ROOT / "__main__.py"]


def module_name(path: Path) -> str:
    """Dotted name of a module below the package, such as `cache.store.verification`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, lazily and for types too.

    `__init__.py` of folders stand outside: they name what their files define.
    """
    names = {module_name(path) for path in sources() if path.name != "__init__.py"}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for path in sources():
        if path.name == "__init__.py":
            continue
        package = ["residua", *path.relative_to(ROOT).parts[:-1]]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                module = module.removeprefix("residua").removeprefix(".")
                targets = {module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)}
                graph[module_name(path)] |= targets & names
    return graph


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Nodes that reach themselves."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph.get(start, ()))
        while todo:
            if (node := todo.pop()) not in seen:
                seen.add(node)
                todo += graph.get(node, ())
        return seen

    return sorted(node for node in graph if node in reach(node))


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


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circles(module_graph()) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_folders_import_one_way() -> None:
    """From upper floors to lower ones, in the order of `FLOORS`."""
    floor = {folder: number for number, folder in enumerate(FLOORS)}
    for module, targets in module_graph().items():
        folder = module.rpartition(".")[0]
        for target in targets:
            lower = target.rpartition(".")[0]
            assert floor[folder] <= floor[lower], f"{module} imports {target}"


def test_every_folder_has_a_floor_a_sentence_and_public_names() -> None:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {""} == set(FLOORS)
    for folder in folders:
        tree = ast.parse((folder / "__init__.py").read_text())
        sentence = ast.get_docstring(tree) or ""
        assert sentence.endswith("."), folder
        assert "\n" not in sentence, folder
        name = ".".join(["residua", *folder.relative_to(ROOT).parts])
        package = import_module(name)
        assert package.__all__, name
        files = {path.stem for path in folder.glob("*.py")}
        # A file of that name would hide the name once the file was imported.
        assert not files & set(package.__all__), name
        for public in package.__all__:
            value = getattr(package, public)
            if isinstance(value, type | FunctionType) and value.__module__.startswith("residua"):
                assert value.__doc__, f"{name}.{public}"


def test_the_page_on_the_code_draws_the_floors_in_their_order() -> None:
    drawn: list[str] = []
    path: list[str] = []
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if match := re.match(r"(    |      |        )([a-z_]+)/ +[^ ]", line):
            path = [*path[: (len(match[1]) - 4) // 2], match[2]]
            drawn.append(".".join(path))
    rooms = [folder for folder in FLOORS if folder not in ("", *ROOMS)]
    assert [folder for folder in drawn if folder not in ROOMS] == rooms


def test_the_page_on_moved_modules_names_modules_that_exist() -> None:
    page = (ROOT / "docs" / "renamed.md").read_text()
    names = {module_name(path) for path in sources()}
    moved = re.findall(r"^\| `([a-z_.]+)` \| `([a-z_.]+)` \|$", page, re.MULTILINE)
    assert len(moved) > 100
    assert {now for _, now in moved} <= names


def test_folders_are_small_enough_to_be_read() -> None:
    for room in ROOMS:
        for folder in {path.parent for path in (ROOT / room).rglob("*.py")}:
            assert len(list(folder.glob("*.py"))) <= 15, folder


def test_a_class_name_means_one_class() -> None:
    places: dict[str, list[str]] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{path}:{node.lineno}")
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_no_call_has_seven_positional_arguments() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert len(node.args) < 7, f"{path}:{node.lineno}"


@pytest.mark.slow
def test_the_wheel_has_every_module_and_all_can_be_imported(tmp_path: Path) -> None:
    """A folder that pyproject.toml forgets breaks installs, not the checkout."""
    names = ("cache", "probes", "analysis", "sample", "cli.py", "__init__.py", "__main__.py",
             "py.typed", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")  # fmt: skip
    for name in names:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "wheels", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    modules = [f"residua.{module_name(path)}".rstrip(".") for path in sources()]
    code = (
        "import sys, importlib\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        f"for name in {modules!r}:\n"
        f"    assert importlib.import_module(name).__file__.startswith({str(tmp_path)!r}), name\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)


def test_libraries_are_imported_only_at_their_doors() -> None:
    for path in sources():
        here = path.relative_to(ROOT).as_posix()
        for name, line in imports(path):
            allowed = DOORS.get(name.split(".")[0])
            assert allowed is None or here in allowed, f"{here}:{line} imports {name}"


def test_library_code_is_quiet() -> None:
    """It logs to the loggers `residua...` and warns with `ResiduaWarning`; commands alone print."""
    # The server decides where its process logs, and some files print for commands.
    of_commands = (
        "analysis/console",
        "analysis/commands",
        "analysis/service/server.py",
        "cli.py",
        "__main__.py",
    )
    of_commands += (
        "analysis/service/server.py",
        "analysis/service/start_message.py",
        "analysis/service_client/job_messages.py",
    )
    for path in sources():
        here = path.relative_to(ROOT).as_posix()
        if here.startswith(of_commands):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            place = f"{here}:{node.lineno} calls {called}"
            assert called not in ("print", "pprint", "logging.basicConfig"), place
            assert not re.fullmatch(r"sys\.std(out|err)\.write|click\..*", called), place
            assert not re.fullmatch(r"logging\.(debug|info|warning|error|log)", called), place
            if called.endswith("getLogger"):
                name = ast.literal_eval(node.args[0])
                assert name.partition(".")[0] == "residua", place
            if called in ("warn", "warnings.warn"):
                assert ast.unparse(node.args[1]) == "ResiduaWarning", place


def test_the_packages_import_relatively_and_the_command_line_absolutely() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                package = (node.module or "").partition(".")[0]
                assert package != "residua" or path.name in ("cli.py", "__main__.py"), (
                    f"{path}:{node.lineno}"
                )


def test_help_loads_nothing_heavy() -> None:
    code = f"import sys, residua, residua.cli\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_reading_a_cache_needs_no_torch(tiny_cache: residua.ActivationCache) -> None:
    code = (
        "import sys\n"
        "from residua.cache.store.activation_cache import ActivationCache\n"
        f"cache = ActivationCache({str(tiny_cache.path)!r})\n"
        "cache.residual_array(1)[:5]\n"
        "cache.head.logits(cache.residual_array(cache.n_blocks)[:5])\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'zarr') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_can_be_imported_and_has_a_docstring() -> None:
    for name in residua.__all__:
        assert getattr(residua, name).__doc__, name


def test_functions_that_lower_floors_call_by_name_exist() -> None:
    calls = [
        node
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "call_above"
    ]
    assert len(calls) > 5
    for call in calls:
        module, function = (ast.literal_eval(argument) for argument in call.args[:2])
        assert callable(getattr(import_module(f"residua.{module}"), function))


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
    assert {p.name for p in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}

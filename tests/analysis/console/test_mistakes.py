"""Mistakes on the command line: one message, the exit code of its class, no traceback."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from residua.analysis.console import quickstart as quickstart_module
from residua.analysis.console.messages import print_fit, root_option
from residua.analysis.console.options import (
    LAYERS,
    NUMBERS,
    ByteCount,
    Gibibytes,
    WholeNumber,
    library_logs_off,
    warnings_as_lines,
)
from residua.analysis.console.terminal import other_output_on_stderr, print_table, visible_text
from residua.cache.errors import NotFoundError, UsageError
from residua.cache.extraction.plan import kept_layers
from residua.cache.number_ranges import absolute_numbers
from residua.cache.store import catalog
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.catalog import cache_root, find_cache, list_caches
from residua.cli import main


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def error_of(*args: object, code: int = 2) -> str:
    """Message of the one JSON object that a refused command prints."""
    result = invoke(*args, "--json")
    assert result.exit_code == code, result.output
    value = json.loads(result.stdout)
    assert value["exit_code"] == code
    return value["message"]


@pytest.fixture(scope="module")
def root(tiny_cache: ActivationCache) -> Path:
    return tiny_cache.path.parent


@pytest.mark.parametrize("below", ["", "/sub"])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_root_that_is_a_file_or_a_link_to_nothing_is_refused_by_every_command(
    tmp_path: Path, below: str, is_link: bool
) -> None:
    path = tmp_path / "thing"
    path.symlink_to("/nowhere/else") if is_link else path.touch()
    for command in (["ls"], ["info", "3f"], ["verify", "3f"], ["extract", "m", "d.txt"]):
        message = error_of(*command, "--root", f"{path}{below}")
        assert str(path) in message
        assert "name a folder" in message


def test_json_and_root_may_stand_before_the_command(root: Path) -> None:
    for args in (["--json", "--root", root], ["--root", root, "--json"], [f"--root={root}"]):
        result = invoke(*args, "ls", *([] if "--json" in args else ["--json"]))
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["caches"]
    message = json.loads(invoke("--json", "fit", "ridge").stdout)["message"]
    assert "CACHE" in message
    assert "no command" in json.loads(invoke("--json").stdout)["message"]
    assert "no command" in json.loads(invoke("fit", "--json").stdout)["message"]


def test_layers_may_be_all_or_count_from_the_end() -> None:
    assert LAYERS.convert("all", None, None) is None
    assert LAYERS.convert("-1", None, None) == (-1,)
    assert absolute_numbers(LAYERS.convert("0-1,-2,-1", None, None), 5) == (0, 1, 4, 5)
    assert kept_layers((-2,), 5) == (4, 5)
    for absent in ((6,), (-7,)):
        with pytest.raises(UsageError, match="layers 0-5"):
            kept_layers(absent, 5)
    with pytest.raises(click.BadParameter):
        LAYERS.convert("last", None, None)


def test_export_takes_layers_from_the_end(tiny_cache: ActivationCache, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = invoke(
        "export", tiny_cache.path, folder, "--layers", "-1", "--root", tmp_path, "--json"
    )
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)["layers"]) == [str(tiny_cache.n_blocks)]


def test_a_huge_range_is_refused_before_it_is_counted_out() -> None:
    for text in ("0-4000000000", "0-1000000,2000000-3000000"):
        with pytest.raises(click.BadParameter, match="more than"):
            NUMBERS.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2", 2 << 30),
        ("0.5", 1 << 29),
        ("2GB", 2 * 10**9),
        ("2 GiB", 2 << 30),
        ("1e6", 10**6 << 30),
    ],
)
def test_memory_is_taken_with_and_without_unit(text: str, size: int) -> None:
    assert Gibibytes().convert(text, None, None) == size


def test_sizes_and_counts_are_taken_as_people_write_them() -> None:
    assert ByteCount().convert("50GB", None, None) == 50 * 10**9
    assert ByteCount().convert("5e10", None, None) == ByteCount().convert("50000000000", None, None)
    assert WholeNumber().convert("1e6", None, None) == 1_000_000
    for kind in (Gibibytes(), ByteCount(), WholeNumber()):
        for text in ("", "much", "-x", "nan", "inf", "1.5.2", "2 XB"):
            with pytest.raises(click.BadParameter):
                kind.convert(text, None, None)


@pytest.mark.parametrize("name", ["report.pdf", "report.png", "report.md"])
def test_a_report_of_another_kind_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    from residua.analysis.console.actions import check_outputs

    with pytest.raises(UsageError, match=r"report\.html"):
        check_outputs(tmp_path / name, None)
    with pytest.raises(UsageError, match="folder"):
        check_outputs(None, tmp_path / "lens.png")
    check_outputs(tmp_path / "report.html", tmp_path / "pictures")
    assert not (tmp_path / name).exists()


def test_caches_are_found_under_a_root_given_as_text(tiny_cache: ActivationCache) -> None:
    root = str(tiny_cache.path.parent)
    assert find_cache(tiny_cache.id[:12], root).id == tiny_cache.id
    assert find_cache(tiny_cache.path, root).id == tiny_cache.id
    assert tiny_cache.id in {cache["cache"] for cache in list_caches(root)}
    with pytest.raises(NotFoundError):
        find_cache("nothing", root)


def test_a_printed_next_step_names_the_root(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert root_option(str(cache_root())) == ""
    root = tmp_path / "my caches"
    for path in (root / "probes" / "ridge-1", tmp_path / "elsewhere" / "ridge-1"):
        print_fit("ridge", "a" * 64, path, [{"layer": 1}], root)
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.endswith(f" --root '{root}'")
        assert (str(path) in line) == (path.parent != root / "probes")
    monkeypatch.setenv("RESIDUA_ROOT", str(root))
    assert root_option(str(root)) == ""


@pytest.mark.parametrize("form", [["--root", "X"], ["--root=X"]])
def test_quickstart_takes_every_form_of_root(
    form: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    roots: list[Path | None] = []

    def refuse(out: Path, root: Path | None, *others: Any) -> None:
        roots.append(root)
        raise UsageError("stopped")

    monkeypatch.setattr(quickstart_module, "run_quickstart", refuse)
    monkeypatch.chdir(tmp_path)
    invoke("quickstart", *form)
    invoke("quickstart")
    assert roots == [Path("X"), None]


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "residua", "ls", "--root", str(tmp_path), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["caches"] == []


EVIL = "gpt2\x1b]0;PWNED\x07\x1b[2J\x9b31m\u202eabc\udc80"


def test_control_characters_of_names_are_shown_and_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = visible_text(EVIL)
    assert shown.isprintable()
    assert r"\x1b]0;PWNED\x07\x1b[2J\x9b31m\u202eabc\udc80" in shown
    value = {"cache": "a" * 64, "positions": 1, "layers": [0], "d_model": 1, "bytes": 1}
    value |= {"model": EVIL, "data": EVIL, "state": f"damaged: {EVIL}", "path": EVIL}
    monkeypatch.setattr(catalog, "list_caches", lambda root: [value])
    listed = invoke("ls", "--root", tmp_path)
    assert listed.exit_code == 0, listed.output
    missing = invoke("info", EVIL[:-1], "--root", tmp_path)
    assert missing.exit_code == 2
    for output in (listed.output, missing.output):
        assert "PWNED" in output
        assert not set(output) & set("\x1b\x07\x9b\u202e")


def test_tables_show_escapes_in_titles_columns_and_cells(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table(EVIL, [EVIL, "b"], [[EVIL, 1]])
    output = capsys.readouterr().out
    assert output.count("PWNED") == 3
    assert not set(output) & set("\x1b\x07\x9b\u202e")


def test_what_others_print_on_stdout_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with other_output_on_stderr():
        print("from Python")
        subprocess.run([sys.executable, "-c", "print('from a subprocess')"], check=True)
    print("the result")
    output = capfd.readouterr()
    assert output.out == "the result\n"
    assert "from Python" in output.err
    assert "from a subprocess" in output.err


def test_log_lines_and_warnings_of_other_libraries_do_not_stand_before_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings_as_lines(), library_logs_off():
        warnings.simplefilter("always")
        logging.getLogger("other").error("a log line")
        warnings.warn("a warning", stacklevel=1)
    assert capsys.readouterr().err == ""
    assert logging.root.manager.disable == logging.NOTSET


def test_what_is_printed_to_a_full_disk_is_an_error_with_one_message(root: Path) -> None:
    command = [sys.executable, "-m", "residua", "ls", "--root", str(root)]
    for arguments in (command, [*command, "--json"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.returncode == 5
        assert done.stderr.startswith("Error: No space left on device")
        assert done.stderr.count("\n") == 1


def test_a_panic_of_a_library_in_rust_that_gets_no_thread_is_a_message(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        """As pyo3's, which is no `Exception`."""

    def panic(_: Path) -> None:
        raise PanicException("ThreadPoolBuildError { kind: IOError(Os { code: 11, kind: WouldBlock")

    monkeypatch.setattr(catalog, "list_caches", panic)
    assert "no further thread" in error_of("ls", "--root", root, code=5)

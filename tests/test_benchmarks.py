"""The numbers in README.md and docs/benchmarks.md are those that the benchmarks wrote."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

import residua
from residua.cache.devices import choose_device

from .support.pretended_device import pretended_device

FOLDER = Path(residua.__file__ or "").parent / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    """The module `benchmarks/<name>.py`, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results() -> ModuleType:
    return load_benchmark("results")


@pytest.fixture(scope="module")
def scale(results: ModuleType) -> ModuleType:
    return load_benchmark("scale")


def test_the_tables_are_those_of_the_files(results: ModuleType) -> None:
    found = results.read_results()
    assert results.table_of(results.PAGE.read_text()) == results.page_table(found)
    assert results.table_of(results.README.read_text()) == results.readme_table(found)


def test_the_tables_of_scale_are_those_of_the_measured_figures(
    results: ModuleType, scale: ModuleType
) -> None:
    measured = json.loads(scale.FIGURES.read_text())
    assert results.table_of(scale.PAGE.read_text()) == scale.page_tables(measured)


def test_hours_follow_from_flops_rates_and_bytes(scale: ModuleType) -> None:
    model = scale.Model("m", d_model=100, vocab=1000, layers=2, parameters=1e6, tokens=10)
    machine = scale.Machine("x", 1e9, 2e9, 4e9, read=1e6)
    slow = scale.Step("s", flops=3.6e12, rows=10, dtype="float32", share=0.5)
    assert scale.hours_of(slow, model, machine) == (1.0, "products")
    long = scale.Step("s", flops=1e6, rows=9_000_000, dtype="float32", share=0.5)
    # Two layers of 200-byte rows.
    assert scale.hours_of(long, model, machine) == (1.0, "reading")
    texts = [scale.format_hours(hours) for hours in (1e-3, 0.1, 1.0, 30.0, 50.0, 24 * 730.0)]
    assert texts == ["3.6 s", "6 min", "1 h", "30 h", "2.1 days", "2 years"]
    assert [scale.format_bytes(n) for n in (5e5, 2.7e12)] == ["500 KB", "2.7 TB"]


def test_every_file_names_machine_command_and_rounds(results: ModuleType) -> None:
    for name, result in results.read_results().items():
        assert (FOLDER / f"{name}.py").is_file()
        assert result["command"].startswith(f"python benchmarks/{name}.py")
        assert result["machine"]["processor"]
        assert {"python", "torch", "numpy"} <= set(result["machine"]["versions"])
        for figure in result["figures"]:
            assert len(figure["ours"]) == len(figure["theirs"]) > 1
            assert min(figure["ours"] + figure["theirs"]) > 0


def test_a_table_shows_median_and_spread_of_the_rounds(results: ModuleType) -> None:
    figure = results.Figure("k", "work", "numpy", [2.0, 3.0, 4.0], [1.0, 3.0, 1.0], "error 0")
    value = {
        "command": "python benchmarks/k.py",
        "machine": {"processor": "p", "versions": {"numpy": "2"}},
        "figures": [vars(figure)],
    }
    (row,) = (line for line in results.page_table({"k": value}).splitlines() if "work" in line)
    assert (
        row == "| work (error 0) | numpy | 3.00 [2.00-4.00] | 1.00 [1.00-3.00] | 2.00 [1.00-4.00] |"
    )
    assert statistics.median(figure.ratios) == 2


def test_a_table_names_its_clock_and_cores(results: ModuleType) -> None:
    figure = results.Figure("k", "work", "numpy", [2.0, 2.0], [1.0, 1.0], clock="wall")
    machine = {"processor": "p", "cores": 2, "versions": {"numpy": "2"}}
    value = {"command": "c", "machine": machine, "figures": [vars(figure)]}
    table = results.page_table({"k": value})
    assert "`c` on p, 2 cores, 2 rounds; numpy 2." in table
    assert "| what | baseline | residua, wall s | baseline, wall s | ratio |" in table
    assert results.describe_machine()["cores"] >= 1


def test_works_take_turns_and_results_are_written(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in ("ours", "theirs")}
    seconds = results.take_turns(works, rounds=2)
    assert calls == ["ours", "theirs"] * 3  # one round is not counted
    assert [len(rounds) for rounds in seconds.values()] == [2, 2]

    path = tmp_path / "x.json"
    monkeypatch.setattr(sys, "argv", ["x.py", "--rounds", "2", "--json", str(path)])
    results.write_results(path, [results.Figure("k", "work", "numpy", [1.0, 2.0], [1.0, 1.0])])
    written = json.loads(path.read_text())
    assert written["command"] == "python benchmarks/x.py --rounds 2"
    assert written["figures"][0]["ours"] == [1.0, 2.0]
    results.write_results(None, [])


def test_the_benchmark_of_a_gpu_runs_all_parts_on_a_device(results: ModuleType) -> None:
    load_benchmark("extract")
    gpu = load_benchmark("gpu")
    words = ["--d-model", "16", "--vocab", "96", "--layers", "2", "--tokens", "512"]
    args = gpu.arguments([*words, "--rows", "512", "--batch", "128", "--rounds", "2"])
    # Of `meta`, extraction thinks that the weights are not loaded: it runs on the CPU.
    args.part = gpu.PARTS[:1]
    figures = gpu.measure(args, choose_device("cpu"))
    args.part = gpu.PARTS[1:]
    with pretended_device() as device:
        figures += gpu.measure(args, choose_device("meta"))
    assert [figure.key for figure in figures] == [f"gpu_{part}" for part in gpu.PARTS]
    for figure in figures:
        assert figure.clock == "wall"
        assert len(figure.ours) == len(figure.theirs) == 2
        assert min(*figure.ours, *figure.theirs) > 0
    assert {"addmm.default", "addmm.out"} <= device.operations


def test_the_benchmark_of_a_gpu_says_that_there_is_none(
    results: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = load_benchmark("gpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match="no GPU that torch finds: nothing was measured"):
        gpu.main()

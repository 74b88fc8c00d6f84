"""Results of the benchmarks as JSON files, and the tables of README.md and docs/benchmarks.md.

    python benchmarks/results.py            # writes the tables anew from benchmarks/results/*.json

A benchmark that is called with `--json FILE` writes its figures there by `write_results`. A figure
compares residua with a baseline: the seconds of both in every round, in which they take turns, CPU
seconds of one thread unless its clock is `wall`. Its ratio is residua's seconds over the
baseline's, the median of the rounds. `tests/test_benchmarks.py`
checks that the tables are those of the files.
"""

import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
README_FIGURES = ("extract_blocks", "extract_call", "ridge_numpy")
"""Keys of the figures in README.md."""
LIBRARIES = ("torch", "numpy", "scikit-learn", "transformers")


@dataclass(frozen=True)
class Figure:
    """Seconds of residua and of a baseline, one number per round."""

    key: str
    what: str
    """Work that is measured, with its size."""
    baseline: str
    """What a careful user would write instead."""
    ours: Sequence[float]
    theirs: Sequence[float]
    note: str = ""
    """Further result of the comparison, such as an error."""
    clock: str = "CPU"
    """`CPU` or `wall`: which seconds; one clock for all figures of a benchmark."""

    @property
    def ratios(self) -> list[float]:
        """Residua's seconds over the baseline's, per round."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]


def use_one_core() -> None:
    """Let this process run on one core, so that no library starts more threads than one."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def take_turns(
    works: Mapping[str, Callable[[], Any]], rounds: int, warm: bool = True
) -> dict[str, list[float]]:
    """CPU seconds of each of `works` in `rounds` rounds; in a round they run one after the other.

    With `warm` a round before is not counted: imports, page cache, allocator.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-1 if warm else 0, rounds):
        for name, work in works.items():
            start = time.process_time()
            work()
            if number >= 0:
                seconds[name].append(time.process_time() - start)
    return seconds


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and versions of libraries."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.M)
        processor = names[0] if names else processor
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return {"processor": processor, "cores": cores, "versions": versions}


def write_results(path: Path | None, figures: Sequence[Figure]) -> None:
    """Print `figures`; write them to `path`, if given, with machine and command."""
    for figure in figures:
        print(" | ".join(_cells(asdict(figure))), flush=True)
    if path is None:
        return
    arguments = [a for a in sys.argv[1:] if a not in ("--json", str(path))]
    value = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
        "machine": describe_machine(),
        "figures": [asdict(figure) for figure in figures],
    }
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_results() -> dict[str, dict[str, Any]]:
    """Benchmark -> content of its file, sorted by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def _spread(numbers: Sequence[float], digits: int = 3) -> str:
    """Median of `numbers`, with the smallest and the largest in brackets."""
    median, low, high = (
        f"{number:#.{digits}g}".rstrip(".")
        for number in (statistics.median(numbers), min(numbers), max(numbers))
    )
    return f"{median} [{low}-{high}]"


def _cells(figure: Mapping[str, Any]) -> list[str]:
    """Cells of a figure's row in docs/benchmarks.md."""
    ratios = [a / b for a, b in zip(figure["ours"], figure["theirs"], strict=True)]
    note = f" ({figure['note']})" if figure["note"] else ""
    return [
        figure["what"] + note,
        figure["baseline"],
        _spread(figure["ours"]),
        _spread(figure["theirs"]),
        _spread(ratios),
    ]


def page_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """All figures as sections of docs/benchmarks.md, one per benchmark."""
    sections = []
    for name, result in results.items():
        machine = result["machine"]
        versions = ", ".join(
            f"{library} {number}" for library, number in machine["versions"].items()
        )
        rows = ["| " + " | ".join(_cells(figure)) + " |" for figure in result["figures"]]
        clock, cores = result["figures"][0].get("clock", "CPU"), machine.get("cores", 1)
        sections.append(
            "\n".join(
                [
                    f"### {name}",
                    "",
                    f"`{result['command']}` on {machine['processor']}, "
                    f"{'one core' if cores == 1 else f'{cores} cores'}, "
                    f"{len(result['figures'][0]['ours'])} rounds; {versions}.",
                    "",
                    f"| what | baseline | residua, {clock} s | baseline, {clock} s | ratio |",
                    "|---|---|---|---|---|",
                    *rows,
                ]
            )  # fmt: skip
        )
    return "\n\n".join(sections)


def readme_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures `README_FIGURES` as the table of README.md."""
    figures = {f["key"]: f for result in results.values() for f in result["figures"]}
    rows = []
    for key in README_FIGURES:
        what, baseline, _, _, ratio = _cells(figures[key])
        rows.append(f"| {what} | {baseline} | {ratio} |")
    return "\n".join(["| what | baseline | CPU time / baseline's |", "|---|---|---|", *rows])


def table_of(text: str) -> str:
    """The table between the marks of a page."""
    return text.split(BEGIN)[1].split(END)[0].strip()


def replace_table(path: Path, table: str) -> None:
    """Write `table` between the marks of the page `path`."""
    text = path.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    replace_table(PAGE, page_table(read_results()))
    replace_table(README, readme_table(read_results()))

"""Progress without a terminal: a line at the beginning, every half minute, and at the end."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from residua.analysis.console.progress_lines import ProgressLines, format_duration


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_comes_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with ProgressLines(clock=clock) as lines:
        for second in range(101):
            clock.now = 100.0 + second
            lines.stage("extract", second * 100, 10_000)
    assert lines_of(capsys) == [
        "extract: 0 of 10,000 positions",
        "extract: 3,000 of 10,000 positions (30%), 100/s, 0:01:10 left",
        "extract: 6,000 of 10,000 positions (60%), 100/s, 0:00:40 left",
        "extract: 9,000 of 10,000 positions (90%), 100/s, 0:00:10 left",
        "extract: 10,000 of 10,000 positions (100%), 100/s, done in 0:01:40",
    ]


def test_resumed_work_does_not_count_for_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = ProgressLines(clock=clock)
    lines.stage("extract", 9_000, 10_000)
    clock.now += 40
    lines.stage("extract", 9_400, 10_000)
    assert lines_of(capsys)[1] == "extract: 9,400 of 10,000 positions (94%), 10/s, 0:01:00 left"


def test_a_stage_that_runs_again_begins_anew(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines(clock=Clock())
    for done in (0, 4, 4, 0, 4):
        lines.stage("verify", done, 4)
    assert [line.partition("(")[0] for line in lines_of(capsys)] == [
        "verify: 0 of 4 shards",
        "verify: 4 of 4 shards ",
        "verify: 0 of 4 shards",
        "verify: 4 of 4 shards ",
    ]


def test_nothing_to_do_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = ProgressLines(clock=clock)
    lines.progress_of("tokenize")(0, 0)
    lines.note("extract", lambda: "forward 3k tok/s")
    lines.stage("extract", 0, 10)
    clock.now += 31
    lines.stage("extract", 5, 10)
    shown = lines_of(capsys)
    assert shown[1] == "tokenize: 0 of 0 documents (100%), done in 0:00:00"
    assert shown[-1].endswith("0:00:31 left; forward 3k tok/s")
    assert format_duration(36_061.4) == "10:01:01"


def test_extraction_without_a_terminal_prints_lines_and_json_stays_alone(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "residua", "extract", model_folder, texts_file]
    command += ["--root", tmp_path, "--context", "64", "--max-tokens", "1k"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"^extract: 960 of 960 positions \(100%\), [0-9,]+/s", result.stderr, re.M)
    assert "--max-tokens 1,000 is at most" in result.stdout
    for option, wants_lines in (("--json", False), ("--no-tty", True)):
        more = [*command[:-1], "2k" if wants_lines else "1.5k", "--json", *([option])]
        result = subprocess.run(more, capture_output=True, text=True, check=True)
        assert result.stdout.count("\n") == 1
        assert ("extract: " in result.stderr) == wants_lines

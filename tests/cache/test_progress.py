"""Progress: bars in terminals and notebooks, lines of a logger elsewhere, functions untouched."""

import io
import logging
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import residua
from residua.analysis.console.terminal import Meter
from residua.cache import progress
from residua.cache.errors import UsageError
from residua.cache.progress import (
    NotebookBars,
    ProgressBars,
    ProgressLog,
    choose_display,
    show_stage,
    show_stages,
)


class Clock:
    """A clock that tests set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def log_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "residua"]


def test_a_function_and_none_are_used_as_they_are() -> None:
    def report(stage: str, done: int, total: int) -> None:
        raise AssertionError("nothing reports here")

    with show_stages(report) as shown:
        assert shown is report
    with show_stages(None) as shown:
        assert shown is None
    with show_stage(None, "moments") as shown:
        assert shown is None


def test_another_word_is_refused() -> None:
    word: Any = "bars"
    with pytest.raises(UsageError, match='must be "auto", a function or None'):
        show_stages(word).__enter__()
    with pytest.raises(UsageError, match="not 'bars'"):
        show_stage(word, "moments").__enter__()


def test_without_a_terminal_each_stage_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "residua")
    clock = Clock(monkeypatch)
    with show_stages("auto") as report:
        assert report is not None
        report("lens", 0, 12_000)
        clock.now = 10.0
        report("lens", 400, 12_000)
        clock.now = 31.0
        report("lens", 1240, 12_000)
        clock.now = 300.0
        report("lens", 12_000, 12_000)
        report("lens", 12_000, 12_000)
    assert log_lines(caplog) == [
        "lens: 0 of 12,000 steps",
        "lens: 1,240 of 12,000 steps, 40 steps/s, 4 min left",
        "lens: 12,000 steps in 5 min",
    ]


def test_a_stage_that_begins_again_is_logged_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "residua")
    Clock(monkeypatch)
    log = ProgressLog()
    for done in (3, 3, 1, 3):
        log.stage("verify", done, 3)
    lines = ["verify: 3 shards in 0 s", "verify: 1 of 3 shards", "verify: 3 shards in 0 s"]
    assert log_lines(caplog) == lines


def test_a_resumed_stage_has_the_rate_of_this_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "residua")
    clock = Clock(monkeypatch)
    log = ProgressLog()
    log.stage("extract", 900_000, 1_000_000)
    clock.now = 40.0
    log.stage("extract", 920_000, 1_000_000)
    line = "extract: 920,000 of 1,000,000 positions, 500 positions/s, 3 min left"
    assert log_lines(caplog)[1:] == [line]


def test_commands_log_stages_that_take_longer_than_half_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Meter() as meter:
        meter.stage("tokenize", 5, 5)
        meter.stage("extract", 0, 100)
        clock.now = 31.0
        meter.stage("extract", 62, 100)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "extract: 62 of 100 positions, 2 positions/s, 19 s left"
    ]
    with Meter(quiet=True) as meter:
        meter.stage("extract", 1, 100)
        clock.now = 99.0
        meter.stage("extract", 62, 100)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_bars_of_one_call_at_a_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    display = choose_display()
    assert isinstance(display, ProgressBars)
    with display:
        display.stage("moments", 50, 100)
        assert isinstance(choose_display(), ProgressLog)  # a fit inside another call
    assert isinstance(choose_display(), ProgressBars)
    assert "moments" in capsys.readouterr().err


class PretendedBar:
    """Counts what `tqdm` would show."""

    shown: list[Any] = []

    def __init__(self, total: int, desc: str, unit: str, unit_scale: bool) -> None:
        self.total, self.n, self.desc = total, 0, desc
        self.shown.append(self)
        self.closed = False

    def update(self, steps: int) -> None:
        self.n += steps

    def close(self) -> None:
        self.closed = True


def test_a_notebook_shows_bars_of_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    tqdm: Any = types.ModuleType("tqdm.auto")
    tqdm.tqdm = PretendedBar
    monkeypatch.setitem(sys.modules, "tqdm.auto", tqdm)
    with show_stages("auto") as report:
        assert isinstance(getattr(report, "__self__", None), NotebookBars)
        assert report is not None
        report("moments", 10, 100)
        report("lens", 1, 7)
        report("moments", 60, 120)
    bars = [(bar.desc, bar.n, bar.total, bar.closed) for bar in PretendedBar.shown]
    assert bars == [("moments", 60, 120, True), ("lens", 1, 7, True)]


def test_a_bar_of_a_notebook_is_closed_when_its_stage_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps its time and rate, and the bar of the next stage needs no line below it."""
    display = NotebookBars()
    with display:
        display.stage("tokenize", 0, 10)
        display.stage("tokenize", 10, 10)
        display.stage("extract", 5, 20)
        display.stage("tokenize", 10, 10)  # said again: no second bar
        assert list(display._bars) == ["extract"]
        display.stage("tokenize", 3, 10)  # begun again
        assert list(display._bars) == ["extract", "tokenize"]
    text = capsys.readouterr().err
    assert text.count("tokenize: 100%") >= 1
    assert "extract:  25%" in text


def test_a_notebook_without_tqdm_has_lines_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert isinstance(choose_display(), ProgressLog)


def test_fits_and_evaluations_are_quiet_without_a_terminal_and_logged(
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A cache of its own: other tests keep the moments of the shared one, and no pass is logged.
    tiny_cache = residua.extract(
        str(model_folder), str(texts_file), root=tmp_path, context=64, progress=None
    )
    caplog.set_level(logging.INFO, "residua")
    ridge = residua.RidgeProbe([0], layers=[1]).fit(tiny_cache, keep=False)
    lens = residua.TunedLens(layers=[1], steps=4).fit(tiny_cache)
    residua.VocabProbe([0], layers=[1], lr=0.01, epochs=1).fit(tiny_cache)
    residua.CausalBasis(k=1, layers=1, method="fisher", positions=256).fit(tiny_cache, lens)
    residua.evaluate(tiny_cache, [ridge], max_positions=256)
    stages = {line.partition(":")[0] for line in log_lines(caplog)}
    assert stages >= {"moments", "lens", "vocab", "basis", "evaluate"}
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")


def test_extraction_is_logged(
    model_folder: Path, texts_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "residua")
    cache = residua.extract(model_folder, texts_file, root=tmp_path, context=64, max_tokens=512)
    assert any(line.startswith(f"extract: {cache.positions} pos") for line in log_lines(caplog))
    caplog.clear()
    residua.extract(
        model_folder, texts_file, root=tmp_path, context=64, max_tokens=1024, progress=None
    )
    assert log_lines(caplog) == []


def test_a_closed_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert isinstance(choose_display(), ProgressLog)
    monkeypatch.setattr(sys, "stderr", None)
    assert isinstance(choose_display(), ProgressLog)


def test_lines_carry_the_note_of_their_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Meter(lines=True) as meter:
        meter.note("extract", lambda: "forward 3k tok/s")
        meter.stage("extract", 0, 10)
        meter.stage("tokenize", 0, 10)
        clock.now = 40.0
        meter.stage("extract", 10, 10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "extract: 0 of 10 positions; forward 3k tok/s",
        "tokenize: 0 of 10 documents",
        "extract: 10 positions in 40 s; forward 3k tok/s",
    ]


@pytest.mark.slow
def test_extraction_prints_lines_where_it_is_asked_to_and_json_stays_alone(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "residua", "extract", str(model_folder), str(texts_file)]
    command += ["--root", str(tmp_path), "--context", "64", "--max-tokens"]
    shown = []
    for options in (["1k", "--no-tty"], ["1.5k", "--json"], ["2k", "--json", "--no-tty"]):
        shown.append(subprocess.run([*command, *options], capture_output=True, text=True))
        assert shown[-1].returncode == 0, shown[-1].stderr
    assert re.search(r" extract: 960 positions in [0-9.]+ s", shown[0].stderr)
    assert "--max-tokens 1,000 is at most" in shown[0].stdout
    assert [result.stdout.count("\n") for result in shown[1:]] == [1, 1]
    assert ["extract: " in result.stderr for result in shown[1:]] == [False, True]

"""In a real kernel and a real IPython shell, objects show themselves and progress has bars."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import residua
from residua.cache.store.activation_cache import ActivationCache

SECONDS = 240
"""Longest time of a kernel or a shell."""


@pytest.fixture
def private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jupyter's and IPython's files go to a folder of the test."""
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    # Kernels are told of deprecations of their own; those are none of ours.
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)


def run_notebook(*cells: str) -> list[list[Any]]:
    """The outputs of each cell, run in a kernel of this interpreter, which is stopped."""
    notebook: Any = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in cells]
    )
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells]


def shown_types(outputs: list[Any]) -> set[str]:
    """MIME types that a cell shows."""
    return {
        name
        for output in outputs
        if output.output_type in ("execute_result", "display_data")
        for name in output.data
    }


def text_of(outputs: list[Any], stream: str) -> str:
    return "".join(
        output.text
        for output in outputs
        if output.output_type == "stream" and output.name == stream
    )


@pytest.mark.slow
@pytest.mark.usefixtures("private_folders")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(jupyter|nbclient|zmq|traitlets).*")
def test_objects_show_themselves_and_work_has_bars_in_a_notebook(
    tiny_cache: ActivationCache, model_folder: Path, tmp_path: Path
) -> None:
    ridge = residua.RidgeProbe([0, 1], layers=[1, 2]).fit(tiny_cache, keep=False)
    ridge.save(tmp_path / "ridge")
    outputs = run_notebook(
        f"import residua\ncache = residua.open({str(tiny_cache.path)!r})\ncache",
        "cache.head",
        f"ridge = residua.load_probe({str(tmp_path / 'ridge')!r})\nridge",
        "evaluation = residua.evaluate(cache, {'mine': ridge}, max_positions=256)\nevaluation",
        "maps = ridge.heatmap(residua.CachePassage(cache, width=5))\nmaps",
        "maps.plot('plotly')",
        f"residua.extract({str(model_folder)!r}, ['the cat sat on the mat'] * 200, "
        f"root={str(tmp_path / 'root')!r}, context=64)",
    )
    for number in (0, 1, 2, 3, 6):
        assert {"text/plain", "text/html"} <= shown_types(outputs[number]), number
    assert "mine" in str(outputs[3])
    assert {"text/plain", "image/png"} <= shown_types(outputs[4])
    assert "application/vnd.plotly.v1+json" in shown_types(outputs[5])
    # Quiet where nothing takes long, bars where something does.
    for number in (0, 1, 2, 4, 5):
        assert text_of(outputs[number], "stderr") == "", number
    assert all(text_of(cell, "stdout") == "" for cell in outputs)
    measured, extracted = (text_of(outputs[number], "stderr") for number in (3, 6))
    assert "evaluate: 100%" in measured
    for stage in ("tokenize", "extract"):
        assert f"{stage}: 100%" in extracted
    # A bar is closed when its stage ends: the next one is not drawn below it.
    assert "\x1b[A" not in extracted
    assert "Warning" not in measured + extracted


@pytest.mark.slow
@pytest.mark.usefixtures("private_folders")
def test_work_has_bars_in_an_ipython_shell(tiny_cache: ActivationCache) -> None:
    code = (
        f"import residua; cache = residua.open({str(tiny_cache.path)!r}); "
        "lens = residua.TunedLens(layers=[1], steps=4, batch=128, lr=0.1).fit(cache); lens"
    )
    shown = run_in_terminal([sys.executable, "-m", "IPython", "--no-banner", "-c", code])
    assert "lens" in shown
    assert "100%" in shown
    assert "TunedLens(" in shown
    assert "Traceback" not in shown


def run_in_terminal(command: list[str]) -> str:
    """What `command` prints on a terminal of its own; it is stopped after `SECONDS`."""
    main, terminal = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    pieces, deadline = [], time.monotonic() + SECONDS
    try:
        while time.monotonic() < deadline:
            if not select.select([main], [], [], 1.0)[0]:
                continue
            try:
                piece = os.read(main, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            pieces.append(piece)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
        os.close(main)
    assert process.returncode == 0
    return b"".join(pieces).decode(errors="replace")

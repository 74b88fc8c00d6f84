"""The notebooks of the documentation run from top to bottom in a real kernel, without errors."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
SECONDS = 900
"""Longest time of one cell."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(jupyter|nbclient|zmq|traitlets).*")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    notebook: Any = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs for cell in code), "notebooks are committed without outputs"
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    shown = [output for cell in code for output in cell.outputs]
    pictures = [
        output
        for output in shown
        if output.output_type in ("execute_result", "display_data") and "image/png" in output.data
    ]
    assert len(pictures) >= 1
    assert "Traceback" not in str(shown)


def test_there_are_notebooks_for_newcomers_and_for_papers() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {"first-hour", "paper-table"}

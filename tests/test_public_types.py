"""The types of the public names, as type checkers of an installed residua see them."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import residua

ROOT = Path(residua.__file__ or "").parent
WITHOUT_PYRIGHT = find_spec("pyright") is None and "CI" not in os.environ
LEAST_SHARE = 0.98
"""Share of the public names whose type is known without inference."""


def install_copy(folder: Path) -> None:
    """Make a virtual environment in `folder` with the package's files and this one's libraries."""
    venv.create(folder, with_pip=False)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    for name in ("cache", "probes", "analysis", "sample"):
        shutil.copytree(
            ROOT / name, site / "residua" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for path in (*ROOT.glob("*.py"), ROOT / "py.typed"):
        shutil.copy(path, site / "residua")
    libraries = [path for path in sys.path if path.endswith("-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")


def verify_types(folder: Path) -> dict[str, Any]:
    """What `pyright --verifytypes residua` reports in the virtual environment in `folder`."""
    command = [sys.executable, "-m", "pyright", "--verifytypes", "residua", "--ignoreexternal"]
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    run = subprocess.run(
        [*command, "--outputjson"],
        cwd=folder,
        env={**os.environ, "PATH": path, "VIRTUAL_ENV": str(folder)},
        capture_output=True,
        text=True,
    )
    # The exit status is 1 as long as one type is unknown.
    assert run.returncode in (0, 1), run.stderr
    return json.loads(run.stdout)["typeCompleteness"]


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_PYRIGHT, reason="needs pyright: pip install -e '.[dev]'")
def test_the_types_of_public_names_are_known(tmp_path: Path) -> None:
    install_copy(tmp_path)
    report = verify_types(tmp_path)
    assert Path(report["packageRootDirectory"]).is_relative_to(tmp_path.resolve())
    assert report["exportedSymbolCounts"]["withKnownType"] > 1000
    doubtful = [
        f"{symbol['name']}: {remark['message']}"
        for symbol in report["symbols"]
        if symbol["isExported"] and (not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"])
        for remark in symbol["diagnostics"]
    ]
    share = report["completenessScore"]
    print(f"{share:.1%} of the public names have a known type")
    assert share >= LEAST_SHARE, "\n".join([f"{share:.1%}; without a known type:", *doubtful])

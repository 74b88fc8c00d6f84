"""The site: built from the pages and the docstrings without a warning, with every public name."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import residua

ROOT = Path(residua.__file__ or "").parent
WITHOUT_SPHINX = find_spec("sphinx") is None and "CI" not in os.environ


def build_site(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Sphinx as `make site` does, warnings as errors, from `source` into `folder / "site"`."""
    options = ["-q", "-W", "--keep-going", "-c", str(ROOT / "docs"), "-d", str(folder / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(folder / "site")]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_page_of_public_names_has_all_of_them() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    names = re.findall(
        r"^\.\. auto(?:class|exception|function):: residua\.(\w+)$", page, re.MULTILINE
    )
    assert sorted(names) == sorted([*residua.__all__, "open"])


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_SPHINX, reason="needs sphinx: pip install -e '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    run = build_site(ROOT, tmp_path)
    assert run.returncode == 0, run.stderr
    site = tmp_path / "site"
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / "docs" / f"{page.stem}.html").is_file(), page
    index = (site / "index.html").read_text()
    assert index == (site / "README.html").read_text()
    assert 'href="docs/probes.html"' in index
    assert 'href="../cache/README.html"' in (site / "docs" / "data.html").read_text()
    # Every public name has its place, methods and docstrings theirs.
    names = (site / "docs" / "api.html").read_text()
    for name in [*residua.__all__, "open", "RidgeProbe.fit", "RidgeProbe.save"]:
        assert f'id="residua.{name}"' in names, name
    sentence = (residua.RidgeProbe.__doc__ or "").splitlines()[0]
    assert sentence in names


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_SPHINX, reason="needs sphinx: pip install -e '.[docs]'")
def test_a_link_that_leads_nowhere_stops_the_site(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Start\n\n[a page](docs/missing.md)\n")
    run = build_site(tmp_path, tmp_path)
    assert run.returncode != 0
    assert "docs/missing.md" in run.stderr

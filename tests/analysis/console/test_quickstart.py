"""The quickstart runs as a newcomer runs it, and says what the pages promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from residua.analysis.console.quickstart import check_transformers
from residua.cache.errors import UsageError


@pytest.mark.slow
def test_the_quickstart_makes_cache_probe_report_and_pictures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "residua.cli", "quickstart", "--max-tokens", "40000", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert Path(tmp_path, found["path"], "manifest.json").is_file()
    page = Path(tmp_path, found["report"]).read_text()
    assert "ridge lens" in page
    assert 'src="http' not in page
    assert all(Path(tmp_path, name).stat().st_size > 10_000 for name in found["pictures"])
    rows = {(r["probe"], r["layer"], r["offset"]): r for r in found["rows"]}
    last = max(layer for _, layer, _ in rows if layer is not None)
    assert rows["logit", 1, 0]["kl"] > 3
    for layer in range(last):
        assert rows["ridge", layer, 0]["kl"] < rows["logit", layer, 0]["kl"]
    assert rows["ridge", last, 0]["kl"] < 1e-4
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(again.stdout)["status"] == "hit"


def test_a_transformers_that_cannot_read_the_sample_model_is_named() -> None:
    for good in ("5.14.0", "5.23.0.dev0", "6.0"):
        check_transformers(good)
    with pytest.raises(UsageError, match=r"transformers 5\.14, and 5\.9\.1 is installed: pip"):
        check_transformers("5.9.1")

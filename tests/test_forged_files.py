"""Files of strangers: whatever they hold, every reader ends in a result or in one clear error.

`support/forged_calls.py` changes one place of a cache or a saved probe (JSON, tensors, tables,
metadata, sizes, files), makes all digests right again, and calls what a user may call: no
traceback, at most ten seconds of CPU time and one GiB of memory for any of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "support" / "forged_calls.py"
PARTS, MUTANTS = 24, 220
"""Cases of the long test, and forged files of each: 5,280 in all."""
FEW_MUTANTS = 10
"""Forged files of the short test."""


def failures_of(folder: Path, seed: str, mutants: int) -> dict[str, list[str]]:
    """Place in the code -> reports of the calls that failed there."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), seed, str(mutants)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["calls"] >= 2 * mutants
    return result["failures"]


def test_some_forged_files_end_in_one_clear_error(tmp_path: Path) -> None:
    failures = failures_of(tmp_path, "few", FEW_MUTANTS)
    assert not failures, "\n\n".join(reports[0] for reports in failures.values())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_forged_files_end_in_one_clear_error(part: int, tmp_path: Path) -> None:
    failures = failures_of(tmp_path, f"part {part}", MUTANTS)
    assert not failures, "\n\n".join(reports[0] for reports in failures.values())

"""Runs code in a process that finds the libraries of the base install alone, none of an extra."""

import json
import subprocess
import sys
from typing import Any

HIDE = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN: return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import json, numpy as np, residua
from residua.cache.optional_libraries import EXTRA_OF
"""
"""Finders of modules that find no library of `HIDDEN`; then what the code of tests uses."""


def run_base_install(code: str, *hidden: str) -> Any:
    """What `code` prints last, as JSON, where `hidden` (default: all of extras) is missing."""
    from residua.cache.optional_libraries import EXTRA_OF

    prefix = f"HIDDEN = {set(hidden or EXTRA_OF)!r}\n{HIDE}"
    found = subprocess.run(
        [sys.executable, "-c", prefix + code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])

"""The OpenAPI document is true: schemathesis asks every endpoint for what the document allows.

No request, right or wrong, makes the service fail, and every answer is one that the document has.
"""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from residua import RidgeProbe
from residua.probes.saved.library import new_probe_path

from ...support.services import running_service
from ...support.synthetic import make_cache, random_head

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,response_headers_conformance"
)
RUN_SECONDS = 600


@pytest.mark.slow
@pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed")
@pytest.mark.parametrize("scope", ["write", "none"])
def test_no_request_breaks_the_service_or_its_document(tmp_path: Path, scope: str) -> None:
    root = tmp_path / "root"
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(640, 8)).astype(np.float32) for _ in range(3)]
    cache = make_cache(root, layers, [40] * 16, random_head(8, 32))
    probe = RidgeProbe([1]).fit(cache, progress=None)
    probe.save(new_probe_path(root, probe, cache.id))
    with running_service(root, jobs=True) as server:
        token = server.service.tokens.write if scope == "write" else "none"
        command = [
            *(
                shutil.which("schemathesis", path=str(Path(sys.executable).parent))
                or "schemathesis",
            ),
            *("run", f"{server.address}/v1/openapi.json", "--checks", CHECKS),
            *("--max-examples", "15", "--seed", "1", "--phases", "examples,coverage,fuzzing"),
            *("-H", f"Authorization: Bearer {token}", "--request-timeout", "30"),
            *("--generation-database", "none", "--no-color"),
        ]
        run = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=RUN_SECONDS
        )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "operations" in run.stdout.lower()

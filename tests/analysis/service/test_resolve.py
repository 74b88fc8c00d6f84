"""Which cache answers an extraction: the same answer by the command and by the service."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from residua.cli import main

from ...support.services import running_service

LIMIT = ("--context", "32", "--max-tokens", "600")


def find(root: Path, *words: object) -> tuple[dict[str, Any], str]:
    """What `residua extract --find` prints as JSON, and for people."""
    arguments = ["extract", *map(str, words), "--find", "--root", str(root)]
    printed = CliRunner().invoke(main, [*arguments, "--json"])
    assert printed.exit_code == 0, printed.output
    return json.loads(printed.stdout), CliRunner().invoke(main, arguments).stdout


@pytest.mark.slow
def test_the_command_and_the_service_say_what_a_cache_lacks(
    tmp_path: Path, model_folder: Path, texts_file: Path
) -> None:
    root = tmp_path / "root"
    missed, text = find(root, model_folder, texts_file, *LIMIT)
    assert (missed["answer"], missed["cache"]) == ("miss", None)
    assert text.startswith("miss: ")
    assert not root.exists()

    words = ["extract", str(model_folder), str(texts_file), *LIMIT, "--root", str(root)]
    result = CliRunner().invoke(main, [*words, "--layers", "1", "--json"])
    assert result.exit_code == 0, result.output
    cache = json.loads(result.stdout)["cache"]
    hit, text = find(root, model_folder, texts_file, *LIMIT, "--layers", "1")
    assert (hit["answer"], hit["cache"]) == ("hit", cache)
    assert text.startswith(f"hit: cache {cache[:12]}")
    partial, text = find(root, model_folder, texts_file, *LIMIT)
    assert partial["answer"] == "partial"
    assert partial["missing_layers"] == [0, 2]
    assert "layers 0" in text

    folders: Any = {"models": (model_folder.parent,), "texts": (texts_file.parent,)}
    with running_service(root, jobs=True, **folders) as server:
        url = server.address + "/v1/resolve"
        body = {"model": model_folder.name, "data": texts_file.name, "context": 32}
        headers = {"Authorization": f"Bearer {server.service.tokens.write}"}
        answer = httpx.post(url, json={**body, "max_tokens": 600}, headers=headers, timeout=100)
        assert answer.json() == partial
        assert httpx.post(url, json=body, timeout=20).status_code == 401
        outside = httpx.post(url, json={**body, "data": "../x"}, headers=headers, timeout=20)
        assert (outside.status_code, outside.json()["code"]) == (400, "usage")
        wrong = httpx.post(url, json={**body, "bos": "x"}, headers=headers, timeout=100)
        assert (wrong.status_code, wrong.json()["error"]) == (400, "UsageError")

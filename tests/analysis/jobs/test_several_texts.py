"""Several uploaded texts as one folder: in the order of their list, and nothing from elsewhere."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from residua.analysis.jobs.job_inputs import LIST_NAME, TextUpload, confine_data
from residua.analysis.jobs.job_settings import JobSettings
from residua.cache.documents.data_files import data_paths
from residua.cache.errors import NotFoundError, UsageError


@pytest.fixture
def settings(tmp_path: Path) -> JobSettings:
    return JobSettings(tmp_path / "root", tmp_path / "state")


def upload(settings: JobSettings, content: bytes, name: str) -> dict[str, str]:
    digest = hashlib.sha256(content).hexdigest()
    text = TextUpload(settings, digest, name)
    try:
        text.write(content)
        text.finish()
    finally:
        text.discard()
    return {"sha256": digest, "name": name}


def join(settings: JobSettings, value: Any) -> Path:
    content = json.dumps(value).encode()
    digest = upload(settings, content, LIST_NAME)["sha256"]
    path = confine_data(settings, f"upload:{digest}/{LIST_NAME}")
    assert isinstance(path, Path)
    return path


def test_texts_are_read_in_the_order_of_the_list(settings: JobSettings) -> None:
    contents = [f'{{"text": "{number}"}}\n'.encode() for number in range(12)]
    files = [upload(settings, content, "part.jsonl") for content in contents]
    folder = join(settings, {"files": [*files, files[0]]})
    paths = data_paths(str(folder))
    assert paths is not None
    assert [path.read_bytes() for path in paths] == [*contents, contents[0]]
    assert join(settings, {"files": [*files, files[0]]}) == folder
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"files": []},
        {"files": {}},
        {"files": ["a"]},
        {"files": [{"sha256": "0" * 63, "name": "a.txt"}]},
        {"files": [{"sha256": "0" * 64}]},
        {"files": [{"sha256": "0" * 64, "name": 3}]},
        {"files": [{"sha256": "../" * 20, "name": "a.txt"}]},
    ],
)
def test_a_forged_list_is_refused(settings: JobSettings, value: Any) -> None:
    with pytest.raises(UsageError, match="list of texts"):
        join(settings, value)


@pytest.mark.parametrize("name", ["../../tokens.json", ".hidden", "a/b", LIST_NAME, "a\0b"])
def test_a_list_names_no_other_files(settings: JobSettings, name: str) -> None:
    text = upload(settings, b"text", "a.txt")
    with pytest.raises(UsageError):
        join(settings, {"files": [text, {**text, "name": name}]})
    with pytest.raises(NotFoundError):
        join(settings, {"files": [text, {"sha256": "0" * 64, "name": "a.txt"}]})
    assert list((settings.state / "texts").rglob("*several-*")) == []

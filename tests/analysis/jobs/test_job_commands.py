"""Requests of jobs are checked before anything runs: names, models and texts, equal requests."""

import os
from pathlib import Path

import pytest

import residua
from residua.analysis.jobs.job_commands import JOB_COMMANDS, check_request, describe_commands
from residua.analysis.jobs.job_inputs import TextUpload, find_upload
from residua.analysis.jobs.job_settings import JobSettings
from residua.cache.errors import (
    LimitError,
    MismatchError,
    NotFoundError,
    ResiduaError,
    UsageError,
)


@pytest.fixture
def settings(
    tiny_cache: residua.ActivationCache, model_folder: Path, texts_file: Path, tmp_path: Path
) -> JobSettings:
    return JobSettings(
        root=tiny_cache.path.parent,
        state=tmp_path / "state",
        models=(model_folder.parent,),
        texts=(texts_file.parent,),
    )


def test_requests_that_mean_the_same_are_one_job(
    settings: JobSettings, tiny_cache: residua.ActivationCache
) -> None:
    def job_of(**arguments: object) -> str:
        return check_request(settings, "fit ridge", arguments).job_id

    identity = job_of(cache=tiny_cache.id, offsets="0-3", folds=5, memory="2GB")
    assert identity == job_of(cache=tiny_cache.id[:6], offsets=[0, 1, 2, 3], memory="2 GB")
    assert identity != job_of(cache=tiny_cache.id, offsets="0-2", memory="2GB")
    last = tiny_cache.n_blocks
    assert job_of(cache=tiny_cache.id, layers="-1") == job_of(cache=tiny_cache.id, layers=[last])

    def evaluation_of(count: object) -> str:
        arguments = {"cache": tiny_cache.id, "max_positions": count}
        return check_request(settings, "evaluate", arguments).job_id

    assert evaluation_of("1k") == evaluation_of(1000) == evaluation_of("1e3")
    salted = check_request(settings, "fit ridge", {"cache": tiny_cache.id}, "a key")
    assert salted.job_id != job_of(cache=tiny_cache.id)


@pytest.mark.parametrize(
    ("command", "arguments", "error", "message"),
    [
        ("fit ridge", {"layers": "x"}, UsageError, "Invalid value for '--layers'"),
        ("fit ridge", {"layers": "99"}, NotFoundError, "layer 99 is not in this cache"),
        ("fit ridge", {"cache": "../x"}, NotFoundError, "no cache"),
        ("fit ridge", {"cache": "/etc"}, NotFoundError, "no cache"),
        ("fit ridge", {"cache": 3}, NotFoundError, "no cache"),
        ("fit ridge", {"cache": None}, UsageError, "Missing argument 'CACHE'"),
        ("fit ridge", {"out": "/tmp/probe"}, UsageError, "a job takes no out"),
        ("fit ridge", {"root": "/"}, UsageError, "has no argument"),
        ("fit ridge", {"server": "http://x"}, UsageError, "has no argument"),
        ("fit ridge", {"scheduler": "tcp://x:1"}, UsageError, "a job takes no scheduler"),
        ("fit ridge", {"offsets": {"a": 1}}, UsageError, "offsets must be a text"),
        ("fit ridge", {"offsets": "0\0"}, UsageError, "offsets must be a text"),
        ("fit ridge", {"across_documents": "yes"}, UsageError, "true or false"),
        ("fit lens", {"checkpoint": "/tmp/x"}, UsageError, "a job takes no checkpoint"),
        ("evaluate", {"probes": ["../x"]}, NotFoundError, "no probe"),
        ("fit basis", {"lens": "/etc/passwd"}, NotFoundError, "no probe"),
        ("rm", {}, UsageError, "is no job"),
        ("serve", {}, UsageError, "is no job"),
    ],
)
def test_a_wrong_request_is_refused_at_once(
    settings: JobSettings,
    tiny_cache: residua.ActivationCache,
    command: str,
    arguments: dict[str, object],
    error: type[ResiduaError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        check_request(settings, command, {"cache": tiny_cache.id, **arguments})


def test_models_and_texts_lie_below_their_folders(
    settings: JobSettings, model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    def words_of(**arguments: object) -> list[str]:
        given = {"model": model_folder.name, "data": texts_file.name, **arguments}
        return check_request(settings, "extract", given).words

    assert str(model_folder.resolve()) in words_of()
    assert str(texts_file.resolve()) in words_of()
    assert words_of(model=str(model_folder), data=str(texts_file)) == words_of()
    assert words_of(data="*.jsonl")[-1] == str(texts_file.resolve().parent / "*.jsonl")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    (elsewhere / "texts.txt").write_text("text")
    link, inner = model_folder.parent / "link", model_folder.parent / "inner"
    link.symlink_to(elsewhere)
    inner.mkdir()
    (inner / "config.json").symlink_to(elsewhere / "config.json")
    text_link = texts_file.parent / "link.txt"
    text_link.symlink_to(elsewhere / "texts.txt")
    try:
        for model in (elsewhere, "../elsewhere", "link", "inner", "/", "..", "org/name", "gpt2"):
            with pytest.raises(UsageError, match="must lie below|leads out"):
                words_of(model=str(model))
        for data in (elsewhere / "texts.txt", "link.txt", "l*.txt", "../*", "/etc/*", "-", "a/b"):
            with pytest.raises(UsageError):
                words_of(data=str(data))
    finally:
        for path in (link, text_link, inner / "config.json"):
            path.unlink()
        inner.rmdir()


def test_code_of_a_model_needs_the_servers_leave(settings: JobSettings, model_folder: Path) -> None:
    arguments = {"model": model_folder.name, "data": "x.txt", "trust_remote_code": True}
    with pytest.raises(UsageError, match="runs no code that comes with a model"):
        check_request(settings, "extract", arguments)


def test_a_changed_text_makes_another_job(
    settings: JobSettings, model_folder: Path, texts_file: Path
) -> None:
    path = texts_file.parent / "changing.txt"
    arguments = {"model": model_folder.name, "data": path.name}
    path.write_text("one")
    before = check_request(settings, "extract", arguments).job_id
    assert check_request(settings, "extract", arguments).job_id == before
    path.write_text("another")
    assert check_request(settings, "extract", arguments).job_id != before
    path.unlink()


def test_every_command_is_described_without_what_a_server_chooses(settings: JobSettings) -> None:
    schemas = describe_commands(settings)
    assert set(schemas) == set(JOB_COMMANDS)
    ridge = schemas["fit ridge"]
    assert ridge["required"] == ["cache"]
    assert ridge["properties"]["products"]["enum"] == ["float64", "float32"]
    assert ridge["properties"]["offsets"]["default"] == "0"
    assert ridge["properties"]["across_documents"]["type"] == "boolean"
    for schema in schemas.values():
        assert not {"root", "server", "out", "scheduler", "checkpoint"} & set(schema["properties"])
        assert "trust_remote_code" not in schema["properties"]


def test_a_sent_text_is_kept_under_its_digest(settings: JobSettings) -> None:
    import hashlib

    text = b"some text\n" * 100
    digest = hashlib.sha256(text).hexdigest()
    upload = TextUpload(settings, digest, "texts.txt")
    upload.write(text[:500])
    with pytest.raises(NotFoundError):
        find_upload(settings, digest, "texts.txt")
    upload.write(text[500:])
    path = upload.finish()
    upload.discard()
    assert find_upload(settings, digest, "texts.txt") == path
    assert path.read_bytes() == text

    wrong = TextUpload(settings, "0" * 64, "texts.txt")
    wrong.write(text)
    with pytest.raises(MismatchError, match="send it again"):
        wrong.finish()
    wrong.discard()
    assert os.listdir(settings.state / "texts") == [digest]
    for name in ("../x", ".hidden", "a/b", "", "x\n"):
        with pytest.raises(UsageError):
            TextUpload(settings, digest, name)


def test_sent_texts_are_bounded(settings: JobSettings) -> None:
    from dataclasses import replace

    small = replace(settings, most_upload_bytes=10)
    upload = TextUpload(small, "0" * 64, "texts.txt")
    upload.write(b"1234567890")
    with pytest.raises(LimitError, match="larger than 10 bytes"):
        upload.write(b"1")
    upload.discard()


def test_studies_and_interventions_name_caches_texts_and_the_model_of_the_cache(
    settings: JobSettings, texts_file: Path, tiny_cache: residua.ActivationCache
) -> None:
    short = tiny_cache.id[:8]
    study = check_request(settings, "study depth", {"cache": short, "step": [f"10={short}"]})
    assert f"--step=10={tiny_cache.id}" in study.words
    other = check_request(settings, "study depth", {"cache": short, "step": [f"20={short}"]})
    assert other.job_id != study.job_id
    with pytest.raises(NotFoundError, match="a job names a cache of the server"):
        check_request(settings, "study transfer", {"cache": short, "to": "../elsewhere"})
    files = check_request(settings, "study all", {"cache": short, "csv": "x", "png": "y"})
    assert {"--csv=files/tables", "--png=files/pictures"} <= set(files.words)
    edit = check_request(
        settings, "intervene edit", {"cache": short, "sentences": texts_file.name, "layers": "-2"}
    )
    assert f"--sentences={texts_file}" in edit.words
    assert any(word.startswith("--model=") for word in edit.words)
    with pytest.raises(UsageError, match=r"must lie below|leads out|no path|names no"):
        check_request(settings, "intervene edit", {"cache": short, "sentences": "/etc/passwd"})

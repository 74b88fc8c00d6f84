"""Token streams are remembered, and never believed when texts, options or tokenizer changed."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.cache.errors import CorruptError
from residua.cache.extraction import answer, stream_memo
from residua.cache.extraction.answer import answer_request, find_match
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.extraction.resolve import read_stream, summarize_stream
from residua.cache.extraction.stream_memo import data_stamps, read_stream_memo, write_stream_memo
from residua.cache.model import weight_digests
from residua.cache.model.source import ModelSource
from residua.cache.tokens.stream_summary import StreamSummary

OPTIONS: dict[str, Any] = {"context": 40, "part_positions": 512, "batch_tokens": 200}


@pytest.fixture(autouse=True)
def memos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of an empty memo that also accepts small files and files changed a moment ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(stream_memo, "MIN_BYTES", 0)
    monkeypatch.setattr(weight_digests, "SETTLED_SECONDS", 0)
    return weight_digests.memo_path().parent / "streams"


@pytest.fixture
def data(texts_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(texts_file, tmp_path / "texts.jsonl"))


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Data of the requests whose texts were tokenized so far."""
    names: list[str] = []

    def record_and_read(request: ExtractionRequest, *arguments: Any) -> Any:
        names.append(request.data)
        return read_stream(request, *arguments)

    monkeypatch.setattr(answer, "read_stream", record_and_read)
    return names


def request_for(model: Path, data: Path, root: Path, **options: Any) -> ExtractionRequest:
    return ExtractionRequest(str(model), str(data), root, **{**OPTIONS, **options})


def summary_of(request: ExtractionRequest) -> StreamSummary:
    source = ModelSource.locate(request.model)
    return summarize_stream(request, source, read_stream(request, source, None))


def assert_equal(one: StreamSummary | None, other: StreamSummary) -> None:
    assert one is not None
    np.testing.assert_array_equal(one.hashes, other.hashes)
    assert one.hashes.dtype == other.hashes.dtype == np.uint64
    assert one.to_dict() == other.to_dict()
    assert one.reading.to_dict() == other.reading.to_dict()


def test_asking_again_tokenizes_nothing(
    model_folder: Path, data: Path, tmp_path: Path, tokenized: list[str]
) -> None:
    request = request_for(model_folder, data, tmp_path / "root")
    made = answer_request(request)
    assert len(tokenized) == 1
    again = answer_request(request)
    assert (again.status, again.cache.id) == ("hit", made.cache.id)
    assert (again.cut, again.reading.to_dict()) == (made.cut, made.reading.to_dict())
    # Fewer layers are the same tokens.
    assert answer_request(replace(request, layers=(0,))).status == "hit"
    assert find_match(request).answer == "hit"
    assert len(tokenized) == 1


def test_another_root_gets_a_cache_from_the_texts(
    model_folder: Path, data: Path, tmp_path: Path, tokenized: list[str]
) -> None:
    made = answer_request(request_for(model_folder, data, tmp_path / "a"))
    other = answer_request(request_for(model_folder, data, tmp_path / "b"))
    assert (other.status, other.cache.id) == ("extracted", made.cache.id)
    assert len(tokenized) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"context": 30},
        {"pack": False},
        {"seed": 1},
        {"max_tokens": 400},
        {"positions": "last"},
        {"format": 1},
        {"text_column": "text"},
    ],
)
def test_other_options_are_another_stream(
    model_folder: Path, data: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = ModelSource.locate(str(model_folder))
    request = request_for(model_folder, data, tmp_path / "root")
    write_stream_memo(request, source, data_stamps(str(data)), summary_of(request))
    other = replace(request, **options)
    assert read_stream_memo(other, source) is None
    write_stream_memo(other, source, data_stamps(str(data)), summary_of(other))
    assert_equal(read_stream_memo(other, source), summary_of(other))
    assert_equal(read_stream_memo(request, source), summary_of(request))


def test_changed_texts_are_read_again(
    model_folder: Path, data: Path, tmp_path: Path, tokenized: list[str]
) -> None:
    request = request_for(model_folder, data, tmp_path / "root")
    made = answer_request(request)
    before, raw = data.stat(), data.read_bytes()
    lines = raw.splitlines(keepends=True)
    data.write_bytes(b"".join([*lines[60:], *lines[:60]]))
    # Of the same size, and with the old time stamp put back, as some copying tools do.
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert answer_request(request).cache.id != made.cache.id
    assert len(tokenized) == 2
    # A file of the old bytes in place of the other.
    replacement = tmp_path / "replacement"
    replacement.write_bytes(raw)
    os.utime(replacement, ns=(before.st_atime_ns, before.st_mtime_ns))
    replacement.replace(data)
    assert answer_request(request).cache.id == made.cache.id
    assert len(tokenized) == 3


def test_another_tokenizer_tokenizes_again(
    model_folder: Path, data: Path, tmp_path: Path, tokenized: list[str]
) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    request = request_for(model, data, tmp_path / "root")
    made = answer_request(request)
    path = model / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(settings))
    again = answer_request(request)
    assert again.cache.manifest.tokens.tokenizer != made.cache.manifest.tokens.tokenizer
    assert len(tokenized) == 2


def test_other_code_tokenizes_again(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource.locate(str(model_folder))
    request = request_for(model_folder, data, tmp_path / "root")
    write_stream_memo(request, source, data_stamps(str(data)), summary_of(request))
    assert read_stream_memo(request, source) is not None
    monkeypatch.setattr(stream_memo, "_code_digest", lambda: "0" * 64)
    assert read_stream_memo(request, source) is None


@pytest.mark.parametrize("damage", ["cut", "flip", "strange", "empty"])
def test_a_damaged_memo_is_made_again(
    model_folder: Path, data: Path, tmp_path: Path, memos: Path, tokenized: list[str], damage: str
) -> None:
    request = request_for(model_folder, data, tmp_path / "root")
    answer_request(request)
    (memo,) = memos.glob("*.json")
    raw = memo.read_bytes()
    damaged = {"cut": raw[:-20], "flip": raw.replace(b'"split_by"', b'"split_bx"'), "empty": b""}
    memo.write_bytes(damaged.get(damage, b'{"summary": 3}'))
    assert answer_request(request).status == "hit"
    assert len(tokenized) == 2
    assert memo.read_bytes() == raw


def test_forged_summaries_are_refused() -> None:
    value = StreamSummary("a", np.zeros(2, np.uint64), 3, "document", "t").to_dict()
    value["cut"] = {"sequences": 0, "tokens": 0}
    assert StreamSummary.from_dict(value).sequences == 2
    forged: dict[str, Any] = {"hashes": "*", "positions": "x", "cut": [], "reading": None}
    for name, other in forged.items():
        with pytest.raises(CorruptError, match="no summary"):
            StreamSummary.from_dict({**value, name: other})
    with pytest.raises(CorruptError, match="no summary"):
        StreamSummary.from_dict({})


def test_small_fresh_and_changed_data_are_not_remembered(
    model_folder: Path, data: Path, tmp_path: Path, memos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource.locate(str(model_folder))
    request = request_for(model_folder, data, tmp_path / "root")
    summary, stamps = summary_of(request), data_stamps(str(data))
    with monkeypatch.context() as patch:
        patch.setattr(stream_memo, "MIN_BYTES", 1 << 30)
        write_stream_memo(request, source, stamps, summary)
        patch.setattr(stream_memo, "MIN_BYTES", 0)
        patch.setattr(weight_digests, "SETTLED_SECONDS", 60)
        write_stream_memo(request, source, stamps, summary)
        patch.setattr(weight_digests, "SETTLED_SECONDS", 0)
        patch.setattr(stream_memo, "MAX_SEQUENCES", 1)
        write_stream_memo(request, source, stamps, summary)
    data.write_bytes(data.read_bytes() * 2)  # while the texts were read
    write_stream_memo(request, source, stamps, summary)
    assert data_stamps("org/name") is None  # a data set of the hub
    write_stream_memo(replace(request, data="org/name"), source, None, summary)
    assert not memos.exists()


def test_a_saved_data_set_is_stamped_by_all_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "data.arrow").write_bytes(b"rows")
    stamps = data_stamps(str(folder))
    assert stamps is not None
    assert [stamp[:2] for stamp in stamps] == [["train/data.arrow", 4]]
    (folder / "state.json").write_text("{}")
    assert data_stamps(str(folder)) != stamps


def test_the_memo_does_not_grow_without_end(
    model_folder: Path, data: Path, tmp_path: Path, memos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource.locate(str(model_folder))
    request = request_for(model_folder, data, tmp_path / "root")
    summary, stamps = summary_of(request), data_stamps(str(data))
    monkeypatch.setattr(stream_memo, "MAX_MEMOS", 2)
    for seed in range(4):
        write_stream_memo(replace(request, seed=seed), source, stamps, summary)
    assert len(list(memos.iterdir())) == 2
    monkeypatch.setattr(stream_memo, "MAX_MEMO_BYTES", 1)
    write_stream_memo(request, source, stamps, summary)
    assert len(list(memos.iterdir())) == 1
    assert read_stream_memo(request, source) is not None


def test_a_folder_that_cannot_be_written_costs_only_the_memo(
    model_folder: Path, data: Path, tmp_path: Path, tokenized: list[str]
) -> None:
    (tmp_path / "xdg").write_text("a file where the folder should be")
    request = request_for(model_folder, data, tmp_path / "root")
    answer_request(request)
    assert answer_request(request).status == "hit"
    assert len(tokenized) == 2

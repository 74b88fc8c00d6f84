"""Digests of weight files are remembered, and never believed when anything changed."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.files.json_files import file_digest, read_json
from residua.cache.model import weight_digests as digests
from residua.cache.model.source import ModelSource
from residua.cache.model.weight_digests import (
    memo_path,
    remembered_file_digests,
    remembered_tensor_digests,
    tensor_digests,
)


@pytest.fixture(autouse=True)
def memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of an empty memo that also accepts small files and files changed a moment ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(digests, "MIN_BYTES", 0)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0)
    return memo_path()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files hashed so far, in order."""
    names: list[str] = []

    def record_and_digest(path: Path) -> str:
        names.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(digests, "file_digest", record_and_digest)
    return names


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one" * 100)
    return path


def test_a_file_is_hashed_once(weights: Path, hashed: list[str], memo: Path) -> None:
    want = {weights.name: file_digest(weights)}
    assert remembered_file_digests([weights]) == remembered_file_digests([weights]) == want
    assert hashed == [weights.name]
    assert list(read_json(memo)["files"]) == [str(weights.resolve())]


def test_a_link_is_the_file_it_leads_to(weights: Path, tmp_path: Path, hashed: list[str]) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(weights)
    remembered_file_digests([weights])
    assert remembered_file_digests([link]) == {link.name: file_digest(weights)}
    assert hashed == [weights.name]


def test_other_content_of_the_same_size_is_hashed_again(weights: Path, hashed: list[str]) -> None:
    remembered_file_digests([weights])
    before = weights.stat()
    weights.write_bytes(b"two" * 100)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert remembered_file_digests([weights]) == {weights.name: file_digest(weights)}
    weights.write_bytes(b"six" * 100)
    # Even with the old time stamp put back, as some copying tools do.
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert remembered_file_digests([weights]) == {weights.name: file_digest(weights)}
    assert len(hashed) == 3


def test_a_file_that_took_the_place_of_another_is_hashed_again(
    weights: Path, tmp_path: Path, hashed: list[str]
) -> None:
    remembered_file_digests([weights])
    other, stat = tmp_path / "other", weights.stat()
    other.write_bytes(b"two" * 100)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(weights)
    assert remembered_file_digests([weights]) == {weights.name: file_digest(weights)}
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "strange", "empty"])
def test_a_damaged_memo_is_ignored_and_replaced(
    weights: Path, hashed: list[str], memo: Path, damage: str
) -> None:
    want = remembered_file_digests([weights])
    raw = memo.read_bytes()
    at = raw.index(want[weights.name].encode())
    memo.write_bytes({
        "cut": raw[:-20],
        "flip": raw[:at] + (b"0" if raw[at:at + 1] != b"0" else b"1") + raw[at + 1 :],
        "strange": b'{"files": {"a": 3}}',
        "empty": b"",
    }[damage])  # fmt: skip
    assert remembered_file_digests([weights]) == want
    assert hashed == [weights.name] * 2
    remembered_file_digests([weights])
    assert hashed == [weights.name] * 2


def test_a_folder_that_cannot_be_written_costs_only_the_memo(
    weights: Path, tmp_path: Path, hashed: list[str]
) -> None:
    (tmp_path / "xdg").write_text("a file where the folder should be")
    want = {weights.name: file_digest(weights)}
    assert remembered_file_digests([weights]) == remembered_file_digests([weights]) == want
    assert len(hashed) == 2


def test_small_and_fresh_files_are_not_remembered(
    weights: Path, memo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(digests, "SETTLED_SECONDS", 60)
        remembered_file_digests([weights])
    monkeypatch.setattr(digests, "MIN_BYTES", 1000)
    remembered_file_digests([weights])
    assert not memo.exists()


def test_the_memo_does_not_grow_without_end(
    weights: Path, memo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(digests.MAX_ENTRIES, "files", 3)
    others = [weights.with_name(f"{number}.safetensors") for number in range(5)]
    for number, other in enumerate(others):
        other.write_bytes(bytes([number]))
        remembered_file_digests([other])
    kept = read_json(memo)["files"]
    assert len(kept) == 3
    assert str(others[-1].resolve()) in kept


def save_tensors(path: Path, **tensors: np.ndarray) -> Path:
    save_file(tensors, path)
    return path


def test_a_tensor_is_hashed_with_its_dtype_and_shape(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    path = save_tensors(tmp_path / "a.safetensors", flat=values, wide=values.reshape(2, 3))
    found = tensor_digests(path)
    raw = values.astype("<f4").tobytes()
    assert found == {
        "flat": hashlib.sha256(b"F32 6\n" + raw).hexdigest(),
        "wide": hashlib.sha256(b"F32 2,3\n" + raw).hexdigest(),
    }


def test_tensors_are_remembered_by_file_like_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def record_and_digest(path: Path) -> dict[str, str]:
        seen.append(path.name)
        return tensor_digests(path)

    monkeypatch.setattr(digests, "tensor_digests", record_and_digest)
    path = save_tensors(tmp_path / "model.safetensors", x=np.ones(3, np.float32))
    other = save_tensors(tmp_path / "other.safetensors", y=np.zeros(2, np.float32))
    want = {path: tensor_digests(path), other: tensor_digests(other)}
    assert (
        remembered_tensor_digests([path, other]) == remembered_tensor_digests([path, other]) == want
    )
    assert seen == ["model.safetensors", "other.safetensors"]
    remembered_file_digests([path])  # one memo for both kinds: neither drops the other
    assert remembered_tensor_digests([path, other]) == want
    save_tensors(path, x=np.full(3, 2, np.float32))
    assert remembered_tensor_digests([path])[path] == tensor_digests(path) != want[path]
    assert seen == ["model.safetensors", "other.safetensors", "model.safetensors"]


def test_asking_again_reads_no_weights_and_the_identity_stays(
    model_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def record_and_digest(path: Path) -> dict[str, str]:
        seen.append(path.name)
        return tensor_digests(path)

    monkeypatch.setattr(digests, "tensor_digests", record_and_digest)
    request = ExtractionRequest(
        str(model_folder), str(texts_file), tmp_path / "root", max_tokens=400
    )
    made = answer_request(request)
    assert seen == ["model.safetensors"]
    again = answer_request(request)
    assert (again.status, again.cache.id) == ("hit", made.cache.id)
    assert seen == ["model.safetensors"]
    assert not list((tmp_path / "root").rglob("digests.json"))
    memo_path().unlink()
    assert ModelSource.locate(str(model_folder)).identity == made.cache.manifest.model

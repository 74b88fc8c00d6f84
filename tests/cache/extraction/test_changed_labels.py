"""Texts that a cache holds with other labels: the caller is told, and the cache keeps its own."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import residua
from residua.cache.errors import ResiduaWarning


def write_rows(path: Path, **labels: list[Any]) -> Path:
    """Four texts, with a column for each of `labels`."""
    rows = [
        {
            "text": f"the cat {number} sat on the mat",
            **{name: v[number] for name, v in labels.items()},
        }
        for number in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def extract(model_folder: Path, data: Path, root: Path) -> residua.ActivationCache:
    return residua.extract(model_folder, data, root=root, pack=False, progress=None)


def test_other_labels_of_the_same_texts_are_said_and_equal_ones_are_not(
    model_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    first = write_rows(tmp_path / "a.jsonl", kind=["x", "y", "x", "y"], size=[1, 2, 3, 4])
    cache = extract(model_folder, first, root)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResiduaWarning)
        assert extract(model_folder, first, root).id == cache.id
        fewer = write_rows(tmp_path / "b.jsonl", size=[1, 2, 3, 4])
        assert extract(model_folder, fewer, root).id == cache.id
        none = write_rows(tmp_path / "c.jsonl")
        assert extract(model_folder, none, root).id == cache.id
    changed = write_rows(tmp_path / "d.jsonl", kind=["x", "x", "x", "y"], size=[1, 2, 3, 4])
    with pytest.warns(
        ResiduaWarning, match=r"other labels \(kind\), and keeps its own.*residua rm"
    ):
        extract(model_folder, changed, root)
    further = write_rows(tmp_path / "e.jsonl", kind=["x", "y", "x", "y"], arm=[0, 1, 0, 1])
    with pytest.warns(ResiduaWarning, match=r"other labels \(arm\)"):
        again = extract(model_folder, further, root)
    assert again.label_names == ("kind", "size")


def test_labels_of_a_cache_of_some_positions_are_compared_run_by_run(
    model_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"

    def extract_some(data: Path) -> None:
        residua.extract(
            model_folder, data, root=root, pack=False, positions="sample:2", progress=None
        )

    same = write_rows(tmp_path / "a.jsonl", kind=["x", "y", "x", "y"])
    extract_some(same)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResiduaWarning)
        extract_some(same)
    with pytest.warns(ResiduaWarning, match=r"other labels \(kind\)"):
        extract_some(write_rows(tmp_path / "b.jsonl", kind=["x", "x", "x", "y"]))


def test_other_labels_are_said_of_texts_that_are_not_read_again(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from residua.cache.extraction import answer, stream_memo

    monkeypatch.setattr(stream_memo, "MIN_BYTES", 0)
    monkeypatch.setattr(stream_memo, "is_settled", lambda _: True)
    root = tmp_path / "root"
    extract(model_folder, write_rows(tmp_path / "a.jsonl", kind=["x", "y", "x", "y"]), root)
    other = write_rows(tmp_path / "b.jsonl", kind=["x", "y", "x", "z"])
    with pytest.warns(ResiduaWarning, match=r"other labels \(kind\)"):
        extract(model_folder, other, root)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the texts are read again")

    monkeypatch.setattr(answer, "_read_and_summarize", refuse)
    with pytest.warns(ResiduaWarning, match=r"other labels \(kind\)"):
        extract(model_folder, other, root)

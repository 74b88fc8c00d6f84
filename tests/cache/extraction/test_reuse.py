"""Rows of an existing cache are not computed again: hits, coverage, more layers, more tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import residua
from residua.cache.errors import UsageError
from residua.cache.extraction import resolve
from residua.cache.extraction.answer import answer_request, find_match
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.forward import part_runner as runner
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.tokens.splits import assign_splits, text_hash
from residua.cli import main

from ...support.models import save_model, texts

OPTIONS: dict[str, Any] = {"context": 40, "part_positions": 512, "batch_tokens": 200}


def request_for(model: Path, data: Path, root: Path, **options: Any) -> ExtractionRequest:
    return ExtractionRequest(str(model), str(data), root, **{**OPTIONS, **options})


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every forward batch that extraction runs."""
    forward_tokens: list[int] = []
    original = runner.PartRunner._residuals

    def counting(self: runner.PartRunner, batch: Any, dtypes: Any) -> Any:
        forward_tokens.append(int(sum(self.lengths[n] for n in batch.sequences)))
        return original(self, batch, dtypes)

    monkeypatch.setattr(runner.PartRunner, "_residuals", counting)
    return forward_tokens


def assert_same_rows(one: ActivationCache, other: ActivationCache, rows: int) -> None:
    for layer in one.layers:
        a, b = one.residual_array(layer).read(0, rows), other.residual_array(layer).read(0, rows)
        np.testing.assert_array_equal(a, b)


def test_a_cache_with_all_layers_answers_a_request_for_two(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    whole = answer_request(request_for(model_folder, texts_file, tmp_path))
    request = request_for(model_folder, texts_file, tmp_path, layers=(0, 2))
    assert find_match(request).answer == "covers"
    assert answer_request(request).status == "hit"
    assert answer_request(request).cache.id == whole.cache.id


def test_more_layers_extend_the_cache_in_place(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    some = answer_request(request_for(model_folder, texts_file, tmp_path / "a", layers=(1,)))
    assert some.cache.layers == (1, 3)  # layer L is always kept
    before = {p: p.read_bytes() for p in some.cache.path.rglob("*/c/*/0")}
    request = request_for(model_folder, texts_file, tmp_path / "a")
    assert find_match(request).missing_layers == (0, 2)
    more = answer_request(request)
    assert (more.status, more.cache.id) == ("extended", some.cache.id)
    assert more.cache.layers == (0, 1, 2, 3)
    assert {p: p.read_bytes() for p in before} == before
    whole = answer_request(request_for(model_folder, texts_file, tmp_path / "b"))
    for file in (whole.cache.path / "arrays.zarr").rglob("*"):
        if file.is_file():
            twin = more.cache.path / file.relative_to(whole.cache.path)
            assert twin.read_bytes() == file.read_bytes()
    assert residua.verify(more.cache.path).ok


def test_metadata_of_a_layer_that_a_power_cut_left_empty_is_made_anew(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    """The journal does not name the layer yet: its file may be there without its bytes."""
    some = answer_request(request_for(model_folder, texts_file, tmp_path / "a", layers=(1,))).cache
    metadata = some.path / "arrays.zarr/residual/0/zarr.json"
    metadata.parent.mkdir()
    metadata.write_bytes(b"")
    more = answer_request(
        request_for(model_folder, texts_file, tmp_path / "a", layers=(0, 1))
    ).cache
    whole = answer_request(
        request_for(model_folder, texts_file, tmp_path / "b", layers=(0, 1))
    ).cache
    assert metadata.read_bytes() == (whole.path / "arrays.zarr/residual/0/zarr.json").read_bytes()
    assert_same_rows(more, whole, whole.positions)
    assert residua.verify(more.path).ok


@pytest.mark.parametrize("pack", [True, False])
def test_more_tokens_extend_without_running_what_is_there(
    model_folder: Path, texts_file: Path, tmp_path: Path, forwards: list[int], pack: bool
) -> None:
    few = answer_request(
        request_for(model_folder, texts_file, tmp_path, max_tokens=1300, pack=pack)
    ).cache
    forwards.clear()
    request = request_for(model_folder, texts_file, tmp_path, pack=pack)
    assert find_match(request).answer == "partial"
    more = answer_request(request)
    assert more.status == "extended"
    assert sum(forwards) <= more.cache.positions - few.positions + 2 * 40
    assert_same_rows(few, more.cache, few.positions)
    alone = answer_request(
        request_for(model_folder, texts_file, tmp_path / "alone", pack=pack)
    ).cache
    # The same sequences; those of the first cache come first.
    orders = [np.argsort(cache.sequence_hash, kind="stable") for cache in (more.cache, alone)]
    rows = [cache.positions_of(o) for cache, o in zip((more.cache, alone), orders, strict=True)]
    np.testing.assert_array_equal(more.cache.tokens[:][rows[0]], alone.tokens[:][rows[1]])
    for name in ("split", "document", "length"):
        one, other = (
            cache.array(f"sequences/{name}")[:][order]
            for cache, order in zip((more.cache, alone), orders, strict=True)
        )
        np.testing.assert_array_equal(one, other)
    for layer in alone.layers:
        np.testing.assert_allclose(
            more.cache.residual_array(layer)[:][rows[0]],
            alone.residual_array(layer)[:][rows[1]],
            rtol=2e-3,
            atol=2e-3,
        )
    assert residua.verify(more.cache.path).ok
    assert residua.verify(few.path).ok
    assert (
        answer_request(
            request_for(model_folder, texts_file, tmp_path, max_tokens=1300, pack=pack)
        ).status
        == "hit"
    )


@pytest.mark.parametrize("order", [1, -1])
def test_the_cache_that_lacks_least_is_extended(
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: int,
) -> None:
    """Whatever its name: caches of 700, 2000 and 1300 tokens, listed from either end."""
    caches = [
        answer_request(
            request_for(model_folder, texts_file, tmp_path / str(number), max_tokens=number)
        ).cache
        for number in (700, 2000, 1300)
    ]
    root = tmp_path / "root"
    root.mkdir()
    for cache in caches:
        shutil.copytree(cache.path, root / cache.id)
    list_paths = resolve.list_paths
    monkeypatch.setattr(resolve, "list_paths", lambda root: sorted(list_paths(root))[::order])
    match = find_match(request_for(model_folder, texts_file, root))
    assert match.answer == "partial"
    assert match.path == root / caches[1].id


def test_full_shards_are_shared_not_copied(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    few = answer_request(request_for(model_folder, texts_file, tmp_path, max_tokens=1300)).cache
    more = answer_request(request_for(model_folder, texts_file, tmp_path)).cache
    key = "arrays.zarr/residual/1/c/0/0"
    assert (few.path / key).stat().st_ino == (more.path / key).stat().st_ino


def test_texts_added_to_the_data_extend_a_cache_of_rows(
    model_folder: Path, tmp_path: Path, forwards: list[int]
) -> None:
    def write(number: int) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(number, seed=4)))
        return path

    few = answer_request(request_for(model_folder, write(30), tmp_path / "root", pack=False)).cache
    forwards.clear()
    more = answer_request(request_for(model_folder, write(50), tmp_path / "root", pack=False))
    assert more.status == "extended"
    assert len(more.cache.sequence_length) == 50
    assert sum(forwards) == more.cache.positions - few.positions
    assert_same_rows(few, more.cache, few.positions)
    assert (
        answer_request(request_for(model_folder, write(50), tmp_path / "root", pack=False)).status
        == "hit"
    )


def test_an_interrupted_extension_is_finished_and_the_old_cache_reads_on(
    model_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = answer_request(
        request_for(model_folder, texts_file, tmp_path, layers=(1,), max_tokens=1300)
    ).cache
    with monkeypatch.context() as patch:

        def failing(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(runner.PartRunner, "_residuals", failing)
        with pytest.raises(KeyboardInterrupt):
            answer_request(request_for(model_folder, texts_file, tmp_path, max_tokens=1300))
    again = ActivationCache(few.path)
    assert again.layers == (1, 3)
    assert not again.finished
    np.testing.assert_array_equal(again.residual_array(1)[:], few.residual_array(1)[:])
    extraction = answer_request(request_for(model_folder, texts_file, tmp_path, max_tokens=1300))
    assert extraction.cache.layers == (0, 1, 2, 3)
    assert extraction.status == "resumed"


def test_neighbouring_parts_that_lack_different_layers_get_all_of_them(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    """The sequence that runs over their border goes through the model for one, then the other."""
    whole = answer_request(request_for(model_folder, texts_file, tmp_path / "whole")).cache
    answer_request(
        request_for(model_folder, texts_file, tmp_path / "root", layers=(1,), part="1/2")
    )
    extraction = answer_request(request_for(model_folder, texts_file, tmp_path / "root"))
    assert extraction.cache.n_parts > 2
    assert extraction.cache.layers == (0, 1, 2, 3)
    assert_same_rows(whole, extraction.cache, whole.positions)


def test_other_weights_or_capture_are_a_miss_that_says_why(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    answer_request(request_for(model_folder, texts_file, tmp_path, max_tokens=500))
    tuned = save_model(tmp_path / "tuned", seed=3)
    match = find_match(request_for(tuned, texts_file, tmp_path, max_tokens=500))
    assert match.answer == "miss"
    assert [name for name, _, _ in match.differences] == ["model.weights"]
    match = find_match(
        request_for(model_folder, texts_file, tmp_path, max_tokens=500, dtype="float32")
    )
    assert [name for name, _, _ in match.differences] == ["capture.dtype"]


def test_diff_names_the_fields(model_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    one = answer_request(request_for(model_folder, texts_file, tmp_path, max_tokens=500)).cache
    other = answer_request(
        request_for(model_folder, texts_file, tmp_path, max_tokens=500, dtype="float32")
    ).cache
    args = ["diff", one.id, other.id, "--root", str(tmp_path), "--json"]
    (difference,) = json.loads(CliRunner().invoke(main, args).stdout)["differences"]
    assert difference == {"field": "capture.dtype", "one": "auto", "other": "float32"}


def test_a_hit_needs_no_weights_in_memory(
    model_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_request(request_for(model_folder, texts_file, tmp_path))
    monkeypatch.setattr(
        "residua.cache.extraction.answer.load_requested_model",
        lambda *_: pytest.fail("model loaded"),
    )
    assert answer_request(request_for(model_folder, texts_file, tmp_path)).status == "hit"


def test_a_moved_root_still_answers(model_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    answer_request(request_for(model_folder, texts_file, tmp_path / "here"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert answer_request(request_for(model_folder, texts_file, tmp_path / "there")).status == "hit"


def test_layers_out_of_range_are_refused(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="layer 40 is not in this model; it has layers 0-3"):
        answer_request(request_for(model_folder, texts_file, tmp_path, layers=(0, 40)))
    assert not list(tmp_path.glob("*/manifest.json"))


def test_a_cache_of_few_rows_is_small_and_grows_into_the_layout_of_its_size(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    few, more = tmp_path / "few.jsonl", tmp_path / "more.jsonl"
    lines = texts_file.read_text().splitlines(keepends=True)
    hashes = np.array([text_hash(json.loads(line)["text"]) for line in lines[:40]], np.uint64)
    # One document of each split, so that none has to move to fill a split.
    first = np.unique(assign_splits(hashes), return_index=True)[1]
    few.write_text("".join(lines[number] for number in first))
    more.write_text("".join(lines[:40]))
    options = {"pack": False, "context": 64, "dtype": "float32"}
    small = residua.extract(model_folder, few, root=tmp_path / "root", **options)
    assert small.positions <= small.manifest.layout.chunk_rows < 2 * small.positions
    shards = list((small.path / "arrays.zarr/residual").glob("*/c/0/0"))
    row = 4 * small.d_model
    assert all(path.stat().st_size < 2 * small.positions * row + 100 for path in shards)
    grown = residua.extract(model_folder, more, root=tmp_path / "root", **options)
    alone = residua.extract(model_folder, more, root=tmp_path / "alone", **options)
    assert grown.manifest.extra["extends"] == small.id
    assert grown.manifest.layout == alone.manifest.layout != small.manifest.layout
    assert residua.verify(grown.path).ok
    order = [np.argsort(cache.sequence_hash) for cache in (grown, alone)]
    rows = [
        cache.positions_of(numbers) for cache, numbers in zip((grown, alone), order, strict=True)
    ]
    for layer in alone.layers:
        np.testing.assert_allclose(
            grown.residual_array(layer).take(rows[0]),
            alone.residual_array(layer).take(rows[1]),
            rtol=0,
            atol=2e-5,
        )
    np.testing.assert_array_equal(
        small.residual_array(1)[:], grown.residual_array(1)[: small.positions]
    )


def test_a_text_that_comes_once_more_is_lacking(model_folder: Path, tmp_path: Path) -> None:
    rows = texts(20, seed=6)
    root = tmp_path / "root"

    def write(name: str, rows: list[str]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        return path

    answer_request(request_for(model_folder, write("once.jsonl", rows), root, pack=False))
    match = find_match(
        request_for(model_folder, write("twice.jsonl", [*rows, rows[4]]), root, pack=False)
    )
    assert match.answer == "partial"
    assert len(match.missing_sequences) == 1

"""Sparse caches keep the rows that were asked for, and they are the rows of the dense one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residua
from residua.cache.errors import DataError, UsageError
from residua.cache.store.activation_cache import ActivationCache

from ...support.models import texts

TEXTS = texts(60, seed=6)
ROWS = [
    {"text": f"{text} house", "answer": "house", "positions": [0, 2, -1, -2], "number": n}
    for n, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def dense_cache(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory):
    return residua.extract(
        model_folder, data, root=tmp_path_factory.mktemp("dense"), pack=False, dtype="float32"
    )


def extract_sparse(model_folder: Path, data: Path, root: Path, positions: str, **more: Any):
    options = {"pack": False, "dtype": "float32", "part_positions": 64, "batch_tokens": 300}
    return residua.extract(model_folder, data, root=root, positions=positions, **options, **more)


def kept_positions(cache: ActivationCache) -> list[tuple[int, int]]:
    """(document, index in the sequence) of every row."""
    rows = cache.array("sequences/row_id")[:][cache.array("tokens/sequence")[:]]
    return list(zip(rows.tolist(), cache.array("tokens/index")[:].tolist(), strict=True))


def expected_positions(policy: str, dense_cache: ActivationCache) -> set[tuple[int, int]]:
    """The same by plain loops over the dense cache."""
    expected = set()
    tokenizer = dense_cache.tokenizer()
    for start, length, row in zip(
        dense_cache.sequence_start,
        dense_cache.sequence_length,
        dense_cache.array("sequences/row_id")[:],
        strict=True,
    ):
        if policy == "last":
            indices = {length - 1}
        elif policy == "explicit":
            indices = {place % length if place < 0 else place for place in (0, 2, -1, -2)}
        else:
            text = ROWS[row]["text"]
            offsets = tokenizer.encode(text).offsets
            at = text.rindex("house")
            indices = {i - 1 for i, (_, stop) in enumerate(offsets) if stop > at} - {-1}
        expected |= {(int(row), int(index)) for index in indices if index < length}
        assert start >= 0
    return expected


@pytest.mark.parametrize("policy", ["last", "explicit", "answer"])
def test_the_named_rows_are_kept_and_equal_the_dense_ones(
    model_folder: Path, data: Path, tmp_path: Path, dense_cache: ActivationCache, policy: str
) -> None:
    cache = extract_sparse(model_folder, data, tmp_path, policy)
    positions = kept_positions(cache)
    assert set(positions) == expected_positions(policy, dense_cache)
    assert len(positions) == cache.positions == len(set(positions))
    row_of = {place: row for row, place in enumerate(kept_positions(dense_cache))}
    rows = np.array([row_of[place] for place in positions])
    np.testing.assert_array_equal(cache.tokens[:], dense_cache.tokens.take(rows))
    for layer in cache.layers:
        np.testing.assert_allclose(
            cache.residual_array(layer)[:],
            dense_cache.residual_array(layer).take(rows),
            rtol=0,
            atol=2e-5,
        )
    assert residua.verify(cache.path).ok


def test_a_sample_has_k_rows_of_each_sequence_and_is_the_same_again(
    model_folder: Path, data: Path, tmp_path: Path, dense_cache: ActivationCache
) -> None:
    cache = extract_sparse(model_folder, data, tmp_path / "a", "sample:3")
    rows, counts = np.unique([row for row, _ in kept_positions(cache)], return_counts=True)
    lengths = dict(
        zip(dense_cache.array("sequences/row_id")[:], dense_cache.sequence_length, strict=True)
    )
    assert counts.tolist() == [min(3, int(lengths[row])) for row in rows]
    again = extract_sparse(model_folder, data, tmp_path / "b", "sample:3")
    assert kept_positions(again) == kept_positions(cache)
    assert again.id == cache.id


def test_rows_of_one_text_share_its_split_and_labels_follow(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    cache = extract_sparse(model_folder, data, tmp_path, "explicit")
    documents = cache.array("sequences/row_id")[:]
    for row in np.unique(documents):
        assert len(np.unique(cache.sequence_split[documents == row])) == 1
    np.testing.assert_array_equal(cache.label("number"), documents)


def test_probes_pair_only_neighbouring_rows(model_folder: Path, data: Path, tmp_path: Path) -> None:
    cache = extract_sparse(model_folder, data, tmp_path, "explicit")
    probe = residua.RidgeProbe(offsets=(0, 1), alpha=1.0).fit(cache)
    pairs = 0
    train = set(cache.sequences("train").tolist())
    positions = kept_positions(cache)
    sequence = cache.array("tokens/sequence")[:]
    for row, (document, index) in enumerate(positions[:-1]):
        if int(sequence[row]) in train:
            pairs += positions[row + 1] == (document, index + 1)
    assert probe.n_[(1, 1)] == pairs
    expected = residua.evaluate(cache, [probe])
    assert {row.offset for row in expected.rows} == {0, 1}


def test_other_positions_are_another_cache(model_folder: Path, data: Path, tmp_path: Path) -> None:
    ids = {
        extract_sparse(model_folder, data, tmp_path, p).id for p in ("last", "explicit", "sample:2")
    }
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"positions": "first"}, UsageError, "choose one of all, last, sample:K"),
        ({"positions": "answer", "pack": True}, UsageError, "add --no-pack"),
    ],
)
def test_bad_policies_are_refused(
    model_folder: Path, data: Path, tmp_path: Path, options: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        residua.extract(model_folder, data, root=tmp_path, **{"pack": False, **options})


def test_a_missing_column_is_named(model_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'answer'"):
        residua.extract(model_folder, texts_file, root=tmp_path, pack=False, positions="answer")

"""Every row knows where it came from: document, characters, labels."""

import json
from pathlib import Path

import numpy as np
import pytest

import residua
from residua.cache.errors import NotFoundError
from residua.cache.store.activation_cache import ActivationCache

from ...support.models import texts

ROWS = [
    {
        "text": text,
        "grade": n % 3,
        "score": n / 4 if n % 5 else None,
        "good": n % 2 == 0,
        "where": ["north", "south", None][n % 3],
        "notes": [n],
    }
    for n, text in enumerate(texts(40, seed=2))
]


@pytest.fixture(scope="module")
def labelled(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """A cache of one sequence per row of `ROWS`."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return residua.extract(model_folder, folder / "rows.jsonl", root=folder / "root", pack=False)


def rows_of(cache: ActivationCache) -> list[dict]:
    return [ROWS[number] for number in cache.array("sequences/row_id")[:]]


def test_labels_of_rows_survive_in_the_order_of_the_sequences(labelled: ActivationCache) -> None:
    rows = rows_of(labelled)
    assert labelled.label_names == ("good", "grade", "score", "where")
    np.testing.assert_array_equal(labelled.label("grade"), [row["grade"] for row in rows])
    np.testing.assert_array_equal(labelled.label("good"), [row["good"] for row in rows])
    score = [np.nan if row["score"] is None else row["score"] for row in rows]
    np.testing.assert_array_equal(labelled.label("score"), score)
    assert labelled.label("where").tolist() == [row["where"] or "" for row in rows]
    with pytest.raises(NotFoundError, match="labels are: good, grade, score, where"):
        labelled.label("colour")


def test_labels_can_be_read_with_zarr_alone(labelled: ActivationCache) -> None:
    import zarr

    arrays = zarr.open_group(labelled.path / "arrays.zarr", mode="r")
    where = arrays["sequences/labels/where"]
    assert where.attrs["categories"] == ["north", "south"]
    words = [row["where"] for row in rows_of(labelled)]
    codes = np.asarray(where)  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert codes.tolist() == [{"north": 0, "south": 1, None: -1}[word] for word in words]


@pytest.mark.parametrize("pack", [True, False])
def test_spans_lead_back_to_the_characters_of_every_token(
    model_folder: Path, tmp_path: Path, pack: bool
) -> None:
    documents = [row["text"] for row in ROWS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    cache = residua.extract(
        model_folder, tmp_path / "a.jsonl", root=tmp_path / "root", pack=pack, context=32
    )
    tokenizer = cache.tokenizer()
    for token, (row, start, stop) in zip(
        cache.tokens[:], cache.spans(np.arange(cache.positions)), strict=True
    ):
        if start < stop:
            assert documents[row][start:stop] == tokenizer.decode(
                [token], skip_special_tokens=False
            )
    assert cache.label_names == ()


def test_labels_and_spans_grow_with_the_cache(model_folder: Path, tmp_path: Path) -> None:
    def cache_of(number: int, root: str) -> ActivationCache:
        path = tmp_path / "grow.jsonl"
        kept = [{k: row[k] for k in ("text", "grade")} for row in ROWS[:number]]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return residua.extract(model_folder, path, root=tmp_path / root, pack=False)

    cache_of(20, "root")
    grown = cache_of(40, "root")
    assert len(grown.sequence_length) == 40
    assert grown.label("grade").tolist() == [row["grade"] for row in rows_of(grown)]
    alone = cache_of(40, "alone")
    key = np.lexsort(alone.spans(np.arange(alone.positions)).T[::-1])
    other = np.lexsort(grown.spans(np.arange(grown.positions)).T[::-1])
    np.testing.assert_array_equal(alone.tokens[:][key], grown.tokens[:][other])
    assert residua.verify(grown.path).ok

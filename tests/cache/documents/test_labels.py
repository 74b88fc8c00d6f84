"""Claims about labels: every value is kept as it is or said to be otherwise; none goes missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residua
from residua.cache.documents.document_loading import load_documents
from residua.cache.documents.labels import Labels, join_labels, label_names
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.tokens.token_stream import TokenStream, concatenate, from_sequences

from ...support.models import texts


def read_labels(tmp_path: Path, values: list[Any], numbers: list[int] | None = None) -> Labels:
    """Labels of rows with `values` in the column `x`; Ellipsis stands for a row without `x`."""
    rows = [{"text": "a b", **({} if value is ... else {"x": value})} for value in values]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = load_documents(str(path))
    return documents.labels(np.array(range(len(rows)) if numbers is None else numbers))


def label_values(labels: Labels) -> list[Any]:
    """Values of the label `x`: numbers, or words and None for a missing word."""
    values = labels.values["x"]
    if "x" not in labels.categories:
        return values.tolist()
    return [None if code < 0 else labels.categories["x"][code] for code in values]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 1, 0, -5], "<i8"),
        ([0, 0], "<i8"),
        ([False, True, False], "u1"),
        ([False], "u1"),
        ([0.0, -0.5], "<f8"),
        ([1, 0.5, 0], "<f8"),
        ([2**53, 0.5], "<f8"),
        ([2**63 - 1, -(2**63), 0], "<i8"),
        (["", "a", "", "b"], "<i4"),
        (["NA", "None", "nan", "null", "-"], "<i4"),
        (["w\0", "w", "é", "e\u0301", "/", ".."], "<i4"),
        ([None, "", "a", None], "<i4"),
    ],
)
def test_values_come_back_as_they_are(tmp_path: Path, values: list[Any], dtype: str) -> None:
    labels = read_labels(tmp_path, values)
    assert labels.values["x"].dtype == np.dtype(dtype)
    assert label_values(labels) == values
    assert labels.notes == []


@pytest.mark.parametrize("missing", [None, ...])
@pytest.mark.parametrize(
    ("values", "want"),
    [
        ([0, 1, 2**53], [0.0, 1.0, float(2**53)]),
        ([False, True], [0.0, 1.0]),
        ([0.0, 0.5], [0.0, 0.5]),
    ],
)
def test_a_missing_number_is_nan_and_no_other_is(
    tmp_path: Path, missing: Any, values: list[Any], want: list[float]
) -> None:
    labels = read_labels(tmp_path, [*values, missing])
    np.testing.assert_array_equal(labels.values["x"], [*want, np.nan])
    assert labels.values["x"].dtype == np.float64


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([2**63, 1], ["9223372036854775808", "1"]),
        ([-(2**63) - 1, 0], ["-9223372036854775809", "0"]),
        ([2**53 + 1, None, 1], ["9007199254740993", None, "1"]),
        ([2**53 + 1, 0.5], ["9007199254740993", "0.5"]),
        ([True, 1, 0, False], ["true", "1", "0", "false"]),
        ([True, "yes", None], ["true", "yes", None]),
        ([0, "x"], ["0", "x"]),
        ([0, ""], ["0", ""]),
    ],
)
def test_what_no_dtype_holds_is_kept_as_words_and_said(
    tmp_path: Path, values: list[Any], words: list[str | None]
) -> None:
    labels = read_labels(tmp_path, values)
    assert label_values(labels) == words
    (note,) = labels.notes
    assert "column 'x' is kept as words" in note


def test_nan_beside_missing_values_is_said(tmp_path: Path) -> None:
    labels = read_labels(tmp_path, [float("nan"), 1.0, None, float("inf")])
    np.testing.assert_array_equal(labels.values["x"], [np.nan, 1, np.nan, np.inf])
    assert "1 missing values are NaN, beside 1 that are NaN" in labels.notes[0]
    assert read_labels(tmp_path, [float("nan"), 1.0]).notes == []


def test_half_a_surrogate_pair_is_a_word_that_can_be_stored(tmp_path: Path) -> None:
    labels = read_labels(tmp_path, ["x\ud800", "x\udc00", "x"])
    assert label_values(labels) == ["x\\ud800", "x\\udc00", "x"]
    json.dumps(labels.categories).encode()


def test_dtypes_are_those_of_the_whole_column(tmp_path: Path) -> None:
    """So that a cache of fewer documents has labels of the same kind."""
    assert read_labels(tmp_path, [1, 2, 0.5], [0, 1]).values["x"].dtype == np.float64
    assert label_values(read_labels(tmp_path, [1, 2, "x"], [1, 0])) == ["2", "1"]


def test_cells_of_csv_are_numbers_only_if_all_are(tmp_path: Path) -> None:
    rows = [
        "text,int,float,truth,code,gap,na,huge,version",
        "a,1,0.5,True,007,,1,99999999999999999999,1.10",
        "b,-2,1e3,False,12,0,NA,1,1.9.2",
        "c,0,2,True,5,3,2,2,2",
    ]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(rows))
    labels = load_documents(str(path)).labels(np.arange(3))
    assert labels.values["int"].tolist() == [1, -2, 0]
    assert labels.values["float"].tolist() == [0.5, 1000.0, 2.0]
    assert labels.values["truth"].dtype == np.uint8
    assert labels.values["truth"].tolist() == [1, 0, 1]
    np.testing.assert_array_equal(labels.values["gap"], [np.nan, 0, 3])
    for name, want in {
        "code": ["007", "12", "5"],
        "na": ["1", "NA", "2"],
        "huge": ["99999999999999999999", "1", "2"],
        "version": ["1.10", "1.9.2", "2"],
    }.items():
        words = labels.categories[name]
        assert [words[code] for code in labels.values[name]] == want
        assert any(repr(name) in note for note in labels.notes)


def test_names_are_all_there_and_none_is_another_one_s() -> None:
    columns = ["a b", "a_b", "a/b", "A_B", "", "..", "...", "名前", "é", "e\u0301", "__x", "split"]
    columns += ["x" * 300, "x" * 301, "ü" * 200, "\0", "ids", "zarr.json"]
    names = label_names(columns)
    assert list(names) == columns
    assert len({name.casefold() for name in names.values()}) == len(columns)
    for name in names.values():
        assert name == name.replace("/", "").strip(".")
        assert not name.startswith("__")
        assert 0 < len(name.encode()) < 120
    assert names["split"] == "split"
    assert names["名前"] == "名前"


def test_labels_that_are_too_many_words_are_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("residua.cache.documents.labels.WORDS_BYTES", 1 << 20)
    labels = read_labels(tmp_path, [f"{n:06}" * 100 for n in range(2000)])
    assert labels.values == {}
    assert labels.notes == ["column 'x' is no label: its distinct words take more than 1 MiB"]


def join_values(*parts: tuple[list[Any] | None, str]) -> list[Any]:
    """Joined values of a label of several streams, each a pair of values and dtype (or `words`)."""
    label_parts = []
    for values, dtype in parts:
        if values is None:
            label_parts.append((2, None, None))
        elif dtype == "words":
            words = tuple(sorted({word for word in values if word is not None}))
            codes = [-1 if word is None else words.index(word) for word in values]
            label_parts.append((len(values), np.array(codes, "<i4"), words))
        else:
            label_parts.append((len(values), np.array(values, dtype), None))
    values, words = join_labels(label_parts)
    if words is None:
        return values.tolist()
    assert words == tuple(sorted(words))
    return [None if code < 0 else words[code] for code in values]


def test_joined_labels_keep_every_value() -> None:
    assert join_values((["b", None], "words"), (["a", "c"], "words")) == ["b", None, "a", "c"]
    assert join_values(([1, 2**60], "<i8"), ([3], "<i8")) == [1, 2**60, 3]
    assert join_values(([1, 2], "<i8"), ([0.5], "<f8")) == [1.0, 2.0, 0.5]
    assert join_values(([2**60], "<i8"), ([0.5, np.nan], "<f8")) == [str(2**60), "0.5", None]
    assert join_values(([1, 0], "u1"), ([7], "<i8")) == ["true", "false", "7"]
    assert join_values(([7, 7], "<i8"), (["x"], "words")) == ["7", "7", "x"]
    assert join_values((None, ""), (["x"], "words")) == [None, None, "x"]
    np.testing.assert_array_equal(join_values((None, ""), ([5], "<i8")), [np.nan, np.nan, 5])
    assert join_values((None, ""), ([2**60], "<i8")) == [None, None, str(2**60)]


def test_streams_join_their_labels() -> None:
    def stream(words: tuple[str, ...], codes: list[int], further: dict) -> TokenStream:
        labelled = from_sequences([[1, 2]] * len(codes))
        labelled.sequence_arrays.update({"sequences/labels/x": np.array(codes, "<i4"), **further})
        labelled.categories["sequences/labels/x"] = words
        return labelled

    both = concatenate(
        stream(("b", "c"), [0, -1, 1], {"sequences/labels/n": np.array([1, 2, 3])}),
        stream(("a", "b"), [0, 1], {}),
    )
    words = [*both.categories["sequences/labels/x"], None]
    found = [words[code] for code in both.sequence_arrays["sequences/labels/x"]]
    assert found == ["b", None, "c", "a", "b"]
    np.testing.assert_array_equal(
        both.sequence_arrays["sequences/labels/n"], [1, 2, 3, np.nan, np.nan]
    )


def test_a_grown_cache_keeps_its_labels_though_their_words_differ(
    model_folder: Path, tmp_path: Path
) -> None:
    rows = [
        {"text": text, "name": f"n{n}" if n % 5 else "", "a b": n, "a_b": None if n % 7 else -n}
        for n, text in enumerate(texts(30, seed=4))
    ]

    def extract_first_rows(count: int, root: str) -> ActivationCache:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        return residua.extract(
            model_folder, path, root=tmp_path / root, pack=False, layers=(0,), context=32
        )

    extract_first_rows(12, "root")
    for cache in (extract_first_rows(30, "root"), extract_first_rows(30, "alone")):
        held = [rows[number] for number in cache.array("sequences/row_id")[:]]
        assert len(held) == 30
        assert cache.label("name", missing=None).tolist() == [row["name"] for row in held]
        assert cache.label("a_b").tolist() == [row["a b"] for row in held]
        want = [np.nan if row["a_b"] is None else row["a_b"] for row in held]
        np.testing.assert_array_equal(cache.label("a_b_2"), want)


def test_an_empty_word_can_be_told_from_a_missing_one(model_folder: Path, tmp_path: Path) -> None:
    words = ["", None, "w\0", "w"] * 3
    path = tmp_path / "rows.jsonl"
    rows = [{"text": text, "x": x} for text, x in zip(texts(12, seed=5), words, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = residua.extract(model_folder, path, root=tmp_path, pack=False, layers=(0,))
    held = [words[number] for number in cache.array("sequences/row_id")[:]]
    assert cache.label("x", missing=None).tolist() == held
    assert cache.label("x", missing="?").tolist() == ["?" if w is None else w for w in held]
    assert cache.label("x").tolist() == [w or "" for w in held]

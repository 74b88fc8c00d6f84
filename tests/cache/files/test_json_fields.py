"""Readers of JSON from disk: types, bounds, and content that Python's parser would accept."""

import pytest

from residua.cache.errors import CorruptError
from residua.cache.files.json_fields import (
    MAX_DEPTH,
    FieldError,
    boolean_field,
    check_known_fields,
    checking_fields,
    choice_field,
    digest_field,
    integer_field,
    list_field,
    number_field,
    object_field,
    optional_field,
    parse_json_object,
    text_field,
)
from residua.cache.files.json_files import parse_json, read_json, write_json


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[1]",
        b"1",
        b"null",
        b"\xff{}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 400 + b".0}",
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":1,"a":2}',
        b'{"a":{"b":1,"b":1}}',
        b'{"a":"\\ud800"}',
        b'{"\\uDFFF":1}',
        b'{"a":' + b"[" * 100_000,
        b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1),
        b'{"a":[' + b"[]," * (1 << 21) + b"[]]}",
    ],
    ids=lambda raw: str(raw[:12]),
)
def test_json_that_no_writer_makes_is_corrupt(raw: bytes, tmp_path):
    with pytest.raises(CorruptError, match="file.json is not JSON"):
        parse_json_object(raw, tmp_path / "file.json")
    with pytest.raises(CorruptError):
        parse_json(raw, tmp_path / "file.json")


def test_a_surrogate_pair_and_depth_within_the_bound_are_read():
    nested = b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH
    assert "a" in parse_json_object(nested, "file")
    assert parse_json_object(b'{"a":"\\ud83d\\ude00"}', "file") == {"a": "\U0001f600"}
    wide = b'{"a":[' + b",".join([b'{"b":[]}'] * 200) + b"]}"
    assert len(parse_json_object(wide, "file")["a"]) == 200


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "manifest.json"
    write_json(path, {"a": 1})
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptError, match="1099511627776 bytes"):
        read_json(path)


READERS = {
    "integer": (integer_field, (1, 9), [3, 1, 9], [0, 10, True, 3.0, "3", None, [3], 10**400]),
    "number": (number_field, (0.0, 9.0), [3, 0.5, 0], [-1, 9.5, True, "3", None, 10**400]),
    "boolean": (boolean_field, (), [True, False], [0, 1, "true", None]),
    "text": (text_field, (4,), ["", "abcd"], ["abcde", 1, None, ["a"]]),
    "choice": (choice_field, (("a", "b"),), ["a"], ["c", "", 1, None, ["a"]]),
    "digest": (digest_field, (), ["0f" * 32], ["0F" * 32, "0f" * 31, "0f" * 32 + "\n", 5, None]),
    "object": (object_field, (), [{}, {"a": 1}], [[], 1, None, "{}"]),
    "list": (list_field, (1, 2), [[1], [1, 2]], [[], [1, 2, 3], {}, "ab", None]),
}


@pytest.mark.parametrize("kind", READERS)
def test_fields_have_their_type_and_lie_in_their_bounds(kind: str):
    reader, bounds, accepted, refused = READERS[kind]
    for value in accepted:
        assert reader({"x": value}, "x", *bounds) == value
        assert optional_field(reader, {"x": value}, "x", *bounds) == value
    for value in refused:
        with pytest.raises(FieldError, match="x is .*expected"):
            reader({"x": value}, "x", *bounds)
    with pytest.raises(FieldError, match="x is missing"):
        reader({}, "x", *bounds)
    assert optional_field(reader, {}, "x", *bounds) is None
    assert optional_field(reader, {"x": None}, "x", *bounds) is None


def test_a_number_is_finite():
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(FieldError):
            number_field({"x": value}, "x")


def test_errors_name_the_file_and_show_no_control_characters():
    with pytest.raises(CorruptError) as caught, checking_fields("a/b.json", "a manifest"):
        integer_field({"x": "\x1b[31m" + "y" * 1000}, "x")
    assert str(caught.value).startswith("a/b.json is not a manifest: x is ")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 200
    with pytest.raises(FieldError, match="layout has the unknown field"):
        check_known_fields({"a": 1, "b": 2}, ("a",), "layout")

"""Claims about identity: what a cache is called depends on what was run, and on nothing else."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from residua.cache.errors import CorruptError
from residua.cache.files.json_files import json_digest, read_json, write_json
from residua.cache.format.layout import Layout
from residua.cache.format.manifest import CaptureIdentity, Manifest, ModelIdentity, TokenIdentity

MANIFEST = Manifest(
    ModelIdentity("a" * 64, "b" * 64, "LlamaForCausalLM"),
    TokenIdentity("d" * 64, 1000, 10, "e" * 64, 128, True, 0),
    CaptureIdentity("bfloat16", "auto", "sdpa"),
    Layout(64, 256),
    d_model=8,
    vocab=20,
    depth=3,
    batch_tokens=1024,
    model_name="some/model",
    data_name="texts.jsonl",
    extra={"pad": True},
)
IDENTITY = [
    (part, field.name)
    for part in ("model", "tokens", "capture")
    for field in fields(getattr(MANIFEST, part))
]
OTHER_FIELDS: dict[str, Any] = {
    "layout": Layout(32, 64),
    "d_model": 16,
    "vocab": 21,
    "depth": 4,
    "batch_tokens": 2048,
    "model_name": "elsewhere",
    "data_name": "other.txt",
    "extra": {},
}


def different_value(value: Any) -> Any:
    """A value of the same type that differs; a word where there was none."""
    if value is None:
        return "f" * 64
    return not value if isinstance(value, bool) else value + (1 if isinstance(value, int) else "x")


def with_field(part: str, name: str, value: Any) -> Manifest:
    changes: dict[str, Any] = {part: replace(getattr(MANIFEST, part), **{name: value})}
    return replace(MANIFEST, **changes)


@pytest.mark.parametrize(("part", "name"), IDENTITY)
def test_the_id_changes_with_every_field_of_the_identity(part, name):
    assert (
        with_field(part, name, different_value(getattr(getattr(MANIFEST, part), name))).id
        != MANIFEST.id
    )


@pytest.mark.parametrize("name", sorted(OTHER_FIELDS))
def test_the_id_does_not_change_with_layout_names_and_sizes(name):
    changed = replace(MANIFEST, **{name: OTHER_FIELDS[name]})
    assert changed != MANIFEST
    assert changed.id == MANIFEST.id


def test_every_field_is_either_identity_or_not():
    assert {"format", "model", "tokens", "capture", *OTHER_FIELDS} == {
        field.name for field in fields(Manifest)
    }


def test_the_id_is_the_digest_of_the_identity_in_the_file(tmp_path):
    MANIFEST.write(tmp_path / "manifest.json")
    value = read_json(tmp_path / "manifest.json")
    assert value["id"] == MANIFEST.id == json_digest(value["identity"])
    assert value["identity"]["format"] == 2
    assert set(value) == {"id", "identity", *OTHER_FIELDS}


def test_the_id_of_format_2_is_fixed():
    assert MANIFEST.id == "65c339d266d452ccbc3b412b09b324ab014df0c6640f7e204b9596952cd464e5"


def test_the_id_of_format_1_is_fixed():
    first = replace(MANIFEST, format=1)
    assert first.id == "40a836b03ed4bc2e4237b0df9e18660fcada90f9e457d4cb0f3737ff51f2d389"


def test_a_manifest_that_is_read_equals_the_one_that_was_written(tmp_path):
    MANIFEST.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == MANIFEST
    tokens = replace(MANIFEST.tokens, split_by="sequence")
    first = replace(MANIFEST, format=1, tokens=tokens)
    first.write(tmp_path / "first.json")
    assert Manifest.read(tmp_path / "first.json") == first
    assert "split_by" not in read_json(tmp_path / "first.json")["identity"]["tokens"]


def write_changed_manifest(path: Path, **changes: Any) -> Path:
    """The manifest with `changes`, its digest valid."""
    MANIFEST.write(path)
    write_json(path, {**read_json(path), **changes})
    return path


def test_an_unknown_format_says_what_to_do(tmp_path):
    identity = {**MANIFEST.identity, "format": 3}
    path = write_changed_manifest(
        tmp_path / "manifest.json", identity=identity, id=json_digest(identity)
    )
    with pytest.raises(CorruptError, match="has format 3, this version reads 1, 2; install"):
        Manifest.read(path)


def test_an_identity_that_does_not_give_the_id_is_corrupt(tmp_path):
    path = write_changed_manifest(tmp_path / "manifest.json", id="0" * 64)
    with pytest.raises(CorruptError, match="does not match the identity"):
        Manifest.read(path)


@pytest.mark.parametrize(
    "changes", [{"surprise": 1}, {"identity": {"format": 1}}, {"layout": {}}, {"identity": None}]
)
def test_unknown_or_missing_fields_are_corrupt(tmp_path, changes):
    path = write_changed_manifest(tmp_path / "manifest.json", **changes)
    with pytest.raises(CorruptError, match="not a manifest of this format"):
        Manifest.read(path)


def test_a_changed_byte_is_found(tmp_path):
    path = tmp_path / "manifest.json"
    MANIFEST.write(path)
    path.write_bytes(path.read_bytes().replace(b"texts.jsonl", b"texts.jsonk"))
    with pytest.raises(CorruptError, match="changed after it was written"):
        Manifest.read(path)


def forged(**changes: Any) -> dict[str, Any]:
    """Fields of `manifest.json` with `changes` by path, such as `identity__tokens__positions`."""
    value: dict[str, Any] = {"identity": MANIFEST.identity, "extra": {"pad": True}}
    value["layout"] = MANIFEST.layout.to_json()
    for path, change in changes.items():
        *parents, name = path.split("__")
        target = value
        for parent in parents:
            target = target[parent]
        target[name] = change
    return {**value, "id": json_digest(value["identity"])}


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": {"chunk_rows": 0, "part_rows": 0}},
        {"layout": {"chunk_rows": 3, "part_rows": 6}},
        {"layout": {"chunk_rows": 64, "part_rows": 100}},
        {"layout": {"chunk_rows": -64, "part_rows": 64}},
        {"layout": {"chunk_rows": 64.0, "part_rows": 64}},
        {"layout": {"chunk_rows": True, "part_rows": 1}},
        {"layout": {"chunk_rows": 1 << 40, "part_rows": 1 << 40}},
        {"layout": {"chunk_rows": 64, "part_rows": 64, "rows": 1}},
        {"layout": {"chunk_rows": 1, "part_rows": 1}, "identity__tokens__positions": 10**13},
        {"identity__tokens__positions": 0},
        {"identity__tokens__positions": -5},
        {"identity__tokens__positions": 1 << 60},
        {"identity__tokens__positions": "1000"},
        {"identity__tokens__sequences": 1001},
        {"identity__tokens__context": 0},
        {"identity__tokens__packed": 1},
        {"identity__tokens__seed": 0.5},
        {"identity__tokens__split_by": "page"},
        {"identity__tokens__bos": None},
        {"identity__tokens": []},
        {"identity__model__weights": 5},
        {"identity__model__code": {}},
        {"identity__model": None},
        {"identity__capture__logits": ["full"]},
        {"identity__capture__surprise": "x"},
        {"identity__surprise": 1},
        {"identity__format": True},
        {"d_model": 0},
        {"d_model": 1 << 40},
        {"vocab": -1},
        {"vocab": 1 << 60},
        {"depth": -1},
        {"depth": 10**9},
        {"batch_tokens": None},
        {"batch_tokens": 0},
        {"model_name": None},
        {"data_name": "x" * 10_000},
        {"extra": []},
        {"extra__pad": "no"},
        {"extra__codec": "lzma"},
        {"extra__batch": 4},
        {"extra__extends": "../../../etc"},
        {"extra__extends": MANIFEST.id},
    ],
    ids=str,
)
def test_a_forged_number_is_corrupt(tmp_path, changes):
    path = write_changed_manifest(tmp_path / "manifest.json", **forged(**changes))
    with pytest.raises(CorruptError, match=r"not a manifest of this format|has format"):
        Manifest.read(path)


def test_unknown_keys_of_extra_are_left_to_later_versions(tmp_path):
    path = write_changed_manifest(tmp_path / "manifest.json", **forged(extra__later=[1]))
    assert Manifest.read(path).extra["later"] == [1]

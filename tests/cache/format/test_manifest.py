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

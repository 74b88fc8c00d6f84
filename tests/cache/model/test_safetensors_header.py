"""Headers of safetensors files are read as the library reads them; damaged files are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from residua.cache.errors import ModelError
from residua.cache.model.safetensors_header import FLOATING_DTYPES, read_header


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.arange(4.0),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7.0, dtype=torch.float16),
        "ids": torch.arange(3),
        "ü": torch.ones(1, dtype=torch.bool),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_names_dtypes_shapes_and_bytes_are_those_that_the_library_reads(weights: Path) -> None:
    entries, data = read_header(weights), weights.read_bytes()
    with safe_open(weights, framework="pt") as library:
        assert set(entries) == set(library.keys())
        for name, entry in entries.items():
            tensor = library.get_tensor(name)
            assert entry.shape == tuple(tensor.shape)
            assert entry.dtype == library.get_slice(name).get_dtype()
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert data[slice(*entry.span)] == raw
            if tensor.is_floating_point():
                assert getattr(torch, FLOATING_DTYPES[entry.dtype]) == tensor.dtype


def write_safetensors(
    path: Path, header: bytes, data: bytes = b"", length: int | None = None
) -> None:
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)


def header_of(*tensors: tuple[str, str, list, list]) -> bytes:
    entries = {n: {"dtype": d, "shape": s, "data_offsets": o} for n, d, s, o in tensors}
    return json.dumps(entries).encode()


def make_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/blob")


ENTRY = b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "git-lfs pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9"),
        "git-lfs pointer.*git lfs pull",
    ),
    "cut in the tensors": (lambda p: p.write_bytes(p.read_bytes()[:-3]), "not a whole"),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:40]), "not a whole"),
    "bytes appended": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "not a whole"),
    "empty": (lambda p: p.write_bytes(b""), "has 0 bytes"),
    "link to nowhere": (make_broken_link, "link to /nowhere/blob.*No such file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "cannot be read"),
    "a page of text": (lambda p: p.write_text("<!DOCTYPE html><html>404"), "not a whole"),
    "not UTF-8": (lambda p: write_safetensors(p, b'{"\xff": 1}'), "header cannot be read"),
    "no object": (lambda p: write_safetensors(p, b"[]"), "header cannot be read"),
    "no JSON": (lambda p: write_safetensors(p, b"{{"), "header cannot be read"),
    "deep JSON": (lambda p: write_safetensors(p, b"[" * 100_000), "header cannot be read"),
    "length beyond the file": (
        lambda p: write_safetensors(p, b"{}", length=2**63),
        "header of 9223",
    ),
    "no offsets": (
        lambda p: write_safetensors(p, b'{"a": {"dtype": "U8", "shape": [1]}}'),
        "data_offsets",
    ),
    "no entry": (lambda p: write_safetensors(p, b'{"a": 3}'), "header cannot be read"),
    "unknown dtype": (
        lambda p: write_safetensors(p, header_of(("a", "Q9", [1], [0, 1])), b"x"),
        "unknown dtype",
    ),
    "negative": (lambda p: write_safetensors(p, header_of(("a", "U8", [-1], [0, -1]))), "offsets"),
    "truth for a number": (
        lambda p: write_safetensors(p, header_of(("a", "U8", [True], [0, 1])), b"x"),
        "shape",
    ),
    "wrong size": (
        lambda p: write_safetensors(p, header_of(("a", "F32", [2], [0, 4])), b"xxxx"),
        "4 bytes",
    ),
    "overlap": (
        lambda p: write_safetensors(
            p, header_of(("a", "U8", [2], [0, 2]), ("b", "U8", [2], [1, 3])), b"xxx"
        ),
        "'b' overlaps",
    ),
    "gap": (
        lambda p: write_safetensors(
            p, header_of(("a", "U8", [1], [0, 1]), ("b", "U8", [1], [2, 3])), b"xxx"
        ),
        "'b' leaves a gap",
    ),
    "twice": (
        lambda p: write_safetensors(p, b"{%b, %b}" % (ENTRY, ENTRY), b"x"),
        "a name is there twice",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_with_its_reason(name: str, weights: Path) -> None:
    damage, reason = DAMAGES[name]
    damage(weights)
    with pytest.raises(ModelError, match=reason):
        read_header(weights)

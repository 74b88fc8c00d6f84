"""Rows of a machine that computes other numbers never enter a cache that another one began."""

from pathlib import Path
from typing import Any

import pytest
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

import residua
from residua.cache.errors import MismatchError

from ...support.local import local_client
from ..extraction.test_extract import stop_after

OPTIONS: dict[str, Any] = {
    "context": 40,
    "part_positions": 512,
    "batch_tokens": 200,
    "pack": False,
}


@pytest.fixture
def data(model_folder: Path, texts_file: Path) -> tuple[str, str]:
    return str(model_folder), str(texts_file)


def compute_other_numbers(patch: pytest.MonkeyPatch, factor: float, block: int) -> None:
    """Let the attention of a block be off by `factor`, as another kernel could; the head is not."""
    forward = GPTNeoXAttention.forward

    def scaled(self: GPTNeoXAttention, *args: Any, **options: Any) -> Any:
        out, *rest = forward(self, *args, **options)
        return (out * factor if self.layer_idx == block else out, *rest)

    patch.setattr(GPTNeoXAttention, "forward", scaled)


def begin_extraction(data: tuple[str, str], root: Path, **options: Any) -> None:
    """Begin an extraction and stop it after some batches."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            residua.extract(*data, root=root, **{**OPTIONS, **options})


def files(root: Path) -> dict[Path, bytes]:
    paths = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.read_bytes() for path in paths}


FIRST_OPTIONS: dict[str, dict[str, Any]] = {
    "resumed": {},
    "resumed by shares": {},
    "given more layers": {"layers": [1]},
    "given more tokens": {"max_tokens": 1300},
    "finished and given more tokens": {"max_tokens": 1300},
    "finished by a cluster": {},
    "repaired": {},
}
"""What is done to a cache -> options with which it was made before."""


def continue_cache(name: str, data: tuple[str, str], root: Path) -> Any:
    """Do to the only cache under `root` what `name` says; what comes out of it."""
    if name == "repaired":
        (path,) = (p.parent for p in root.rglob("manifest.json"))
        return residua.repair(path)
    if name == "resumed by shares":
        return residua.extract(*data, root=root, part="1/2", **OPTIONS)
    if name == "finished by a cluster":
        with local_client() as client:
            return residua.extract(*data, root=root, client=client, **OPTIONS)
    return residua.extract(*data, root=root, **OPTIONS)


@pytest.mark.parametrize("name", FIRST_OPTIONS)
def test_a_cache_is_not_mixed_with_other_numbers(
    data: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    unfinished = name not in ("given more layers", "given more tokens", "repaired")
    if unfinished:
        begin_extraction(data, tmp_path, **FIRST_OPTIONS[name])
    else:
        residua.extract(*data, root=tmp_path, **{**OPTIONS, **FIRST_OPTIONS[name]})
    if name == "repaired":
        (path,) = (p.parent for p in tmp_path.rglob("manifest.json"))
        shard = path / "arrays.zarr/residual/1/c/1/0"
        shard.write_bytes(shard.read_bytes()[:-1])
    before = files(tmp_path)
    for block in (0, 2) if name == "resumed" else (2,):
        with monkeypatch.context() as patch:
            compute_other_numbers(patch, 1.05, block)
            with pytest.raises(MismatchError, match="computes other numbers than the one that"):
                continue_cache(name, data, tmp_path)
        assert files(tmp_path) == before
    # Rounding is no other number, and nothing has gone wrong meanwhile.
    with monkeypatch.context() as patch:
        compute_other_numbers(patch, 1 + 1e-6, 1)
        continue_cache(name, data, tmp_path)
    cache = residua.extract(*data, root=tmp_path, **OPTIONS)
    assert cache.complete
    assert residua.verify(cache.path).ok

"""Temporary files are made anew, never followed, and swept when their writer was killed."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from residua.cache.files.json_files import write_atomically, write_json
from residua.cache.files.paths import open_new
from residua.cache.format.layout import ArrayLayout
from residua.cache.format.shard import ShardWriter
from residua.cache.store.cache_extension import link_file
from residua.probes.training.checkpoint import Checkpoint


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file outside of the cache, which no writer may change."""
    path = tmp_path / "outside"
    path.write_text("theirs")
    return path


def set_link(path: Path, outside: Path) -> None:
    path.with_name(f".{path.name}.{os.getpid()}.tmp").symlink_to(outside)


def test_a_new_file_takes_the_place_of_a_link_or_file(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "link").symlink_to(outside)
    for name in ("link", "link", "new"):
        with open_new(tmp_path / name) as file:
            file.write(b"ours")
        assert (tmp_path / name).read_text() == "ours"
        assert not (tmp_path / name).is_symlink()
    assert outside.read_text() == "theirs"


def write_shard(path: Path) -> None:
    layout = ArrayLayout((4, 2), "<f4", "float32", chunk_rows=4, shard_rows=4, raw=True)
    writer = ShardWriter(path, layout, 4)
    writer.write(0, np.zeros((4, 2), np.float32))
    writer.commit()


def link_other(path: Path) -> None:
    source = path.with_name("source")
    source.write_text("shared")
    link_file(source, path)


def save_state(path: Path) -> None:
    Checkpoint(path.parent, {}).save({"step": 1}, {"x": torch.zeros(2)})


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda path: write_json(path, {"a": 1}), "record.json"),
        (write_shard, "0"),
        (link_other, "0"),
        (save_state, "00000001.safetensors"),
    ],
    ids=["json", "shard", "linked part", "checkpoint"],
)
def test_no_writer_follows_a_link_under_its_temporary_name(
    tmp_path: Path, outside: Path, write: Callable[[Path], None], name: str
) -> None:
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    set_link(folder / name, outside)
    write(folder / name)
    assert outside.read_text() == "theirs"
    assert (folder / name).is_file()
    assert not (folder / name).is_symlink()


def test_a_sweep_neither_follows_links_nor_waits_for_a_pipe(tmp_path: Path, outside: Path) -> None:
    os.mkfifo(tmp_path / ".record.json.1.tmp")
    (tmp_path / ".record.json.2.tmp").symlink_to(outside)
    (tmp_path / ".record.json.3.tmp").mkdir()
    write_json(tmp_path / "record.json", {"a": 1})
    assert outside.read_text() == "theirs"
    assert (tmp_path / ".record.json.2.tmp").is_symlink()
    assert (tmp_path / ".record.json.3.tmp").is_dir()


def test_a_file_that_another_writer_sweeps_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    swept: list[int] = []

    def lock_late(file: object, operation: int) -> None:
        if not swept:  # as if another process swept between the open and the lock
            swept.append(operation)
            (tmp_path / f".record.json.{os.getpid()}.tmp").unlink()

    monkeypatch.setattr("fcntl.flock", lock_late)
    write_atomically(path, b"whole", sweep=False)
    assert swept
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    assert path.read_bytes() == b"whole"

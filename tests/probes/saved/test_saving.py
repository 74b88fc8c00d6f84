"""A saved probe appears whole, a replaced one at once, and nothing of a killed save stays."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.cache.errors import CorruptError
from residua.cache.files import staging
from residua.probes.lens.tuned_lens import TunedLens
from residua.probes.ridge.solver import AffineMap
from residua.probes.saved import save as save_module
from residua.probes.saved.library import find_probe
from residua.probes.saved.save import load_probe, save_probe

WIDTH = 64


def lens(value: float) -> TunedLens:
    """A lens whose numbers are all `value`."""
    weight = np.full((WIDTH, WIDTH), value, np.float32)
    probe = TunedLens.of({(0, 0): AffineMap(weight, weight[0])}, geometry="a")
    probe.cache_id_ = "c" * 64
    return probe


def value_of(folder: Path) -> float:
    return float(load_probe(folder).maps_[0, 0].weight[0, 0])


def test_a_probe_is_replaced_at_once_while_others_read_it(tmp_path: Path) -> None:
    folder, done, errors, values = tmp_path / "lens", threading.Event(), [], set()
    save_probe(lens(0.0), folder)

    def read() -> None:
        while not done.is_set():
            try:
                values.add(value_of(folder))
            except Exception as error:
                errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(1, 40):
        save_probe(lens(float(number)), folder)
    done.set()
    for reader in readers:
        reader.join()
    assert errors == []
    assert values <= set(map(float, range(40)))
    assert value_of(folder) == 39.0
    assert [path.name for path in tmp_path.iterdir()] == ["lens"]


@pytest.mark.parametrize("call", ["before", "after"])
def test_a_kill_leaves_the_old_probe_or_the_new_one_and_the_next_save_sweeps(
    tmp_path: Path, call: str
) -> None:
    folder = tmp_path / "lens"
    save_probe(lens(1.0), folder)
    code = f"""
import os
from residua.tests.probes.saved.test_saving import lens, save_module
from residua.probes.saved.save import save_probe
exchange = save_module.exchange_folder
def kill(*paths):
    if {call!r} == "after":
        exchange(*paths)
    os._exit(9)
save_module.exchange_folder = kill
save_probe(lens(2.0), {str(folder)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert value_of(folder) == (2.0 if call == "after" else 1.0)
    assert len(list(tmp_path.iterdir())) == 2
    save_probe(lens(3.0), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lens", "other"]


def test_a_new_probe_that_fails_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(save_module, "write_json", fail)
    with pytest.raises(OSError, match="no"):
        save_probe(lens(1.0), tmp_path / "lens")
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_an_empty_folder_and_a_link_stay_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, notes, link = tmp_path / "empty", tmp_path / "notes", tmp_path / "link"
    for folder in (empty, notes):
        folder.mkdir()
    (notes / "README.md").write_text("mine")
    link.symlink_to(empty)
    inodes = {path: path.stat().st_ino for path in (empty, notes)}
    for number, folder in enumerate((empty, notes, link, link)):
        save_probe(lens(float(number)), folder)
        assert value_of(folder) == float(number)
    assert (notes / "README.md").read_text() == "mine"
    assert link.is_symlink()
    assert {path: path.stat().st_ino for path in inodes} == inodes
    # The folder in which somebody stands is not renamed.
    monkeypatch.chdir(empty)
    save_probe(lens(7.0), Path("."))
    assert value_of(empty) == 7.0
    assert os.listdir(".")


def test_without_an_exchange_of_names_the_files_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_probe(lens(1.0), tmp_path / "lens")
    monkeypatch.setattr(staging, "_exchange_names", lambda *_: False)
    save_probe(lens(2.0), tmp_path / "lens")
    assert value_of(tmp_path / "lens") == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["lens"]


def test_damage_is_still_found_and_hidden_folders_are_no_probes(tmp_path: Path) -> None:
    folder = save_probe(lens(1.0), tmp_path / "probes" / "lens")
    (tmp_path / "probes" / ".residua-probe-1.tmp").mkdir()
    assert find_probe("lens", tmp_path) == folder
    file = folder / "probe.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptError, match="was changed after it was written"):
        load_probe(folder)
    file.unlink()
    with pytest.raises(CorruptError, match="is missing"):
        load_probe(folder)

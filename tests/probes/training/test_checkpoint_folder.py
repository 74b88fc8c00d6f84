"""One process works in a folder of checkpoints, and nothing is left of a fit that ended."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from residua import TunedLens, VocabProbe
from residua.cache.errors import NoSpaceError, ResiduaWarning, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.saved.library import checkpoint_path
from residua.probes.training import checkpoint as checkpoint_module
from residua.probes.training.checkpoint import Checkpoint, lock_folder


def test_a_folder_that_its_holder_removed_is_locked_by_one_at_a_time(tmp_path: Path) -> None:
    """B waits while A works; A removes the folder, B makes a new one; C must wait for B."""
    folder, holders, most = tmp_path / "fits" / "one", 0, 0
    a_holds, counter_lock = threading.Event(), threading.Lock()

    def hold(seconds: float) -> None:
        nonlocal holders, most
        checkpoint = Checkpoint(folder, {"of": 1})
        with checkpoint.lock():
            with counter_lock:
                holders += 1
                most = max(most, holders)
            a_holds.set()
            checkpoint.save({"step": 1}, {"a": torch.zeros(2)})
            threading.Event().wait(seconds)
            checkpoint.remove()
            with counter_lock:
                holders -= 1

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(hold, 0.5)
        a_holds.wait()
        others = [pool.submit(hold, 0.05) for _ in range(7)]
        for future in (first, *others):
            future.result(timeout=60)
    assert most == 1
    assert not folder.exists()


def test_nothing_is_left_of_a_lock_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_folder(tmp_path / "new" / "fit"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "theirs").write_text("")
    with lock_folder(tmp_path / "fit"):
        pass
    assert {path.name for path in (tmp_path / "fit").iterdir()} == {"fit.lock", "theirs"}
    with lock_folder(None):
        pass


def test_a_state_that_is_left_keeps_its_folder(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "fit", {"of": 1})
    with checkpoint.lock():
        checkpoint.save({"step": 1}, {"a": torch.ones(2)})
    assert checkpoint.load() is not None
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["lens", "vocab"])
def test_a_fit_waits_for_another_in_its_folder(
    tiny_cache: ActivationCache, tmp_path: Path, kind: str
) -> None:
    probe: Any = TunedLens(layers=[0], steps=1, lr=0.1)
    if kind == "vocab":
        probe = VocabProbe(0, [0], lr=0.1, epochs=1)
    folder = tmp_path / "fit"
    with ThreadPoolExecutor(1) as pool:
        with lock_folder(folder):
            fit = pool.submit(probe.fit, tiny_cache, checkpoint=folder)
            threading.Event().wait(1)
            assert not fit.done()
        fit.result(timeout=120)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_place_and_leaves_no_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "sync_folder", fail)
    checkpoint = Checkpoint(tmp_path / "fit", {})
    with pytest.raises(NoSpaceError, match=rf"its state in {tmp_path / 'fit'}: .*--checkpoint"):
        checkpoint.save({"step": 1}, {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written_is_a_warning_and_a_named_place_an_error(
    tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    probe, blocked = TunedLens(layers=[0]), tmp_path / "blocked"
    blocked.write_text("a file where folders should be made")
    with pytest.warns(ResiduaWarning, match="keeps no checkpoint, and begins anew.*--checkpoint"):
        assert checkpoint_path(blocked, probe, tiny_cache.id) is None
    with pytest.raises(UsageError, match="cannot be written"):
        checkpoint_path(tmp_path, probe, tiny_cache.id, blocked)
    path = checkpoint_path(blocked, probe, tiny_cache.id, tmp_path / "here", suffix="-x")
    assert path is not None
    assert path.parent == tmp_path / "here"
    assert path.name.endswith("-x")

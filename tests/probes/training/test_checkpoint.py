"""Killed fits go on from their last checkpoint to the very same result."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from residua import VocabProbe, load_probe
from residua.cache.errors import CorruptError, MismatchError
from residua.cache.files.json_files import read_json
from residua.probes.training.checkpoint import Checkpoint
from residua.probes.vocabulary import descent

from ...support.crashing import shared_driver, wait_until
from ..vocabulary.test_vocab_probe import planted, same

OPTIONS: dict[str, Any] = {"epochs": 1, "batch": 256}


class Killed(Exception):
    pass


def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fit end after so many steps, sweeps not counted."""
    plain, taken = descent.Trainer.measured, [0]

    def measured(self: descent.Trainer, step: int, held_out: float | None) -> None:
        plain(self, step, held_out)
        taken[0] += 1
        if taken[0] == steps:
            raise Killed

    monkeypatch.setattr(descent.Trainer, "measured", measured)


@pytest.mark.parametrize(
    "form",
    [
        {"lr": 0.1},
        pytest.param({"rank": 3, "loss": "kl"}, marks=pytest.mark.slow),
        pytest.param({"form": "head", "loss": "text"}, marks=pytest.mark.slow),
    ],
)
def test_a_fit_that_broke_off_goes_on_to_the_same_result(
    form: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "LEAST_STEPS", 50)
    echo = planted(tmp_path)
    whole = VocabProbe((0, 2), [0, 1], **OPTIONS, **form).fit(echo)
    probe, folder = VocabProbe((0, 2), [0, 1], **OPTIONS, **form), tmp_path / "checkpoint"
    for measurements in (3, 5, 1):
        with monkeypatch.context() as patch:
            killed_after(measurements, patch)
            with pytest.raises(Killed):
                probe.fit(echo, checkpoint=folder, checkpoint_seconds=0)
        assert (folder / "0" / "fit.json").is_file()
    assert read_json(folder / "0" / "fit.json")["state"]["step"] > 0
    probe.fit(echo, checkpoint=folder, checkpoint_seconds=0)
    assert same(probe, whole)
    assert probe.sweep_ == whole.sweep_
    assert not folder.exists() or not list(folder.rglob("*.*"))


@pytest.mark.slow
def test_a_killed_fit_goes_on_to_the_same_result(tmp_path: Path) -> None:
    echo, driver = planted(tmp_path / "caches"), shared_driver()
    fit = ("fit", "vocab", echo.id, "--root", tmp_path / "caches", "--offsets", "0,2",
           "--layers", "0,1", "--epochs", 12, "--checkpoint-seconds", 0)  # fmt: skip
    whole = load_probe(driver.run(*fit, "--out", tmp_path / "whole")["probe"])
    folder = tmp_path / "caches" / "checkpoints"
    killed = 0
    for more in (1, 40, 90):
        child = driver.start(*fit, "--out", tmp_path / "killed")
        start = step_of(folder)
        wait_until(lambda start=start, more=more: step_of(folder) >= start + more, 60)
        killed += child.kill()
        time.sleep(0.01)
    assert killed == 3
    assert not (tmp_path / "killed").exists()
    found = load_probe(driver.run(*fit, "--out", tmp_path / "killed")["probe"])
    assert same(found, whole)
    assert found.sweep_ == whole.sweep_


def step_of(folder: Path) -> int:
    """Step of the only checkpoint under `folder`, -1 if there is none."""
    files = list(folder.rglob("fit.json"))
    return read_json(files[0])["state"]["step"] if files else -1


def test_a_checkpoint_of_another_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo, folder = planted(tmp_path), tmp_path / "checkpoint"
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            VocabProbe(0, [0], lr=0.1, **OPTIONS).fit(echo, checkpoint=folder)
    with pytest.raises(MismatchError, match=r"params was .*'lr': 0\.1"):
        VocabProbe(0, [0], lr=0.2, **OPTIONS).fit(echo, checkpoint=folder)


def test_a_changed_checkpoint_is_refused(tmp_path: Path) -> None:
    place = Checkpoint(tmp_path / "fit", {"of": 1})
    assert place.load() is None
    for step in (3, 4):
        place.save({"step": step}, {"a": torch.arange(4.0)})
    found = place.load()
    assert found is not None
    assert found[0] == {"step": 4}
    assert torch.equal(found[1]["a"], torch.arange(4.0))
    (file,) = place.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match="was changed"):
        place.load()
    place.remove()
    assert not place.folder.exists()


def test_nothing_is_lost_when_a_save_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Checkpoint(tmp_path / "fit", {})
    place.save({"step": 1}, {"a": torch.ones(2)})

    def broken(*args: object) -> None:
        raise OSError("the disk is gone")

    for target in (
        "residua.probes.training.checkpoint.write_json",
        "residua.probes.training.checkpoint.os.replace",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, broken)
            with pytest.raises(OSError, match="gone"):
                place.save({"step": 2}, {"a": torch.zeros(2)})
        found = place.load()
        assert found is not None
        assert found[0] == {"step": 1}
        assert found[1]["a"].all()

"""Killed fits go on from their last checkpoint to the very same result."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from residua import VocabProbe, load_probe
from residua.cache.errors import CorruptError, MismatchError
from residua.cache.files.json_files import read_json, write_json
from residua.probes.training.checkpoint import Checkpoint
from residua.probes.vocabulary import descent

from ...support.crashing import shared_driver, wait_until
from ..vocabulary.test_vocab_probe import planted, same

OPTIONS: dict[str, Any] = {"epochs": 1, "batch": 256}


class Killed(Exception):
    pass


def kill_after_measurements(measurements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fit raise `Killed` after so many measurements of its trainers; sweeps have none."""
    record_losses, calls = descent.Trainer.record_losses, [0]

    def record_and_die(self: descent.Trainer, step: int, held_out_loss: float | None) -> None:
        record_losses(self, step, held_out_loss)
        calls[0] += 1
        if calls[0] == measurements:
            raise Killed

    monkeypatch.setattr(descent.Trainer, "record_losses", record_and_die)


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
            kill_after_measurements(measurements, patch)
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
    fit = [
        *("fit", "vocab", echo.id, "--root", tmp_path / "caches"),
        *("--offsets", "0,2", "--layers", "0,1", "--epochs", 12, "--checkpoint-seconds", 0),
    ]
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
    resumed = load_probe(driver.run(*fit, "--out", tmp_path / "killed")["probe"])
    assert same(resumed, whole)
    assert resumed.sweep_ == whole.sweep_


def step_of(folder: Path) -> int:
    """Step of the only checkpoint under `folder`, -1 if there is none."""
    files = list(folder.rglob("fit.json"))
    return read_json(files[0])["state"]["step"] if files else -1


def test_a_checkpoint_of_another_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo, folder = planted(tmp_path), tmp_path / "checkpoint"
    with monkeypatch.context() as patch:
        kill_after_measurements(2, patch)
        with pytest.raises(Killed):
            VocabProbe(0, [0], lr=0.1, **OPTIONS).fit(echo, checkpoint=folder)
    with pytest.raises(MismatchError, match=r"params was .*'lr': 0\.1"):
        VocabProbe(0, [0], lr=0.2, **OPTIONS).fit(echo, checkpoint=folder)


def test_a_changed_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "fit", {"of": 1})
    assert checkpoint.load() is None
    for step in (3, 4):
        checkpoint.save({"step": step}, {"a": torch.arange(4.0)})
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded[0] == {"step": 4}
    assert torch.equal(loaded[1]["a"], torch.arange(4.0))
    (file,) = checkpoint.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match="was changed"):
        checkpoint.load()
    checkpoint.remove()
    assert not checkpoint.folder.exists()


@pytest.mark.parametrize(
    "forged",
    [
        {"identity": 3},
        {"state": []},
        {"tensors": "../../outside.safetensors"},
        {"tensors": None},
        {"digest": 7},
    ],
)
def test_a_forged_checkpoint_is_refused(tmp_path: Path, forged: dict[str, Any]) -> None:
    checkpoint = Checkpoint(tmp_path / "a" / "fit", {"of": 1})
    checkpoint.save({"step": 1}, {"x": torch.zeros(2)})
    (tmp_path / "outside.safetensors").write_bytes(
        (checkpoint.folder / "00000001.safetensors").read_bytes()
    )
    saved = read_json(checkpoint.file)
    write_json(checkpoint.file, {**saved, **forged})
    with pytest.raises(CorruptError):
        checkpoint.load()
    for name in ("identity", "state", "tensors", "digest"):
        write_json(checkpoint.file, {key: saved[key] for key in saved if key != name})
        with pytest.raises(CorruptError, match=name):
            checkpoint.load()


def test_nothing_is_lost_when_a_save_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path / "fit", {})
    checkpoint.save({"step": 1}, {"a": torch.ones(2)})

    def broken(*args: object) -> None:
        raise OSError("the disk is gone")

    for target in (
        "residua.probes.training.checkpoint.write_json",
        "residua.probes.training.checkpoint.os.replace",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, broken)
            with pytest.raises(OSError, match="gone"):
                checkpoint.save({"step": 2}, {"a": torch.zeros(2)})
        loaded = checkpoint.load()
        assert loaded is not None
        assert loaded[0] == {"step": 1}
        assert loaded[1]["a"].all()

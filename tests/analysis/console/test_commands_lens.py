"""`residua fit lens`: what it prints, keeps and goes on from."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import residua
from residua.cli import main
from residua.probes.basis.causal_basis import CausalBasis
from residua.probes.lens import translator_fit as lensfit
from residua.probes.lens.tuned_lens import TunedLens
from residua.probes.saved import library
from residua.probes.vocabulary.vocab_probe import VocabProbe


def json_of(*args: object, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(main, [*(str(arg) for arg in args), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_a_lens_is_fitted_kept_and_evaluated(
    tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    root = tiny_cache.path.parent
    found = json_of(
        "fit",
        "lens",
        tiny_cache.id[:12],
        "--root",
        root,
        "--layers",
        "1-2",
        "--steps",
        "12",
        "--batch",
        "128",
        "--out",
        tmp_path / "lens",
    )
    assert [row["layer"] for row in found["metrics"]] == [1, 2]
    assert all(row["kl"] <= row["kl_logit"] for row in found["metrics"])
    assert residua.load_probe(found["probe"]).kind == "lens"
    rows = json_of("evaluate", tiny_cache.id[:12], found["probe"], "--root", root)["rows"]
    assert {row["probe"] for row in rows} == {"logit", "lens"}


def test_other_offsets_make_a_future_lens_that_goes_on_where_it_was_stopped(
    tiny_cache: residua.ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "fit",
        "lens",
        tiny_cache.id[:12],
        "--root",
        tiny_cache.path.parent,
        "--layers",
        "3",
        "--offsets",
        "0-1",
        "--steps",
        "30",
        "--batch",
        "128",
        "--lr",
        "0.1",
        "--out",
        tmp_path / "lens",
    ]
    whole = json_of(*command)["metrics"]
    judge = lensfit.LensFitRun._judge

    def stop(course: lensfit.LensFitRun) -> None:
        if course.step == 30:
            raise KeyboardInterrupt
        judge(course)

    with monkeypatch.context() as patch:
        patch.setattr(lensfit.LensFitRun, "_judge", stop)
        json_of(*command, code=130)
    checkpoints = tiny_cache.path.parent / "checkpoints"
    assert len(list(checkpoints.rglob("fit.json"))) == 1
    sweeps: list[int] = []
    monkeypatch.setattr(lensfit.LensFitRun, "sweep", lambda course: sweeps.append(1))
    assert json_of(*command)["metrics"] == whole
    assert not sweeps
    assert not list(checkpoints.iterdir())
    assert residua.load_probe(tmp_path / "lens").pairs() == [(3, 0), (3, 1)]


@pytest.mark.parametrize("kind", ["lens", "vocab", "basis"])
def test_the_place_of_the_checkpoint_can_be_chosen(
    tiny_cache: residua.ActivationCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """A root that cannot be written is a warning, and a chosen place that cannot be is an error."""
    seen: list[Path | None] = []

    def stop(_: Any, *args: Any, checkpoint: Path | None, **options: Any) -> None:
        seen.append(checkpoint)
        raise KeyboardInterrupt

    for probe_class in (TunedLens, VocabProbe, CausalBasis):
        monkeypatch.setattr(probe_class, "fit", stop)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where folders should be made")
    command = ["fit", kind, tiny_cache.path, "--out", tmp_path / "probe"]
    command += ["--lens", "logit"] if kind == "basis" else []
    json_of(*command, "--checkpoint", tmp_path / "here", code=130)
    assert [path and path.parent for path in seen] == [tmp_path / "here"]
    message = json_of(*command, "--checkpoint", blocked, code=2)["message"]
    assert "cannot be written" in message
    monkeypatch.setattr(library, "CHECKPOINTS", blocked / "below")
    result = CliRunner().invoke(main, [str(argument) for argument in command])
    assert result.exit_code == 130
    assert "Warning: this fit keeps no checkpoint, and begins anew" in result.stderr
    assert seen[1:] == [None]

"""Damage is mended byte for byte; sequences that are not finite are set aside, and why is kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import residua
from residua.cache.errors import MismatchError, ModelError
from residua.cache.extraction.damage_repair import repair
from residua.cache.forward import part_runner as runner
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.verification import verify
from residua.cli import main

from ...support.models import save_model


@pytest.fixture
def damaged(tiny_cache: ActivationCache, tmp_path: Path) -> Path:
    """A copy of the cache, to be damaged."""
    return Path(shutil.copytree(tiny_cache.path, tmp_path / tiny_cache.id))


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 16
    path.write_bytes(data)


def files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    forward_tokens: list[int] = []
    original = runner.PartRunner._residuals

    def counting(self: runner.PartRunner, batch: Any, dtypes: Any) -> Any:
        forward_tokens.append(int(sum(self.lengths[n] for n in batch.sequences)))
        return original(self, batch, dtypes)

    monkeypatch.setattr(runner.PartRunner, "_residuals", counting)
    return forward_tokens


def test_only_the_damaged_parts_are_run_again_and_give_the_same_bytes(
    tiny_cache: ActivationCache, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_byte(damaged / "arrays.zarr/residual/1/c/2/0", 4321)
    (damaged / "arrays.zarr/residual/3/c/2/0").unlink()
    forward_tokens = count_forwards(monkeypatch)
    repaired = repair(damaged)
    assert repaired.ok
    assert sorted(repaired.mended) == [f"arrays.zarr/residual/{n}/c/2/0" for n in (1, 3)]
    assert files(damaged) == files(tiny_cache.path)
    assert sum(forward_tokens) <= tiny_cache.manifest.layout.part_rows + 2 * 64


@pytest.mark.parametrize(
    "name",
    [
        "head/head.safetensors",
        "head/head.json",
        "head/tokenizer.json",
        "head/canary.safetensors",
        "head/config.json",
        "arrays.zarr/residual/2/zarr.json",
    ],
)
def test_the_head_and_metadata_are_mended(
    tiny_cache: ActivationCache, damaged: Path, name: str
) -> None:
    flip_byte(damaged / name, 77)
    assert not verify(damaged).ok
    assert repair(damaged).mended == (name,)
    assert files(damaged) == files(tiny_cache.path)


def test_damaged_tokens_are_said_to_be_beyond_repair(damaged: Path) -> None:
    flip_byte(damaged / "arrays.zarr/tokens/ids/c/0", 50)
    result = CliRunner().invoke(main, ["repair", str(damaged)])
    assert result.exit_code == 4
    assert "cannot be mended: arrays.zarr/tokens/ids/c/0" in result.stdout


def test_a_whole_cache_needs_no_model(tiny_cache: ActivationCache) -> None:
    args = ["repair", str(tiny_cache.path), "--model", "/nowhere", "--json"]
    assert json.loads(CliRunner().invoke(main, args).stdout)["mended"] == []


def test_a_model_that_is_not_found_is_asked_for(damaged: Path, model_folder: Path) -> None:
    assert ActivationCache(damaged).manifest.model_name == model_folder.name
    flip_byte(damaged / "arrays.zarr/residual/1/c/0/0", 5)
    (damaged / "local.json").unlink()  # as after a pull
    with pytest.raises(ModelError, match="say where the model is with --model"):
        repair(damaged)
    assert repair(damaged, str(model_folder)).ok


def test_another_model_does_not_repair(damaged: Path, tmp_path: Path) -> None:
    flip_byte(damaged / "arrays.zarr/residual/1/c/0/0", 5)
    other = save_model(tmp_path / "other", seed=11)
    with pytest.raises(MismatchError, match="is not the model of this cache"):
        repair(damaged, str(other))


def poisoned(model_folder: Path, target: Path, token: int) -> Path:
    """The model with NaN in the embedding of one token."""
    shutil.copytree(model_folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors["gpt_neox.embed_in.weight"][token] = np.nan
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def rare_token(cache: ActivationCache) -> int:
    """A token of few sequences that no batch of the checks holds."""
    from residua.cache.checks.model_checks import LENGTH, ROWS

    ids, sequence = cache.tokens[:], cache.array("tokens/sequence")[:]
    check_ids = np.random.default_rng(0).integers(0, cache.vocab, (3, ROWS, LENGTH))
    first = ids[sequence < ROWS + 1]
    free = [t for t in np.unique(ids) if t not in check_ids and t not in first]
    return min(free, key=lambda t: len(np.unique(sequence[ids == t])))


@pytest.fixture
def texts_with_a_rare_token(tmp_path: Path) -> Path:
    from ...support.models import texts

    path = tmp_path / "rare.jsonl"
    rows = [*texts(60), *(f"{text} Z~ Q^ {text}" for text in texts(3, seed=9))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


def test_every_kept_run_of_a_context_that_is_not_finite_is_quarantined(
    model_folder: Path, texts_with_a_rare_token: Path, tmp_path: Path
) -> None:
    clean = residua.extract(model_folder, texts_with_a_rare_token, root=tmp_path, pack=False)
    bad = poisoned(model_folder, tmp_path / "bad", rare_token(clean))
    cache = residua.extract(
        bad, texts_with_a_rare_token, root=tmp_path, pack=False, positions="sample:12"
    )
    context, sequence = cache.array("sequences/context")[:], cache.array("tokens/sequence")[:]
    finite = np.all(
        [np.isfinite(cache.residual_array(la)[:]).all(-1) for la in cache.layers], axis=0
    )
    contexts = set(context[sequence[~finite]].tolist())
    runs = [number for number in range(len(context)) if context[number] in contexts]
    assert contexts
    assert len(runs) > len(contexts)
    assert set(cache.quarantined) == set(runs)
    assert not set(runs) & set(cache.sequences("all").tolist())


def test_sequences_that_are_not_finite_are_quarantined_with_the_reason(
    model_folder: Path, texts_with_a_rare_token: Path, tmp_path: Path
) -> None:
    clean = residua.extract(model_folder, texts_with_a_rare_token, root=tmp_path, pack=False)
    token = rare_token(clean)
    bad = poisoned(model_folder, tmp_path / "bad", token)
    cache = residua.extract(bad, texts_with_a_rare_token, root=tmp_path, pack=False)
    sequence = cache.array("tokens/sequence")[:]
    with_token = set(np.unique(sequence[cache.tokens[:] == token]).tolist())
    assert set(cache.quarantined) == with_token
    assert "non-finite values at layer 0" in cache.quarantined[min(with_token)]
    assert not with_token & set(cache.sequences("all").tolist())
    assert sum(r.arrays["residual/1"].nonfinite for r in cache.committed.values()) > 0
    probe = residua.RidgeProbe().fit(cache)
    assert np.isfinite(probe.maps_[(1, 0)].weight).all()
    with pytest.raises(ModelError, match=r"sequence \d+ \(document \d+\) has \d+ non-finite"):
        residua.extract(
            bad, texts_with_a_rare_token, root=tmp_path / "x", pack=False, on_error="raise"
        )


def test_a_machine_that_computes_other_numbers_is_found_on_resume(
    model_folder: Path, tiny_cache: ActivationCache
) -> None:
    from residua.cache.checks.model_checks import recheck_model
    from residua.cache.checks.reference_rows import check_reference_rows, compute_reference_rows
    from residua.cache.model.model_loading import load_model
    from residua.cache.model.source import ModelSource

    model: Any = load_model(ModelSource.locate(str(model_folder)))
    stack = recheck_model(model, tiny_cache)
    assert check_reference_rows(stack, tiny_cache.path, "float32") == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    drift = compute_reference_rows(stack, tiny_cache.path / "head")
    assert drift is not None
    assert drift > 1e-3
    with pytest.raises(MismatchError, match="computes other numbers"):
        check_reference_rows(stack, tiny_cache.path, "float32")

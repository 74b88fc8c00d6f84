"""A fitted causal basis is ablated and edited as its own formula says, from Python and commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import residua
from residua.analysis.interventions.layer_runs import spaced_positions
from residua.analysis.interventions.patch_study import study_patching
from residua.analysis.studies.trajectories.position_sample import choose_positions
from residua.cache.resuming.resumable_model import ResumableModel
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import main

from ...support.models import texts
from ...support.planted_models import planted_cache, planted_model

LAYER = 1


@pytest.fixture(scope="module")
def model() -> ResumableModel:
    return planted_model()


@pytest.fixture(scope="module")
def cache(model: ResumableModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return planted_cache(tmp_path_factory.mktemp("planted"), model)


@pytest.fixture(scope="module")
def basis(cache: ActivationCache) -> residua.CausalBasis:
    lens = residua.LogitLens.of(cache, 0)
    fitted = residua.CausalBasis(k=2, layers=[LAYER], positions=128, test_positions=64)
    return fitted.fit(cache, lens, progress=None)


def test_the_ablated_rows_are_those_of_the_formula(
    cache: ActivationCache, basis: residua.CausalBasis
) -> None:
    import torch

    rows = torch.from_numpy(np.array(cache.residual_array(LAYER)[:50], np.float32))
    of_layer = basis.bases_[LAYER]
    encoder, decoder = (
        np.asarray(matrix, np.float64) for matrix in (of_layer.encoder, of_layer.decoder)
    )
    reference = np.asarray(of_layer.reference, np.float64)
    states = rows.double().numpy()
    expected = states - (states - reference) @ encoder.T @ decoder
    np.testing.assert_allclose(of_layer.ablate(rows).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_basis_stands_beside_the_other_ablations(
    cache: ActivationCache, model: ResumableModel, basis: residua.CausalBasis
) -> None:
    import torch

    result = study_patching(
        cache,
        {"directions": basis},
        model=model,
        layers=LAYER,
        spacing=5,
        offsets=0,
        split="all",
        progress=None,
        device="cpu",
    )
    found = {row.kind: row for row in result.table("ablations").rows if row.offset == 0}
    assert {"directions", "mean", "zero"} <= set(found)
    # One sequence at a time, by a run of all blocks whose layer is overwritten.
    sample = choose_positions(cache, "all", 4096)
    positions = sample.positions[spaced_positions(sample, 5, 0)]
    divergences = []
    for sequence in sample.sequences.tolist():
        start = int(cache.sequence_start[sequence])
        stop = start + int(cache.sequence_length[sequence])
        tokens = torch.from_numpy(np.asarray(cache.tokens[start:stop], np.int64))[None]
        clean = torch.from_numpy(np.array(cache.residual_array(LAYER)[start:stop], np.float32))
        with torch.no_grad():
            p = model.overwrite(LAYER, clean[None], tokens)[0].double().log_softmax(-1)
            for position in positions[(positions >= start) & (positions < stop)].tolist():
                row = position - start
                changed = clean.clone()
                changed[row] = basis.bases_[LAYER].ablate(clean[row : row + 1])[0]
                q = model.overwrite(LAYER, changed[None], tokens)[0].double().log_softmax(-1)
                divergences.append(float((p[row].exp() * (p[row] - q[row])).sum()))
    assert found["directions"].kl == pytest.approx(np.mean(divergences), rel=1e-3)
    assert found["directions"].kl > 0


def test_commands_take_a_saved_basis(tiny_cache: ActivationCache, tmp_path: Path) -> None:
    root = ["--root", str(tiny_cache.path.parent), "--json"]

    def run(*words: str) -> dict:
        result = CliRunner().invoke(main, [*words, *root])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    saved = tmp_path / "basis"
    run(
        "fit", "basis", tiny_cache.id[:8], "--lens", "logit", "--layers", "2", "-k", "2",
        "--positions", "128", "--test-positions", "64", "--out", str(saved),
    )  # fmt: skip
    few = ["--max-positions", "100", "--layers", "2"]
    patched = run("intervene", "patch", tiny_cache.id[:8], str(saved), *few, "--kinds", "mean")
    assert {row["kind"] for row in patched["tables"]["ablations"]} == {"mean", "basis"}
    words = [w for w in dict.fromkeys(" ".join(texts(20)).split()) if w.isalpha()]
    sentences = tmp_path / "sentences.txt"
    sentences.write_text(f"a {words[0]} here\nthe {words[1]} there\n")
    edited = run(
        "intervene", "edit", tiny_cache.id[:8], str(saved), *few, "--sentences", str(sentences),
        "--words", f"{words[0]},{words[1]}", "--directions", "random", "--amounts", "0,1",
    )  # fmt: skip
    assert {row["direction"] for row in edited["tables"]["edits"]} == {"random", "basis"}

"""Studies of interventions find what was planted in a model, and nothing where nothing was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residua.analysis.interventions.erase_study import ContrastRow, ErasureRow, study_erasure
from residua.analysis.interventions.future_subspaces import (
    FutureMoments,
    find_subspaces,
    readout_weights,
)
from residua.analysis.interventions.layer_runs import LayerRuns, mean_rows, spaced_positions
from residua.analysis.interventions.optimal_constant import fit_constant
from residua.analysis.interventions.patch_map import patch_passage
from residua.analysis.interventions.patch_study import AblationRow, BlockRow, study_patching
from residua.analysis.studies.results.study_result import StudyResult
from residua.analysis.studies.trajectories.position_sample import choose_positions
from residua.cache.errors import UsageError
from residua.cache.resuming.resumable_model import ResumableModel
from residua.cache.store.activation_cache import ActivationCache

from ...support.planted_models import FACTOR, planted_cache, planted_model


@pytest.fixture(scope="module")
def model() -> ResumableModel:
    return planted_model()


@pytest.fixture(scope="module")
def cache(model: ResumableModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return planted_cache(tmp_path_factory.mktemp("planted"), model)


@pytest.fixture(scope="module")
def erasure(cache: ActivationCache, model: ResumableModel) -> StudyResult:
    return study_erasure(
        cache, model=model, layers=1, k=3, spacing=5, split="all", progress=None, device="cpu"
    )


def erased(result: StudyResult, subspace: str) -> dict[int, ErasureRow]:
    rows: Any = result.table("erasures").rows
    return {row.offset: row for row in rows if row.subspace == subspace}


def test_the_planted_offset_alone_suffers_from_its_erasure(erasure: StudyResult) -> None:
    rows = erased(erasure, "future 2")
    kl = {offset: row.kl or 0.0 for offset, row in rows.items()}
    assert kl[2] > 0.3
    assert max(kl[0], kl[1], kl[3]) < 0.02 * kl[2]


def test_nothing_is_found_where_nothing_is_planted(erasure: StudyResult) -> None:
    for offset in (1, 3):
        assert (erased(erasure, f"future {offset}")[offset].kl or 0.0) < 1e-6


def test_the_subspace_of_the_next_step_changes_the_next_prediction(erasure: StudyResult) -> None:
    kl = {offset: row.kl or 0.0 for offset, row in erased(erasure, "next step").items()}
    assert kl[0] > 0.3
    assert kl[2] < 0.02 * kl[0]


def test_the_contrast_with_controls_is_positive_at_the_planted_offset_alone(
    erasure: StudyResult,
) -> None:
    rows: list[ContrastRow] = list(erasure.table("contrasts").rows)
    for row in rows:
        low = row.kl_difference_interval[0]
        assert low is not None
        if row.offset == 2 and row.control.startswith("random"):
            assert low > 0.1
        elif row.offset != 2:
            assert abs(row.kl_difference or 0.0) < 1e-6
    (sentence,) = erasure.says
    assert "N = 1" in sentence
    assert "N = 2: KL" in sentence


def test_controls_have_their_rank_and_their_variance(cache: ActivationCache) -> None:
    sample = choose_positions(cache, "train", 10**6, 0)
    moments = FutureMoments.collect(sample, 1, range(4))
    subspaces = {s.name: s for s in find_subspaces(moments, readout_weights(cache), 3)}
    target = subspaces["future 1"].removed_variance
    assert {s.k for name, s in subspaces.items() if name != "random, variance"} == {3}
    assert 0 < target < 1
    for subspace in subspaces.values():
        basis = subspace.layer_basis()
        # What an erasure removes, on the rows themselves.
        rows = np.asarray(cache.residual_array(1)[:], np.float64)
        rows = rows[sample.positions]
        removed = rows - basis.ablate(rows)
        share = removed.var(0).sum() / rows.var(0).sum()
        assert share == pytest.approx(subspace.removed_variance, rel=0.1)
        np.testing.assert_allclose(basis.encoder @ basis.decoder.T, np.eye(basis.k), atol=1e-4)
    pca = subspaces["PCA, variance"].removed_variance
    assert abs(pca - target) <= abs(subspaces["PCA"].removed_variance - target)


def test_moments_are_those_of_numpy_on_the_same_pairs(cache: ActivationCache) -> None:
    sample = choose_positions(cache, "train", 10**6, 0)
    moments = FutureMoments.collect(sample, 0, (0, 2)).at_offset[2]
    rows, last = (np.asarray(cache.residual_array(n)[:], np.float64) for n in (0, 2))
    starts = np.concatenate(
        [np.arange(s, s + 46) for s in cache.sequence_start[cache.sequences("train")]]
    )
    x, y = rows[starts], last[starts + 2]
    assert moments.n == len(starts)
    np.testing.assert_allclose(moments.xx / len(x), np.cov(x.T, bias=True), atol=1e-12)
    expected = (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)
    np.testing.assert_allclose(moments.xy / len(x), expected, atol=1e-12)


def test_questions_that_cannot_be_answered_are_refused(
    cache: ActivationCache, model: ResumableModel
) -> None:
    cases: list[tuple[Any, str]] = [
        ({"k": 0}, "k must be 1 to 8"),
        ({"k": 9}, "k must be 1 to 8"),
        ({"k": 8, "layers": 0}, "fewer than 2 x 8"),
        ({"offsets": 0}, "offsets must be 1 or more"),
        ({"spacing": 2}, "spacing must be more than 3"),
        ({"offsets": 60, "spacing": 70}, "."),
        ({"lenses": [1]}, "leave probes out"),
    ]
    for options, message in cases:
        with pytest.raises(UsageError, match=message):
            study_erasure(cache, model=model, progress=None, **options)


# Patching


@pytest.fixture(scope="module")
def patched(cache: ActivationCache, model: ResumableModel) -> StudyResult:
    return study_patching(
        cache, model=model, spacing=5, split="all", progress=None, device="cpu", passage=3, source=5
    )


def test_a_row_is_read_at_its_own_position_and_two_later(patched: StudyResult) -> None:
    rows: list[AblationRow] = list(patched.table("ablations").rows)
    for row in rows:
        assert row.kl is not None
        if row.offset in (1, 3):
            assert row.kl < 1e-6
        else:
            assert row.kl > 0.05
    assert {(row.layer, row.kind) for row in rows} == {
        (layer, kind) for layer in (0, 1) for kind in ("zero", "mean", "resample")
    }


def test_a_block_that_writes_noise_is_not_missed(
    patched: StudyResult, cache: ActivationCache, model: ResumableModel
) -> None:
    rows: list[BlockRow] = list(patched.table("blocks").rows)
    of_block = {(row.block, row.kind): row.kl or 0.0 for row in rows}
    assert of_block[1, "deleted"] < 1e-6
    # Without block 2 the third slot stays empty.
    tokens = np.asarray(cache.tokens[:], np.int64).reshape(-1, 48)
    module: Any = model.blocks.model
    hidden = module.embed(torch.from_numpy(tokens))
    p = module(torch.from_numpy(tokens)).logits.double().log_softmax(-1)
    q = module.unembed(hidden).double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert of_block[2, "deleted"] == pytest.approx(expected, rel=1e-4)
    assert of_block[2, "mean"] < of_block[2, "deleted"]


def test_the_map_is_that_of_every_row_patched_by_hand(
    patched: StudyResult, cache: ActivationCache, model: ResumableModel
) -> None:
    tokens = np.asarray(cache.tokens[:], np.int64).reshape(-1, 48)
    module: Any = model.blocks.model
    clean = module(torch.from_numpy(tokens[3:4])).logits[0, -1].double().log_softmax(-1)
    cells: Any = {(cell.layer, cell.index): cell for cell in patched.table("map").rows}
    assert set(cells) == {(layer, index) for layer in (0, 1) for index in range(24, 48)}
    for index in (45, 46, 47):
        mixed = tokens[3:4].copy()
        mixed[0, index] = tokens[5, index]
        # A changed embedding is a changed token.
        q = module(torch.from_numpy(mixed)).logits[0, -1].double().log_softmax(-1)
        expected = float((clean.exp() * (clean - q)).sum())
        assert cells[0, index].kl == pytest.approx(expected, abs=1e-5)
    others = [cell.kl for (_, index), cell in cells.items() if index not in (45, 47)]
    assert max(others) < 1e-6


def test_passages_that_are_not_there_are_refused(
    cache: ActivationCache, model: ResumableModel
) -> None:
    cases: list[tuple[Any, str]] = [
        ({"sequence": 99}, "there is no 99"),
        ({"sequence": 0, "source": -1}, "there is no -1"),
        ({"sequence": 0, "last": 48}, "positions 0 to 47, there is no 48"),
        ({"sequence": 0, "width": 0}, "width must be"),
    ]
    for options, message in cases:
        with pytest.raises(UsageError, match=message):
            patch_passage(cache, model=model, **options)
    with pytest.raises(UsageError, match="there is no ablation 'one'"):
        study_patching(cache, model=model, kinds=("one",), progress=None)
    with pytest.raises(UsageError, match="give its sequence"):
        study_patching(cache, model=model, tokens=("a", "b"), progress=None)


def test_the_optimal_constant_changes_less_than_the_mean(
    cache: ActivationCache, model: ResumableModel
) -> None:
    runs = LayerRuns.prepare(cache, model, split="train", max_positions=10**6, device="cpu")
    mean = mean_rows(cache, [0])[0]
    constant = fit_constant(runs, 0, mean, spacing=5, reach=3)
    edited = spaced_positions(runs.sample, 5, 3)

    def mean_kl(row: np.ndarray) -> float:
        values = []
        with torch.inference_mode():
            for batch in runs.batches():
                places = np.flatnonzero(edited[batch.numbers])
                rows = batch.rows(0)
                p = batch.logits(0, rows)[places].double().log_softmax(-1)
                rows[places] = torch.from_numpy(row).float()
                q = batch.logits(0, rows)[places].double().log_softmax(-1)
                values += (p.exp() * (p - q)).sum(-1).tolist()
        return float(np.mean(values))

    assert mean_kl(constant) < mean_kl(mean)
    # The second slot is read two steps later, the fourth never: neither is fitted.
    moved = np.abs(constant - mean).reshape(4, FACTOR).max(1)
    assert moved[1] < 1e-6
    assert moved[3] == 0
    assert moved[0] > 1e-3


def test_results_can_be_written(patched: StudyResult, erasure: StudyResult, tmp_path: Path) -> None:
    for result in (patched, erasure):
        page = result.write_html(tmp_path / f"{result.study}.html").read_text()
        assert result.title in page
        assert all(len(figure.caption) > 20 for figure in result.figures)
        for figure in result.figures:
            result.plot(figure.name)
        assert result.to_dict()["settings"]["seed"] == 0

"""The study of Jacobian lenses on blocks whose Jacobian is known: a centered lens is the model."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

import residua
from residua.analysis.studies.jacobian.jacobian_study import (
    geometric_mean,
    matrix_cosine,
    study_jacobian,
)
from residua.analysis.studies.trajectories.position_sample import choose_positions
from residua.cache.errors import MismatchError, UsageError
from residua.probes.lens.jacobian_lens import JacobianLens
from residua.probes.ridge.ridge_probe import RidgeProbe

from ....support.synthetic import make_cache, random_head

WIDTH, VOCAB = 6, 20


@pytest.fixture(scope="module")
def linear_model(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[residua.ActivationCache, JacobianLens]:
    """A cache of two affine blocks h -> A h + b, and the lens of its exact Jacobians."""
    rng = np.random.default_rng(0)
    blocks = [
        (np.eye(WIDTH) + 0.5 * rng.normal(size=(WIDTH, WIDTH)), 2 * rng.normal(size=WIDTH))
        for _ in range(2)
    ]
    hidden = [rng.normal(1, 1, (600, WIDTH))]
    for matrix, bias in blocks:
        hidden.append(hidden[-1] @ matrix.T + bias)
    states = [layer.astype(np.float32) for layer in hidden]
    root = tmp_path_factory.mktemp("linear")
    cache = make_cache(root, states, [20] * 30, random_head(WIDTH, VOCAB))
    jacobians = {0: blocks[1][0] @ blocks[0][0], 1: blocks[1][0]}
    return cache, JacobianLens.of(jacobians, depth=2, geometry=cache.head.digest)


def test_the_centered_lens_of_affine_blocks_is_the_model(
    linear_model: tuple[residua.ActivationCache, JacobianLens],
) -> None:
    cache, lens = linear_model
    ridge = RidgeProbe(offsets=[0, 1], alpha=1e-9).fit(cache)
    result = study_jacobian(cache, [lens, ridge], split="all", offsets=(0, 1), track=3)
    rows = {(row.lens, row.layer): row for row in result.table("lenses").rows}
    p = softmax(cache.logits().compute().astype(np.float64), -1)
    for layer in (0, 1):
        centered, plain = rows["jacobian centered", layer], rows["jacobian", layer]
        assert centered.kl == pytest.approx(0, abs=1e-6)
        assert (centered.agreement, centered.rank) == (1, pytest.approx(1))
        read = cache.residual_array(layer)[:] @ lens.jacobians_[layer].T
        log_q = np.log(softmax(cache.head.logits(read.astype(np.float32)).astype(np.float64), -1))
        assert plain.kl == pytest.approx(rel_entr(p, np.exp(log_q)).sum(-1).mean(), rel=1e-3)
        assert plain.kl > 0.05
        assert plain.tracked_log_p == pytest.approx(log_q[:, 3].mean(), rel=1e-4)
        rank = 1 + (log_q > log_q[:, 3:4]).sum(-1)
        assert plain.tracked_rank == pytest.approx(np.exp(np.log(rank).mean()), rel=1e-3)
        logit_kl = rows["logit", layer].kl
        assert plain.over_logit == pytest.approx(logit_kl - plain.kl, abs=1e-4)
    # Ridge finds the same matrix: the blocks are affine.
    for row in result.table("maps").rows:
        assert row.cosine == pytest.approx(1, abs=1e-4)
        assert row.norm_ratio == pytest.approx(1, rel=1e-3)
        assert row.offsets == 2
    at_0 = {
        (row.lens, row.layer): row.precision_at_1
        for row in result.table("ahead").rows
        if row.offset == 0
    }
    assert at_0["jacobian centered", 1] == 1
    assert {row.offset for row in result.table("ahead").rows} == {0, 1}
    assert result.settings["track"] == "#3"
    assert any("nats less than that of jacobian [" in text for text in result.says)
    assert any("No clear difference between jacobian centered and ridge" in t for t in result.says)


def test_a_lens_with_means_keeps_them(
    linear_model: tuple[residua.ActivationCache, JacobianLens],
) -> None:
    cache, lens = linear_model
    shifted = JacobianLens.of(
        lens.jacobians_, {layer: np.full(WIDTH, 1.0) for layer in (0, 1, 2)}, depth=2
    )
    result = study_jacobian(cache, {"mine": shifted}, split="all", offsets=(0,))
    kl = {(row.lens, row.layer): row.kl for row in result.table("lenses").rows}
    assert kl["mine centered", 1] > 0.01  # the means of the lens, not those of the cache
    assert result.table("maps").rows == []


def test_cosine_and_geometric_mean_are_those_of_numpy(
    linear_model: tuple[residua.ActivationCache, JacobianLens],
) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 5))
    expected = (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
    assert matrix_cosine(a, b) == pytest.approx(expected)
    assert matrix_cosine(a, 0 * b) is None
    sample = choose_positions(linear_model[0], "all")
    ranks = rng.integers(1, 9, sample.count).astype(np.float32)
    mean, (low, high) = geometric_mean(sample, ranks)
    assert mean == pytest.approx(np.exp(np.log(ranks).mean()), rel=1e-5)
    assert low is not None
    assert high is not None
    assert mean is not None
    assert low < mean < high
    assert geometric_mean(sample, np.full(sample.count, np.nan)) == (None, (None, None))


def test_mistakes_end_in_one_message(
    linear_model: tuple[residua.ActivationCache, JacobianLens], tmp_path: Path
) -> None:
    cache, lens = linear_model
    with pytest.raises(UsageError, match="give a Jacobian lens: a file"):
        study_jacobian(cache, [], split="all")
    other = make_cache(
        tmp_path, [np.ones((20, WIDTH), np.float32)] * 5, [20], random_head(WIDTH, VOCAB)
    )
    with pytest.raises(MismatchError, match="2 blocks, this cache has width 6 and 4 blocks"):
        study_jacobian(other, [lens], split="all")
    with pytest.raises(UsageError, match="no token 20 in a vocabulary of 20"):
        study_jacobian(cache, [lens], split="all", track=20)
    with pytest.raises(UsageError, match="no tokenizer"):
        study_jacobian(cache, [lens], split="all", track=" Paris")

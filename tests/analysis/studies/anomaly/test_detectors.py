"""AUROC and detectors are those of scikit-learn and of plain formulas."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from residua.analysis.studies.anomaly.detectors import (
    DETECTORS,
    FACTOR,
    FOREST,
    SVM,
    MahalanobisDistance,
    fit_detector,
)
from residua.analysis.studies.anomaly.separation import QuestionResamples, weighted_auroc


@pytest.mark.parametrize("ties", [1, 4, 1000])
def test_auroc_is_that_of_scikit_learn_with_repeated_documents(ties: int) -> None:
    rng = np.random.default_rng(ties)
    scores = rng.integers(0, ties + 1, 60) / ties
    positive = rng.random(60) < 0.4
    weights = rng.integers(0, 3, (5, 60)).astype(float)
    weights[0] = 1
    found = weighted_auroc(scores, positive, weights)
    for row, value in zip(weights.astype(int), found, strict=True):
        expected = roc_auc_score(np.repeat(positive, row), np.repeat(scores, row))
        assert value == pytest.approx(expected, abs=1e-12)
    assert np.isnan(weighted_auroc(scores, np.ones(60, bool), weights)).all()
    assert np.isnan(weighted_auroc(scores, positive, np.where(positive, 0.0, 1.0)[None])).all()


def test_separation_averages_splits_and_leaves_unscored_documents_out() -> None:
    rng = np.random.default_rng(0)
    questions = np.repeat(np.arange(30), 2)
    positive = np.tile([False, True], 30)
    scores = rng.normal(size=(3, 60)) + positive
    for row in scores:
        row[rng.random(60) < 0.3] = np.nan
    resamples = QuestionResamples(questions, 7)
    found = resamples.separate(scores, ~positive, positive)
    expected = [roc_auc_score(positive[np.isfinite(row)], row[np.isfinite(row)]) for row in scores]
    assert found.value == pytest.approx(np.mean(expected))
    # One resample by hand: questions repeated as often as they were drawn.
    count = resamples.weights[11][questions].astype(int)
    by_hand = [
        roc_auc_score(np.repeat(positive, count * np.isfinite(row)),
                      np.repeat(row, count * np.isfinite(row)))
        for row in scores
    ]  # fmt: skip
    assert found.resampled[11] == pytest.approx(np.mean(by_hand))
    low, high = found.interval
    assert low is not None
    assert high is not None
    assert low < np.mean(expected) < high
    assert found.minus(found).interval == (0, 0)
    nothing = resamples.separate(scores * np.nan, ~positive, positive)
    assert (nothing.value, nothing.interval) == (None, (None, None))
    alone = QuestionResamples(np.zeros(60, int), 0).separate(scores, ~positive, positive)
    assert alone.value == found.value
    assert alone.interval == (None, None)


def test_scores_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    rows, others = rng.normal(3, 2, (80, 6)), rng.normal(0, 5, (9, 6))
    scaler = StandardScaler().fit(rows)
    plain = {
        FOREST: IsolationForest(random_state=5),
        FACTOR: LocalOutlierFactor(n_neighbors=20, novelty=True),
        SVM: OneClassSVM(nu=0.1, gamma="scale"),
    }
    for name, model in plain.items():
        model.fit(scaler.transform(rows))
        expected = -model.score_samples(scaler.transform(others))
        np.testing.assert_allclose(fit_detector(name, rows, 5)(others), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="no detector"):
        fit_detector("kNN", rows, 0)


@pytest.mark.parametrize("rows", [12, 2000])
def test_the_distance_is_that_of_the_shrunk_covariance(rows: int) -> None:
    rng = np.random.default_rng(2)
    mixing = np.eye(20) + 0.1 * rng.normal(size=(20, 20))
    fit, others = rng.normal(size=(rows, 20)) @ mixing + 4, rng.normal(size=(7, 20)) @ mixing
    distance = MahalanobisDistance(fit)
    standard = (fit - fit.mean(0)) / fit.std(0)
    model = LedoitWolf(assume_centered=True).fit(standard)
    sample = standard.T @ standard / rows
    shrunk = (1 - model.shrinkage_) * sample + model.shrinkage_ * np.trace(sample) / 20 * np.eye(20)
    z = (others - fit.mean(0)) / fit.std(0)
    expected = np.array([row @ np.linalg.solve(shrunk, row) for row in z])
    np.testing.assert_allclose(distance.squared(others), expected, rtol=1e-8)
    np.testing.assert_allclose(distance.relative(others), expected - (z * z).sum(1), rtol=1e-7)
    assert distance.shrinkage == pytest.approx(model.shrinkage_)
    if rows == 2000:
        # With many rows it is the plain distance, for any scale of the columns.
        plain = np.array([
            row @ np.linalg.solve(np.cov(fit.T, bias=True), row) for row in others - fit.mean(0)
        ])  # fmt: skip
        np.testing.assert_allclose(distance.squared(others), plain, rtol=0.2)
        scaled = MahalanobisDistance(fit * 1e4).squared(others * 1e4)
        np.testing.assert_allclose(scaled, distance.squared(others), rtol=1e-6)


def test_constant_columns_and_equal_rows_give_finite_scores() -> None:
    rows = np.tile(np.array([[1.0, 2.0, 0.0]]), (30, 1))
    rows[:, 1] += np.arange(30) % 2
    for name in DETECTORS:
        assert np.isfinite(fit_detector(name, rows, 0)(rows + 1)).all(), name
    constant = MahalanobisDistance(np.ones((30, 4)))
    assert np.isfinite(constant.squared(np.ones((2, 4)))).all()

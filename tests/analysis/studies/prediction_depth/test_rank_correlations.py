"""Spearman correlations and their intervals are those of scipy on the resampled rows."""

import numpy as np
import pytest
from scipy import stats

from residua.analysis.studies.prediction_depth.number_texts import (
    holds_zero,
    number_text,
    percent_text,
)
from residua.analysis.studies.prediction_depth.rank_correlations import correlate_ranks
from residua.probes.base.resampling import resampling_counts


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def partial_spearman(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> float:
    """Correlation of the residuals of the ranks of x and y on the rank of z."""
    ranks = [stats.rankdata(values) for values in (x, y, z)]
    design = np.column_stack([np.ones(len(z)), ranks[2]])
    rest = [r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in ranks[:2]]
    return float(np.corrcoef(*rest)[0, 1])


def sample(n: int = 90, units: int = 7) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    z = rng.normal(size=n)
    x = np.round(z + rng.normal(size=n))  # with ties
    y = np.round(2 * (z + rng.normal(size=n)))
    return x, y, z, rng.integers(0, units, n), resampling_counts(units, 3, 40)


def test_values_are_those_of_scipy() -> None:
    x, y, z, units, weights = sample()
    plain = correlate_ranks(x, y, units, weights)
    assert plain.n == 90
    assert plain.value == pytest.approx(spearman(x, y), abs=1e-12)
    partial = correlate_ranks(x, y, units, weights, z)
    assert partial.value == pytest.approx(partial_spearman(x, y, z), abs=1e-12)


def test_intervals_are_those_of_rows_drawn_again_by_document() -> None:
    x, y, z, units, weights = sample()
    drawn = [np.repeat(np.arange(len(x)), counts[units].astype(int)) for counts in weights]
    low, high = np.percentile([spearman(x[rows], y[rows]) for rows in drawn], (2.5, 97.5))
    assert correlate_ranks(x, y, units, weights).interval == pytest.approx((low, high), abs=1e-12)
    found = [partial_spearman(x[rows], y[rows], z[rows]) for rows in drawn]
    low, high = np.percentile(found, (2.5, 97.5))
    partial = correlate_ranks(x, y, units, weights, z)
    assert partial.interval == pytest.approx((low, high), abs=1e-10)


def test_what_is_missing_is_left_out_and_what_is_undefined_is_none() -> None:
    x, y, z, units, weights = sample()
    x[:10], z[80:] = np.nan, np.nan
    found = correlate_ranks(x, y, units, weights, z)
    assert found.n == 70
    kept = slice(10, 80)
    assert found.value == pytest.approx(partial_spearman(x[kept], y[kept], z[kept]), abs=1e-12)
    for values in (np.zeros(90), np.full(90, np.nan)):
        undefined = correlate_ranks(values, y, units, weights)
        assert (undefined.value, undefined.interval) == (None, (None, None))
    assert correlate_ranks(y[:2], y[:2], units[:2], weights).value is None
    # Given itself, nothing is left to correlate.
    assert correlate_ranks(y, y + 1, units, weights, y).value is None
    one = correlate_ranks(y, -y, np.zeros(90, np.int64), weights)
    assert one.value == pytest.approx(-1)
    assert one.interval == (None, None)


def test_infinite_values_rank_last() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0])
    y = np.array([1.0, 2.0, np.inf, np.inf])
    expected = spearman(x, np.array([1.0, 2.0, 9.0, 9.0]))
    assert correlate_ranks(x, y, np.zeros(4, np.int64), np.ones((0, 1))).value == pytest.approx(
        expected
    )


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng, holds = np.random.default_rng(1), 0
    for _ in range(60):
        # Documents shift x and y, each by itself: positions are no independent observations.
        units = np.repeat(np.arange(40), 10)
        x, y = rng.normal(size=(2, 40))[:, units] + rng.normal(size=(2, 400))
        low, high = correlate_ranks(x, y, units, resampling_counts(40, 0, 100)).interval
        assert low is not None
        assert high is not None
        holds += low <= 0 <= high
    assert 51 <= holds <= 60


def test_numbers_in_sentences_are_rounded_and_keep_their_intervals() -> None:
    assert number_text(0.12345, (0.1, 0.25)) == "0.123 [0.1, 0.25]"
    assert number_text(1064.4, (877.2, 1290.0)) == "1,064 [877, 1,290]"
    assert number_text(float("inf")) == "inf"
    assert number_text(None, (0.0, 1.0)) == "undefined"
    assert number_text(2.0, (None, None)) == "2"
    assert percent_text(0.456, (0.4, 0.5)) == "46 % [40, 50]"
    assert [holds_zero(one) for one in ((None, None), (-1.0, 1.0), (0.1, 0.2))] == [1, 1, 0]

"""RidgeProbe on arrays keeps scikit-learn's contract, by scikit-learn's own checks."""

from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from residua.cache.errors import UsageError
from residua.probes.ridge.ridge_probe import RidgeProbe


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.parametrize("params", [{}, {"alpha": 1.0, "folds": 1}])
def test_every_check_of_sklearn_passes(params: dict[str, Any]) -> None:
    """None is expected to fail; one is skipped, as it needs SCIPY_ARRAY_API."""
    results = check_estimator(RidgeProbe(**params), on_fail=None, on_skip=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    skipped = [r["check_name"] for r in results if r["status"] == "skipped"]
    assert failed == {}
    assert set(skipped) <= {"check_array_api_input"}
    assert len(results) > 40


def random_rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(2, 3, (120, 5))
    return x, x @ rng.normal(size=(5, 3)) + rng.normal(0, 2, (120, 3))


def test_a_pipeline_equals_that_of_sklearns_ridge() -> None:
    x, y = random_rows()
    found = make_pipeline(StandardScaler(), RidgeProbe(alpha=5.0)).fit(x, y)
    expected = make_pipeline(StandardScaler(), Ridge(alpha=5.0)).fit(x, y)
    np.testing.assert_allclose(found.predict(x), expected.predict(x), rtol=1e-9)


def test_a_grid_search_chooses_what_it_chooses_for_sklearns_ridge() -> None:
    x, y = random_rows()
    grid = {"alpha": np.logspace(-2, 4, 13)}
    options: dict[str, Any] = {"cv": KFold(4), "scoring": "neg_mean_squared_error"}
    found = GridSearchCV(RidgeProbe(folds=1), grid, **options).fit(x, y)
    expected = GridSearchCV(Ridge(), grid, **options).fit(x, y)
    assert found.best_params_ == expected.best_params_
    scores = (search.cv_results_["mean_test_score"] for search in (found, expected))
    np.testing.assert_allclose(*scores, rtol=1e-9)


def test_dask_arrays_stay_lazy_and_give_the_same() -> None:
    import dask.array

    x, y = random_rows()
    lazy = [dask.array.asarray(v).rechunk((37, 2)) for v in (x, y)]
    probe, expected = RidgeProbe().fit(*lazy), RidgeProbe().fit(x, y)
    np.testing.assert_allclose(probe.coef_, expected.coef_, rtol=1e-9)
    predicted = probe.predict(lazy[0])
    assert isinstance(predicted, dask.array.Array)
    np.testing.assert_allclose(predicted.compute(), expected.predict(x), rtol=1e-9)
    assert probe.score(*lazy) == pytest.approx(expected.score(x, y), rel=1e-9)
    with pytest.raises(UsageError, match=r"expected rows \(n, 5\)"):
        probe.predict(lazy[0][:, 1:])


def test_frames_give_their_names() -> None:
    import pandas

    x, y = random_rows()
    frame = pandas.DataFrame(x, columns=pandas.Index(list("abcde")))
    probe: Any = RidgeProbe(alpha=1.0).fit(frame, y)
    assert list(probe.feature_names_in_) == list("abcde")
    assert probe.n_features_in_ == 5


def test_an_unfitted_probe_says_so() -> None:
    probe = RidgeProbe()
    for call in (probe.pairs, probe.map, probe.metrics, lambda: probe.predict(np.zeros((2, 3)))):
        with pytest.raises(NotFittedError):
            call()

"""Ridge from a cache: scikit-learn's numbers, and the penalty that a K-fold loop picks."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold

from residua.cache.errors import (
    CorruptError,
    MismatchError,
    NotFoundError,
    ResiduaWarning,
    UsageError,
)
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.readout import ReadoutBatch
from residua.probes.moments.moment_collection import collect_moments
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.ridge.solver import GRID
from residua.probes.saved.save import check_geometry, load_probe, save_probe

from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB, DEPTH, FOLDS = 10, 30, 2, 4
OFFSETS = (0, 1, 3)
ALPHAS = np.logspace(-2, 5, 12)


def noisy_layers(rng: np.random.Generator, rows: int) -> list[np.ndarray]:
    """Layers that share a signal, so that R2 lies between 0 and 1."""
    signal = rng.normal(size=(rows, WIDTH))
    return [
        (signal @ rng.normal(size=(WIDTH, WIDTH)) + rng.normal(0, 2, (rows, WIDTH)) + 3).astype(
            "f4"
        )
        for _ in range(DEPTH + 1)
    ]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    rng = np.random.default_rng(0)
    lengths = [1, *rng.integers(1, 12, 60).tolist()]
    folder = tmp_path_factory.mktemp("noisy")
    return make_cache(folder, noisy_layers(rng, sum(lengths)), lengths, random_head(WIDTH, VOCAB))


def train_pairs(
    cache: ActivationCache, layer: int, offset: int, target: int = DEPTH
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows x, y in float64 and the fold of each, sequence by sequence."""
    x, y = (np.asarray(cache.residual_array(number)[:], np.float64) for number in (layer, target))
    folds = cache.sequence_folds(FOLDS)
    found: list[tuple[int, int, int]] = []
    for number in cache.sequences("train"):
        start, length = int(cache.sequence_start[number]), int(cache.sequence_length[number])
        found += [
            (t, t + offset, int(folds[number])) for t in range(start, start + length - offset)
        ]
    rows = np.array(found)
    return x[rows[:, 0]], y[rows[:, 1]], rows[:, 2]


def explicit_path(x: np.ndarray, y: np.ndarray, fold: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """Mean squared error of held-out rows by a loop over folds and penalties of scikit-learn."""
    errors = []
    for alpha in alphas:
        predicted = np.empty_like(y)
        for k in np.unique(fold):
            model = Ridge(alpha=alpha).fit(x[fold != k], y[fold != k])
            predicted[fold == k] = model.predict(x[fold == k])
        errors.append(((y - predicted) ** 2).mean())
    return np.array(errors)


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("layer", range(DEPTH))
def test_coefficients_equal_those_of_sklearn(
    noisy: ActivationCache, layer: int, offset: int, alpha: float
) -> None:
    found = RidgeProbe(offset, [layer], alpha=alpha).fit(noisy).maps_[layer, offset]
    x, y, _ = train_pairs(noisy, layer, offset)
    expected = Ridge(alpha=alpha).fit(x, y)
    np.testing.assert_allclose(found.weight.T, expected.coef_, rtol=1e-6)
    np.testing.assert_allclose(found.bias, expected.intercept_, rtol=1e-6)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("layer", range(DEPTH))
def test_the_penalty_path_equals_an_explicit_loop(
    noisy: ActivationCache, layer: int, offset: int
) -> None:
    probe = RidgeProbe(offset, [layer], alphas=ALPHAS.tolist(), folds=FOLDS).fit(noisy)
    x, y, fold = train_pairs(noisy, layer, offset)
    expected = explicit_path(x, y, fold, ALPHAS)
    np.testing.assert_allclose(probe.cv_mse_path_[layer, offset], expected, rtol=1e-9)
    assert probe.alpha_[layer, offset] == ALPHAS[np.argmin(expected)]
    spread = ((y - y.mean(0)) ** 2).mean()
    assert probe.r2_[layer, offset] == pytest.approx(1 - expected.min() / spread, rel=1e-9)
    assert probe.n_[layer, offset] == len(x)


def test_all_pairs_at_once_equal_each_alone(noisy: ActivationCache) -> None:
    with pytest.warns(ResiduaWarning, match="more than the memory of 0.0 MB"):
        probe = RidgeProbe(OFFSETS, folds=FOLDS).fit(noisy, memory=1)
    assert probe.pairs() == [(layer, n) for layer in range(DEPTH + 1) for n in OFFSETS]
    for layer, offset in [(0, 0), (1, 3)]:
        alone = RidgeProbe(offset, [layer], folds=FOLDS).fit(noisy)
        assert alone.alpha_[layer, offset] == pytest.approx(probe.alpha_[layer, offset], rel=1e-12)
        np.testing.assert_allclose(alone.map().weight, probe.map(layer, offset).weight, rtol=1e-6)


def test_maps_between_any_layers_equal_sklearn(noisy: ActivationCache) -> None:
    """Forwards, backwards and to itself, several targets in one pass."""
    probe = RidgeProbe((0, 3), alpha=2.0, folds=FOLDS, target=[0, 1]).fit(noisy)
    assert list(probe.maps_) == [
        (layer, offset, target) for layer in range(3) for offset in (0, 3) for target in (0, 1)
    ]
    for (layer, offset, target), found in probe.maps_.items():
        x, y, _ = train_pairs(noisy, layer, offset, target)
        expected = Ridge(alpha=2.0).fit(x, y)
        np.testing.assert_allclose(found.weight.T, expected.coef_, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.bias, expected.intercept_, rtol=1e-5, atol=1e-6)
        alone = RidgeProbe(offset, [layer], alpha=2.0, folds=FOLDS, target=target).fit(noisy)
        np.testing.assert_allclose(alone.maps_[layer, offset].weight, found.weight, rtol=1e-5)
        assert alone.metrics()[0] == pytest.approx(
            next(row for row in probe.metrics() if (row["layer"], row["offset"], row["target"])
                 == (layer, offset, target)), rel=1e-9)  # fmt: skip


def test_targets_that_share_spectra_are_validated_as_if_alone(noisy: ActivationCache) -> None:
    options: dict[str, Any] = {"layers": [1], "alphas": ALPHAS.tolist(), "folds": FOLDS}
    probe = RidgeProbe(1, target=[0, DEPTH], **options).fit(noisy)
    for target in (0, DEPTH):
        x, y, fold = train_pairs(noisy, 1, 1, target)
        expected = explicit_path(x, y, fold, ALPHAS)
        np.testing.assert_allclose(probe.cv_mse_path_[1, 1, target], expected, rtol=1e-9)
        assert probe.alpha_[1, 1, target] == ALPHAS[np.argmin(expected)]


def test_a_map_to_another_layer_is_scored_and_saved(noisy: ActivationCache, tmp_path: Path) -> None:
    probe = RidgeProbe(1, [0], folds=FOLDS, target=(1, DEPTH)).fit(noisy)
    loaded = load_probe(save_probe(probe, tmp_path))
    for target in (1, DEPTH):
        x, y, _ = train_pairs(noisy, 0, 1, target)
        expected = r2_score(y, loaded.predict(x, target=target), multioutput="variance_weighted")
        found = loaded.score(noisy, target=target, split="train")
        assert found == pytest.approx(expected, rel=1e-5)
    assert loaded.metrics() == probe.metrics()
    with pytest.raises(UsageError, match="and a target; fitted"):
        loaded.map(0, 1)
    with pytest.raises(NotFoundError, match="target 0; fitted are"):
        loaded.map(target=0)


def test_the_head_reads_maps_to_the_last_layer_only(noisy: ActivationCache) -> None:
    both = RidgeProbe(0, [0], target=[1, DEPTH]).fit(noisy)
    lens = RidgeProbe(0, [0]).fit(noisy)
    assert both.pairs() == lens.pairs() == [(0, 0)]
    torch.testing.assert_close(
        logits_of_all_pairs(both, noisy)[0], logits_of_all_pairs(lens, noisy)[0]
    )
    with pytest.raises(UsageError, match="predicts layer 1; the head reads layer 2"):
        logits_of_all_pairs(RidgeProbe(0, [0], target=1).fit(noisy), noisy)


def test_moments_of_several_targets_are_chosen_from(noisy: ActivationCache) -> None:
    moments = collect_moments(noisy, [0], [1], [0, 1, 2], folds=FOLDS)
    found = RidgeProbe(target=1).fit(moments)
    expected = RidgeProbe(1, [0], folds=FOLDS, target=1).fit(noisy)
    np.testing.assert_allclose(found.map(0, 1).weight, expected.map(0, 1).weight, rtol=1e-6)
    with pytest.raises(UsageError, match="give target="):
        RidgeProbe().fit(moments)
    with pytest.raises(NotFoundError, match=r"not \{4\}"):
        RidgeProbe(target=4).fit(moments)


def test_a_probe_of_the_first_version_still_loads(noisy: ActivationCache, tmp_path: Path) -> None:
    """It knew no `target` and no `depth`."""
    probe = RidgeProbe((0, 1), [0, 1], alpha=1.0).fit(noisy)
    config, tensors = probe.state()
    params = {k: v for k, v in probe.get_params().items() if k != "target"}
    rows = [{k: v for k, v in row.items() if k != "target"} for row in config["pairs"]]
    old = {**{k: v for k, v in config.items() if k != "depth"}, "pairs": rows}
    loaded = RidgeProbe.restore(params, old, tensors)
    for pair, found in probe.maps_.items():
        np.testing.assert_array_equal(loaded.maps_[pair].weight, found.weight)
    for mine, theirs in zip(
        logits_of_all_pairs(loaded, noisy), logits_of_all_pairs(probe, noisy), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_saved_moments_give_the_same_fit(noisy: ActivationCache) -> None:
    moments = collect_moments(noisy, [0, 1], [1], folds=FOLDS)
    probe = RidgeProbe(alphas=ALPHAS.tolist()).fit(moments)
    direct = RidgeProbe(1, [0, 1], alphas=ALPHAS.tolist(), folds=FOLDS).fit(noisy)
    assert probe.alpha_ == direct.alpha_
    np.testing.assert_allclose(probe.map(1, 1).weight, direct.map(1, 1).weight, rtol=1e-6)
    assert probe.cache_id_ == noisy.id


@pytest.mark.parametrize("chunks", [None, 7, 40, 1000])
def test_arrays_equal_sklearn_with_kfold(chunks: int | None) -> None:
    import dask.array

    rng = np.random.default_rng(1)
    x = rng.normal(2, 1, (203, 6))
    y = x @ rng.normal(size=(6, 3)) + rng.normal(0, 3, (203, 3))
    fold = np.empty(203, int)
    for number, (_, held) in enumerate(KFold(5).split(x)):
        fold[held] = number
    path = explicit_path(x, y, fold, ALPHAS)
    given = (
        [x, y] if chunks is None else [dask.array.asarray(v).rechunk((chunks, 3)) for v in (x, y)]
    )
    probe = RidgeProbe(alphas=ALPHAS.tolist()).fit(*given)
    np.testing.assert_allclose(probe.cv_mse_path_[0, 0], path, rtol=1e-9)
    best = Ridge(alpha=ALPHAS[np.argmin(path)]).fit(x, y)
    assert probe.alpha_[0, 0] == best.alpha
    np.testing.assert_allclose(probe.coef_, best.coef_, rtol=1e-9)
    np.testing.assert_allclose(probe.intercept_, best.intercept_, rtol=1e-9)
    np.testing.assert_allclose(probe.predict(x), best.predict(x), rtol=1e-9)
    expected = r2_score(y, best.predict(x), multioutput="variance_weighted")
    assert probe.score(*given) == pytest.approx(expected, rel=1e-9)
    assert probe.n_features_in_ == 6


def test_a_single_output_keeps_its_shape() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(50, 4)), rng.normal(size=50)
    probe, expected = RidgeProbe(alpha=2.0).fit(x, y), Ridge(alpha=2.0).fit(x, y)
    np.testing.assert_allclose(probe.coef_, expected.coef_, rtol=1e-9)
    np.testing.assert_allclose(probe.predict(x), expected.predict(x), rtol=1e-9)
    assert probe.predict(x).shape == (50,)
    assert probe.score(x, y) == pytest.approx(expected.score(x, y), rel=1e-9)


@pytest.mark.parametrize("planted", [0, 1, 2])
def test_no_pair_crosses_a_sequence(planted: int, tmp_path: Path) -> None:
    """The last layer is a linear map of layer 0, N tokens before, inside each sequence."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 9, 120).tolist()
    start, noise = np.cumsum([0, *lengths]), rng.normal(size=(sum(lengths), WIDTH))
    x, y = rng.normal(size=(sum(lengths), WIDTH)), noise
    mixing = rng.normal(size=(WIDTH, WIDTH))
    for first, length in zip(start, lengths, strict=False):
        if length > planted:
            y[first + planted : first + length] = x[first : first + length - planted] @ mixing + 1
    tiny = make_cache(tmp_path, [x, y], lengths, random_head(WIDTH, VOCAB))
    probe = RidgeProbe((0, 1, 2, 3), [0]).fit(tiny)
    for (_, offset), r2 in probe.r2_.items():
        assert (r2 > 1 - 1e-9) if offset == planted else (abs(r2) < 0.1)
    assert probe.score(tiny, layer=0, offset=planted, split="test") > 1 - 1e-9


def test_the_last_layer_maps_to_itself(noisy: ActivationCache) -> None:
    probe = RidgeProbe(0, [DEPTH]).fit(noisy)
    np.testing.assert_allclose(probe.map().weight, np.eye(WIDTH), atol=1e-5)
    np.testing.assert_allclose(probe.map().bias, 0, atol=1e-5)
    assert probe.r2_[DEPTH, 0] > 1 - 1e-9


def test_massive_columns_equal_sklearn() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, 8))
    x[:, 2] = 1e4 * (x[:, 2] + 20)
    y = x @ rng.normal(size=(8, 5)) + rng.normal(size=(300, 5))
    y[:, 1] *= 1e4
    for alpha in (1e-3, 1.0, 1e5):
        found, expected = RidgeProbe(alpha=alpha).fit(x, y), Ridge(alpha=alpha).fit(x, y)
        np.testing.assert_allclose(found.coef_, expected.coef_, rtol=1e-6)
    fold = np.repeat(np.arange(5), 60)
    probe = RidgeProbe(alphas=ALPHAS.tolist()).fit(x, y)
    np.testing.assert_allclose(
        probe.cv_mse_path_[0, 0], explicit_path(x, y, fold, ALPHAS), rtol=1e-6
    )


@pytest.mark.parametrize("alpha", [0.0, 1e-8, 1.0])
def test_fewer_rows_than_columns_equal_sklearn(alpha: float) -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(9, 20)), rng.normal(size=(9, 3))
    expected = Ridge(alpha=alpha, solver="svd").fit(x, y)
    found = RidgeProbe(alpha=alpha, folds=1).fit(x, y)
    np.testing.assert_allclose(found.coef_, expected.coef_, rtol=1e-6)
    assert np.isnan(found.r2_[0, 0])


def test_constant_columns_get_no_weight() -> None:
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(40, 2))
    x[:, 1] = 7
    probe = RidgeProbe().fit(x, y)
    assert not probe.coef_[:, 1].any()
    flat = RidgeProbe().fit(np.ones((40, 3)), y)
    assert not flat.coef_.any()
    np.testing.assert_allclose(flat.intercept_, y.mean(0))


def test_the_default_grid_is_relative_to_the_mean_eigenvalue() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.normal(0, 1e3, (200, 4)), rng.normal(size=(200, 2))
    probe = RidgeProbe().fit(x, y)
    mean = np.linalg.eigvalsh(np.cov(x.T, bias=True) * 200).mean()
    np.testing.assert_allclose(probe.alphas_[0, 0], GRID * mean, rtol=1e-12)


def logits_of_all_pairs(probe: RidgeProbe, cache: ActivationCache) -> list[torch.Tensor]:
    hidden = torch.from_numpy(cache.residual_array(0)[:20])
    batch = ReadoutBatch(hidden, torch.zeros(20, dtype=torch.int64), cache.head.torch())
    return [probe.logits(batch, layer, offset) for layer, offset in probe.pairs()]


def test_logits_are_the_head_of_the_prediction(noisy: ActivationCache) -> None:
    probe = RidgeProbe((0, 1), folds=FOLDS).fit(noisy)
    for (layer, offset), found in zip(
        probe.pairs(), logits_of_all_pairs(probe, noisy), strict=True
    ):
        predicted = probe.predict(noisy.residual_array(0)[:20], layer, offset)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, noisy.head.logits(predicted), rtol=1e-4, atol=1e-4)


def test_a_saved_probe_reads_the_same(noisy: ActivationCache, tmp_path: Path) -> None:
    probe = RidgeProbe((0, 1), layers=range(2), alphas=ALPHAS, folds=FOLDS).fit(noisy)
    loaded = load_probe(save_probe(probe, tmp_path / "probe"))
    for mine, theirs in zip(
        logits_of_all_pairs(loaded, noisy), logits_of_all_pairs(probe, noisy), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    assert loaded.metrics() == probe.metrics()
    assert (loaded.cache_id_, loaded.geometry_) == (noisy.id, noisy.head.digest)
    assert repr(loaded) == repr(probe)
    assert loaded.layers == range(2)
    np.testing.assert_array_equal(loaded.alphas, ALPHAS)
    np.testing.assert_array_equal(loaded.cv_mse_path_[1, 1], probe.cv_mse_path_[1, 1])
    check_geometry(loaded, noisy)


def test_a_probe_of_arrays_survives_saving(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=30)
    probe = RidgeProbe(alpha=1.0, folds=1).fit(x, y)
    loaded = load_probe(save_probe(probe, tmp_path))
    np.testing.assert_allclose(loaded.predict(x), probe.predict(x), rtol=1e-12, atol=1e-12)
    assert np.isnan(loaded.r2_[0, 0])


@pytest.mark.parametrize("name", ["probe.safetensors", "config.json"])
def test_a_flipped_byte_in_a_saved_probe_is_found(
    noisy: ActivationCache, tmp_path: Path, name: str
) -> None:
    save_probe(RidgeProbe(layers=[0]).fit(noisy), tmp_path)
    raw = bytearray((tmp_path / name).read_bytes())
    for at in range(0, len(raw), max(1, len(raw) // 50)):
        damaged = bytearray(raw)
        damaged[at] ^= 4
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CorruptError):
            load_probe(tmp_path)


def test_loading_needs_no_cache_and_no_model_library(
    noisy: ActivationCache, tmp_path: Path
) -> None:
    save_probe(RidgeProbe(layers=[0]).fit(noisy), tmp_path)
    code = (
        "import sys; from residua.probes.saved.save import load_probe; "
        f"load_probe({str(tmp_path)!r}); "
        "print([m for m in ('zarr', 'torch', 'transformers', 'distributed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_another_head_is_refused(noisy: ActivationCache, tmp_path: Path) -> None:
    probe = RidgeProbe(layers=[0]).fit(noisy)
    rng, lengths = np.random.default_rng(9), [5] * 20
    other = make_cache(tmp_path, noisy_layers(rng, 100), lengths, random_head(WIDTH, VOCAB, seed=1))
    with pytest.raises(MismatchError, match="fit a new probe"):
        check_geometry(probe, other)


def test_sklearn_conventions_hold(noisy: ActivationCache) -> None:
    params: dict[str, Any] = {"offsets": (0, 2), "layers": [1], "alphas": ALPHAS, "folds": 3}
    probe = RidgeProbe(**params)
    assert all(probe.get_params()[key] is value for key, value in params.items())
    copied: Any = clone(probe.fit(noisy))
    assert not hasattr(copied, "maps_")
    assert copied.set_params(folds=4).folds == 4
    assert probe.fit(noisy) is probe
    with pytest.raises(NotFittedError):
        copied.predict(np.zeros((2, WIDTH)))
    with pytest.raises(NotFittedError):
        copied.metrics()


def test_fitting_again_forgets_the_first_fit(noisy: ActivationCache) -> None:
    probe = RidgeProbe((0, 1), layers=[0]).fit(noisy)
    before = logits_of_all_pairs(probe, noisy)[0]
    probe.set_params(alpha=1e6, offsets=0).fit(noisy)
    assert probe.pairs() == [(0, 0)]
    assert not torch.allclose(logits_of_all_pairs(probe, noisy)[0], before)


def test_which_map_must_be_clear(noisy: ActivationCache) -> None:
    probe = RidgeProbe((0, 1), layers=[0, 1]).fit(noisy)
    rows = noisy.residual_array(0)[:3]
    with pytest.raises(UsageError, match=r"name a layer and an offset; .*\(0, 0\)"):
        probe.predict(rows, layer=0)
    with pytest.raises(NotFoundError, match="no map for layer 2"):
        probe.predict(rows, layer=2, offset=0)
    with pytest.raises(UsageError, match="X has 9 features, but RidgeProbe is expecting 10"):
        probe.predict(rows[:, 1:], 0, 0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"offsets": 50}, "no pair at offset 50: .* lie in one document .* the largest offset is "),
        ({"layers": [9]}, "layer 9 is not in this cache; it holds 0-2"),
        ({"alpha": 1.0, "alphas": [1.0]}, "give alpha"),
        ({"alpha": -1.0}, "finite and 0 or more"),
        ({"alphas": []}, "finite and 0 or more"),
        ({"folds": 1}, "at least 2 folds"),
        ({"products": "float8"}, "products must be one of"),
        ({"offsets": []}, "at least one layer, one offset and one target"),
    ],
)
def test_requests_that_cannot_be_right_are_refused(
    noisy: ActivationCache, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        RidgeProbe(**params).fit(noisy)


def test_rows_that_cannot_be_fitted_are_refused() -> None:
    x, y = np.zeros((4, 3)), np.zeros((4, 2))
    with pytest.raises(UsageError, match=r"inconsistent numbers of samples: \[4, 3\]"):
        RidgeProbe().fit(x, y[1:])
    with pytest.raises(UsageError, match="fit takes a cache, or two arrays"):
        RidgeProbe().fit(x)
    with pytest.raises(UsageError, match="n_samples=4 rows cannot be cut into 5 folds"):
        RidgeProbe().fit(x, y)
    x[1, 1] = np.nan
    with pytest.raises(UsageError, match="contains NaN"):
        RidgeProbe(folds=2).fit(x, y)


def test_one_sequence_is_not_enough_to_choose_a_penalty(tmp_path: Path) -> None:
    layers = noisy_layers(np.random.default_rng(10), 30)
    single = make_cache(tmp_path, layers, [30], random_head(WIDTH, VOCAB))
    probe = RidgeProbe(layers=[0], alpha=1.0)
    if len(single.sequences("train")) == 0:
        pytest.skip("the only sequence is not in the train split")
    assert probe.fit(single).n_[0, 0] == 30
    with pytest.raises(UsageError, match="needs pairs in at least two folds"):
        RidgeProbe(layers=[0]).fit(single)


@pytest.mark.parametrize("seed", range(8))
def test_columns_that_are_nearly_the_same_give_the_solution_of_least_norm(seed: int) -> None:
    """Cholesky may succeed on a matrix of no use: its condition decides, not its success."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(300, 4)), rng.normal(size=(300, 2))
    x[:, 3] = x[:, 2] + 3e-9 * rng.normal(size=300)
    found = RidgeProbe(alpha=0.0, folds=1).fit(x, y)
    want = np.linalg.lstsq(x - x.mean(axis=0), y - y.mean(axis=0), rcond=1e-7)[0]
    np.testing.assert_allclose(found.coef_.T, want, atol=1e-6)

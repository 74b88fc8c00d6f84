"""Ridge on a device: the numbers of the CPU, without float64, and with little memory."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch

from residua.cache.errors import ModelError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.moments.moment_collection import collect_moments, moments_of_rows
from residua.probes.moments.pass_plan import CachePass, MomentRequest, divide_pass
from residua.probes.ridge.device_algebra import DeviceAlgebra, algebra_on
from residua.probes.ridge.linear_algebra import HOST_ALGEBRA
from residua.probes.ridge.ridge_probe import RidgeProbe

from ...support.pretended_device import DEVICE, pretended_device
from ...support.synthetic import make_cache, random_head

WIDTH, DEPTH = 12, 2
EXACT = 1e-11
"""Relative difference of float64 sums in another order, and of what is solved from them."""
SINGLE = 2e-5
"""The same of float32 products of blocks of rows."""


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def cache(request: Any, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """Layers of one dtype that share a signal, far from 0; documents of 1 to 40 tokens."""
    rng = np.random.default_rng(0)
    lengths = [1, *rng.integers(1, 40, 120).tolist()]
    signal = rng.normal(size=(sum(lengths), WIDTH))
    layers = [
        (signal @ rng.normal(size=(WIDTH, WIDTH)) + rng.normal(0, 2, signal.shape) + 30).astype(
            np.float32
        )
        for _ in range(DEPTH + 1)
    ]
    folder = tmp_path_factory.mktemp(request.param)
    return make_cache(folder, layers, lengths, random_head(WIDTH, 20), dtype=request.param)


def assert_equal_moments(ours: Any, others: Any, tolerance: float) -> None:
    assert ours.keys() == others.keys()
    for pair, folds in others.items():
        for a, b in zip(ours[pair], folds, strict=True):
            assert a.n == b.n
            scale = max(np.abs(b.xx).max(), b.yy, 1e-9)
            np.testing.assert_allclose(a.mean_x, b.mean_x, rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(a.mean_y, b.mean_y, rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(a.xx, b.xx, rtol=0, atol=tolerance * scale)
            np.testing.assert_allclose(a.xy, b.xy, rtol=0, atol=tolerance * scale)
            assert a.yy == pytest.approx(b.yy, rel=tolerance, abs=tolerance)


def assert_equal_fits(ours: RidgeProbe, other: RidgeProbe, tolerance: float) -> None:
    assert ours.alpha_ == pytest.approx(other.alpha_, rel=10 * tolerance)
    assert ours.r2_ == pytest.approx(other.r2_, rel=10 * tolerance)
    for key, affine in other.maps_.items():
        scale = np.abs(affine.weight).max()
        np.testing.assert_allclose(
            ours.maps_[key].weight, affine.weight, rtol=0, atol=10 * tolerance * scale
        )
        np.testing.assert_allclose(
            ours.maps_[key].bias, affine.bias, rtol=0, atol=1000 * tolerance * scale
        )


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("products", ["float64", "float32"])
def test_moments_equal_those_of_the_cpu(
    cache: ActivationCache, products: str, float64: bool
) -> None:
    options: dict[str, Any] = {"targets": [1, 2], "folds": 3, "rows": 64}
    expected = collect_moments(cache, None, (0, 1, 4), products="float64", **options).pairs
    with pretended_device(float64=float64) as device:
        ours = collect_moments(
            cache, None, (0, 1, 4), products=products, device=DEVICE, **options
        ).pairs
    assert any(name.startswith(("addmm", "mm")) for name in device.operations)
    is_exact = float64 and products == "float64"
    assert_equal_moments(ours, expected, EXACT if is_exact else SINGLE)


def test_memory_that_runs_out_halves_the_blocks(cache: ActivationCache) -> None:
    """Of 2048 rows a tensor does not fit, of 512 (the fewest) one does."""
    options: dict[str, Any] = {"folds": 2, "rows": 2048}
    expected = collect_moments(cache, [0, 1], (0, 2), **options).pairs
    with pretended_device(largest=8 * WIDTH * 700) as device:
        ours = collect_moments(cache, [0, 1], (0, 2), device=DEVICE, **options).pairs
    assert device.refused
    assert_equal_moments(ours, expected, EXACT)


def test_memory_that_does_not_hold_the_sums_is_an_error(cache: ActivationCache) -> None:
    with pretended_device(largest=8 * WIDTH), pytest.raises(RuntimeError, match="out of memory"):
        collect_moments(cache, [0], (0,), device=DEVICE)


@pytest.mark.parametrize("target", [None, [1, 2]])
@pytest.mark.parametrize("float64", [True, False])
def test_a_fit_equals_that_of_the_cpu(cache: ActivationCache, target: Any, float64: bool) -> None:
    def new_probe() -> RidgeProbe:
        return RidgeProbe(offsets=[0, 2], target=target, folds=3, alphas=np.logspace(0, 4, 9))

    expected = new_probe().fit(cache, keep=False, device="cpu")
    with pretended_device(float64=float64) as device:
        ours = new_probe().fit(cache, keep=False, device="meta")
    assert float64 == any("eigh" in name for name in device.operations)
    # Maps are float32.
    assert_equal_fits(ours, expected, 1e-6 if float64 else SINGLE)
    for affine in ours.maps_.values():
        assert isinstance(affine.weight, np.ndarray)


def as_dask(array: np.ndarray) -> Any:
    chunks: Any = (700, -1)
    return da.from_array(array, chunks=chunks)


@pytest.mark.parametrize("rows", [np.asarray, as_dask])
@pytest.mark.parametrize("float64", [True, False])
def test_rows_are_fitted_on_the_device(rows: Callable[[Any], Any], float64: bool) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3000, 7)) + 5
    y = x @ rng.normal(size=(7, 3)) + rng.normal(size=(3000, 3))
    x[:, 6] = x[:, 5]  # singular: the least norm
    expected = RidgeProbe(alphas=[0.0, 1.0, 10.0]).fit(x, y, device="cpu")
    with pretended_device(float64=float64, largest=8 * 7 * 550) as device:
        ours = RidgeProbe(alphas=[0.0, 1.0, 10.0]).fit(rows(x), rows(y), device="meta")
    assert device.refused or not float64
    assert_equal_fits(ours, expected, EXACT if float64 else SINGLE)
    np.testing.assert_allclose(ours.coef_, expected.coef_, rtol=0, atol=1e-9 if float64 else 1e-4)


def test_folds_of_few_rows_and_of_none_have_moments_on_the_device() -> None:
    x, y = np.arange(6.0).reshape(3, 2), np.arange(3.0)
    with pretended_device():
        ours = moments_of_rows(x, y, 3, "float64", device=DEVICE)
    assert_equal_moments({0: ours}, {0: moments_of_rows(x, y, 3, "float64")}, EXACT)


def test_eigenvectors_come_from_the_host_where_the_device_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = np.diag([1.0, 2.0, 3.0])

    def fail(_: Any) -> Any:
        raise NotImplementedError("the device has no eigh")

    with pretended_device():
        algebra = DeviceAlgebra(DEVICE)
        monkeypatch.setattr(torch.linalg, "eigh", fail)
        values, vectors = algebra.spectrum(algebra.array(matrix))
        np.testing.assert_array_equal(values, [1.0, 2.0, 3.0])
        assert vectors.device == DEVICE
        np.testing.assert_array_equal(np.abs(algebra.host_array(vectors)), np.eye(3))


def test_a_device_without_float64_leaves_the_solution_to_the_host() -> None:
    with pretended_device(float64=False):
        assert algebra_on(DEVICE) is HOST_ALGEBRA
    assert algebra_on(None) is HOST_ALGEBRA


def test_passes_fit_the_memory_of_the_device_too() -> None:
    request = MomentRequest(tuple(range(8)), (0, 1), (8,))
    plan = CachePass(request, 0, 1024, tasks=1, cores=1, device=torch.device("meta"))
    assert len(divide_pass(plan, 1 << 40, 256)) == 1
    budget = 64 << 20
    passes = divide_pass(plan, 1 << 40, 256, budget)
    assert len(passes) > 1
    assert all(part.device_bytes(256) <= budget for part in passes)
    layers = [layer for part in passes for layer in part.request.layers]
    assert sorted(set(layers)) == list(range(8))


def test_a_device_that_is_not_here_is_one_message(cache: ActivationCache) -> None:
    with pytest.raises(ModelError, match="device 'meta' cannot be used"):
        RidgeProbe().fit(cache, device="meta")
    with pytest.raises(ModelError, match="device 'gpu' cannot be used"):
        RidgeProbe().fit(cache, device="gpu")


def test_a_fit_on_the_cpu_does_not_import_torch(cache: ActivationCache, tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys, residua\n"
        f"cache = residua.ActivationCache({str(cache.path)!r})\n"
        "residua.RidgeProbe(folds=3).fit(cache, keep=False, device='cpu')\n"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"

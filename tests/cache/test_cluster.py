"""On the workers of a cluster every fit comes out as in this process, from wherever it is asked."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

import residua
from residua.cache.cluster import results
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.baselines.token_counts import unfitted_baselines
from residua.probes.controls.cache_views import CONTROLS
from residua.probes.controls.control_probe import ControlProbe

from ..support.local import local_client
from ..support.synthetic import make_cache, random_head

FITS: dict[str, Any] = {
    "ridge": (residua.RidgeProbe(offsets=(1, 2)), {}),
    "lens": (residua.FutureLens(offsets=(1, 2), steps=4, batch=128), {}),
    "vocab": (
        residua.VocabProbe(offsets=(1, 2), epochs=1, lr=0.01, batch=128),
        {"memory": 1 << 20},
    ),
}
KINDS = ("unigram", "bigram", "trigram", "lagged", "chain", "marginal")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, 80).tolist()
    states = [rng.normal(size=(sum(lengths), 8)) for _ in range(3)]
    return make_cache(tmp_path_factory.mktemp("caches"), states, lengths, random_head(8, 20))


@pytest.fixture(scope="module")
def two_workers() -> Iterator[Client]:
    """Two workers in this process."""
    with local_client() as client:
        yield client


def assert_same_state(alone: Any, shared: Any, rtol: float) -> None:
    expected, actual = alone.state()[1], shared.state()[1]
    assert expected.keys() == actual.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], values, rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("kind", FITS)
def test_controls(cache: ActivationCache, two_workers: Client, kind: str, control: str) -> None:
    probe, options = FITS[kind]
    alone = ControlProbe(probe, control).fit(cache, **options)
    shared = ControlProbe(probe, control).fit(cache, client=two_workers, **options)
    assert_same_state(alone, shared, 0 if kind == "vocab" else 1e-5)


@pytest.mark.parametrize("workers", [1, 2, pytest.param(200, marks=pytest.mark.slow)])
def test_baselines(
    cache: ActivationCache, two_workers: Client, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if there are more threads than sequences."""
    from residua.probes.baselines import token_counts as counts

    monkeypatch.setattr(counts, "threads_of", lambda client: {"": workers})
    for alone, shared in zip(
        unfitted_baselines(KINDS, (0, 1, 2)), unfitted_baselines(KINDS, (0, 1, 2)), strict=True
    ):
        assert_same_state(alone.fit(cache), shared.fit(cache, client=two_workers), 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FITS)
def test_processes_find_a_cache_that_was_opened_by_a_relative_path(
    cache: ActivationCache, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers stay in the folder in which they started."""
    probe, options = FITS[kind]
    alone = ControlProbe(probe, "next-token").fit(cache, **options)
    with local_client(processes=True) as client:
        monkeypatch.chdir(cache.path.parent)
        reopened = ActivationCache(cache.path.name)
        assert not reopened.path.is_absolute()
        shared = ControlProbe(probe, "next-token").fit(reopened, client=client, **options)
        assert_same_state(alone, shared, 0 if kind == "vocab" else 1e-5)
        for alone, shared in zip(
            unfitted_baselines(KINDS, (1,)), unfitted_baselines(KINDS, (1,)), strict=True
        ):
            assert_same_state(alone.fit(cache), shared.fit(reopened, client=client), 0)


def test_results_come_in_order_and_what_is_left_is_cancelled(two_workers: Client) -> None:
    powers = results(two_workers, pow, [(2, n) for n in range(9)])
    assert list(powers) == [2**n for n in range(9)]
    failing = results(two_workers, divmod, [(1, 1), (1, 0), (2, 1)])
    assert next(failing) == (1, 0)
    with pytest.raises(ZeroDivisionError):
        next(failing)
    assert not two_workers.futures


def test_a_cache_is_pickled_as_its_path(cache: ActivationCache) -> None:
    import pickle

    vars(cache).pop("committed", None)
    data = pickle.dumps(cache)
    assert len(data) < 200 + len(os.fsencode(cache.path))
    unpickled = pickle.loads(data)
    assert (unpickled.id, unpickled.path) == (cache.id, Path(cache.path).absolute())

"""Moments: streamed from a cache they are those of numpy in memory, however the work is cut."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.cache.errors import CorruptError, MismatchError, NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.moments.moment_collection import (
    collect_moments,
    collect_passes,
    moments_of_rows,
)
from residua.probes.moments.moment_set import MomentSet
from residua.probes.moments.moments import Accumulator, Moments, merge_all
from residua.probes.moments.pass_plan import CachePass, MomentRequest, divide_pass, reason_of_passes
from residua.probes.ridge.ridge_probe import RidgeProbe

from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB, DEPTH, FOLDS = 12, 40, 2, 3
OFFSETS = (0, 1, 2, 3, 9)


def random_layers(rng: np.random.Generator, rows: int, width: int = WIDTH) -> list[np.ndarray]:
    mixing = rng.normal(size=(width, width))
    return [
        (rng.normal(size=(rows, width)) @ mixing + rng.normal(size=width) * 5).astype(np.float32)
        for _ in range(DEPTH + 1)
    ]


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """Sequences of 1 to 30 tokens."""
    rng = np.random.default_rng(0)
    lengths = [1, 1, 2, 3, *rng.integers(1, 30, 60).tolist(), 1]
    layers = random_layers(rng, sum(lengths))
    return make_cache(tmp_path_factory.mktemp("ragged"), layers, lengths, random_head(WIDTH, VOCAB))


def pairs_by_hand(
    cache: ActivationCache, layer: int, offset: int, fold: int, split: str = "all"
) -> tuple[np.ndarray, np.ndarray]:
    """Rows x and y in float64, sequence by sequence."""
    x, y = (
        np.asarray(cache.residual_array(number)[:], np.float64)
        for number in (layer, cache.n_blocks)
    )
    xs, ys = [np.zeros((0, cache.d_model))], [np.zeros((0, cache.d_model))]
    for number in cache.sequences(split):
        if cache.sequence_folds(FOLDS)[number] != fold:
            continue
        start, length = int(cache.sequence_start[number]), int(cache.sequence_length[number])
        for t in range(start, start + length - offset):
            xs.append(x[t : t + 1])
            ys.append(y[t + offset : t + offset + 1])
    return np.concatenate(xs), np.concatenate(ys)


def moments_in_memory(x: np.ndarray, y: np.ndarray) -> Moments:
    """Two passes of plain numpy in float64."""
    n, (d_in, d_out) = len(x), (x.shape[1], y.shape[1])
    if n == 0:
        return Moments.zero(d_in, d_out)
    mean_x, mean_y = x.mean(0), y.mean(0)
    dx, dy = x - mean_x, y - mean_y
    return Moments(n, mean_x, mean_y, dx.T @ dx, dx.T @ dy, float((dy**2).sum()))


def assert_close(found: Moments, expected: Moments, rtol: float) -> None:
    """Every entry agrees, relative to the spread of the columns it belongs to."""
    assert found.n == expected.n
    spread_x = np.sqrt(np.diagonal(expected.xx))
    spread_y = np.sqrt(max(expected.yy, 0.0))
    np.testing.assert_allclose(found.mean_x, expected.mean_x, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(found.mean_y, expected.mean_y, rtol=rtol, atol=rtol)
    limit = rtol * (np.outer(spread_x, spread_x) + np.finfo(float).tiny)
    assert np.all(np.abs(found.xx - expected.xx) <= limit)
    limit = rtol * (spread_x[:, None] * spread_y + np.finfo(float).tiny)
    assert np.all(np.abs(found.xy - expected.xy) <= limit)
    assert found.yy == pytest.approx(expected.yy, rel=rtol)


def assert_sets_close(found: MomentSet, expected: MomentSet, rtol: float) -> None:
    assert found.pairs.keys() == expected.pairs.keys()
    for pair, parts in expected.pairs.items():
        for mine, theirs in zip(found.pairs[pair], parts, strict=True):
            assert_close(mine, theirs, rtol)


def collect_all(cache: ActivationCache, **options: Any) -> MomentSet:
    return collect_moments(cache, None, OFFSETS, folds=FOLDS, split="all", **options)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("layer", range(DEPTH + 1))
def test_moments_equal_numpy_in_memory(ragged: ActivationCache, layer: int, offset: int) -> None:
    found = collect_moments(ragged, [layer], [offset], folds=FOLDS, split="all")
    for fold, moments in enumerate(found.parts(layer, offset)):
        expected = moments_in_memory(*pairs_by_hand(ragged, layer, offset, fold))
        assert_close(moments, expected, 1e-10)
        np.testing.assert_array_equal(moments.xx, moments.xx.T)


def test_moments_of_the_train_split_hold_no_other_sequence(ragged: ActivationCache) -> None:
    found = collect_moments(ragged, [1], [1], folds=FOLDS)
    for fold, moments in enumerate(found.parts(1, 1)):
        assert_close(moments, moments_in_memory(*pairs_by_hand(ragged, 1, 1, fold, "train")), 1e-10)
    assert found.split == "train"
    assert found.total(1, 1).n < ragged.positions - len(ragged.sequence_length)


@pytest.mark.parametrize("seed", range(5))
def test_moments_equal_numpy_for_random_lengths(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.choice([1, 2, 3, 5, 40], 25).tolist()
    layers = random_layers(rng, sum(lengths))
    tiny = make_cache(tmp_path, layers, lengths, random_head(WIDTH, VOCAB), seed=seed)
    found = collect_moments(
        tiny, [0], OFFSETS, folds=FOLDS, split="all", rows=int(rng.integers(1, 60))
    )
    for (layer, offset, _), parts in found.pairs.items():
        for fold, moments in enumerate(parts):
            assert_close(
                moments, moments_in_memory(*pairs_by_hand(tiny, layer, offset, fold)), 1e-10
            )


def test_second_moments_merged_from_many_blocks_are_symmetric_to_the_last_bit(
    ragged: ActivationCache,
) -> None:
    for parts in collect_all(ragged, rows=7, tasks=3).pairs.values():
        for moments in parts:
            np.testing.assert_array_equal(moments.xx, moments.xx.T)


@pytest.mark.parametrize("options", [{"rows": 1}, {"rows": 7}, {"rows": 10**6}])
def test_moments_do_not_depend_on_block_size(ragged: ActivationCache, options: dict) -> None:
    assert_sets_close(collect_all(ragged, **options), collect_all(ragged), 1e-12)


@pytest.mark.parametrize("tasks", [1, 2, 3, 64])
def test_moments_do_not_depend_on_the_number_of_tasks(ragged: ActivationCache, tasks: int) -> None:
    assert_sets_close(
        collect_all(ragged, rows=16, tasks=tasks), collect_all(ragged, rows=16, tasks=5), 1e-12
    )


def test_the_same_request_gives_the_same_bits(ragged: ActivationCache) -> None:
    first, second = collect_all(ragged, rows=16, tasks=4), collect_all(ragged, rows=16, tasks=4)
    for pair, parts in first.pairs.items():
        for mine, theirs in zip(parts, second.pairs[pair], strict=True):
            np.testing.assert_array_equal(mine.xx, theirs.xx)
            np.testing.assert_array_equal(mine.xy, theirs.xy)


def test_moments_do_not_depend_on_layer_groups(ragged: ActivationCache) -> None:
    request = MomentRequest.of(ragged, None, OFFSETS, None, folds=FOLDS, split="all")
    groups = list(collect_passes(ragged, request, memory=1))
    assert len(groups) == (DEPTH + 1) * len(OFFSETS)
    assert_sets_close(collect_all(ragged, memory=1, tasks=2), collect_all(ragged, tasks=2), 1e-12)


def test_passes_fit_the_memory_budget() -> None:
    request = MomentRequest(tuple(range(13)), (0, 1, 2, 3), (6, 12))
    plan = CachePass(request, 0, 2048, 8, 2)
    for budget in (1 << 29, 1 << 30, 2 << 30):
        passes = divide_pass(plan, budget, 768)
        assert all(part.bytes(768) <= budget for part in passes)
        assert sorted(p for part in passes for p in part.request.pairs) == sorted(request.pairs)
    assert divide_pass(plan, 1 << 40, 768) == [plan]
    smallest = replace(request, layers=(0,), offsets=(0,), targets=(6,))
    assert replace(plan, tasks=1, block_rows=512, request=smallest) in divide_pass(plan, 1, 768)


def test_what_does_not_fit_the_memory_is_said() -> None:
    request = MomentRequest(tuple(range(13)), (0, 1, 2, 3), (12,))
    plan = CachePass(request, 0, 2048, 2, 2)
    size = plan.bytes(768)
    assert reason_of_passes([plan], [request], size, 768) is None
    passes = divide_pass(plan, size - 1, 768)
    reason = reason_of_passes(passes, [request], size - 1, 768)
    assert reason is not None
    largest = max(len(part.request.pairs) for part in passes)
    for words in (f"up to {largest} are", f"in {len(passes)} passes", f"{size / 1e6:,.1f} MB (--"):
        assert words in reason
    passes = divide_pass(plan, 1, 768)
    reason = reason_of_passes(passes, [request], 1, 768)
    assert reason is not None
    assert f"take {max(part.bytes(768) for part in passes) / 1e6:,.1f} MB, more than" in reason
    assert f"in {13 * 4} passes" in reason


def test_any_pairs_are_asked_for_exactly_once() -> None:
    rng = np.random.default_rng(9)
    request = MomentRequest(tuple(range(5)), (0, 1, 2), (3, 4))
    for share in (0.1, 0.5, 0.9, 1.0):
        pairs = [pair for pair in request.pairs if rng.random() < share]
        found = [pair for part in request.for_pairs(pairs) for pair in part.pairs]
        assert sorted(found) == sorted(pairs)
    assert request.for_pairs(request.pairs) == [request]


def test_moments_do_not_depend_on_chunk_order() -> None:
    rng = np.random.default_rng(1)
    parts = [Moments.of(rng.normal(3, 1, (n, 5)), rng.normal(size=(n, 4))) for n in (1, 9, 0, 50)]
    forward, backward = merge_all(parts), merge_all(parts[::-1])
    assert_close(forward, backward, 1e-13)
    assert_close(merge_all([merge_all(parts[:2]), merge_all(parts[2:])]), forward, 1e-13)


def test_update_and_merge_in_any_order_give_the_same() -> None:
    """Random partitions, orders and trees; one column is massive, and another far from 0."""
    rng = np.random.default_rng(11)
    x, y = rng.normal(size=(400, 6)), rng.normal(size=(400, 4))
    x[:, 2] *= 1e4
    x[::16, 4] += 1e4
    y += 100
    expected = moments_in_memory(x, y)
    for _ in range(30):
        cuts = np.sort(rng.integers(0, 401, rng.integers(1, 12)))
        pieces = np.split(np.arange(400), cuts)
        pieces = [pieces[i] for i in rng.permutation(len(pieces))]
        total, waiting = Accumulator(6, 4), []
        for rows in pieces:
            if rng.random() < 0.5:
                total.update(x[rows], y[rows])
            else:
                waiting.append(Moments.of(x[rows], y[rows]))
        while len(waiting) > 1:
            i, j = rng.choice(len(waiting), 2, replace=False)
            merged = waiting[i].merge(waiting[j])
            waiting = [m for k, m in enumerate(waiting) if k not in (i, j)] + [merged]
        for rest in waiting:
            total.add(rest)
        assert_close(total.result(), expected, 1e-12)


def test_sets_of_two_caches_merge(tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    lengths = rng.integers(1, 15, 40).tolist()
    layers = random_layers(rng, sum(lengths))
    head = random_head(WIDTH, VOCAB)
    rows = sum(lengths[:25])
    both = make_cache(tmp_path, layers, lengths, head)
    first = make_cache(tmp_path, [a[:rows] for a in layers], lengths[:25], head, seed=1)
    second = make_cache(tmp_path, [a[rows:] for a in layers], lengths[25:], head, seed=2)
    parts = [
        collect_moments(one, [0, 1], (0, 2), [1, 2], folds=1, split="all")
        for one in (first, second)
    ]
    expected = collect_moments(both, [0, 1], (0, 2), [1, 2], folds=1, split="all")
    found = parts[0].merge(parts[1])
    assert_sets_close(found, expected, 1e-12)
    assert found.bytes == expected.bytes
    assert (found.cache_id, found.geometry) == (None, head.digest)
    with pytest.raises(MismatchError, match="moments of split all and train"):
        found.merge(collect_moments(both, [0, 1], (0, 2), [1, 2], folds=1))
    with pytest.raises(MismatchError, match="collect both alike"):
        found.merge(collect_moments(both, [0], (0, 2), [1, 2], folds=1, split="all"))


def test_float32_products_bear_massive_first_tokens(tmp_path: Path) -> None:
    """Only first tokens are massive: what is predicted at offset 1 has none of them."""
    rng = np.random.default_rng(13)
    layers = [rng.normal(5, 1, (1280, WIDTH)).astype(np.float32) for _ in range(2)]
    for values in layers:
        values[::32, 3] = 1e4
    massive = make_cache(tmp_path, layers, [32] * 40, random_head(WIDTH, VOCAB))
    found = collect_moments(massive, [0], [1], folds=1, split="all", products="float32").total(0, 1)
    source = np.flatnonzero(np.arange(1280) % 32 < 31)
    x, y = layers[0][source].astype(float), layers[1][source + 1].astype(float)
    expected = moments_in_memory(x, y)
    spread = np.sqrt(np.diagonal(expected.xx))
    assert np.abs(found.xx - expected.xx).max() / spread.max() ** 2 < 1e-6
    np.testing.assert_allclose(found.xx / spread / spread[:, None],
                               expected.xx / spread / spread[:, None], atol=2e-6)  # fmt: skip
    assert found.yy == pytest.approx(expected.yy, rel=1e-6)
    of_y = np.sqrt(((y - y.mean(0)) ** 2).sum(0))
    assert of_y.max() < 50
    np.testing.assert_allclose(found.xy / spread[:, None] / of_y,
                               expected.xy / spread[:, None] / of_y, atol=2e-6)  # fmt: skip


def test_minus_is_the_inverse_of_merge() -> None:
    rng = np.random.default_rng(2)
    a, b = (Moments.of(rng.normal(m, 1, (30, 5)), rng.normal(m, 2, (30, 4))) for m in (0, 7))
    assert_close(a.merge(b).minus(b), a, 1e-12)
    assert_close(a.merge(b).minus(a), b, 1e-12)
    assert a.minus(a).n == 0
    assert not a.minus(a).xx.any()
    with pytest.raises(UsageError, match="cannot take 60 pairs away from 30"):
        a.minus(a.merge(b))


def test_minus_leaves_no_error_below_zero() -> None:
    """One pair is left, whose spread is 0: what rounding makes of it must not be negative."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(9, 2)), rng.normal(size=(9, 3)) * 1e3
        y[8] = y[:8].mean(axis=0)
        left = Moments.of(x, y).minus(Moments.of(x[:8], y[:8]))
        assert left.n == 1
        assert 0 <= left.yy < 1e-6


def test_merge_leaves_its_operands_alone() -> None:
    rng = np.random.default_rng(3)
    a, b = (Moments.of(rng.normal(size=(9, 3)), rng.normal(size=(9, 2))) for _ in range(2))
    before = a.xx.copy(), b.xx.copy()
    a.merge(b)
    np.testing.assert_array_equal(a.xx, before[0])
    np.testing.assert_array_equal(b.xx, before[1])


def test_an_accumulator_adds_up_blocks() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(1e6, 1, (101, 6)), rng.normal(size=(101, 3))
    total = Accumulator(6, 3)
    for start in range(0, 101, 10):
        total.update(x[start : start + 10], y[start : start + 10])
    assert_close(total.result(), moments_in_memory(x, y), 1e-9)


@pytest.mark.parametrize("where", ["first", "last", "everywhere"])
def test_a_massive_column_costs_no_accuracy(where: str, tmp_path: Path) -> None:
    """A column 1e4 times the rest, whose mean is far from 0: against float64 by two passes."""
    rng = np.random.default_rng(5)
    layers = [rng.normal(size=(320, WIDTH)).astype(np.float32) for _ in range(2)]
    rows = {"first": np.s_[::16], "last": np.s_[15::16], "everywhere": np.s_[:]}[where]
    for values in layers:
        values[rows, 3] = 1e4 * (1 + 0.01 * values[rows, 3])
    assert layers[0].max() > 9e3
    massive = make_cache(tmp_path, layers, [16] * 20, random_head(WIDTH, VOCAB))
    found = collect_moments(massive, [0], (0, 1, 3), folds=1, split="all", rows=64)
    for offset in (0, 1, 3):
        source = np.flatnonzero(np.tile(np.arange(16), 20) + offset < 16)
        x, y = layers[0][source].astype(float), layers[1][source + offset].astype(float)
        total = found.total(0, offset)
        assert_close(total, moments_in_memory(x, y), 1e-12)
        singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
        np.testing.assert_allclose(np.linalg.eigvalsh(total.xx)[::-1], singular**2, rtol=1e-8)


def test_float32_products_are_right_to_float32(ragged: ActivationCache) -> None:
    found, exact = collect_all(ragged, products="float32"), collect_all(ragged)
    assert found.parts(0, 1)[0].xx.dtype == np.float64
    assert_sets_close(found, exact, 5e-6)
    assert any(np.any(found.pairs[p][0].xx != exact.pairs[p][0].xx) for p in exact.pairs)


def test_offsets_beyond_every_sequence_have_no_pairs(ragged: ActivationCache) -> None:
    found = collect_moments(ragged, [0, 1], [0, 500], folds=FOLDS)
    assert found.total(0, 500).n == 0
    assert found.total(0, 0).n > 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [True, False])
def test_a_dask_cluster_gives_what_this_process_gives(
    ragged: ActivationCache, processes: bool
) -> None:
    from distributed import Client, LocalCluster
    from threadpoolctl import threadpool_info

    before = blas_threads()
    seen: list[tuple[int, int]] = []
    with (
        LocalCluster(
            n_workers=2, processes=processes, threads_per_worker=1, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        found = collect_all(
            ragged, client=client, rows=16, progress=lambda *done: seen.append(done)
        )
        probe = RidgeProbe((0, 2), folds=FOLDS).fit(ragged, client=client, keep=False)
        x, y = ragged.residual(0), ragged.residual(1)
        rows = RidgeProbe(folds=FOLDS).fit(x, y, client=client)
        pools: Any = client.run(threadpool_info) if processes else {}
    assert_sets_close(found, collect_all(ragged, tasks=2, rows=16), 1e-9)
    assert seen[-1] == (ragged.positions, ragged.positions)
    alone = RidgeProbe((0, 2), folds=FOLDS).fit(ragged, keep=False)
    for pair, fitted in alone.maps_.items():
        np.testing.assert_allclose(probe.maps_[pair].weight, fitted.weight, rtol=1e-6, atol=1e-7)
        assert probe.mse_[pair] == pytest.approx(alone.mse_[pair], rel=1e-9, abs=1e-12)
    expected = RidgeProbe(folds=FOLDS).fit(np.asarray(x), np.asarray(y))
    np.testing.assert_allclose(rows.coef_, expected.coef_, rtol=1e-9, atol=1e-9)
    for pool in (pool for found in pools.values() for pool in found):
        assert pool["user_api"] != "blas" or pool["num_threads"] == 1
    assert blas_threads() == before


def test_rows_of_arrays_fall_into_the_folds_of_kfold() -> None:
    from sklearn.model_selection import KFold

    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(103, 4)), rng.normal(size=(103, 3))
    found = moments_of_rows(x, y, 5, "float64")
    for moments, (_, held) in zip(found, KFold(5).split(x), strict=True):
        assert_close(moments, moments_in_memory(x[held], y[held]), 1e-12)


def test_dask_rows_give_what_numpy_rows_give() -> None:
    import dask.array

    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(5000, 4)), rng.normal(size=(5000, 3))
    lazy_x = dask.array.asarray(x).rechunk((700, 3))
    lazy = lazy_x, dask.array.asarray(y).rechunk((999, 3))
    pairs = zip(
        moments_of_rows(*lazy, 3, "float64"), moments_of_rows(x, y, 3, "float64"), strict=True
    )
    for found, expected in pairs:
        assert_close(found, expected, 1e-13)


def test_progress_counts_every_position_once_per_pass(ragged: ActivationCache) -> None:
    seen: list[tuple[int, int]] = []
    collect_all(ragged, rows=8, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (ragged.positions, ragged.positions)


def test_saved_moments_come_back_bit_by_bit(ragged: ActivationCache, tmp_path: Path) -> None:
    found = collect_all(ragged)
    found.save(tmp_path / "moments")
    loaded = MomentSet.load(tmp_path / "moments")
    assert (loaded.cache_id, loaded.split) == (ragged.id, "all")
    assert loaded.geometry == ragged.head.digest
    for pair, parts in found.pairs.items():
        for mine, theirs in zip(loaded.pairs[pair], parts, strict=True):
            assert (mine.n, mine.yy) == (theirs.n, theirs.yy)
            np.testing.assert_array_equal(mine.xy, theirs.xy)
            np.testing.assert_array_equal(mine.xx, theirs.xx)


@pytest.mark.parametrize("name", ["moments.safetensors", "moments.json"])
def test_a_flipped_byte_in_saved_moments_is_found(
    ragged: ActivationCache, tmp_path: Path, name: str
) -> None:
    collect_moments(ragged, [0], [0]).save(tmp_path)
    raw = bytearray((tmp_path / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(CorruptError, match="changed|not a file"):
        MomentSet.load(tmp_path)


def test_requests_that_cannot_be_right_are_refused(ragged: ActivationCache) -> None:
    with pytest.raises(NotFoundError, match="layer 7 is not in this cache; it holds 0-2"):
        collect_moments(ragged, [7])
    with pytest.raises(UsageError, match="offsets are 0 or more"):
        collect_moments(ragged, [0], [-1])
    with pytest.raises(UsageError, match="folds must be at least 1"):
        collect_moments(ragged, [0], [0], folds=0)
    with pytest.raises(UsageError, match="products must be one of"):
        collect_moments(ragged, [0], [0], products="float16")
    with pytest.raises(UsageError, match="there is no split"):
        collect_moments(ragged, [0], [0], split="tests")


def blas_threads() -> set[int]:
    from threadpoolctl import threadpool_info

    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_blas_has_one_thread_in_every_task_and_gets_its_own_back(ragged: ActivationCache) -> None:
    from threadpoolctl import threadpool_limits

    seen: list[set[int]] = []
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        for _ in range(3):
            collect_all(
                ragged, rows=16, tasks=4, progress=lambda *done: seen.append(blas_threads())
            )
        assert blas_threads() == before
    assert len(seen) > 4
    assert set.union(*seen) <= {1}


FIXED = 2 << 20
"""What a fit takes beside its budget: maps, tables of sequences, checks of chunks."""


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    width, lengths, budget = 64, [128] * 512, 8 << 20
    layers = [rng.normal(size=(sum(lengths), width)).astype(np.float32) for _ in range(4)]
    big = make_cache(
        tmp_path, layers, lengths, random_head(width, VOCAB), part_rows=1 << 14, chunk_rows=1 << 12
    )
    size = sum(layer.nbytes for layer in layers)
    del layers
    assert size >= 8 * budget
    probe = RidgeProbe((0, 1))
    probe.fit(big, memory=budget, keep=False)  # imports
    tracemalloc.start()
    probe.fit(big, memory=budget, keep=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < budget + FIXED
    request = MomentRequest.of(big, None, (0, 1), None)
    tracemalloc.start()
    for part in collect_passes(big, request, memory=4 * budget):
        del part
    wider = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert budget < wider < 4 * budget + FIXED

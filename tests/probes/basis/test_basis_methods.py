"""The methods find what they say: planted directions, ordered energies, the largest span."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from residua.cache.store.activation_cache import ActivationCache
from residua.probes.basis import basis_rows as rows_module
from residua.probes.basis.ablation_objective import AblationObjective, ObjectiveSpec
from residua.probes.basis.basis_methods import (
    BasisFinder,
    BasisProgress,
    complement_in,
    top_eigenvectors,
    without,
)
from residua.probes.basis.basis_rows import BasisRows, divide_rows, draw_positions
from residua.probes.basis.coordinates import AblationCoordinates
from residua.probes.basis.fit_settings import METHODS
from residua.probes.basis.span_search import SpanSearch
from residua.probes.moments.moments import Moments
from residua.probes.ridge.solver import AffineMap

from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB, ROWS = 9, 40, 600


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "GROUP_ROWS", 250)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    rng = np.random.default_rng(0)
    spread = rng.gamma(1.0, 1.0, WIDTH) + 0.2
    layer = (rng.standard_t(5, size=(ROWS, WIDTH)) * spread) @ rng.normal(size=(WIDTH, WIDTH))
    layer = layer.astype("f4")
    head = random_head(WIDTH, VOCAB)
    return make_cache(tmp_path_factory.mktemp("methods"), [layer, layer], [20] * 30, head)


def moments_of(source: ActivationCache) -> Moments:
    layer = source.residual_array(0)[:].astype(np.float64)
    return Moments.of(layer, layer[:, :1])


def objective_of(source: ActivationCache, weight: np.ndarray | None = None) -> AblationObjective:
    """The objective of all rows with the mean as reference; the map is the identity by default."""
    reference = moments_of(source).mean_x.astype("f4")
    rows = BasisRows(source, 0, np.arange(source.positions), reference, seed=0)
    weight = np.eye(WIDTH) if weight is None else weight
    affine = AffineMap(weight.astype("f4"), np.zeros(WIDTH, "f4"))
    return AblationObjective(ObjectiveSpec(rows, affine, memory=1 << 20, dtype=torch.float64))


def found_by(
    method: str, source: ActivationCache, k: int, metric: str = "covariance"
) -> tuple[np.ndarray, BasisFinder, Callable[[np.ndarray], float]]:
    """Columns of a method, the finder, and the KL of a span."""
    coordinates = AblationCoordinates.of(moments_of(source), metric)
    with objective_of(source) as objective:
        finder = BasisFinder(objective, coordinates, k)
        columns = finder.find(method)

    def span_kl(basis: np.ndarray) -> float:
        with objective_of(source) as again:
            directions = coordinates.encoder(basis), coordinates.decoder(basis)
            return again.evaluate(directions)[0]

    return columns, finder, span_kl


@pytest.mark.parametrize("method", METHODS)
def test_a_lens_that_reads_two_directions_has_them_as_its_basis(
    source: ActivationCache, method: str
) -> None:
    rng = np.random.default_rng(3)
    # A lens of rank 2 in the covariance's coordinates.
    coordinates = AblationCoordinates.of(moments_of(source), "covariance")
    planted = np.linalg.qr(rng.normal(size=(WIDTH, 2)))[0]
    weight = coordinates.encoder(planted).T @ rng.normal(size=(2, WIDTH))
    with objective_of(source, weight) as objective:
        columns = BasisFinder(objective, coordinates, 2).find(method)
    # Canonical correlations of both spans. The quadratic form of Fisher lies in the span; ablating
    # a little of another direction adds noise that the lens reads, and so raises the KL.
    least = 1 - 1e-6 if method == "fisher" else 0.95
    assert np.linalg.svd(columns.T @ planted)[1].min() > least


@pytest.mark.parametrize("metric", ["covariance", "euclidean"])
@pytest.mark.parametrize("method", METHODS)
def test_columns_are_orthonormal_in_the_metric(
    source: ActivationCache, method: str, metric: str
) -> None:
    columns, finder, _ = found_by(method, source, 4, metric)
    np.testing.assert_allclose(columns.T @ columns, np.eye(4), atol=1e-9)
    encoder = finder.coordinates.encoder(columns)
    decoder = finder.coordinates.decoder(columns)
    np.testing.assert_allclose(encoder @ decoder.T, np.eye(4), atol=1e-9)


@pytest.mark.parametrize("metric", ["covariance", "euclidean"])
def test_greedy_energies_never_increase_and_are_maxima(
    source: ActivationCache, metric: str
) -> None:
    columns, finder, span_kl = found_by("greedy", source, 5, metric)
    energies = finder.progress.energies
    assert all(a >= b * (1 - 1e-6) for a, b in zip(energies, energies[1:], strict=False))
    np.testing.assert_allclose([span_kl(columns[:, [i]]) for i in range(5)], energies, rtol=1e-9)
    # No small turn of the first direction, orthogonal or not, has more energy.
    rng = np.random.default_rng(0)
    for _ in range(20):
        turned = columns[:, :1] + 0.1 * rng.normal(size=(WIDTH, 1))
        assert span_kl(turned / np.linalg.norm(turned)) < energies[0] * (1 + 1e-3)


def test_a_later_direction_with_more_energy_takes_the_earlier_slot() -> None:
    class Placing(BasisFinder):
        def __init__(self) -> None:
            self.k, self.progress = 3, BasisProgress()

    finder = Placing()
    axes = list(np.eye(3))
    finder._place(axes[0], 1.0)
    finder._place(axes[1], 0.5)
    finder._place(axes[2], 2.0)
    # Both earlier directions go; the search for the first slot begins at the better one.
    assert not finder.progress.directions
    assert finder.progress.start is axes[2]
    # After many repeats the directions are put in order instead.
    finder.progress = BasisProgress(directions=[axes[0], axes[1]], energies=[1.0, 0.5], repeats=12)
    finder._place(axes[2], 0.7)
    assert finder.progress.energies == [1.0, 0.7, 0.5]
    assert np.array_equal(finder.progress.directions[1], axes[2])


def test_joint_is_the_best_of_many_starts(source: ActivationCache) -> None:
    columns, finder, span_kl = found_by("joint", source, 3)
    others = [span_kl(found_by(m, source, 3)[0]) for m in ("greedy", "one-shot", "fisher")]
    joint = span_kl(columns)
    assert joint >= max(others)
    with objective_of(source) as objective:
        again = BasisFinder(objective, finder.coordinates, 3)
        for seed in range(5):
            start = np.linalg.qr(np.random.default_rng(seed).normal(size=(WIDTH, 3)))[0]
            value = SpanSearch(start, 200, 1e-6).run(again._evaluate).value
            assert joint > value * 0.98


def test_the_order_inside_the_span_has_good_prefixes(
    source: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, _, span_kl = found_by("joint", source, 4)
    rng = np.random.default_rng(0)
    rotations = [np.linalg.qr(rng.normal(size=(4, 4)))[0] for _ in range(30)]
    for size in (1, 2, 3):
        prefix = span_kl(columns[:, :size])
        others = [span_kl(columns @ rotation[:, :size]) for rotation in rotations]
        assert prefix > np.quantile(others, 0.9)


def test_the_fisher_matrix_is_that_of_the_lens(source: ActivationCache) -> None:
    coordinates = AblationCoordinates.of(moments_of(source), "euclidean")
    with objective_of(source) as objective:
        sampled = objective.mean_matrix("fisher")
    # Exact: J' (diag(q) - q q') J for every row, by autograd.
    head = source.head.torch()
    states = torch.from_numpy(source.residual_array(0)[:])
    exact = np.zeros((WIDTH, WIDTH))
    for row in states:
        jacobian = torch.autograd.functional.jacobian(
            lambda x: torch.log_softmax(head(x[None]), -1)[0], row
        )
        q = torch.softmax(head(row[None]), -1)[0]
        exact += (jacobian.T @ (q[:, None] * jacobian)).double().numpy()
    exact /= len(states)
    # 4 tokens for each of 600 rows: a standard error of some percent.
    assert np.abs(sampled - exact).max() < 0.1 * np.abs(exact).max()
    assert coordinates.rank == WIDTH


def rosenbrock_span(basis: np.ndarray) -> tuple[float, np.ndarray]:
    """trace(V' A V) + a quartic, whose best span is not an eigenspace of A."""
    rng = np.random.default_rng(5)
    matrix = rng.normal(size=(12, 12))
    matrix = matrix + matrix.T
    quartic = rng.normal(size=(12, 12)) ** 2
    projector = basis @ basis.T
    value = np.sum(matrix * projector) - 0.3 * np.sum(quartic * projector**2)
    slope = matrix - 0.6 * quartic * projector
    return float(value), (slope + slope.T) @ basis


def test_a_search_ends_where_the_gradient_vanishes() -> None:
    start = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 3)))[0]
    search = SpanSearch(start, 300, 1e-12).run(rosenbrock_span)
    first = rosenbrock_span(start)[0]
    assert search.value > first
    assert np.linalg.norm(search.gradient) < 1e-4
    np.testing.assert_allclose(search.basis.T @ search.basis, np.eye(3), atol=1e-12)


def test_a_restored_search_takes_the_same_course() -> None:
    start = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 3)))[0]
    whole = SpanSearch(start, 40, 1e-12).run(rosenbrock_span)
    search = SpanSearch(start, 40, 1e-12)
    while not search.ended:
        search.step(rosenbrock_span)
        search = SpanSearch.restore(*search.state())
    assert np.array_equal(search.basis, whole.basis)
    assert search.evaluations == whole.evaluations


def test_complements_and_restrictions() -> None:
    rng = np.random.default_rng(0)
    span = np.linalg.qr(rng.normal(size=(8, 4)))[0]
    free = complement_in(span, span[:, :1])
    assert free.shape == (8, 3)
    np.testing.assert_allclose(free.T @ span[:, :1], 0, atol=1e-12)
    np.testing.assert_allclose(span @ span.T @ free, free, atol=1e-12)
    matrix = rng.normal(size=(8, 8))
    matrix = matrix + matrix.T
    top = top_eigenvectors(without(span, matrix), 4)
    np.testing.assert_allclose(top.T @ span, 0, atol=1e-9)


@pytest.mark.parametrize("n", [1, 249, 250, 251, 999, 1001])
def test_groups_cover_the_rows_evenly(n: int) -> None:
    groups = divide_rows(n)
    sizes = [group.stop - group.start for group in groups]
    assert sum(sizes) == n
    assert max(sizes) <= 250
    assert max(sizes) - min(sizes) <= 1
    assert [group.start for group in groups] == np.cumsum([0, *sizes[:-1]]).tolist()


def test_positions_are_drawn_from_many_sequences(source: ActivationCache) -> None:
    drawn = draw_positions(source, "train", 60, 0, drop_first=2)
    assert len(set(drawn.positions.tolist())) == 60
    assert (drawn.positions % 20 >= 2).all()
    assert len(set((drawn.positions // 20).tolist())) > 10
    assert np.array_equal(source.positions_of(drawn.sequences)[drawn.index], drawn.positions)
    everything = draw_positions(source, "all", 10_000, 0, drop_first=0)
    assert sorted(everything.positions) == list(range(ROWS))


def test_replacements_of_resampling_are_a_derangement(source: ActivationCache) -> None:
    rows = BasisRows(source, 0, np.arange(100, 150), None, seed=1)
    whole = slice(0, 50)
    states = rows.states(whole).astype(np.float64)
    replacements = states - rows.differences(whole, states)
    order = [int(np.abs(states - r).sum(1).argmin()) for r in replacements]
    assert sorted(order) == list(range(50))
    assert all(i != j for i, j in enumerate(order))
    part = slice(20, 30)
    assert np.array_equal(
        rows.differences(part, states[part]), rows.differences(whole, states)[part]
    )


def test_whitened_rows_have_unit_covariance(source: ActivationCache) -> None:
    coordinates = AblationCoordinates.of(moments_of(source), "covariance")
    layer = source.residual_array(0)[:].astype(np.float64)
    white = (layer - layer.mean(0)) @ coordinates.whiten
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(WIDTH), atol=1e-8)
    np.testing.assert_allclose(coordinates.unwhiten @ coordinates.whiten, np.eye(WIDTH), atol=1e-9)


def test_constant_directions_are_no_coordinates(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 3)) @ rng.normal(size=(3, WIDTH))
    coordinates = AblationCoordinates.of(Moments.of(rows, rows[:, :1]), "covariance")
    assert coordinates.rank == 3
    with pytest.raises(ValueError, match="varies in 3 directions only, fewer than k = 4"):
        coordinates.check_k(4, layer=2)
    still = np.ones((5, WIDTH))
    assert AblationCoordinates.of(Moments.of(still, still[:, :1]), "covariance").rank == 0

"""Transfer, similarity and persistence are those of numpy, on layers that are planted."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.stats import ortho_group

from residua.analysis.studies.trajectories.position_sample import PositionSample, choose_positions
from residua.analysis.studies.tuned_lens.layer_similarity import (
    LayerCovariance,
    LayerPairRow,
    frobenius_cosine,
    largest_coordinates,
    layer_pair_rows,
    read_covariances,
    spread_rows,
)
from residua.analysis.studies.tuned_lens.layer_transfer import (
    LayerTransferRow,
    affine_map_of,
    drift_rows,
    is_affine,
    mantel_p_value,
    measure_transfer,
)
from residua.cache.devices import choose_device
from residua.cache.errors import UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.lens.logit_lens import LogitLens
from residua.probes.lens.tuned_lens import TunedLens
from residua.probes.ridge.solver import AffineMap

from ....support.synthetic import make_cache, random_head

WIDTH, VOCAB = 16, 40
LENGTHS = [40] * 40


def rotated_cache(root: Path, spoil: bool = False) -> tuple[ActivationCache, TunedLens]:
    """Layers 1 and 2 in one basis, 0 and 3 in others, 4 the last; and the lens that knows them."""
    rng = np.random.default_rng(0)
    # Directions of unlike variance, so that a rotation changes the covariance.
    last = rng.normal(size=(sum(LENGTHS), WIDTH)) * np.linspace(0.2, 2, WIDTH)
    rotations = ortho_group.rvs(WIDTH, 3, random_state=1)
    bases = [rotations[0], rotations[1], rotations[1], rotations[2]]
    layers = [*(last @ basis for basis in bases), last]
    if spoil:
        layers[1][3] = np.nan
    documents = np.repeat(np.arange(20), 80)
    cache = make_cache(root, layers, LENGTHS, random_head(WIDTH, VOCAB), documents=documents)
    maps = {
        (layer, 0): AffineMap(basis.T.astype(np.float32), np.full(WIDTH, 0.1, np.float32))
        for layer, basis in enumerate(bases)
    }
    return cache, TunedLens.of(maps)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    return (np.exp(log_p) * (log_p - log_q)).sum(1)


def test_transfer_is_that_of_plain_numpy(tmp_path: Path) -> None:
    cache, lens = rotated_cache(tmp_path)
    sample = choose_positions(cache, "all")
    layers = (0, 1, 2, 3)
    rows = measure_transfer(
        sample, "tuned", lens, layers, positions=10_000, device=choose_device("cpu")
    )
    assert len(rows) == 16
    log_p = log_softmax(cache.head.logits(cache.residual_array(4)[sample.positions]))
    text = sample.text_tokens
    log_q = {}
    for row in rows:
        states = cache.residual_array(row.layer)[sample.positions]
        mapped = lens.map(row.translator)(states)
        log_q[row.translator, row.layer] = log_softmax(cache.head.logits(mapped))
    for row in rows:
        own, native = log_q[row.translator, row.layer], log_q[row.layer, row.layer]
        assert row.n == sample.count
        assert row.kl == pytest.approx(kl(log_p, own).mean(), rel=1e-4, abs=1e-6)
        expected = (kl(log_p, own) - kl(log_p, native)).mean()
        assert row.penalty == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert row.kl_to_native == pytest.approx(kl(native, own).mean(), rel=1e-4, abs=1e-6)
        known = text >= 0
        loss = -(own - native)[known][np.arange(known.sum()), text[known]]
        assert row.cross_entropy_penalty == pytest.approx(loss.mean(), rel=1e-4, abs=1e-6)
    penalty = {(row.translator, row.layer): row.penalty or 0.0 for row in rows}
    # Layers 1 and 2 share their basis.
    assert penalty[1, 2] == pytest.approx(0, abs=1e-6)
    assert penalty[0, 3] > 0.2


def test_transfer_reads_few_positions_and_leaves_undefined_ones_out(tmp_path: Path) -> None:
    cache, lens = rotated_cache(tmp_path, spoil=True)
    sample = choose_positions(cache, "all")
    cpu = choose_device("cpu")
    rows = measure_transfer(sample, "tuned", lens, (1, 2), positions=10_000, device=cpu)
    counts = {(row.translator, row.layer): row.n for row in rows}
    assert counts[1, 1] == counts[2, 1] == sample.count - 1
    assert counts[1, 2] == sample.count
    assert all(row.kl is not None and np.isfinite(row.kl) for row in rows)
    few = measure_transfer(sample, "tuned", lens, (2,), positions=50, device=cpu)
    assert [row.n for row in few] == [50]


def test_only_lenses_with_affine_maps_are_transferred(tmp_path: Path) -> None:
    cache, lens = rotated_cache(tmp_path)
    assert is_affine(lens, (0, 3))
    assert not is_affine(lens, ())
    assert not is_affine(LogitLens.of(cache, 0), (0, 1))
    assert affine_map_of(lens, 1) is lens.map(1)


def test_similarities_and_overlaps_are_those_that_were_planted(tmp_path: Path) -> None:
    cache, _ = rotated_cache(tmp_path)
    sample = choose_positions(cache, "all")
    covariances = read_covariances(cache)
    train = cache.positions_of(cache.sequences("train"))
    for layer, found in covariances.items():
        states = np.asarray(cache.residual_array(layer)[train], np.float64)
        np.testing.assert_allclose(found.covariance, np.cov(states.T, bias=True), atol=1e-10)
        assert found.n == len(train)
    rows = {(row.layer, row.other): row for row in layer_pair_rows(sample, covariances, k=3)}
    assert len(rows) == 10
    for (layer, other), row in rows.items():
        a, b = (covariances[number].covariance for number in (layer, other))
        expected = np.trace(a @ b) / np.sqrt(np.trace(a @ a) * np.trace(b @ b))
        assert row.similarity == pytest.approx(expected, abs=1e-12)
        vectors = [np.linalg.eigh(matrix)[1][:, -3:] for matrix in (a, b)]
        overlap = np.square(vectors[0].T @ vectors[1]).sum() / 3
        assert row.cosine_overlap == pytest.approx(overlap, abs=1e-9)
        # All layers are rotations of one another: coordinates on the largest directions persist.
        assert row.coordinate_overlap == pytest.approx(1, abs=1e-6)
        assert row.coordinate_chance is not None
        assert row.coordinate_chance < 0.6
        assert row.cosine_chance == 3 / WIDTH
    assert rows[1, 2].similarity == pytest.approx(1)
    assert rows[1, 2].cosine_overlap == pytest.approx(1)
    others = [row.cosine_overlap for pair, row in rows.items() if pair != (1, 2)]
    assert max(value or 0.0 for value in others) < 0.7


def test_unrelated_layers_share_no_coordinates(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    layers = [rng.normal(size=(sum(LENGTHS), WIDTH)) for _ in range(2)]
    cache = make_cache(tmp_path, layers, LENGTHS, random_head(WIDTH, VOCAB))
    (row,) = layer_pair_rows(choose_positions(cache, "all"), read_covariances(cache), k=4)
    assert row.coordinate_overlap is not None
    assert row.coordinate_overlap < 0.02


def test_a_rogue_coordinate_makes_up_a_similarity() -> None:
    rng = np.random.default_rng(2)
    spectra = [np.diag(np.r_[np.ones(8), np.zeros(8)]), np.diag(np.r_[np.zeros(8), np.ones(8)])]
    assert frobenius_cosine(*spectra) == 0
    assert frobenius_cosine(spectra[0], 7 * spectra[0]) == pytest.approx(1)
    assert frobenius_cosine(spectra[0], np.zeros((16, 16))) is None
    assert frobenius_cosine(spectra[0], np.full((16, 16), np.nan)) is None
    for spectrum in spectra:
        spectrum[5, 5] = 1000
    layers = {
        layer: LayerCovariance(100, rng.normal(size=16), spectrum)
        for layer, spectrum in enumerate(spectra)
    }
    assert largest_coordinates(layers).tolist() == [5]
    cosine = frobenius_cosine(*spectra)
    assert cosine is not None
    assert cosine > 0.99
    spread = spread_rows(layers)
    assert spread[0].largest_coordinate == pytest.approx(1000 / 1007)
    assert spread[0].largest_direction == pytest.approx(1000 / 1007)
    assert spread[0].effective_dimension == pytest.approx(1007**2 / (1000**2 + 7))
    (empty,) = spread_rows({0: LayerCovariance(2, np.zeros(4), np.zeros((4, 4)))})
    assert (empty.effective_dimension, empty.largest_direction) == (None, None)


def test_similarity_without_the_largest_coordinate(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    layers = [rng.normal(size=(sum(LENGTHS), WIDTH)) for _ in range(2)]
    layers[0][:, :8] *= 0.01
    layers[1][:, 8:15] *= 0.01
    for layer in layers:
        layer[:, 15] *= 100
    cache = make_cache(tmp_path, layers, LENGTHS, random_head(WIDTH, VOCAB))
    (row,) = layer_pair_rows(choose_positions(cache, "all"), read_covariances(cache))
    assert row.similarity == pytest.approx(1, abs=1e-3)
    assert row.similarity_without_largest is not None
    assert row.similarity_without_largest < 0.2


def pair_row(layer: int, other: int, similarity: float | None) -> LayerPairRow:
    return LayerPairRow(layer, other, similarity, similarity, None, 0.1, None, None, directions=2)


def transfer_row(translator: int, layer: int, penalty: float | None) -> LayerTransferRow:
    return LayerTransferRow(
        lens="tuned",
        translator=translator,
        layer=layer,
        n=10,
        kl=penalty,
        penalty=penalty,
        penalty_interval=(None, None),
        cross_entropy_penalty=penalty,
        kl_to_native=penalty,
    )


def test_drift_is_the_rank_correlation_over_pairs_of_layers() -> None:
    rng = np.random.default_rng(4)
    layers = range(1, 7)
    pairs = [pair_row(i, j, float(rng.random())) for i in layers for j in layers if i < j]
    similarity = {(row.layer, row.other): row.similarity or 0.0 for row in pairs}
    rows = []
    for i in layers:
        for j in layers:
            value = 0.0 if i == j else 5 - 4 * similarity[min(i, j), max(i, j)]
            rows.append(transfer_row(i, j, value + 0.01 * (i > j)))
    found = {(row.similarity, row.layers, row.given): row for row in drift_rows(rows, pairs)}
    assert len(found) == 4  # without layer 0 there is one group of layers
    plain = found["similarity", "all", ""]
    x = [row.penalty for row in rows if row.translator != row.layer]
    y = [
        similarity[min(row.translator, row.layer), max(row.translator, row.layer)]
        for row in rows
        if row.translator != row.layer
    ]
    result = stats.spearmanr(x, y)
    assert plain.pairs == 30
    assert plain.correlation == pytest.approx(float(result[0]))  # pyright: ignore
    assert plain.correlation is not None
    assert plain.correlation < -0.9
    assert plain.p_value is not None
    assert plain.p_value < 0.02
    rows = [transfer_row(i, j, None) for i in layers for j in layers]
    assert {row.correlation for row in drift_rows(rows, pairs)} == {None}
    assert drift_rows([], pairs) == []


def test_layers_by_chance_have_p_values_by_chance() -> None:
    rng = np.random.default_rng(6)
    values = []
    for _ in range(12):
        penalty, similarity = rng.normal(size=(2, 6, 6))
        similarity += similarity.T
        off = ~np.eye(6, dtype=bool)
        rho = float(stats.spearmanr(penalty[off], similarity[off])[0])  # pyright: ignore
        values.append(mantel_p_value(penalty, similarity, rho, 0) or 0.0)
    assert 0.25 < np.mean(values) < 0.75
    assert mantel_p_value(np.zeros((3, 3)), np.zeros((3, 3)), 0.0, 0) is None


def test_an_empty_train_split_has_no_covariances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _ = rotated_cache(tmp_path)
    monkeypatch.setattr(ActivationCache, "sequences", lambda *_: np.zeros(0, np.int64))
    with pytest.raises(UsageError, match="train split has fewer than 2 positions"):
        read_covariances(cache)


def test_undefined_states_have_no_coordinates(tmp_path: Path) -> None:
    cache, _ = rotated_cache(tmp_path, spoil=True)
    sample = PositionSample(cache, "all", np.arange(4))
    covariances = read_covariances(cache)
    rows = layer_pair_rows(sample, {la: found for la, found in covariances.items() if la < 3})
    by_pair = {(row.layer, row.other): row for row in rows}
    assert by_pair[0, 1].coordinate_overlap is None
    assert by_pair[0, 2].coordinate_overlap is not None

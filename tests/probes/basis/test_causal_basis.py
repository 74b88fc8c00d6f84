"""Causal bases as users have them: fitted, applied, saved, resumed, on a cluster, out of core."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from residua.cache.errors import (
    MismatchError,
    NoSpaceError,
    NotFoundError,
    ResiduaWarning,
    UsageError,
)
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.basis import basis_rows as rows_module
from residua.probes.basis import causal_basis as causal_basis_module
from residua.probes.basis import layer_fit as layer_fit_module
from residua.probes.basis.causal_basis import CausalBasis
from residua.probes.basis.layer_basis import LayerBasis
from residua.probes.basis.metric_rows import span_sizes
from residua.probes.lens.logit_lens import LogitLens
from residua.probes.lens.tuned_lens import TunedLens
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.ridge.solver import AffineMap
from residua.probes.saved.save import load_probe, save_probe
from residua.probes.vocabulary.vocab_probe import VocabProbe

from ...support.local import local_client
from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB = 8, 300
FAST: dict[str, Any] = {"k": 3, "positions": 400, "test_positions": 300}


def noisy_layers(rng: np.random.Generator, rows: int) -> list[np.ndarray]:
    """Three layers, each a linear map of the last one with noise."""
    last = rng.standard_t(5, size=(rows, WIDTH)) * (rng.gamma(1, 1, WIDTH) + 0.3)
    mixing = rng.normal(size=(2, WIDTH, WIDTH))
    layers = [last @ m + 0.1 * rng.normal(size=last.shape) + 2 for m in mixing]
    return [layer.astype("f4") for layer in (*layers, last)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 40, 120).tolist()
    layers = noisy_layers(rng, sum(lengths))
    folder = tmp_path_factory.mktemp("basis")
    return make_cache(folder, layers, lengths, random_head(WIDTH, VOCAB))


@pytest.fixture(scope="module")
def ridge(source: ActivationCache) -> RidgeProbe:
    return RidgeProbe().fit(source)


@pytest.fixture(scope="module")
def fitted(source: ActivationCache, ridge: RidgeProbe) -> CausalBasis:
    return CausalBasis(**FAST).fit(source, ridge)


def tensors_of(probe: CausalBasis) -> dict[str, np.ndarray]:
    return probe.state()[1]


def assert_same_bases(one: CausalBasis, other: CausalBasis, tolerance: float) -> None:
    for name, tensor in tensors_of(one).items():
        actual = tensors_of(other)[name]
        np.testing.assert_allclose(actual, tensor, rtol=tolerance, atol=tolerance, err_msg=name)


def test_a_fit_has_a_basis_and_measures_of_every_layer(
    source: ActivationCache, fitted: CausalBasis
) -> None:
    assert list(fitted.bases_) == [0, 1, 2]
    for row in fitted.metrics():
        assert len(row["energies"]) == len(row["influences"]) == 3
        assert list(row["span"]) == [1, 2, 3]
        assert row["n"] == 400
        assert row["n_test"] <= 300
        for name in ("span", "pca", "random"):
            measures = row[name].values()
            assert all(m["low"] <= m["kl"] <= m["high"] for m in measures)
        assert row["span"][3]["kl"] > row["random"][3]["kl"]
        assert 0 < row["evaluations"] < 40
        assert row["cpu_seconds"] > 0
    assert fitted.geometry_ == source.head.digest


def test_held_out_spans_equal_a_plain_computation(
    source: ActivationCache, ridge: RidgeProbe, fitted: CausalBasis
) -> None:
    drawn = rows_module.draw_positions(source, "test", 300, 0, 0)
    layer, row = fitted.bases_[1], fitted.metrics()[1]
    states = source.residual_array(1)[np.sort(drawn.positions)].astype(np.float64)
    head, affine = source.head, ridge.map(1)

    def log_probabilities(rows: np.ndarray) -> np.ndarray:
        logits = head.logits(rows @ affine.weight + affine.bias).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    clean = log_probabilities(states)
    for name, basis in (("span", layer), ("pca", fitted.pca_[1]), ("random", fitted.random_[1])):
        for size in (1, 2, 3):
            ablated = log_probabilities(basis.ablate(states, size))
            expected = (np.exp(clean) * (clean - ablated)).sum(-1).mean()
            assert abs(row[name][size]["kl"] - expected) < 2e-5 * max(1, expected)
    for direction in range(3):
        ablated = log_probabilities(layer.ablate_direction(states, direction))
        expected = (np.exp(clean) * (clean - ablated)).sum(-1).mean()
        assert abs(row["influences"][direction] - expected) < 2e-5 * max(1, expected)


@pytest.mark.parametrize("metric", ["covariance", "euclidean"])
def test_ablation_and_projection_part_the_row(
    source: ActivationCache, ridge: RidgeProbe, metric: str
) -> None:
    basis = CausalBasis(layers=1, metric=metric, method="one-shot", **FAST).fit(source, ridge)
    rows = source.residual_array(1)[:200]
    for k in (1, 3, None):
        ablated, projected = basis.ablate(rows, k), basis.project(rows, k)
        reference = basis.basis().reference
        np.testing.assert_allclose(ablated + projected, rows + reference, atol=2e-4)
        # Ablated rows have the coordinates of the reference, and ablating again changes nothing.
        np.testing.assert_allclose(basis.coordinates(ablated, k), 0, atol=2e-4)
        np.testing.assert_allclose(basis.ablate(ablated, k), ablated, atol=2e-4)
    replacement = rows[::-1]
    resampled = basis.ablate(rows, 3, replacement=replacement)
    np.testing.assert_allclose(
        basis.coordinates(resampled), basis.coordinates(replacement), atol=5e-4
    )


def test_the_covariance_metric_replaces_what_it_removes_by_the_conditional_mean(
    source: ActivationCache, ridge: RidgeProbe
) -> None:
    basis = CausalBasis(layers=1, method="one-shot", **FAST).fit(source, ridge).basis()
    rows = source.residual_array(1)[source.positions_of(source.sequences("train"))].astype("f8")
    ablated = basis.ablate(rows)
    removed = basis.coordinates(rows)
    # What is left is uncorrelated with what was removed.
    covariance = (ablated - ablated.mean(0)).T @ (removed - removed.mean(0)) / len(rows)
    assert np.abs(covariance).max() < 1e-4 * np.abs(rows).std()
    # Euclidean coordinates leave rows that still tell the removed ones.
    euclidean = CausalBasis(layers=1, method="one-shot", metric="euclidean", **FAST)
    other = euclidean.fit(source, ridge).basis()
    left, gone = other.ablate(rows), other.coordinates(rows)
    assert np.abs((left - left.mean(0)).T @ (gone - gone.mean(0))).max() / len(rows) > 0.01


def test_rows_may_be_numpy_dask_or_torch(source: ActivationCache, fitted: CausalBasis) -> None:
    rows = source.residual_array(1)[:60]
    expected = fitted.ablate(rows, 2, layer=1)
    assert expected.dtype == np.float32
    chunked = da.from_array(rows).rechunk((17, WIDTH))
    lazy = fitted.ablate(chunked, 2, layer=1)
    assert isinstance(lazy, da.Array)
    np.testing.assert_allclose(lazy.compute(), expected, atol=1e-5)
    tensor = fitted.ablate(torch.from_numpy(rows).bfloat16(), 2, layer=1)
    assert tensor.dtype == torch.float32
    exact = fitted.ablate(torch.from_numpy(rows).double(), 2, layer=1)
    np.testing.assert_allclose(exact.numpy(), expected, atol=1e-5)
    three_axes = fitted.project(torch.from_numpy(rows).view(3, 20, WIDTH), 2, layer=1)
    assert three_axes.shape == (3, 20, WIDTH)
    assert np.array_equal(fitted.ablate(rows, 0, layer=1), rows)


def test_a_saved_basis_is_loaded_without_torch_or_scikit_learn(
    fitted: CausalBasis, source: ActivationCache, tmp_path: Path
) -> None:
    save_probe(fitted, tmp_path / "basis")
    loaded = load_probe(tmp_path / "basis")
    assert loaded.metrics() == fitted.metrics()
    assert repr(loaded) == repr(fitted)
    rows = source.residual_array(0)[:9]
    assert np.array_equal(loaded.ablate(rows, 2, layer=0), fitted.ablate(rows, 2, layer=0))
    code = (
        "import sys\n"
        "for name in ('torch', 'sklearn', 'transformers', 'zarr'): sys.modules[name] = None\n"
        "import numpy as np, residua\n"
        f"basis = residua.load_probe({str(tmp_path / 'basis')!r})\n"
        f"print(basis.ablate(np.ones((2, {WIDTH})), 2, layer=1).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == f"(2, {WIDTH})", done.stderr


def test_parameters_are_those_of_scikit_learn(fitted: CausalBasis) -> None:
    again: Any = clone(fitted)
    assert again.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError, match="CausalBasis is not fitted"):
        again.metrics()


@pytest.mark.parametrize("reference", ["mean", "zero", "resample"])
@pytest.mark.parametrize("method", ["joint", "greedy", "one-shot", "fisher"])
def test_every_method_fits_with_every_reference(
    source: ActivationCache, ridge: RidgeProbe, method: str, reference: str
) -> None:
    basis = CausalBasis(layers=1, method=method, reference=reference, **FAST)
    row = basis.fit(source, ridge).metrics()[0]
    assert row["span"][3]["kl"] > row["random"][3]["kl"]
    if method == "greedy":
        energies = row["energies"]
        assert all(a >= b * (1 - 1e-4) for a, b in zip(energies, energies[1:], strict=False))


def test_lenses_of_all_kinds_are_read(source: ActivationCache, ridge: RidgeProbe) -> None:
    options: dict[str, Any] = {**FAST, "layers": [1], "method": "one-shot"}
    tuned = TunedLens(layers=[1], steps=5, batch=64).fit(source)
    for lens in (tuned, ridge, LogitLens.of(source, [0])):
        assert CausalBasis(**options).fit(source, lens).metrics()[0]["span"]
    future = RidgeProbe(offsets=[0, 1], layers=[1]).fit(source)
    assert CausalBasis(**options, offset=1).fit(source, future).metrics()[0]["offset"] == 1


def test_workers_and_threads_do_not_change_a_fit(
    source: ActivationCache,
    ridge: RidgeProbe,
    fitted: CausalBasis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows_module, "GROUP_ROWS", 70)
    alone = CausalBasis(**FAST).fit(source, ridge)
    with local_client(workers=2) as client:
        shared = CausalBasis(**FAST).fit(source, ridge, client=client)
    assert_same_bases(alone, shared, 1e-9)
    for one, other in zip(alone.metrics(), shared.metrics(), strict=True):
        assert one["evaluations"] == other["evaluations"]
        for size, measures in one["span"].items():
            assert abs(other["span"][size]["kl"] - measures["kl"]) < 1e-9


@pytest.mark.parametrize("where", ["scratch", "nowhere"])
def test_rows_beyond_memory_give_the_same_basis(
    source: ActivationCache, ridge: RidgeProbe, tmp_path: Path, where: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(rows_module, "GROUP_ROWS", 70)
    whole = CausalBasis(layers=1, **FAST).fit(source, ridge)
    # Room for some of the clean rows only.
    monkeypatch.setattr(causal_basis_module, "kept_bytes", lambda cache, memory: 20_000)
    probe = CausalBasis(layers=1, **FAST)
    assert probe.scratch_bytes(source) > 400 * VOCAB * 4
    scratch = tmp_path if where == "scratch" else None
    probe.fit(source, ridge, scratch=scratch)
    assert_same_bases(whole, probe, 1e-9)
    assert not list(tmp_path.iterdir())


def test_a_scratch_file_that_does_not_fit_is_refused_before_work(
    source: ActivationCache, ridge: RidgeProbe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_basis_module, "kept_bytes", lambda cache, memory: 0)
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("residua.probes.basis.kept_rows.shutil.disk_usage", lambda path: free)
    with pytest.raises(NoSpaceError, match=r"needs [\d,]+ bytes, .* has 1,000 free"):
        CausalBasis(layers=1, **FAST).fit(source, ridge, scratch=tmp_path)
    with pytest.raises(UsageError, match="must be an existing folder"):
        CausalBasis(layers=1, **FAST).fit(source, ridge, scratch=tmp_path / "none")


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["joint", "greedy"])
@pytest.mark.parametrize("evaluation", [1, 4, 9, 30])
def test_a_killed_fit_goes_on_to_the_same_basis(
    source: ActivationCache,
    ridge: RidgeProbe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    evaluation: int,
) -> None:
    monkeypatch.setattr(layer_fit_module, "CHECKPOINT_SECONDS", 0)
    options = {**FAST, "method": method, "layers": [0, 1]}
    whole = CausalBasis(**options).fit(source, ridge)
    calls = 0

    def kill(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += stage == "basis"
        if calls == evaluation:
            calls += 1
            raise Killed

    with pytest.raises(Killed):
        CausalBasis(**options).fit(source, ridge, checkpoint=tmp_path / "fit", progress=kill)
    assert (tmp_path / "fit").is_dir()
    resumed = CausalBasis(**options).fit(source, ridge, checkpoint=tmp_path / "fit")
    assert_same_bases(whole, resumed, 0.0)
    for one, other in zip(whole.metrics(), resumed.metrics(), strict=True):
        assert other["evaluations"] == pytest.approx(one["evaluations"], abs=1.01)
    assert not (tmp_path / "fit").exists()


def test_a_checkpoint_of_another_fit_is_refused(
    source: ActivationCache, ridge: RidgeProbe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_fit_module, "CHECKPOINT_SECONDS", 0)

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "basis" and done > 3:
            raise Killed

    with pytest.raises(Killed):
        CausalBasis(layers=1, **FAST).fit(source, ridge, checkpoint=tmp_path, progress=kill)
    other = CausalBasis(layers=1, **{**FAST, "k": 2})
    with pytest.raises(MismatchError):
        other.fit(source, ridge, checkpoint=tmp_path)


def test_wrong_requests_have_one_message(
    source: ActivationCache, ridge: RidgeProbe, fitted: CausalBasis, tmp_path: Path
) -> None:
    for options, message in (
        ({"k": 0}, "k must be 1 or more"),
        ({"method": "newton"}, "method must be one of joint, greedy, one-shot, fisher"),
        ({"metric": "cosine"}, "metric must be one of covariance, euclidean"),
        ({"reference": "median"}, "reference must be one of mean, zero, resample"),
        ({"positions": 0}, "positions must be 1 or more"),
        ({"k": WIDTH + 1}, f"varies in {WIDTH} directions only"),
        ({"drop_first": 500}, "no position behind the drop_first=500"),
        ({"layers": [], "offset": 0}, "reads no layer"),
        ({"offset": 3}, "reads no layer of this cache at offset 3"),
    ):
        with pytest.raises(UsageError, match=message):
            CausalBasis(**{**FAST, **options}).fit(source, ridge)
    with pytest.raises(NotFoundError, match="layer 7"):
        CausalBasis(layers=7, **FAST).fit(source, ridge)
    vocab = VocabProbe(layers=[1], epochs=1).fit(source)
    with pytest.raises(UsageError, match="does not map a layer to the last one"):
        CausalBasis(**FAST).fit(source, vocab)
    with pytest.raises(UsageError, match="to another layer than the last one"):
        CausalBasis(layers=0, **FAST).fit(source, RidgeProbe(target=1).fit(source))
    with pytest.raises(UsageError, match="fitted on a cache"):
        CausalBasis(**FAST).fit(np.zeros((4, WIDTH)), ridge)  # pyright: ignore
    layers = noisy_layers(np.random.default_rng(1), 200)
    stranger = make_cache(tmp_path, layers, [20] * 10, random_head(WIDTH, VOCAB, seed=9))
    with pytest.raises(MismatchError, match="head"):
        CausalBasis(**FAST).fit(stranger, ridge)
    with pytest.raises(UsageError, match=r"name a layer; bases are fitted at layers \[0, 1, 2\]"):
        fitted.ablate(np.zeros((1, WIDTH)))
    with pytest.raises(NotFoundError, match="no basis of layer 5"):
        fitted.ablate(np.zeros((1, WIDTH)), layer=5)
    with pytest.raises(UsageError, match="k must be a number from 0 to 3"):
        fitted.ablate(np.zeros((1, WIDTH)), 4, layer=1)
    with pytest.raises(UsageError, match=r"expected rows \(..., 8\), found shape \(2, 5\)"):
        fitted.ablate(np.zeros((2, 5)), layer=1)
    with pytest.raises(UsageError, match="replacement has the shape"):
        fitted.ablate(np.zeros((2, WIDTH)), layer=1, replacement=np.zeros((3, WIDTH)))


def test_an_empty_test_split_leaves_the_measures_out(tmp_path: Path) -> None:
    layers = noisy_layers(np.random.default_rng(2), 90)
    few = make_cache(tmp_path / "few", layers, [45, 45], random_head(WIDTH, VOCAB))
    assert not len(few.sequences("test"))
    lens = LogitLens.of(few, [0])
    with pytest.warns(ResiduaWarning, match="too few positions"):
        basis = CausalBasis(layers=1, k=2).fit(few, lens)
    row = basis.metrics()[0]
    assert (row["n_test"], row["span"], row["pca"], row["influences"]) == (0, None, None, None)
    save_probe(basis, tmp_path / "saved")
    assert load_probe(tmp_path / "saved").metrics() == basis.metrics()


def test_a_lens_without_a_finite_kl_is_refused(
    source: ActivationCache, ridge: RidgeProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InfiniteLens(RidgeProbe):
        def residual_map(self, layer: int | None, offset: int) -> AffineMap:
            affine = ridge.map(layer)
            return AffineMap(affine.weight * np.float32(np.inf), affine.bias)

    infinite = InfiniteLens().fit(source)
    with pytest.raises(UsageError, match="not finite: the lens or the rows"):
        CausalBasis(layers=1, **FAST).fit(source, infinite)


def test_moments_of_other_fits_are_used_again(source: ActivationCache, ridge: RidgeProbe) -> None:
    RidgeProbe().fit(source, keep=True)
    stages: list[str] = []
    CausalBasis(**{**FAST, "method": "one-shot"}).fit(
        source, ridge, progress=lambda stage, done, total: stages.append(stage)
    )
    assert set(stages) == {"basis"}


def test_sizes_of_spans_double_up_to_k() -> None:
    assert span_sizes(1) == [1]
    assert span_sizes(8) == [1, 2, 4, 8]
    assert span_sizes(11) == [1, 2, 4, 8, 11]


def test_metrics_can_be_written_as_json(fitted: CausalBasis) -> None:
    assert json.loads(json.dumps(fitted.metrics()))[0]["span"]["2"]["kl"] > 0


def test_a_layer_basis_of_lists_is_float32() -> None:
    basis = LayerBasis(np.eye(2, 3), np.eye(2, 3), np.zeros(3))
    assert basis.encoder.dtype == np.float32
    assert basis.k == 2
    with pytest.raises(UsageError, match="the directions are 0 to 1"):
        basis.ablate_direction(np.zeros((1, 3)), 2)
    for arrays in (
        (np.eye(2, 3), np.eye(2, 4), np.zeros(3)),
        (np.eye(2, 3), np.eye(2, 3), np.zeros(2)),
        (np.zeros(3), np.zeros(3), np.zeros(3)),
    ):
        with pytest.raises(UsageError, match="encoder and decoder must be"):
            LayerBasis(*arrays)

"""The KL of ablations and its gradient equal autograd on the plain formula, in float64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residua.cache.head.head import Head
from residua.cache.head.head_recording import SHAPES, merge_recordings, record_program
from residua.cache.head.program_head import ProgramHead
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.basis import basis_rows as rows_module
from residua.probes.basis import lens_kl as kl_module
from residua.probes.basis.ablation_objective import AblationObjective, ObjectiveSpec
from residua.probes.basis.basis_methods import BasisFinder
from residua.probes.basis.basis_rows import BasisRows
from residua.probes.basis.coordinates import AblationCoordinates
from residua.probes.moments.moments import Moments
from residua.probes.ridge.solver import AffineMap

from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB, ROWS = 7, 600, 90
NORMS = ("layernorm", "rmsnorm", "none")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups, blocks and tiles of tokens, the last ones shorter."""
    monkeypatch.setattr(rows_module, "GROUP_ROWS", 40)
    monkeypatch.setattr(kl_module, "BLOCK_ROWS", 12)
    monkeypatch.setattr(kl_module, "PRODUCT_ROWS", 30)
    monkeypatch.setattr(kl_module, "TILE_BYTES", 1)


def head_with(norm: str = "layernorm", softcap: float | None = None) -> Head:
    """A head with no parameter at its default."""
    return replace(random_head(WIDTH, VOCAB), norm=norm, scale=0.7, softcap=softcap)


def spec_of(folder: Path, head: Head, reference: str = "mean", dtype: Any = torch.float64) -> Any:
    """Rows of a synthetic cache with this head, their moments and a random lens map."""
    rng = np.random.default_rng(1)
    layer = (rng.normal(size=(ROWS, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH)) + 1).astype("f4")
    cache = make_cache(folder, [layer, layer], [30] * 3, head)
    moments = Moments.of(layer.astype(np.float64), layer[:, :1].astype(np.float64))
    row = {"mean": moments.mean_x.astype("f4"), "zero": np.zeros(WIDTH, "f4"), "resample": None}
    rows = BasisRows(cache, 0, np.arange(ROWS), row[reference], seed=3)
    weight = (np.eye(WIDTH) + 0.3 * rng.normal(size=(WIDTH, WIDTH))).astype("f4")
    affine = AffineMap(weight, rng.normal(size=WIDTH).astype("f4"))
    return ObjectiveSpec(rows, affine, memory=1 << 20, dtype=dtype), moments


def references_of(rows: BasisRows) -> np.ndarray:
    """The row that replaces each row, in float64."""
    whole = slice(0, rows.n)
    states = rows.states(whole).astype(np.float64)
    return states - rows.differences(whole, states)


def plain_logits(head: Head, x: torch.Tensor) -> torch.Tensor:
    """The head's formula in float64."""
    norm_weight, norm_bias, unembedding, bias = (
        torch.tensor(getattr(head, name), dtype=torch.float64)
        for name in ("norm_weight", "norm_bias", "unembedding", "bias")
    )
    if head.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    if head.norm != "none":
        x = x / (x.square().mean(-1, keepdim=True) + head.eps).sqrt()
    logits = head.scale * ((x * norm_weight + norm_bias) @ unembedding.T + bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def plain_kl(spec: ObjectiveSpec, coordinates: AblationCoordinates, basis: torch.Tensor) -> Any:
    """Mean KL(lens(h) || lens(h ablated)), on whole matrices."""
    head, rows = spec.rows.cache.head, spec.rows
    states = torch.tensor(rows.states(slice(0, rows.n)), dtype=torch.float64)
    reference = torch.tensor(references_of(rows))
    whiten, unwhiten = torch.tensor(coordinates.whiten), torch.tensor(coordinates.unwhiten)
    ablated = states - (states - reference) @ whiten @ basis @ basis.T @ unwhiten
    weight, bias = (
        torch.tensor(array, dtype=torch.float64) for array in (spec.map.weight, spec.map.bias)
    )
    log_p, log_q = (
        torch.log_softmax(plain_logits(head, x @ weight + bias), -1) for x in (states, ablated)
    )
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def orthonormal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def relative_error(actual: Any, expected: Any) -> float:
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("reference", ["mean", "zero", "resample"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("norm", NORMS)
def test_loss_and_gradient_equal_autograd(
    tmp_path: Path, norm: str, softcap: float | None, reference: str
) -> None:
    spec, moments = spec_of(tmp_path, head_with(norm, softcap), reference)
    for metric in ("covariance", "euclidean"):
        coordinates = AblationCoordinates.of(moments, metric)
        for k in (1, 3):
            basis = torch.tensor(orthonormal(coordinates.rank, k), requires_grad=True)
            expected = plain_kl(spec, coordinates, basis)
            expected.backward()
            with AblationObjective(spec) as objective:
                finder = BasisFinder(objective, coordinates, k)
                loss, gradient = finder._evaluate(basis.detach().numpy())
            assert relative_error(loss, expected.item()) < 1e-10
            assert basis.grad is not None
            assert relative_error(gradient, basis.grad.numpy()) < 1e-10


@pytest.mark.parametrize("reference", ["mean", "resample"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("norm", NORMS)
def test_the_full_gradient_is_that_of_the_projector(
    tmp_path: Path, norm: str, softcap: float | None, reference: str
) -> None:
    spec, moments = spec_of(tmp_path, head_with(norm, softcap), reference)
    coordinates = AblationCoordinates.of(moments, "covariance")
    # d KL / d V at an orthonormal square V is 2 K V, with K the gradient in the projector V V'.
    basis = torch.tensor(orthonormal(WIDTH, WIDTH), requires_grad=True)
    plain_kl(spec, coordinates, basis).backward()
    assert basis.grad is not None
    expected = basis.grad.numpy() @ basis.detach().numpy().T / 2
    with AblationObjective(spec) as objective:
        found = BasisFinder(objective, coordinates, 2).full_gradient()
    # The general path of heads with a softcap, and of resampling, is float32.
    tolerance = 1e-10 if softcap is None and reference == "mean" else 2e-5
    assert relative_error(found, expected) < tolerance


def test_nothing_ablated_costs_nothing(tmp_path: Path) -> None:
    spec, _ = spec_of(tmp_path, head_with())
    nothing = np.zeros((2, WIDTH))
    with AblationObjective(spec) as objective:
        loss, encoder, decoder = objective.evaluate((nothing, nothing))
    assert abs(loss) < 1e-14
    assert not encoder.any()
    assert not decoder.any()


@pytest.mark.parametrize("metric", ["covariance", "euclidean"])
def test_float32_is_near_float64(tmp_path: Path, metric: str) -> None:
    spec, moments = spec_of(tmp_path, head_with(), dtype=torch.float32)
    coordinates = AblationCoordinates.of(moments, metric)
    basis = torch.tensor(orthonormal(WIDTH, 3), requires_grad=True)
    expected = plain_kl(spec, coordinates, basis)
    expected.backward()
    with AblationObjective(spec) as objective:
        loss, gradient = BasisFinder(objective, coordinates, 3)._evaluate(basis.detach().numpy())
    assert basis.grad is not None
    assert relative_error(loss, expected.item()) < 1e-5
    # Whitening multiplies the rounding of rows by the ratio of their deviations.
    deviations = np.sqrt(coordinates.variances)
    ratio = deviations[0] / deviations[-1] if metric == "covariance" else 1.0
    assert relative_error(gradient, basis.grad.numpy()) < 1e-5 * ratio


def test_logits_far_from_the_clean_ones_do_not_overflow(tmp_path: Path) -> None:
    head = replace(head_with("none"), unembedding=60 * random_head(WIDTH, VOCAB).unembedding)
    spec, moments = spec_of(tmp_path, head, "zero", torch.float32)
    coordinates = AblationCoordinates.of(moments, "euclidean")
    # Rows that are doubled and not ablated: logits grow by hundreds of nats.
    encoder = np.eye(WIDTH)[:3]
    weight, bias = spec.map.weight.astype("f8"), spec.map.bias.astype("f8")
    states = spec.rows.states(slice(0, ROWS)).astype("f8")
    changed = states + 8 * states @ encoder.T @ encoder
    log_p, log_q = (
        torch.log_softmax(plain_logits(head, torch.tensor(x @ weight + bias)), -1)
        for x in (states, changed)
    )
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    with AblationObjective(spec) as objective:
        loss, *gradients = objective.evaluate((-8 * encoder, encoder))
    assert expected > 100
    assert relative_error(loss, expected) < 1e-4
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert coordinates.rank == WIDTH


def test_a_token_that_the_head_excludes_has_no_part(tmp_path: Path) -> None:
    bias = random_head(WIDTH, VOCAB).bias.copy()
    bias[5] = -1e30
    head = replace(head_with(), bias=bias)
    spec, moments = spec_of(tmp_path, head)
    coordinates = AblationCoordinates.of(moments, "covariance")
    basis = orthonormal(WIDTH, 2)
    expected = plain_kl(spec, coordinates, torch.tensor(basis)).item()
    with AblationObjective(spec) as objective:
        loss, gradient = BasisFinder(objective, coordinates, 2)._evaluate(basis)
    assert relative_error(loss, expected) < 1e-10
    assert np.isfinite(gradient).all()


def program_of(head: Head) -> ProgramHead:
    """`head` as a program of operations, as if it were no known formula."""
    torch_head = head.torch()
    inputs = [torch.randn(*shape, WIDTH) for shape in SHAPES]
    program, tensors = merge_recordings(
        [record_program(lambda x: torch_head(x), x) for x in inputs], SHAPES
    )
    return ProgramHead(program, {n: t.numpy() for n, t in tensors.items()}, WIDTH, VOCAB)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_head_program_gives_what_its_formula_gives(tmp_path: Path, softcap: Any) -> None:
    formula = head_with("rmsnorm", softcap)
    results = []
    for head, name in ((formula, "formula"), (program_of(formula), "program")):
        spec, moments = spec_of(tmp_path / name, head, dtype=torch.float32)
        coordinates = AblationCoordinates.of(moments, "euclidean")
        with AblationObjective(spec) as objective:
            finder = BasisFinder(objective, coordinates, 2)
            loss, gradient = finder._evaluate(orthonormal(WIDTH, 2))
            sums = objective.sum_losses(
                [(np.eye(WIDTH)[:1], np.eye(WIDTH)[:1])], np.zeros(ROWS, int), 1
            )
            results.append((loss, gradient, finder.full_gradient(), sums))
    for from_formula, from_program in zip(*results, strict=True):
        assert relative_error(from_program, from_formula) < 2e-5


def test_losses_of_rows_equal_those_of_the_gradient(tmp_path: Path) -> None:
    spec, moments = spec_of(tmp_path, head_with(), "resample")
    coordinates = AblationCoordinates.of(moments, "covariance")
    bases = [orthonormal(WIDTH, k, seed=k) for k in (1, 2, 5)]
    directions = [(coordinates.encoder(v), coordinates.decoder(v)) for v in bases]
    units = np.arange(ROWS) % 4
    with AblationObjective(spec) as objective:
        sums = objective.sum_losses(directions, units, 4)
        losses = [objective.evaluate(d)[0] for d in directions]
    np.testing.assert_allclose(sums.sum(1) / ROWS, losses, rtol=1e-12)
    assert sums.shape == (3, 4)


def test_the_cache_of_the_rows_is_not_changed(tmp_path: Path) -> None:
    spec, _ = spec_of(tmp_path, head_with())
    before = spec.rows.cache.residual_array(0)[:]
    with AblationObjective(spec) as objective:
        objective.evaluate((np.eye(WIDTH)[:2], np.eye(WIDTH)[:2]))
    assert np.array_equal(ActivationCache(spec.rows.cache.path).residual_array(0)[:], before)


@pytest.mark.parametrize("norm", NORMS)
def test_the_unembedding_is_that_of_the_head_and_read_by_many_rows(norm: str) -> None:
    """A copy would take as much memory as the head, and products of few rows twice the time."""
    head = head_with(norm)
    kl = kl_module.ExplicitLensKL(head)
    assert np.shares_memory(kl.unembedding.numpy(), head.unembedding)
    kept: list[slice] = []
    clean = kl.clean_rows(torch.randn(80, WIDTH), lambda part, tokens: kept.append(part))
    assert [part.stop - part.start for part in kept] == [24, 24, 24, 8]
    logits = head.logits(clean.output.numpy()) if norm == "none" else None
    if logits is not None:
        expected = torch.from_numpy(logits).double().logsumexp(-1)
        torch.testing.assert_close(clean.log_z, expected, rtol=1e-5, atol=1e-5)

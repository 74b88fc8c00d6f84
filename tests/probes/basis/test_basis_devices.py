"""Causal bases on a device: the numbers of the CPU, with memory that runs out, for every head."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residua.cache.head.head import Head
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.basis import lens_kl as lens_kl_module
from residua.probes.basis.ablation_objective import AblationObjective, ObjectiveSpec
from residua.probes.basis.basis_rows import BasisRows
from residua.probes.basis.causal_basis import CausalBasis
from residua.probes.lens.logit_lens import LogitLens
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.ridge.solver import AffineMap

from ...support.pretended_device import DEVICE, pretended_device
from ...support.synthetic import make_cache, random_head
from .test_lens_kl import VOCAB, WIDTH, program_of

FAST: dict[str, Any] = {"k": 3, "positions": 400, "test_positions": 300}
FORMULA = random_head(WIDTH, VOCAB)
HEADS: dict[str, Head] = {
    "layernorm": FORMULA,
    "rmsnorm": replace(FORMULA, norm="rmsnorm", scale=0.7),
    "none": replace(FORMULA, norm="none"),
    "softcap": replace(FORMULA, norm="rmsnorm", softcap=5.0),
}
"""Heads by formula."""
EXACT, SINGLE = 2e-5, 2e-4
"""Relative differences of float32 products, with sums in float64 and in float32."""


def cache_with(folder: Path, head: Any) -> ActivationCache:
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 40, 60).tolist()
    last = rng.standard_t(5, size=(sum(lengths), WIDTH)) * (rng.gamma(1, 1, WIDTH) + 0.3)
    layer = last @ rng.normal(size=(WIDTH, WIDTH)) + 0.1 * rng.normal(size=last.shape) + 2
    return make_cache(folder, [layer, last], lengths, head)


@pytest.fixture(scope="module", params=[*HEADS, "program"])
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    name = request.param
    head = program_of(HEADS["rmsnorm"]) if name == "program" else HEADS[name]
    return cache_with(tmp_path_factory.mktemp(name), head)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return cache_with(tmp_path_factory.mktemp("plain"), FORMULA)


def spec_on(source: ActivationCache, device: torch.device, **options: Any) -> ObjectiveSpec:
    """The objective of layer 0 on 300 rows, with a random lens map."""
    rng = np.random.default_rng(1)
    weight = (np.eye(WIDTH) + 0.3 * rng.normal(size=(WIDTH, WIDTH))).astype("f4")
    affine = AffineMap(weight, rng.normal(size=WIDTH).astype("f4"))
    rows = BasisRows(source, 0, np.arange(300), np.ones(WIDTH, "f4"), seed=3)
    return ObjectiveSpec(rows, affine, **{"memory": 1 << 20, **options}, device=device)


def evaluations(spec: ObjectiveSpec) -> dict[str, np.ndarray]:
    """Loss, gradients and matrices of an objective, the loss twice: from kept products, too."""
    encoder, decoder = np.random.default_rng(5).normal(size=(2, 2, WIDTH))
    names = ("full_gradient", "fisher", "second_moments")
    with AblationObjective(spec) as objective:
        loss, in_encoder, in_decoder = objective.evaluate((encoder, decoder))
        again = objective.evaluate((encoder, decoder))[0]
        sums = objective.sum_losses([(encoder, decoder)], np.zeros(300, np.int64), 1)
        matrices = {name: objective.mean_matrix(name) for name in names}
    numbers = {"loss": np.array(loss), "again": np.array(again), "sums": sums}
    return {**numbers, "encoder": in_encoder, "decoder": in_decoder, **matrices}


def assert_equal(ours: dict[str, np.ndarray], others: dict[str, np.ndarray], tol: float) -> None:
    for name, expected in others.items():
        assert ours[name].dtype == np.float64
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=tol * scale, err_msg=name)


@pytest.mark.parametrize("float64", [True, False])
def test_losses_and_gradients_equal_those_of_the_cpu(
    source: ActivationCache, float64: bool
) -> None:
    expected = evaluations(spec_on(source, torch.device("cpu")))
    with pretended_device(float64=float64) as device:
        ours = evaluations(spec_on(source, DEVICE))
    assert any(name.startswith(("addmm", "mm")) for name in device.operations)
    assert_equal(ours, expected, EXACT if float64 else SINGLE)


def test_products_in_a_scratch_file_come_back_to_the_device(
    plain: ActivationCache, tmp_path: Path
) -> None:
    expected = evaluations(spec_on(plain, torch.device("cpu"), memory=0))
    with pretended_device():
        ours = evaluations(spec_on(plain, DEVICE, memory=0, scratch=tmp_path))
    assert_equal(ours, expected, EXACT)


def test_memory_that_runs_out_halves_the_blocks(plain: ActivationCache) -> None:
    """Logits of 300 rows do not fit, nor those of 150; those of 75 do."""
    expected = evaluations(spec_on(plain, torch.device("cpu")))
    with pretended_device(largest=4 * VOCAB * 100) as device:
        ours = evaluations(spec_on(plain, DEVICE))
    assert device.refused
    assert_equal(ours, expected, EXACT)


def test_memory_for_no_block_at_all_is_the_error_of_the_device(plain: ActivationCache) -> None:
    spec = spec_on(plain, DEVICE)
    with (
        pretended_device(largest=4 * VOCAB * WIDTH),
        pytest.raises(RuntimeError, match="out of memory"),
        AblationObjective(spec) as objective,
    ):
        objective.evaluate((np.eye(WIDTH)[:1], np.eye(WIDTH)[:1]))


@pytest.mark.parametrize("method", ["joint", "greedy", "fisher"])
def test_a_fit_equals_that_of_the_cpu(plain: ActivationCache, method: str) -> None:
    ridge = RidgeProbe(layers=[0]).fit(plain, keep=False)

    def new_basis() -> CausalBasis:
        return CausalBasis(layers=0, method=method, **FAST)

    expected = new_basis().fit(plain, ridge, device="cpu")
    with pretended_device() as device:
        ours = new_basis().fit(plain, ridge, device="meta")
    assert any(name.startswith(("addmm", "mm")) for name in device.operations)
    # The search stops where gains are below a thousandth: bases are equal to about its root.
    for name, tensor in expected.state()[1].items():
        np.testing.assert_allclose(
            ours.state()[1][name], tensor, rtol=0.02, atol=0.02, err_msg=name
        )
    for row, other in zip(ours.metrics(), expected.metrics(), strict=True):
        for size, measures in other["span"].items():
            assert row["span"][size]["kl"] == pytest.approx(measures["kl"], rel=1e-3)


def test_a_basis_of_the_logit_lens_of_a_head_program_runs_on_the_device(tmp_path: Path) -> None:
    source = cache_with(tmp_path, program_of(HEADS["rmsnorm"]))
    lens = LogitLens.of(source, [0])
    options: dict[str, Any] = {**FAST, "layers": 0, "method": "one-shot"}
    expected = CausalBasis(**options).fit(source, lens, device="cpu").metrics()[0]
    with pretended_device(float64=False):
        ours = CausalBasis(**options).fit(source, lens, device="meta").metrics()[0]
    for size, measures in expected["span"].items():
        assert ours["span"][size]["kl"] == pytest.approx(measures["kl"], rel=1e-3)


def test_blocks_are_larger_on_a_device() -> None:
    """A product starts there for each block: few rows would leave it idle."""
    on_cpu = lens_kl_module.rows_of_block(4 * 50_000, torch.device("cpu"))
    assert on_cpu < lens_kl_module.rows_of_block(4 * 50_000, DEVICE) <= 2048

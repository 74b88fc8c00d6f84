"""Lenses from a cache: never worse than their start, resumed to the same bits."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import residua
from residua.cache.errors import MismatchError, NotFoundError, ResiduaWarning, UsageError
from residua.cache.head.head_recording import SHAPES, merge_recordings, record_program
from residua.cache.head.program_head import ProgramHead
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.readout import ReadoutBatch
from residua.probes.lens import fit_groups as lensgroups
from residua.probes.lens import translator_fit
from residua.probes.lens.natural_gradient import (
    InputWhitening,
    NaturalGradientMap,
    sampled_slopes,
)
from residua.probes.lens.translator_fit import identity_map
from residua.probes.lens.tuned_lens import FutureLens, TunedLens
from residua.probes.moments.moments import Moments
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.saved.save import check_geometry, load_probe, save_probe
from residua.probes.training.softmax_loss import ModelDistribution, draw_tokens

from ...support.defined import not_none
from ...support.local import local_client
from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB = 10, 24
FAST: dict[str, Any] = {"steps": 50, "batch": 256}


def curved_layers(rng: np.random.Generator, rows: int) -> list[np.ndarray]:
    """A last layer, and earlier ones that say less and less of it, in other coordinates."""
    last = rng.normal(size=(rows, WIDTH)) * rng.gamma(1.0, 1.0, (rows, 1))
    layers = [last]
    for noise in (0.2, 0.5):
        mixed = np.tanh(last) + noise * rng.normal(size=last.shape)
        layers.insert(0, mixed @ rng.normal(size=(WIDTH, WIDTH)) + 3)
    return [layer.astype("f4") for layer in layers]


@pytest.fixture(scope="module")
def curved(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, 150).tolist()
    folder, head = tmp_path_factory.mktemp("curved"), random_head(WIDTH, VOCAB)
    return make_cache(folder, curved_layers(rng, sum(lengths)), lengths, head)


@pytest.fixture(scope="module")
def lens(curved: ActivationCache) -> TunedLens:
    return TunedLens(**FAST).fit(curved)


def validation_kl(found: ActivationCache, probes: list[Any], **options: Any) -> dict[Any, float]:
    rows = residua.evaluate(found, probes, split="validation", **options).rows
    return {(row.probe, row.layer, row.offset): not_none(row.kl) for row in rows}


def test_a_lens_is_better_than_ridge_and_never_worse_than_the_logit_lens(
    curved: ActivationCache, lens: TunedLens
) -> None:
    kl = validation_kl(curved, [RidgeProbe().fit(curved), lens])
    for layer in range(curved.n_blocks):
        assert kl["lens", layer, 0] < 0.95 * kl["ridge", layer, 0]
        assert kl["lens", layer, 0] < kl["logit", layer, 0]
    # The last bits of a float32 product depend on where its operands lie in memory.
    assert kl["lens", curved.n_blocks, 0] < 1e-7


def test_metrics_are_what_evaluation_finds(curved: ActivationCache, lens: TunedLens) -> None:
    kl = validation_kl(curved, [RidgeProbe().fit(curved), lens])
    for row in lens.metrics()[:-1]:
        for name, probe in {"kl": "lens", "kl_logit": "logit", "kl_ridge": "ridge"}.items():
            np.testing.assert_allclose(row[name], kl[probe, row["layer"], 0], rtol=1e-4)
        assert row["lr"] in dict(row["sweep"])
        assert row["start"] == "ridge"
    assert lens.metrics()[-1]["start"] == "model"


def test_where_the_logit_lens_is_the_truth_it_is_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    last = rng.normal(size=(2000, WIDTH)).astype("f4")
    same = make_cache(tmp_path, [last, last], [50] * 40, random_head(WIDTH, VOCAB))
    row = TunedLens(layers=[0], **FAST).fit(same).metrics()[0]
    assert row["kl"] <= row["kl_logit"] < 1e-6


def test_without_steps_a_lens_is_its_start(curved: ActivationCache) -> None:
    ridge, start = RidgeProbe().fit(curved), TunedLens(steps=0).fit(curved)
    for layer in range(curved.n_blocks):
        np.testing.assert_allclose(
            start.map(layer).weight, ridge.map(layer).weight, rtol=1e-3, atol=1e-5
        )


def test_offsets_are_fitted_by_the_same_steps(curved: ActivationCache, lens: TunedLens) -> None:
    future = FutureLens(offsets=(0, 2), **FAST).fit(curved)
    assert future.pairs() == [(layer, offset) for layer in range(3) for offset in (0, 2)]
    for layer in range(curved.n_blocks):
        np.testing.assert_allclose(future.map(layer, 0).weight, lens.map(layer).weight, atol=1e-4)
    kl = validation_kl(curved, [future])
    for row in future.metrics():
        found = kl["future", row["layer"], row["offset"]]
        np.testing.assert_allclose(row["kl"], found, rtol=1e-4, atol=1e-6)


def test_a_lens_of_a_program_head_is_fitted(tmp_path: Path) -> None:
    explicit = random_head(WIDTH, VOCAB)
    unembedding = torch.from_numpy(explicit.unembedding)
    inputs = [torch.randn(*shape, WIDTH) for shape in SHAPES]
    program, tensors = merge_recordings(
        [record_program(lambda x: x.tanh() @ unembedding.T, x) for x in inputs], SHAPES
    )
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    head = ProgramHead(program, arrays, WIDTH, VOCAB)
    layers = curved_layers(np.random.default_rng(0), 2000)
    cache_of = make_cache(tmp_path, layers, [50] * 40, head)
    found = TunedLens(layers=[1], steps=20, batch=128).fit(cache_of).metrics()[0]
    assert found["kl"] < 0.9 * min(found["kl_logit"], found["kl_ridge"])


class Killed(Exception):
    pass


def killed_at(step: int) -> Callable[[str, int, int], None]:
    def report(stage: str, done: int, total: int) -> None:
        if stage == "lens" and done == step:
            raise Killed

    return report


@pytest.mark.parametrize("step", [10, 25, 75])
def test_a_killed_fit_goes_on_to_the_same_lens(
    curved: ActivationCache, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TunedLens(lr=0.2, steps=100, batch=128).fit(curved)
    probe = TunedLens(lr=0.2, steps=100, batch=128)
    with pytest.raises(Killed):
        probe.fit(curved, checkpoint=tmp_path, progress=killed_at(step))
    starts = []
    start = lensgroups.start_run
    monkeypatch.setattr(lensgroups, "start_run", lambda *args: starts.append(args) or start(*args))
    probe.fit(curved, checkpoint=tmp_path)
    # A fit that was killed before its first checkpoint begins again.
    assert len(starts) == (step == 10)
    assert probe.metrics() == whole.metrics()
    assert not list(tmp_path.rglob("*.safetensors"))
    for pair, found in whole.maps_.items():
        assert np.array_equal(probe.maps_[pair].weight, found.weight)
        assert np.array_equal(probe.maps_[pair].bias, found.bias)


@pytest.mark.slow
def test_a_fit_that_was_killed_by_the_system_goes_on_to_the_same_lens(
    curved: ActivationCache, tmp_path: Path
) -> None:
    code = (
        "import os, signal\n"
        "from residua.probes.lens.tuned_lens import TunedLens\n"
        "from residua.cache.store.activation_cache import ActivationCache\n"
        "def report(stage, done, total):\n"
        "    if (stage, done) == ('lens', 50): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"TunedLens(lr=0.2, steps=100, batch=128).fit(ActivationCache({str(curved.path)!r}),\n"
        f"    checkpoint={str(tmp_path)!r}, progress=report)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert len(list(tmp_path.rglob("fit.json"))) == 1
    stages = set()
    probe = TunedLens(lr=0.2, steps=100, batch=128)
    probe.fit(curved, checkpoint=tmp_path, progress=lambda stage, *_: stages.add(stage))
    assert stages == {"lens"}
    whole = TunedLens(lr=0.2, steps=100, batch=128).fit(curved)
    for pair, found in whole.maps_.items():
        np.testing.assert_allclose(probe.maps_[pair].weight, found.weight, atol=1e-5)


def test_first_batches_that_are_read_again_give_the_same_lens(
    curved: ActivationCache, lens: TunedLens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translator_fit, "FIRST_BYTES", 0)
    again = TunedLens(**FAST).fit(curved)
    for pair, found in lens.maps_.items():
        np.testing.assert_allclose(again.maps_[pair].weight, found.weight, atol=1e-5)


def test_groups_of_layers_and_workers_give_the_same_lens(
    curved: ActivationCache, lens: TunedLens
) -> None:
    # Earlier fits kept their moments.
    shutil.rmtree(curved.path / "moments", ignore_errors=True)
    with pytest.warns(ResiduaWarning, match=r"in \d passes over the rows"):
        small = TunedLens(**FAST).fit(curved, memory=1)
    with local_client() as client:
        shared = TunedLens(**FAST).fit(curved, client=client)
    for other in (small, shared):
        for pair, found in lens.maps_.items():
            np.testing.assert_allclose(other.maps_[pair].weight, found.weight, atol=2e-4)


def test_a_saved_lens_gives_the_same_logits_without_its_cache(
    curved: ActivationCache, lens: TunedLens, tmp_path: Path
) -> None:
    loaded = load_probe(save_probe(lens, tmp_path))
    assert loaded.metrics() == lens.metrics()
    assert loaded.get_params() == lens.get_params()
    check_geometry(loaded, curved)
    rows = torch.from_numpy(curved.residual_array(1)[:20])
    batch = ReadoutBatch(rows, torch.zeros(20, dtype=torch.int64), curved.head.torch())
    torch.testing.assert_close(loaded.logits(batch, 1, 0), lens.logits(batch, 1, 0))


def test_a_saved_lens_loads_without_scikit_learn(lens: TunedLens, tmp_path: Path) -> None:
    save_probe(lens, tmp_path)
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import numpy as np, residua\n"
        f"lens = residua.load_probe({str(tmp_path)!r})\n"
        "print(lens.transform_hidden(np.ones((2, 10)), 1).shape, repr(lens))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "(2, 10) TunedLens(steps=50, batch=256)\n"


def test_a_lens_of_another_model_is_refused(lens: TunedLens, tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(400, WIDTH)).astype("f4")
    other = make_cache(tmp_path, [rows, rows], [40] * 10, random_head(WIDTH, VOCAB, seed=1))
    with pytest.raises(MismatchError, match="fitted on a cache with head"):
        check_geometry(lens, other)


def test_numpy_and_torch_rows_are_translated_alike(lens: TunedLens) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 5, WIDTH)).astype("f4")
    found = lens.transform_hidden(rows, 1)
    assert found.shape == rows.shape
    np.testing.assert_allclose(
        lens.transform_hidden(torch.from_numpy(rows), 1).numpy(), found, rtol=1e-5, atol=1e-5
    )
    assert np.array_equal(lens.transform_hidden(rows, 2), rows)


def test_parameters_are_those_of_scikit_learn() -> None:
    lens = TunedLens(offsets=(0, 1), lr=0.2)
    copy: Any = clone(lens)  # pyright: ignore[reportArgumentType]
    assert copy is not lens
    assert copy.get_params() == lens.get_params()
    assert copy.set_params(steps=7).steps == 7
    assert repr(copy) == "TunedLens(offsets=(0, 1), lr=0.2, steps=7)"
    with pytest.raises(UsageError, match="no parameter 'rate'"):
        lens.set_params(rate=1)
    with pytest.raises(NotFittedError, match="TunedLens is not fitted"):
        lens.metrics()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layers": [7]}, "layer 7 is not in this cache"),
        ({"offsets": -1}, "offsets are 0 or more"),
        ({"layers": []}, "at least one layer"),
        ({"steps": -1}, "steps and seed must be 0 or more"),
        ({"lr": 0.0}, "lr and damping must be positive"),
        (
            {"offsets": 100},
            "no pair at offset 100: .* lie in one document .* the largest offset is ",
        ),
    ],
)
def test_a_request_that_cannot_be_right_says_why(
    curved: ActivationCache, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        TunedLens(**params).fit(curved)


def test_a_layer_that_was_not_fitted_is_named(lens: TunedLens) -> None:
    with pytest.raises(NotFoundError, match=r"layer 5, offset 0; fitted are \(0, 0\), \(1, 0\)"):
        lens.map(5, 0)
    with pytest.raises(UsageError, match="needs the head"):
        TunedLens().fit(np.zeros((3, 3)))  # pyright: ignore[reportArgumentType]


def test_whitened_inputs_have_second_moments_one() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(500, WIDTH)) * np.logspace(0, 4, WIDTH) + 100
    moments = Moments.of(rows, rows)
    inputs = InputWhitening.of(moments, 0.0)
    z = inputs(torch.from_numpy(rows.astype("f4"))).double().numpy()
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(WIDTH), atol=5e-3)
    assert torch.allclose(inputs.whiten @ inputs.unwhiten, torch.eye(WIDTH), atol=1e-3)


def test_tokens_are_drawn_as_their_probabilities_say() -> None:
    q = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    n, generator = 100_000, torch.Generator().manual_seed(0)
    quantile = torch.rand(2 * n, generator=generator)
    token = draw_tokens(q.repeat_interleave(n, 0), quantile).view(2, n)
    found = torch.stack([row.bincount(minlength=6) for row in token])
    assert not found[q == 0].any()
    # Six standard deviations.
    assert (found / n - q).abs().max() < 6 * (0.25 / n) ** 0.5


def test_sampled_slopes_have_the_fisher_matrix_as_second_moment() -> None:
    head = random_head(WIDTH, VOCAB).torch()
    u = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_q = head(u).log_softmax(-1)[0]
    slopes = torch.stack(
        [torch.autograd.grad(-log_q[y], u, retain_graph=True)[0][0] for y in range(VOCAB)]
    )
    fisher = slopes.T @ (log_q.exp().detach()[:, None] * slopes)
    found = sampled_slopes(u.detach().expand(60_000, WIDTH), head, torch.Generator().manual_seed(1))
    error = (found.T @ found / len(found) - fisher).norm() / fisher.norm()
    assert error < 0.02


def test_a_full_step_solves_where_the_loss_is_a_parabola() -> None:
    # Near its minimum the KL is the quadratic form of the Fisher matrix: one step gets there.
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4000, WIDTH)).astype("f4")
    head = random_head(WIDTH, VOCAB).torch()
    x = torch.from_numpy(rows)
    target = ModelDistribution(head).distribution(x)
    fit = NaturalGradientMap(InputWhitening.of(Moments.of(rows, rows), 0.0), damping=1e-3)
    nearby = identity_map(WIDTH).astype(np.float32)
    nearby.weight[:] += 0.02 * rng.normal(size=(WIDTH, WIDTH))
    fit.set_map(nearby)
    before = fit.losses(x, head, target).mean()
    fit.outputs = torch.linalg.eigh(fit.output_factor(x, head, torch.Generator().manual_seed(0)))[1]
    fit.update_curvature(x, head, torch.Generator().manual_seed(1), 1.0)
    fit.step(x, head, target, 1.0)
    assert fit.losses(x, head, target).mean() < 0.1 * before

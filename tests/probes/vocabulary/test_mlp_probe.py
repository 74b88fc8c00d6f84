"""The MLP probe reads what no affine map reads, has the gradients of autograd, and saves itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.cache.errors import CorruptError, UsageError
from residua.cache.head.head import Head
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.controls.control_probe import ControlProbe
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.training.softmax_loss import ModelDistribution
from residua.probes.vocabulary.mlp_probe import MlpProbe
from residua.probes.vocabulary.parametrizations import (
    MlpThroughHead,
    PrincipalAxes,
    apply_parametrization,
)
from residua.probes.vocabulary.vocab_probe import VocabProbe

from ...support.synthetic import make_cache, random_head

WIDTH = 6
LENGTHS = [50] * 60


def xor_cache(root: Path) -> ActivationCache:
    """A cache whose model says, one token later, token 0 or 1 by the XOR of two signs of layer 0.

    Layer 1 is the last; the first two numbers of layer 0 are the signs, the others are noise.
    """
    rng = np.random.default_rng(0)
    n = sum(LENGTHS)
    signs = rng.choice([-1.0, 1.0], (n, 2))
    first = np.concatenate([signs, rng.normal(0, 0.5, (n, WIDTH - 2))], 1)
    first += rng.normal(0, 0.05, first.shape)
    token = np.roll((signs[:, 0] * signs[:, 1] > 0).astype(int), 1)
    last = np.eye(WIDTH)[token] + rng.normal(0, 0.02, (n, WIDTH))
    head = Head(
        norm="none",
        eps=1e-5,
        norm_weight=np.ones(WIDTH, np.float32),
        norm_bias=np.zeros(WIDTH, np.float32),
        unembedding=8 * np.eye(WIDTH, dtype=np.float32),
        bias=np.zeros(WIDTH, np.float32),
    )
    return make_cache(root, [first, last], LENGTHS, head)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return xor_cache(tmp_path_factory.mktemp("xor"))


@pytest.fixture(scope="module")
def probe(cache: ActivationCache) -> MlpProbe:
    probe = MlpProbe(offsets=1, layers=[0], hidden=16, lr=0.01, epochs=30, batch=128)
    probe.fit(cache, progress=None)
    return probe


def precision(cache: ActivationCache, probes: dict[str, Any]) -> dict[str, float | None]:
    evaluation = evaluate(cache, probes, progress=None)
    return {
        row.probe: row.precision_at_1
        for row in evaluation.rows
        if row.offset == 1 and row.layer == 0
    }


def test_a_planted_xor_is_read_by_the_mlp_and_by_no_affine_map(
    cache: ActivationCache, probe: MlpProbe
) -> None:
    options: dict[str, Any] = {"progress": None}
    twin = VocabProbe(1, [0], form="head", loss="kl", lr=0.01, epochs=30, batch=128)
    shuffled = ControlProbe(
        MlpProbe(offsets=1, layers=[0], hidden=16, lr=0.01, epochs=5, batch=128), "shuffled"
    )
    found = precision(
        cache,
        {
            "mlp": probe,
            "twin": twin.fit(cache, **options),
            "ridge": RidgeProbe(1, [0]).fit(cache, keep=False, **options),
            "shuffled": shuffled.fit(cache, **options),
        },
    )
    assert (found["mlp"] or 0) > 0.99
    for name in ("twin", "ridge", "shuffled"):
        assert abs((found[name] or 0) - 0.5) < 0.12, name


def test_losses_and_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    head = random_head(WIDTH, 11).torch()
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(9, WIDTH)).astype(np.float32))
    target = ModelDistribution(head).distribution(torch.randn(9, WIDTH))
    form = MlpThroughHead(head, WIDTH, 1.7, hidden=5, seed=3)
    parameters = {
        name: torch.randn(shape)
        for name, shape in {
            "weight": (WIDTH, WIDTH),
            "bias": (WIDTH,),
            "inner": (5, WIDTH),
            "inner_bias": (5,),
            "outer": (WIDTH, 5),
        }.items()
    }
    grads = {name: torch.zeros_like(value) for name, value in parameters.items()}
    losses = form.losses(parameters, x, target, grads)

    plain = {name: value.double().requires_grad_() for name, value in parameters.items()}
    inner = x.double() @ plain["inner"].T + plain["inner_bias"]
    hidden = x.double() @ plain["weight"].T + plain["bias"]
    hidden = 1.7 * (hidden + torch.nn.functional.gelu(inner) @ plain["outer"].T)
    mean = hidden.mean(1, keepdim=True)
    normed = (hidden - mean) / ((hidden - mean).square().mean(1, keepdim=True) + 1e-5).sqrt()
    normed = normed * head.norm_weight.double() + head.norm_bias.double()
    logits = normed @ head.unembedding.double().T + head.bias.double()
    assert target.p is not None
    p = target.p.double()
    expected = (p * (p.log() - logits.log_softmax(1))).sum(1)
    expected.mean().backward()
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    for name, value in plain.items():
        assert value.grad is not None
        torch.testing.assert_close(grads[name].double(), value.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(form.losses(parameters, x, target, None), losses)


def test_folded_parameters_apply_to_raw_states_and_unfold_again() -> None:
    rng = np.random.default_rng(2)
    raw = torch.from_numpy(rng.normal(1, 3, (50, WIDTH)).astype(np.float32))
    axes = PrincipalAxes.of(raw.mean(0).double(), torch.cov(raw.T.double()))
    form = MlpThroughHead(random_head(WIDTH, 11).torch(), WIDTH, 2.5, hidden=4)
    parameters = form.start(axes, torch.zeros(11))
    parameters["outer"] = torch.randn(WIDTH, 4)
    x = axes(raw)
    inner = x @ parameters["inner"].T + parameters["inner_bias"]
    expected = x @ parameters["weight"].T + parameters["bias"]
    expected = 2.5 * (expected + torch.nn.functional.gelu(inner) @ parameters["outer"].T)
    folded = form.folded(parameters, axes)
    found = apply_parametrization(folded, raw)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    for name, value in form.unfolded(folded, axes).items():
        torch.testing.assert_close(value, parameters[name], rtol=1e-3, atol=1e-4)


def test_the_fit_starts_as_the_logit_lens(cache: ActivationCache) -> None:
    form = MlpThroughHead(cache.head.torch(), WIDTH, 3.0, hidden=4)
    raw = torch.from_numpy(np.array(cache.residual_array(0)[:100], np.float32))
    axes = PrincipalAxes.of(raw.mean(0).double(), torch.cov(raw.T.double()))
    folded = form.folded(form.start(axes, torch.zeros(WIDTH)), axes)
    torch.testing.assert_close(apply_parametrization(folded, raw), raw, rtol=1e-4, atol=1e-4)


def test_a_saved_probe_says_the_same_and_a_changed_one_is_refused(
    cache: ActivationCache, probe: MlpProbe, tmp_path: Path
) -> None:
    folder = probe.save(tmp_path / "mlp")
    loaded = residua.load_probe(folder)
    assert type(loaded) is MlpProbe
    assert loaded.get_params() == probe.get_params()
    assert precision(cache, {"mlp": loaded}) == precision(cache, {"mlp": probe})
    assert loaded.metrics() == probe.metrics()
    _, tensors = probe.state()
    config = loaded.state()[0]
    del tensors["0.1.inner_bias"]
    with pytest.raises(CorruptError, match="inner_bias"):
        MlpProbe.restore(probe.get_params(), config, tensors)


def test_a_killed_fit_goes_on_to_the_same_probe(cache: ActivationCache, tmp_path: Path) -> None:
    def new_probe() -> MlpProbe:
        return MlpProbe(offsets=1, layers=[0], hidden=4, lr=0.01, epochs=1, batch=256)

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done > 0.6 * total:
            raise Killed

    whole = new_probe().fit(cache, progress=None)
    options: dict[str, Any] = {"checkpoint": tmp_path / "checkpoint", "checkpoint_seconds": 0.05}
    with pytest.raises(Killed):
        new_probe().fit(cache, progress=kill, **options)
    resumed = new_probe().fit(cache, progress=None, **options)
    for name, tensor in whole.map(0, 1).items():
        torch.testing.assert_close(resumed.map(0, 1)[name], tensor, rtol=0, atol=0)


def test_what_cannot_be_fitted_is_said(cache: ActivationCache) -> None:
    with pytest.raises(UsageError, match="hidden must be a whole number"):
        MlpProbe(hidden=0).fit(cache, progress=None)
    with pytest.raises(UsageError, match="labelled rows have no head"):
        MlpProbe(loss="model").fit(np.zeros((20, 3)), np.arange(20) % 2, progress=None)
    with pytest.raises(UsageError, match="loss must be one of"):
        MlpProbe(loss="mse").fit(cache, progress=None)

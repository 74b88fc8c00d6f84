"""Tiled losses and their gradients equal plain autograd."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from residua.cache.head.head import Head, TorchHead
from residua.cache.head.program import Program
from residua.cache.head.program_head import ProgramHead
from residua.probes.training.softmax_loss import (
    TILE_ROWS,
    Gradients,
    ModelDistribution,
    Target,
    affine_losses,
    head_losses,
    row_tiles,
)

from ...support.synthetic import random_head

ROWS, WIDTH, VOCAB = 53, 7, 31
TILES = [1, 10, 1000, None]
"""Rows of a tile."""


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_losses(logits: Tensor, target: Target) -> Tensor:
    """The losses of torch's own functions, with an autograd graph."""
    if target.token is not None:
        return F.cross_entropy(logits, target.token, reduction="none")
    assert target.p is not None
    return F.kl_div(logits.log_softmax(-1), target.p.to(logits.dtype), reduction="none").sum(-1)


def targets() -> list[Target]:
    token = torch.randint(VOCAB, (ROWS,), generator=torch.Generator().manual_seed(3))
    p = normal(ROWS, VOCAB, seed=4, scale=3.0).softmax(-1)
    return [Target(token=token), Target(p=p, negentropy=torch.special.xlogy(p, p).sum(-1))]


@pytest.mark.parametrize("tile_rows", TILES)
@pytest.mark.parametrize("kind", [0, 1])
def test_an_affine_map_has_the_gradients_of_autograd(kind: int, tile_rows: int | None) -> None:
    target, scale = targets()[kind], 1 / ROWS
    x, weight, bias = normal(ROWS, WIDTH), normal(VOCAB, WIDTH, seed=1), normal(VOCAB, seed=2)
    buffers = [torch.ones_like(v) for v in (weight, bias, x)]
    losses = affine_losses(x, weight, bias, target, Gradients(*buffers, scale=scale), tile_rows)
    leaves = [v.double().requires_grad_() for v in (weight, bias, x)]
    plain = plain_losses(F.linear(leaves[2], leaves[0], leaves[1]), target)
    torch.testing.assert_close(losses.double(), plain, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(plain.sum() * scale, leaves)
    for buffer, expected in zip(buffers, gradients, strict=True):
        # Gradients are added to the ones of the buffer.
        torch.testing.assert_close(buffer.double() - 1, expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_wanted_is_not_computed() -> None:
    target = targets()[0]
    x, weight, bias = normal(ROWS, WIDTH), normal(VOCAB, WIDTH, seed=1), normal(VOCAB, seed=2)
    only = Gradients(weight=torch.zeros_like(weight))
    torch.testing.assert_close(
        affine_losses(x, weight, bias, target, only), affine_losses(x, weight, bias, target)
    )
    assert only.weight is not None
    assert only.weight.any()


@pytest.mark.parametrize("tile_rows", TILES)
def test_gradients_from_bfloat16_factors_are_those_of_float32_to_their_rounding(
    tile_rows: int | None,
) -> None:
    target, scale = targets()[0], 0.3
    x, weight, bias = normal(ROWS, WIDTH), normal(VOCAB, WIDTH), normal(VOCAB)
    results = {}
    for products in ("float32", "bfloat16"):
        buffers = (torch.zeros_like(weight), torch.zeros_like(bias), torch.zeros_like(x))
        losses = affine_losses(
            x, weight, bias, target, Gradients(*buffers, scale, products), tile_rows
        )
        results[products] = losses, buffers
    (expected_losses, exact_gradients), (losses, gradients) = results.values()
    torch.testing.assert_close(losses, expected_losses)
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert exact.norm() > 0
        # Factors are rounded to 8 bits.
        assert (gradient - exact).norm() <= 2.0**-7 * exact.norm()


def heads() -> dict[str, Head]:
    layernorm = random_head(WIDTH, VOCAB)
    return {
        "layernorm": layernorm,
        "rmsnorm": replace(layernorm, norm="rmsnorm"),
        "none": replace(layernorm, norm="none"),
        "scale and softcap": replace(layernorm, scale=0.7, softcap=2.5),
    }


@pytest.mark.parametrize("tile_rows", TILES)
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("name", list(heads()))
def test_a_head_has_the_gradients_of_autograd(name: str, kind: int, tile_rows: int | None) -> None:
    target, scale = targets()[kind], 0.3
    head, hidden = heads()[name].torch(), normal(ROWS, WIDTH, scale=2.0)
    gradient = torch.ones_like(hidden)
    losses = head_losses(hidden, head, target, Gradients(x=gradient, scale=scale), tile_rows)
    check_head(head, hidden, target, losses, gradient - 1, scale)


def check_head(
    head: TorchHead, hidden: Tensor, target: Target, losses: Tensor, gradient: Tensor, scale: float
) -> None:
    leaf = hidden.clone().requires_grad_()
    plain = plain_losses(head(leaf), target)
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(plain.sum() * scale, leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_program_head_goes_through_its_own_operations(kind: int) -> None:
    head = program_head()
    target, hidden = targets()[kind], normal(ROWS, WIDTH)
    gradient = torch.zeros_like(hidden)
    losses = head_losses(hidden, head.torch(), target, Gradients(x=gradient), 10)
    check_head(head.torch(), hidden, target, losses, gradient, 1.0)
    torch.testing.assert_close(head_losses(hidden, head.torch(), target), losses)


def program_head() -> ProgramHead:
    """tanh(h * gain) @ table, as operations."""
    rng = np.random.default_rng(0)
    tensors = {
        "gain": rng.normal(1, 0.2, WIDTH).astype(np.float32),
        "table": rng.normal(size=(WIDTH, VOCAB)).astype(np.float32),
    }
    nodes = [
        {"op": "mul", "args": {"self": {"node": 0}, "other": {"tensor": "gain"}}},
        {"op": "tanh", "args": {"self": {"node": 1}}},
        {"op": "mm", "args": {"self": {"node": 2}, "mat2": {"tensor": "table"}}},
    ]
    return ProgramHead(Program.from_json(nodes, set(tensors)), tensors, WIDTH, VOCAB)


@pytest.mark.parametrize("tile_rows", TILES)
def test_the_model_distribution_is_that_of_the_head(tile_rows: int | None) -> None:
    head, hidden = random_head(WIDTH, VOCAB), normal(ROWS, WIDTH)
    model, expected = ModelDistribution(head.torch(), tile_rows), head.torch()(hidden).double()
    target = model.distribution(hidden)
    assert target.p is not None
    assert target.negentropy is not None
    torch.testing.assert_close(target.p.double(), expected.softmax(-1), rtol=1e-5, atol=1e-7)
    negentropy = (expected.softmax(-1) * expected.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(target.negentropy.double(), negentropy, rtol=1e-5, atol=1e-6)
    sure = ModelDistribution(head.torch(), tile_rows).distribution(1000 * hidden)
    assert sure.negentropy is not None
    assert sure.negentropy.max() < 1e-6
    token = model.tokens(hidden).token
    assert token is not None
    assert token.tolist() == expected.argmax(-1).tolist()
    tied = replace(head, unembedding=np.zeros_like(head.unembedding), bias=np.zeros(VOCAB, "f4"))
    assert not ModelDistribution(tied.torch()).tokens(hidden).token.any()  # pyright: ignore


def test_the_model_against_itself_has_no_loss_and_no_gradient() -> None:
    head, hidden = random_head(WIDTH, VOCAB).torch(), normal(ROWS, WIDTH)
    gradient = torch.zeros_like(hidden)
    target = ModelDistribution(head).distribution(hidden)
    losses = head_losses(hidden, head, target, Gradients(x=gradient))
    assert losses.abs().max() < 1e-5
    assert gradient.abs().max() < 1e-6


def test_extreme_logits_stay_exact() -> None:
    logits = torch.tensor([[0.0, 500.0, -500.0], [1e4, 0.0, -1e4]])
    assert Target(token=torch.tensor([0, 2])).losses(logits.clone()).tolist() == [500.0, 2e4]
    excluded = torch.tensor([[1.0, 2.0, -float("inf")]])
    p = excluded.softmax(-1)
    target = Target(p=p, negentropy=torch.special.xlogy(p, p).sum(-1))
    head = random_head(WIDTH, VOCAB)
    never = replace(head, bias=np.where(np.arange(VOCAB) < 3, -np.inf, head.bias).astype("f4"))
    found = ModelDistribution(never.torch()).distribution(normal(ROWS, WIDTH))
    assert found.p is not None
    assert not found.p[:, :3].any()
    torch.testing.assert_close(found.negentropy, torch.special.xlogy(found.p, found.p).sum(-1))
    rows = excluded.clone()
    assert target.losses(rows).abs().max() < 1e-6
    assert rows.abs().max() < 1e-6


@pytest.mark.parametrize(("rows", "most"), [(1, 5), (10, 3), (7, 1), (1000, None)])
def test_tiles_cover_all_rows(rows: int, most: int | None) -> None:
    tiles = list(row_tiles(rows, 1 << 15, most))
    assert [i for t in tiles for i in range(t.start, t.stop)] == list(range(rows))
    assert max(t.stop - t.start for t in tiles) <= (most or TILE_ROWS)


def test_a_target_is_cut_by_rows() -> None:
    for target in targets():
        part = target[3:9]
        assert len(part) == 6
        assert len(target) == ROWS
        for part_rows, rows in zip(vars(part).values(), vars(target).values(), strict=True):
            assert part_rows is None or torch.equal(part_rows, rows[3:9])

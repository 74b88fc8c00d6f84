"""Logits written into a buffer equal those of the head; bfloat16 products, to their rounding."""

import pickle
from dataclasses import replace

import pytest
import torch

from residua.cache.errors import UsageError
from residua.cache.head.head import ROUNDED_BYTES, Head, round_unembedding

from ...support.synthetic import random_head

ROWS, WIDTH, VOCAB = 53, 16, 41


def heads() -> dict[str, Head]:
    explicit = random_head(WIDTH, VOCAB)
    return {
        "layernorm": explicit,
        "rmsnorm": replace(explicit, norm="rmsnorm"),
        "scale": replace(explicit, scale=0.7),
        "softcap": replace(explicit, softcap=2.5),
        # Logits far from 0, as many models have.
        "shifted": replace(explicit, unembedding=explicit.unembedding + 30),
    }


@pytest.mark.parametrize("name", list(heads()))
def test_logits_in_a_buffer_are_those_of_the_head(name: str) -> None:
    head = heads()[name].torch()
    hidden = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    out = torch.full((ROWS, VOCAB), torch.nan)
    head.write_logits(hidden.requires_grad_(), out)
    assert not out.requires_grad
    torch.testing.assert_close(out, head(hidden).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(heads()))
def test_bfloat16_products_round_the_differences_of_logits(name: str) -> None:
    head = heads()[name].torch()
    hidden = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    out = torch.full((ROWS, VOCAB), torch.nan)
    head.write_logits(hidden, out, "bfloat16")
    expected = head(hidden)
    spread = (expected - expected.mean(1, keepdim=True)).square().mean().sqrt()
    # 8 bits of both factors and of the product; the common part of the logits is not rounded.
    assert 0 < (out - expected).square().mean().sqrt() < 2.0**-7 * spread


def test_a_program_head_writes_its_logits_but_has_no_linear_part() -> None:
    from ...probes.training.test_softmax_loss import VOCAB, WIDTH, program_head

    head, hidden = program_head().torch(), torch.randn(9, WIDTH)
    for products in ("float32", "bfloat16"):
        out = torch.empty(9, VOCAB)
        head.write_logits(hidden, out, products)
        torch.testing.assert_close(out, head(hidden))
    with pytest.raises(UsageError, match="has no write_linear"):
        _ = head.write_linear


def test_factors_of_bfloat16_products_are_made_once_and_never_pickled() -> None:
    head = random_head(WIDTH, VOCAB)
    factors = head.torch().rounded_unembedding, head.torch().mean_unembedding
    assert head.torch().rounded_unembedding is factors[0]
    assert head.torch().mean_unembedding is factors[1]
    copy = pickle.loads(pickle.dumps(head))
    assert "rounded_on_cpu" not in vars(copy)
    assert copy.digest == head.digest
    for found, expected in zip(copy.rounded_on_cpu, factors, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_unembedding_is_rounded_the_same_in_blocks_of_any_size() -> None:
    width = ROUNDED_BYTES // 4 // 3  # blocks of 3 rows
    unembedding = torch.randn(7, width, generator=torch.Generator().manual_seed(0)) + 3
    rounded, mean = round_unembedding(unembedding)
    torch.testing.assert_close(mean, unembedding.mean(0))
    torch.testing.assert_close(rounded, (unembedding - mean).bfloat16(), rtol=0, atol=0)

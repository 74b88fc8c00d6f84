"""Blocks and head of any model are found by watching it, and are right or refused."""

from typing import Any

import numpy as np
import pytest
import torch

from residua.cache.checks.model_checks import check_model
from residua.cache.errors import HeadMismatchError, ModelError
from residua.cache.head.head_identification import verify_head
from residua.cache.model.block_search import find_blocks
from residua.cache.model.blocks import run_model
from residua.cache.tokens.token_stream import TokenStream, from_sequences

from ...support import toys
from ...support.models import CONFIGS, VOCAB, build_model
from ...support.toys import Toy


def stream() -> TokenStream:
    rng = np.random.default_rng(3)
    return from_sequences([rng.integers(0, VOCAB, 50) for _ in range(6)])


def batch(seed: int, rows: int = 3, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (rows, length), generator=generator)


@pytest.mark.parametrize("kind", CONFIGS)
def test_head_of_layer_l_gives_the_logits_of_the_model(kind: str) -> None:
    model = build_model(kind)
    report = check_model(model, stream(), "float32", "auto")
    ids = batch(9, rows=2, length=31)
    with torch.inference_mode():
        want = run_model(model, ids).logits
        hidden = report.stack.residuals(ids)
    got = report.head.logits(hidden[-1].numpy())
    assert np.abs(got - want.numpy()).max() <= 1e-5 * float(want.abs().max())
    torch_head = report.head.torch()(hidden[-1])
    assert float((torch_head - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gpt2", "gemma2", "bloom", "opt"])
def test_layers_are_the_hidden_states_that_transformers_reports(kind: str) -> None:
    model = build_model(kind)
    report = check_model(model, stream(), "float32", "auto")
    ids = batch(4)
    with torch.inference_mode():
        residuals = report.stack.residuals(ids)
        reported = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(residuals) == report.stack.depth + 1
    # The last reported state is behind the final norm; ours is before it.
    for ours, theirs in zip(residuals[:-1], reported[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(residuals[-1], reported[-1], atol=1e-2)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gptj", "gemma2", "mamba"])
def test_bfloat16_models_give_their_logits_to_rounding(kind: str) -> None:
    model = build_model(kind, torch.bfloat16)
    report = check_model(model, stream(), "bfloat16", "auto")
    assert report.head_error < 1e-2
    assert set(report.dtypes.values()) == {"bfloat16"}
    assert report.stored_kl < 1e-4


def test_the_head_is_a_copy_that_outlives_the_model() -> None:
    model = build_model("gpt2")  # tied embeddings
    report = check_model(model, stream(), "float32", "auto")
    ids = batch(5)
    with torch.inference_mode():
        want, hidden = run_model(model, ids).logits.clone(), report.stack.residuals(ids)[-1].clone()
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    torch.testing.assert_close(torch.from_numpy(report.head.logits(hidden.numpy())), want)


def test_a_wrong_head_is_refused() -> None:
    model = build_model("llama")
    report = check_model(model, stream(), "float32", "auto")
    ids = batch(6)
    with torch.inference_mode():
        hidden, logits = report.stack.residuals(ids)[-1], run_model(model, ids).logits
    with pytest.raises(HeadMismatchError, match="does not reproduce its logits"):
        verify_head(report.head, hidden * 1.01 + 0.01, logits, torch.float32)


def test_post_norm_states_are_not_taken_for_layer_l() -> None:
    model = build_model("llama")
    report = check_model(model, stream(), "float32", "auto")
    ids = batch(7)
    with torch.inference_mode():
        normed = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        logits = run_model(model, ids).logits
    with pytest.raises(HeadMismatchError):
        verify_head(report.head, normed, logits, torch.float32)


def test_a_bidirectional_model_is_seen_not_to_be_causal() -> None:
    model = build_model("llama")
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.__dict__["is_causal"] = False
    config: Any = model.config
    config.is_causal = False
    report = check_model(model, stream(), "float32", "auto")
    assert not report.causal
    assert check_model(build_model("llama"), stream(), "float32", "auto").causal


def test_a_toy_model_that_nothing_spoils_extracts() -> None:
    report = check_model(Toy(), stream(), "float32", "auto")
    assert report.head.kind == "explicit"
    assert report.causal
    assert report.embedding
    assert report.head_error <= 1e-6


@pytest.mark.parametrize(
    ("model", "depth", "width"),
    [
        (toys.InDictionary, 2, 16),
        (toys.InDataclass, 2, 16),
        (toys.SecondOfTwo, 2, 16),
        (toys.TwoStreams, 2, 32),
        (toys.ByKeyword, 2, 16),
        (toys.OtherClasses, 2, 16),
        (toys.SkippedBlock, 2, 16),
        (toys.Looped, 4, 16),
        (toys.PositionFirst, 2, 16),
        (toys.StreamsInside, 2, 16),
        (toys.StreamsFirst, 2, 16),
        (toys.Prompted, 2, 16),
        (toys.Repeated, 2, 48),
    ],
)
def test_streams_of_every_form_are_found_and_decode_row_by_row(
    model: type[Toy], depth: int, width: int
) -> None:
    toy = model()
    report = check_model(toy, stream(), "float32", "auto")
    assert (report.stack.depth, report.head.d_model) == (depth, width)
    assert report.causal
    assert report.embedding
    assert report.pad
    ids = batch(8, rows=2, length=9)
    layers, want = report.stack.residuals(ids), run_model(toy, ids).logits
    assert [tuple(layer.shape) for layer in layers] == [(2, 9, width)] * (depth + 1)
    got = report.head.logits(layers[-1].reshape(-1, width).numpy())
    torch.testing.assert_close(torch.from_numpy(got), want.reshape(-1, VOCAB), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (toys.MixingTail, "not one of a head program|does not reproduce its logits"),
        (toys.PositionTail, "depends on the tokens or on the size"),
        (toys.TokenTail, "not a function of the last block's output alone"),
        (toys.EarlierBlock, "not a function of the last block's output alone"),
        (toys.Random, "is not deterministic"),
        (toys.Infinite, "not finite"),
        (toys.Stepped, "operator round is not one of a head program"),
        (toys.FilledInPlace, "operator copy is not one of a head program"),
        (toys.Pooled, "one row of logits per token"),
    ],
)
def test_what_a_cache_would_get_wrong_is_refused_with_the_reason(
    model: type[Toy], reason: str
) -> None:
    with pytest.raises((ModelError, HeadMismatchError), match=reason):
        check_model(model(), stream(), "float32", "auto")


def test_a_model_whose_rows_mix_in_a_batch_runs_every_sequence_alone() -> None:
    assert check_model(toys.Crowd(), stream(), "float32", "auto").alone
    assert not check_model(Toy(), stream(), "float32", "auto").alone


def test_a_model_without_blocks_is_refused() -> None:
    class Flat(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> None:
            raise AssertionError("not reached")

    class Bare(Flat):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> None:
            return None

    with pytest.raises(ModelError, match="no logits"):
        find_blocks(Bare(), batch(1), batch(2))
    flat = Toy()
    flat.blocks = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="no decoder blocks"):
        find_blocks(flat, batch(1), batch(2))

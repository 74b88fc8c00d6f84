"""Mean Jacobians are those of plain autograd, and a killed fit goes on to the same ones."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residua.cache.errors import MismatchError, NotFoundError, UsageError
from residua.cache.model.block_search import find_blocks
from residua.cache.resuming.resumable_model import ResumableModel
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.jacobian import jacobian_fit
from residua.probes.jacobian.jacobian_fit import fit_jacobian_lens
from residua.probes.jacobian.jacobian_sums import JacobianSums, PromptBatch, batch_jacobians
from residua.probes.lens.jacobian_lens import JacobianLens

from ...support import models

KINDS = ("gpt2", "gpt_neox", "llama", "gemma2", "bloom")


def resumable(kind: str) -> ResumableModel:
    model = models.build_model(kind)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, models.VOCAB, (4, 32), generator=generator) for _ in range(2)]
    with torch.inference_mode():
        return ResumableModel(find_blocks(model, *ids))


def plain_jacobian(model: ResumableModel, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """d h_L[t', i] / d h_l[t, j] of one sequence, `(length, d, length, d)`, by plain hooks."""
    module, blocks = model.blocks.model, model.blocks.blocks
    last: list[torch.Tensor] = []

    def first_tensor(output: Any) -> torch.Tensor:
        return output if isinstance(output, torch.Tensor) else output[0]

    def run(hidden: torch.Tensor) -> torch.Tensor:
        def put_in(_: Any, __: Any, output: Any) -> Any:
            is_tensor = isinstance(output, torch.Tensor)
            return hidden[None] if is_tensor else (hidden[None], *output[1:])

        handles = [
            blocks[-1].register_forward_hook(lambda _, __, out: last.append(first_tensor(out)))
        ]
        if layer:
            handles.insert(0, blocks[layer - 1].register_forward_hook(put_in))
        try:
            module(input_ids=tokens[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return last.pop()[0]

    with torch.no_grad():
        hidden = model.run_residual(layer, tokens)
    return torch.autograd.functional.jacobian(run, hidden)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_jacobian_is_that_of_plain_autograd(kind: str) -> None:
    model = resumable(kind)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, models.VOCAB, (2, 7), generator=generator)
    first, last = 2, 6
    with torch.no_grad():
        states = model.run_residual(1, tokens).numpy()
    batch = PromptBatch(tokens.numpy(), states, first, last)
    found = batch_jacobians(model, [1, 2], batch)
    assert (found.n_prompts, found.n_positions) == (2, 8)
    for layer in (1, 2):
        expected = sum(
            plain_jacobian(model, layer, row)[first:last, :, first:last].double().sum((0, 2))
            / (last - first)
            for row in tokens
        )
        assert isinstance(expected, torch.Tensor)
        scale = float(expected.abs().max())
        np.testing.assert_allclose(found.sums[layer], expected.numpy(), atol=1e-5 * scale)


def test_random_signs_give_the_jacobian_of_one_offset_on_average() -> None:
    """Over all patterns of signs, the mean is exact."""
    model = resumable("llama")
    tokens = torch.tensor([[5, 9, 70, 31, 200, 8]])
    offset, first, last = 1, 1, 4
    with torch.no_grad():
        states = model.run_residual(1, tokens).numpy()
    total = JacobianSums.empty([1, 2], model.d_model)
    patterns = list(itertools.product([-1.0, 1.0], repeat=last - first))
    for pattern in patterns:
        signs = np.zeros((1, 6), np.float32)
        signs[0, first + offset : last + offset] = pattern
        batch = PromptBatch(tokens.numpy(), states, first, last, offset, signs)
        total = total.merge(batch_jacobians(model, [1, 2], batch))
    for layer in (1, 2):
        full = plain_jacobian(model, layer, tokens[0])
        expected = sum(full[t + offset, :, t] for t in range(first, last)) / (last - first)
        assert isinstance(expected, torch.Tensor)
        np.testing.assert_allclose(
            total.sums[layer] / len(patterns),
            expected.numpy(),
            atol=1e-5 * float(expected.abs().max()),
        )


@pytest.fixture(scope="module")
def lens(tiny_cache: ActivationCache) -> JacobianLens:
    return fit_jacobian_lens(tiny_cache, prompts=12, length=20, skip_first=4, progress=None)


def test_the_lens_is_that_of_the_cache_however_prompts_are_batched(
    tiny_cache: ActivationCache, lens: JacobianLens
) -> None:
    assert lens.layers == (0, 1, 2)
    assert lens.n_prompts_ == 12
    assert lens.cache_id_ == tiny_cache.id
    assert lens.geometry_ == tiny_cache.head.digest
    other = fit_jacobian_lens(
        tiny_cache, prompts=12, length=20, skip_first=4, batch_tokens=1, progress=None
    )
    for layer in lens.layers:
        scale = np.abs(lens.jacobians_[layer]).max()
        np.testing.assert_allclose(
            other.jacobians_[layer], lens.jacobians_[layer], atol=1e-5 * scale
        )


def test_the_layer_before_the_last_block_reads_nearly_like_the_model(
    tiny_cache: ActivationCache, lens: JacobianLens
) -> None:
    """The linear map of the last block, with the mean corrected, beats the bare stream."""
    import residua

    logit = residua.LogitLens.of(tiny_cache, 0)
    rows = residua.evaluate(tiny_cache, [logit, lens], progress=None).rows
    kl = {(str(row.probe), row.layer): row.kl or 0.0 for row in rows if row.offset == 0}
    assert kl["jacobian", 2] > 0
    assert kl["jacobian", 2] < kl["logit", 2]


def test_a_killed_fit_goes_on_to_the_same_lens(
    tiny_cache: ActivationCache,
    lens: JacobianLens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {
        "prompts": 12,
        "length": 20,
        "skip_first": 4,
        "batch_tokens": 60,
        "progress": None,
    }
    whole = fit_jacobian_lens(tiny_cache, **options)
    calls = 0

    def fail_later(*arguments: Any) -> JacobianSums:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return batch_jacobians(*arguments)

    monkeypatch.setattr(jacobian_fit, "batch_jacobians", fail_later)
    folder = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        fit_jacobian_lens(tiny_cache, checkpoint=folder, **options)
    with pytest.raises(MismatchError, match="of another fit: .*skip_first was 4, is 5"):
        fit_jacobian_lens(tiny_cache, checkpoint=folder, **{**options, "skip_first": 5})
    calls = 10
    again = fit_jacobian_lens(tiny_cache, checkpoint=folder, **options)
    assert calls == 10 + 4 - 2
    assert not folder.exists()
    for layer in whole.layers:
        np.testing.assert_array_equal(again.jacobians_[layer], whole.jacobians_[layer])


def test_sums_of_other_layers_are_not_merged() -> None:
    with pytest.raises(MismatchError, match="cannot be merged"):
        JacobianSums.empty([1], 4).merge(JacobianSums.empty([2], 4))


def test_what_cannot_be_fitted_is_refused(tiny_cache: ActivationCache) -> None:
    for options, error, message in (
        ({"layers": 3}, UsageError, "from layers below 3 to layer 3"),
        ({"layers": 9}, NotFoundError, "no layer 9"),
        ({"skip_first": 200}, UsageError, "no sequence of the split 'train' has more than 201"),
        ({"prompts": 0}, UsageError, "prompts must be 1 or more, not 0"),
        ({"offset": 90}, UsageError, "use a smaller skip_first, offset"),
    ):
        arguments: dict[str, Any] = {"progress": None, **options}
        with pytest.raises(error, match=message):
            fit_jacobian_lens(tiny_cache, **arguments)

"""Patched prompts run as the whole model with plain hooks runs them, on several architectures."""

from typing import Any

import numpy as np
import pytest
import torch

from residua.cache.errors import MismatchError, UsageError
from residua.cache.model.block_search import find_blocks
from residua.cache.resuming.resumable_model import ResumableModel
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.prompts.patched_prompt import FIXED_PROMPTS, PatchedPrompt, read_prompt
from residua.probes.prompts.prompt_runner import PromptRunner
from residua.probes.prompts.prompt_sample import PromptSample

from ...support import models

KINDS = ("gpt2", "gpt_neox", "llama", "gemma2", "bloom", "gptj", "falcon", "mixtral")


def resumable(kind: str) -> ResumableModel:
    model = models.build_model(kind)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, models.VOCAB, (4, 32), generator=generator) for _ in range(2)]
    with torch.inference_mode():
        return ResumableModel(find_blocks(model, *ids))


def plain_run(
    model: ResumableModel,
    layer: int,
    tokens: torch.Tensor,
    states: torch.Tensor,
    at: int,
    embeddings: torch.Tensor | None,
) -> torch.Tensor:
    """Last block's output `(n, length, d)` of a full run, by plain hooks on modules."""
    blocks, last = model.blocks.blocks, []

    def changed(stream: torch.Tensor, first: bool) -> torch.Tensor:
        stream = stream.clone()
        if first and embeddings is not None:
            stream[:, : len(embeddings)] = embeddings
        if layer == (0 if first else layer):
            stream[:, at] = states
        return stream

    def change_input(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (changed(args[0], True), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"], True)}

    def change_output(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return changed(output, False)
        return (changed(output[0], False), *output[1:])

    def keep(_: Any, __: Any, output: Any) -> None:
        last.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [blocks[0].register_forward_pre_hook(change_input, with_kwargs=True)]
    if layer:
        handles.append(blocks[layer - 1].register_forward_hook(change_output))
    handles.append(blocks[-1].register_forward_hook(keep))
    try:
        model.blocks.model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return last[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_embeddings", [False, True], ids=["written", "learned"])
def test_a_patched_prompt_is_that_of_plain_hooks(kind: str, with_embeddings: bool) -> None:
    model = resumable(kind)
    rng = np.random.default_rng(2)
    embeddings = rng.normal(0, 1, (3, model.d_model)).astype(np.float32)
    prompt = PatchedPrompt("p", (7, 8, 9), embeddings if with_embeddings else None)
    # Three samples share their continuation: the lower blocks run for two texts alone.
    continuations = np.array([[5, 6], [5, 6], [200, 4], [5, 6]])
    tokens = prompt.tokens(np.zeros(4, np.int64), continuations)
    states = torch.from_numpy(rng.normal(0, 1, (4, model.d_model)).astype(np.float32))
    runner = PromptRunner(model, prompt)
    with torch.inference_mode():
        streams = runner.clean_streams(tokens, range(model.depth + 1))
        for layer in range(model.depth + 1):
            found = runner.read_states(layer, states, tokens, streams[layer])
            expected = plain_run(
                model,
                layer,
                torch.from_numpy(tokens),
                states,
                2,
                torch.from_numpy(embeddings) if with_embeddings else None,
            )[:, 2:]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_in_the_embeddings_are_those_of_a_full_run() -> None:
    model = resumable("llama")
    rng = np.random.default_rng(3)
    first = torch.from_numpy(rng.normal(0, 1, (3, model.d_model)).astype(np.float32))
    prompt = PatchedPrompt("p", (7, 8, 9), first.numpy())
    tokens = prompt.tokens(np.zeros(3, np.int64), np.array([[5], [5], [9]]))
    states = torch.from_numpy(rng.normal(0, 1, (3, model.d_model)).astype(np.float32))
    for layer in (0, 1, 2):
        gradients = []
        for run in ("resumed", "plain"):
            embeddings = first.clone().requires_grad_(True)
            if run == "resumed":
                runner = PromptRunner(model, prompt, embeddings)
                last = runner.read_with_gradient(layer, states, tokens)
            else:
                given = torch.from_numpy(tokens)
                last = plain_run(model, layer, given, states, 2, embeddings)[:, 2:]
            gradients += torch.autograd.grad(last.square().sum(), [embeddings])
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
        assert float(gradients[0].abs().max()) > 0


def test_the_written_prompts_are_those_of_the_released_code(tiny_cache: ActivationCache) -> None:
    prompts = [read_prompt(text, tiny_cache) for text in FIXED_PROMPTS]
    tokenizer = tiny_cache.tokenizer()
    for text, prompt in zip(FIXED_PROMPTS, prompts, strict=True):
        decoded = tokenizer.decode(list(prompt.ids), skip_special_tokens=False)
        assert decoded == text
    # The end-of-text mark of the fourth is one token.
    assert prompts[3].ids[0] == tokenizer.token_to_id("<|endoftext|>")
    start = read_prompt("simlens", tiny_cache)
    assert (start.ids, start.ends_with_token, start.length) == ((0,), True, 2)
    tokens = start.tokens(np.array([3, 4]), np.array([[5], [6]]))
    assert tokens.tolist() == [[0, 3, 5], [0, 4, 6]]


def test_prompts_that_cannot_be_run_are_refused(tiny_cache: ActivationCache) -> None:
    with pytest.raises(UsageError, match="has no token"):
        read_prompt("", tiny_cache)
    with pytest.raises(UsageError, match="has 0 tokens; expected 1 to 1024"):
        PatchedPrompt("none", ())
    with pytest.raises(UsageError, match="2 tokens and 1 embeddings"):
        PatchedPrompt("two", (1, 2), np.zeros((1, 4), np.float32))
    prompt = PatchedPrompt("wide", (1,), np.zeros((1, 7), np.float32))
    with pytest.raises(MismatchError, match="width 7, the model has width 32"):
        PromptRunner(resumable("llama"), prompt)


def test_a_sample_has_whole_pairs_of_one_document(tiny_cache: ActivationCache) -> None:
    sample = PromptSample.draw(tiny_cache, "train", 3, 50, seed=1)
    assert sample.count == 50
    rows = tiny_cache.document_numbers
    assert rows is not None
    for offset in range(1, 4):
        same = rows.take(sample.positions) == rows.take(sample.positions + offset)
        assert same.all()
        expected = tiny_cache.tokens.take(sample.positions + offset)
        np.testing.assert_array_equal(sample.continuations[:, offset - 1], expected)
    expected = tiny_cache.residual_array(3).take(sample.positions + 2)
    np.testing.assert_array_equal(sample.last_states(2), expected)
    mask = np.zeros(tiny_cache.positions, bool)
    with pytest.raises(
        UsageError, match="no position with 3 more tokens .* among those of the mask"
    ):
        PromptSample.draw(tiny_cache, "train", 3, 50, where=mask)
    with pytest.raises(UsageError, match="where must be a bool mask of the"):
        PromptSample.draw(tiny_cache, "train", 3, 50, where=mask[:-1])
    with pytest.raises(UsageError, match="no position with 900 more tokens"):
        PromptSample.draw(tiny_cache, "train", 900, 50)

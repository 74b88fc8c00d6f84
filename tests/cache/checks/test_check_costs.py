"""The checks before the first row cost at most five forward passes of the largest batch."""

from typing import Any

import numpy as np
import pytest

from residua.cache.checks.model_checks import check_model
from residua.cache.forward.batches import BATCH_TOKENS
from residua.cache.tokens.token_stream import TokenStream, from_sequences

from ...support.architectures import VOCAB, build_architecture

LARGEST_BATCH = BATCH_TOKENS["cpu"]
CONTEXT = 1024


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny llama with a long context, whose configuration has many integers."""
    return build_architecture("llama", max_position_embeddings=2 * LARGEST_BATCH)


def stream_of(lengths: list[int]) -> TokenStream:
    rng = np.random.default_rng(0)
    return from_sequences([rng.integers(3, VOCAB - 1, length) for length in lengths])


def block_tokens(model: Any, stream: TokenStream) -> int:
    """Tokens, padding included, that the last block reads in the checks of `model`.

    The blocks cost nearly all of a forward pass; embeddings alone (`first_layer`) cost nothing.
    """
    tokens = 0

    def count(_: Any, __: Any, output: Any) -> None:
        nonlocal tokens
        hidden = output[0] if isinstance(output, tuple) else output
        tokens += hidden.shape[0] * hidden.shape[1]

    handle = model.model.layers[-1].register_forward_hook(count)
    try:
        check_model(model, stream, "float32", "auto")
    finally:
        handle.remove()
    return tokens


@pytest.mark.parametrize(
    "lengths",
    [
        [CONTEXT] * 12 + [700, 500, 300],  # packed: one sequence of each split is shorter
        [*range(CONTEXT, 20, -37)],  # one document per sequence
        [256] * 30,
        [2 * CONTEXT] * 4 + [1500],
        [LARGEST_BATCH] * 3 + [900],
    ],
    ids=["packed", "documents", "short", "long", "one sequence a batch"],
)
def test_checks_cost_at_most_five_largest_batches(model: Any, lengths: list[int]) -> None:
    tokens = block_tokens(model, stream_of(lengths))
    assert tokens <= 5 * max(LARGEST_BATCH, max(lengths)), tokens / LARGEST_BATCH

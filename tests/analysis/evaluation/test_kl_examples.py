"""Examples of an evaluation are the pairs with the largest and smallest KL, with their text."""

from pathlib import Path

import numpy as np
import pytest
import torch

from residua.analysis.evaluation.kl_examples import CONTEXT_TOKENS, find_kl_examples
from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.cache.errors import NotFoundError
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.tokens.segments import PairScope
from residua.probes.lens.logit_lens import LogitLens
from residua.probes.ridge.ridge_probe import RidgeProbe

from ...support.synthetic import make_cache, random_head

VOCAB = 17


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 40, 50).tolist()
    states = [rng.normal(0, 1, (sum(lengths), 6)).astype(np.float32) for _ in range(3)]
    root: Path = tmp_path_factory.mktemp("caches")
    return make_cache(root, states, lengths, random_head(6, VOCAB))


def naive_kl(cache: ActivationCache, layer: int, offset: int, split: str) -> dict[int, float]:
    """KL of the logit lens by target position, from float64 softmaxes, one pair at a time."""
    head = cache.head.torch("cpu")

    def distribution(layer: int, position: int) -> torch.Tensor:
        row = torch.from_numpy(np.array(cache.residual_array(layer)[position : position + 1]))
        with torch.no_grad():
            return head(row)[0].double().softmax(-1)

    found = {}
    for sequence in cache.sequences(split):
        start, length = cache.sequence_start[sequence], cache.sequence_length[sequence]
        for index in range(offset, int(length)):
            target = int(start) + index
            p, q = distribution(cache.n_blocks, target), distribution(layer, target - offset)
            found[target] = float((p * (p / q).log()).sum())
    return found


@pytest.mark.parametrize("offset", [0, 2])
def test_examples_are_the_extremes_of_a_plain_computation(
    small_cache: ActivationCache, offset: int
) -> None:
    lens = LogitLens.of(small_cache, (offset,))
    found = find_kl_examples(small_cache, lens, layer=1, offset=offset, split="all", count=4)
    kl = naive_kl(small_cache, 1, offset, "all")
    assert found.n == len(kl)
    starts = small_cache.sequence_start
    for examples, sign in ((found.worst, -1), (found.best, 1)):
        # The extreme of each sequence, then the extremes among these.
        extremes: dict[int, float] = {}
        for target, value in kl.items():
            sequence = int(np.searchsorted(starts, target, side="right")) - 1
            extremes[sequence] = min(extremes.get(sequence, np.inf), sign * value)
        want = sorted(extremes.items(), key=lambda entry: entry[1])[:4]
        assert [example.sequence for example in examples] == [sequence for sequence, _ in want]
        for example, (_, value) in zip(examples, want, strict=True):
            assert example.kl == pytest.approx(sign * value, rel=1e-4, abs=1e-5)
            target = int(starts[example.sequence]) + example.index
            assert kl[target] == pytest.approx(example.kl, rel=1e-4, abs=1e-5)


def test_an_example_says_what_was_read_and_what_came_after(small_cache: ActivationCache) -> None:
    lens = LogitLens.of(small_cache, (2,))
    found = find_kl_examples(small_cache, lens, layer=2, offset=2, split="all")
    for example in (*found.worst, *found.best):
        target = int(small_cache.sequence_start[example.sequence]) + example.index
        tokens = [f"#{token}" for token in small_cache.tokens[: target + 1].tolist()]
        context, ahead = example.context.split(" "), example.ahead.split(" ")
        assert ahead == tokens[-2:]
        assert len(context) == min(example.index - 1, CONTEXT_TOKENS)
        assert context == tokens[-2 - len(context) : -2]
        row = torch.from_numpy(np.array(small_cache.residual_array(2)[target : target + 1]))
        with torch.no_grad():
            p = small_cache.head.torch("cpu")(row)[0].softmax(-1)
        assert [name for name, _ in example.model] == [f"#{i}" for i in p.topk(3).indices.tolist()]
        shown = [value for _, value in example.model]
        assert shown == pytest.approx(p.topk(3).values.tolist(), rel=1e-5)


def test_masks_and_dropped_positions_count(small_cache: ActivationCache) -> None:
    lens = LogitLens.of(small_cache, (0,))
    where = np.zeros(small_cache.positions, bool)
    where[::7] = True
    scope = PairScope(drop_first=2)
    found = find_kl_examples(
        small_cache, lens, layer=1, offset=0, split="all", where=where, scope=scope
    )
    index = np.concatenate([np.arange(n) for n in small_cache.sequence_length])
    assert found.n == int((where & (index >= 2)).sum())
    for example in (*found.worst, *found.best):
        assert where[int(small_cache.sequence_start[example.sequence]) + example.index]
        assert example.index >= 2
    nothing = find_kl_examples(
        small_cache, lens, layer=1, offset=0, split="all", where=np.zeros_like(where)
    )
    assert (nothing.n, nothing.worst, nothing.best) == (0, (), ())


def test_undefined_pairs_are_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    states = [rng.normal(0, 1, (60, 6)).astype(np.float32) for _ in range(2)]
    states[0][5] = np.nan
    odd = make_cache(tmp_path, states, [20, 20, 20], random_head(6, VOCAB))
    found = find_kl_examples(odd, LogitLens.of(odd, (0,)), layer=0, offset=0, split="all")
    assert found.n == 59
    assert all(np.isfinite(example.kl) for example in (*found.worst, *found.best))


def test_an_evaluation_gives_examples_of_lenses_in_their_middle_layer(
    small_cache: ActivationCache,
) -> None:
    ridge = RidgeProbe(offsets=[0, 1]).fit(small_cache, keep=False)
    evaluation = evaluate(small_cache, [ridge], split="train")
    found = evaluation.kl_examples(count=2)
    assert [(examples.probe, examples.layer, examples.offset) for examples in found] == [
        ("logit", 1, 0),
        ("ridge", 1, 0),
    ]
    assert all(len(examples.worst) == len(examples.best) == 2 for examples in found)


def test_a_layer_that_a_lens_lacks_is_named(small_cache: ActivationCache) -> None:
    with pytest.raises(NotFoundError, match="no layer 9 at offset 0"):
        find_kl_examples(small_cache, LogitLens.of(small_cache, (0,)), layer=9, offset=0)

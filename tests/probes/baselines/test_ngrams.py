"""Claims about the bigram baseline: plain counts, proper distributions, only the train split."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from residua.cache.errors import UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.readout import ReadoutBatch
from residua.probes.baselines import token_counts as counts
from residua.probes.baselines.ngrams import Bigram

from ...support.synthetic import make_cache, random_head

VOCAB, D_MODEL = 12, 4


def cache_of(root: Path, lengths: list[int], ids: np.ndarray | None = None) -> ActivationCache:
    layer = np.zeros((sum(lengths), D_MODEL), np.float32)
    if ids is None:
        # Token 11 never occurs, and token 10 only as the last one.
        ids = np.random.default_rng(3).integers(0, VOCAB - 2, sum(lengths))
        ids[np.cumsum(lengths)[::5] - 1] = VOCAB - 2
    return make_cache(root, [layer], lengths, random_head(D_MODEL, VOCAB), ids)


@pytest.fixture
def tiny_cache(tmp_path) -> ActivationCache:
    return cache_of(tmp_path, np.random.default_rng(1).integers(1, 30, 60).tolist())


def pairs_of(tiny_cache: ActivationCache) -> Counter[tuple[int, int]]:
    counts: Counter[tuple[int, int]] = Counter()
    for number in tiny_cache.sequences("train"):
        start = tiny_cache.sequence_start[number]
        ids = tiny_cache.tokens[start : start + tiny_cache.sequence_length[number]].tolist()
        counts.update(zip(ids[:-1], ids[1:], strict=True))
    return counts


def test_counts_equal_a_plain_dict(tiny_cache, monkeypatch):
    monkeypatch.setattr(counts, "BLOCK_TOKENS", 50)
    table = Bigram().fit(tiny_cache).counts_.tocoo()
    where = zip(table.row.tolist(), table.col.tolist(), strict=True)
    found = dict(zip(where, table.data.tolist(), strict=True))
    assert found == dict(pairs_of(tiny_cache))


def test_probabilities_are_witten_bell(tiny_cache):
    counts = pairs_of(tiny_cache)
    after, seen = Counter(), Counter()
    for (a, b), number in counts.items():
        after[a] += number
        seen[b] += number
    found = Bigram().fit(tiny_cache).log_probabilities(np.arange(VOCAB))
    for a in range(VOCAB):
        followers = sum(first == a for first, _ in counts)
        for b in range(VOCAB):
            unigram = (seen[b] + len(seen) / VOCAB) / (sum(seen.values()) + len(seen))
            want = unigram
            if after[a]:
                want = (counts[a, b] + followers * unigram) / (after[a] + followers)
            assert np.exp(found[a, b]) == pytest.approx(want, rel=1e-5)


def test_every_row_is_positive_and_sums_to_one(tiny_cache):
    found = Bigram().fit(tiny_cache).log_probabilities(np.arange(VOCAB)).astype(float)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-6)


def test_only_the_train_split_is_counted(tmp_path):
    lengths = [20] * 30
    ids = np.random.default_rng(0).integers(0, VOCAB, 600)
    tiny_cache = cache_of(tmp_path, lengths, ids)
    inside = 19 * len(tiny_cache.sequences("train"))
    assert len(tiny_cache.sequences("test")) > 0
    assert Bigram().fit(tiny_cache).counts_.sum() == inside


def test_logits_are_the_rows_of_the_last_tokens(tiny_cache):
    probe = Bigram((1, 2)).fit(tiny_cache)
    assert probe.pairs() == [(None, 1), (None, 2)]
    tokens = torch.tensor([3, 3, 11, 0])
    found = probe.logits(ReadoutBatch(None, tokens, tiny_cache.head.torch()), None, 1)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), probe.log_probabilities(tokens.numpy()))


def test_a_fit_without_a_pair_says_so(tmp_path):
    with pytest.raises(UsageError, match="no pair"):
        Bigram().fit(cache_of(tmp_path, [1] * 9, np.arange(9)))


def test_offset_zero_is_refused(tiny_cache):
    with pytest.raises(UsageError, match="1 or more"):
        Bigram((0, 1)).fit(tiny_cache)


def test_an_unfitted_bigram_says_so():
    with pytest.raises(Exception, match="not fitted"):
        Bigram().log_probabilities(np.arange(2))

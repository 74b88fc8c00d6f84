"""Claims about counted baselines: plain counts, proper distributions, only tokens they may see."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import residua
from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.analysis.report.tables import headlines
from residua.cache.errors import UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.readout import ReadoutBatch
from residua.probes.baselines import token_counts as counts
from residua.probes.baselines.marginal_bigram import BigramChain, MarginalBigram
from residua.probes.baselines.ngrams import (
    Bigram,
    CrossFittedBigram,
    LaggedBigram,
    Trigram,
    Unigram,
)
from residua.probes.baselines.token_counts import unfitted_baselines

from ...support.synthetic import make_cache, random_head

VOCAB, D_MODEL = 13, 6
KINDS = ("unigram", "bigram", "trigram", "lagged", "chain", "marginal")


def cache_of(root: Path, lengths: list[int], seed: int = 0) -> ActivationCache:
    rng = np.random.default_rng(seed)
    states = [rng.normal(0, 1, (sum(lengths), D_MODEL)) for _ in range(2)]
    # Token 12 never occurs, and low tokens are frequent.
    ids = np.minimum(rng.geometric(0.2, sum(lengths)) - 1, VOCAB - 2)
    return make_cache(root, states, lengths, random_head(D_MODEL, VOCAB), ids)


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory) -> ActivationCache:
    lengths = np.random.default_rng(1).integers(1, 30, 60).tolist()
    return cache_of(tmp_path_factory.mktemp("caches"), lengths)


def texts(cache: ActivationCache, split: str = "train") -> list[list[int]]:
    start, length = cache.sequence_start, cache.sequence_length
    return [cache.tokens[start[n] : start[n] + length[n]].tolist() for n in cache.sequences(split)]


def count_ngrams(cache: ActivationCache, size: int, lag: int = 1) -> Counter[tuple[int, ...]]:
    """Runs of `size` tokens, the last of them `lag` after the one before."""
    found: Counter[tuple[int, ...]] = Counter()
    for ids in texts(cache):
        for end in range(size - 2 + lag, len(ids)):
            first = end - lag - size + 2
            found[(*ids[first : end - lag + 1], ids[end])] += 1
    return found


def witten_bell(numbers: Counter, prior) -> "defaultdict[tuple[int, ...], np.ndarray]":
    """P(. | context) by its context; `prior(context)` where nothing was seen."""
    rows: dict[tuple[int, ...], Counter] = {}
    for (*context, token), number in numbers.items():
        rows.setdefault(tuple(context), Counter())[token] += number
    found = {}
    for context, seen in rows.items():
        types, total = len(seen), sum(seen.values())
        row = np.array([seen[b] for b in range(VOCAB)], float)
        found[context] = (row + types * prior(context)) / (total + types)
    return defaultdict(lambda: np.zeros(0), found)


def unigram_of(cache: ActivationCache) -> np.ndarray:
    seen = Counter(token for ids in texts(cache) for token in ids[1:])
    row = np.array([seen[b] for b in range(VOCAB)], float)
    return (row + len(seen) / VOCAB) / (row.sum() + len(seen))


def bigram_of(cache: ActivationCache, lag: int = 1) -> np.ndarray:
    """P(b | a), `(vocab, vocab)` float64."""
    unigram = unigram_of(cache)
    rows = witten_bell(count_ngrams(cache, 2, lag), lambda context: unigram)
    return np.array([rows.get((a,), unigram) for a in range(VOCAB)])


def probabilities(probe, **tokens: list[int]) -> np.ndarray:
    """Of a baseline without a layer, at its last offset."""
    given = {name: torch.tensor(ids) for name, ids in tokens.items()}
    count = len(next(iter(given.values())))
    given.setdefault("last_token", torch.zeros(count, dtype=torch.int64))
    batch = ReadoutBatch(hidden=None, head=random_head(D_MODEL, VOCAB).torch(), **given)
    out = probe.logits(batch, None, probe.offsets[-1])
    assert out.dtype == torch.float32
    return np.exp(out.double().numpy())


def test_the_unigram_is_the_smoothed_marginal(tiny_cache):
    found = probabilities(Unigram().fit(tiny_cache), last_token=[0, 5])
    np.testing.assert_allclose(found, [unigram_of(tiny_cache)] * 2, rtol=1e-6)


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_the_lagged_bigram_counts_at_its_distance(tiny_cache, offset, monkeypatch):
    monkeypatch.setattr(counts, "BLOCK_TOKENS", 50)
    probe = LaggedBigram((offset,)).fit(tiny_cache)
    table = probe.counts_[offset].tocoo()
    where = zip(table.row.tolist(), table.col.tolist(), strict=True)
    numbers = count_ngrams(tiny_cache, 2, offset + 1)
    assert dict(zip(where, table.data.tolist(), strict=True)) == dict(numbers)
    found = probabilities(probe, token=list(range(VOCAB)))
    np.testing.assert_allclose(found, bigram_of(tiny_cache, offset + 1), rtol=1e-5)


def test_the_trigram_is_witten_bell_over_the_bigram(tiny_cache, monkeypatch):
    monkeypatch.setattr(counts, "BLOCK_TOKENS", 50)
    bigram = bigram_of(tiny_cache)
    rows = witten_bell(count_ngrams(tiny_cache, 3), lambda context: bigram[context[1]])
    assert len(rows) < VOCAB**2  # some contexts were never seen
    a, b = (side.ravel().tolist() for side in np.indices((VOCAB, VOCAB)))
    want = [rows[c] if c in rows else bigram[c[1]] for c in zip(a, b, strict=True)]
    found = probabilities(Trigram().fit(tiny_cache), previous_token=a, last_token=b)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    first = probabilities(Trigram().fit(tiny_cache), previous_token=[-1], last_token=[3])
    np.testing.assert_allclose(first, bigram[[3]], rtol=1e-5)


def test_a_bounded_trigram_keeps_the_most_frequent_contexts(tiny_cache):
    pairs, bigram = count_ngrams(tiny_cache, 2), bigram_of(tiny_cache)
    kept = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:7]
    probe = Trigram(contexts=7).fit(tiny_cache)
    assert probe.contexts_.tolist() == sorted(a * VOCAB + b for a, b in kept)
    whole = Trigram().fit(tiny_cache)
    for a, b in pairs:
        found, full = (
            probabilities(one, previous_token=[a], last_token=[b]) for one in (probe, whole)
        )
        np.testing.assert_allclose(found, full if (a, b) in kept else bigram[[b]], rtol=1e-5)


@pytest.mark.parametrize("offset", [1, 2, 5])
def test_the_marginalised_bigram_sums_out_the_tokens_between(tiny_cache, offset):
    hidden = torch.from_numpy(tiny_cache.residual_array(1)[:9])
    head = tiny_cache.head.torch()
    probe = MarginalBigram((offset,)).fit(tiny_cache)
    assert probe.pairs() == [(tiny_cache.n_blocks, offset)]
    batch = ReadoutBatch(hidden, torch.zeros(9, dtype=torch.int64), head)
    found = np.exp(probe.logits(batch, tiny_cache.n_blocks, offset).double().numpy())
    model = head(hidden).double().softmax(-1).numpy()
    want = model @ np.linalg.matrix_power(bigram_of(tiny_cache), offset)
    np.testing.assert_allclose(found, want, rtol=2e-5)


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_the_chain_is_a_power_of_the_bigram(tiny_cache, offset):
    tokens = [3, 3, 12, 0]
    found = probabilities(BigramChain((offset,)).fit(tiny_cache), token=tokens)
    want = np.linalg.matrix_power(bigram_of(tiny_cache), offset + 1)[tokens]
    np.testing.assert_allclose(found, want, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_distribution_is_positive_and_sums_to_one(tiny_cache, kind):
    (probe,) = unfitted_baselines([kind], (2,))
    tokens = torch.arange(VOCAB)
    hidden = torch.from_numpy(tiny_cache.residual_array(1)[:VOCAB])
    batch = ReadoutBatch(hidden, tokens, tiny_cache.head.torch(), tokens, tokens.flip(0))
    out = probe.fit(tiny_cache).logits(batch, None, 2).double().numpy()
    assert np.isfinite(out).all()
    np.testing.assert_allclose(np.exp(out).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_baseline_is_the_same(tiny_cache, kind, tmp_path):
    (probe,) = unfitted_baselines([kind], (1, 2))
    residua.save_probe(probe.fit(tiny_cache), tmp_path / kind)
    again = residua.load_probe(tmp_path / kind)
    assert type(again) is type(probe)
    assert again.get_params() == probe.get_params()
    assert again.pairs() == probe.pairs()
    assert again.metrics() == probe.metrics()
    tokens = torch.arange(VOCAB)
    hidden = torch.from_numpy(tiny_cache.residual_array(1)[:VOCAB])
    batch = ReadoutBatch(hidden, tokens, tiny_cache.head.torch(), tokens, tokens)
    torch.testing.assert_close(again.logits(batch, None, 2), probe.logits(batch, None, 2))


@pytest.mark.parametrize("rows", [7, 4096])
def test_evaluation_gives_each_the_tokens_it_may_see(tiny_cache, rows):
    """The mean -log P of the text, against the same mean over plain lists of tokens."""
    offset = 2
    probes = [probe.fit(tiny_cache) for probe in unfitted_baselines(KINDS, (offset,))]
    found = evaluate(tiny_cache, probes, split="train", batch_rows=rows)
    assert [name for name in found.probes if name != "logit"] == list(KINDS)
    bigram, unigram = bigram_of(tiny_cache), unigram_of(tiny_cache)
    lagged, cube = bigram_of(tiny_cache, 3), np.linalg.matrix_power(bigram, 3)
    triples = witten_bell(count_ngrams(tiny_cache, 3), lambda context: bigram[context[1]])
    want = defaultdict(list)
    for ids in texts(tiny_cache):
        for t in range(len(ids) - offset - 1):
            now, before, last, text = (ids[t + n] for n in (0, offset - 1, offset, offset + 1))
            want["unigram"].append(unigram[text])
            want["bigram"].append(bigram[last, text])
            want["trigram"].append(triples[before, last][text])
            want["lagged"].append(lagged[now, text])
            want["chain"].append(cube[now, text])
    nll = {row.probe: row.nll_text for row in found.rows if row.layer is None}
    assert nll == {name: pytest.approx(-np.log(p).mean(), rel=1e-5) for name, p in want.items()}


def test_the_report_says_which_tokens_each_reads(tiny_cache):
    probes = [probe.fit(tiny_cache) for probe in unfitted_baselines(KINDS, (2,))]
    (sentence,) = headlines(evaluate(tiny_cache, probes, split="train"))
    for words in (
        "unigram (which reads nothing)",
        "trigram (which reads tokens t+1 and t+2)",
        "lagged bigram (which reads token t)",
        "the bigram (which reads token t+2)",
        "marginalised bigram (layer 1)",
    ):
        assert words in sentence


def test_a_first_token_has_no_previous_one(tiny_cache):
    class Asked:
        kind = "asked"
        seen: list[tuple[int, int, int]] = []

        def pairs(self) -> list[tuple[int | None, int]]:
            return [(None, 0)]

        def logits(self, batch, layer, offset):
            rows = (batch.previous_token, batch.token, batch.last_token)
            self.seen += zip(*(side.tolist() for side in rows), strict=True)
            return torch.zeros(len(batch.token), VOCAB)

    evaluate(tiny_cache, [Asked()], split="train", batch_rows=5)
    want = [(a, b, b) for ids in texts(tiny_cache) for a, b in zip([-1, *ids], ids, strict=False)]
    assert sorted(Asked.seen) == sorted(want)


def test_tables_are_added_up_in_any_number(tiny_cache, monkeypatch):
    whole = counts.count_pairs(counts.TrainSplitPasses(tiny_cache))
    monkeypatch.setattr(counts, "BLOCK_TOKENS", 1)
    assert np.array_equal(
        counts.count_pairs(counts.TrainSplitPasses(tiny_cache)).toarray(), whole.toarray()
    )


@pytest.mark.parametrize(
    ("probe", "passes"),
    [
        (Unigram(), 1),
        (Bigram(), 1),
        (MarginalBigram(), 1),
        (CrossFittedBigram(), 1),
        (Trigram(), 2),
        (LaggedBigram((0, 2)), 3),
    ],
)
def test_a_fit_reports_the_tokens_it_has_read(tiny_cache, probe, passes, monkeypatch):
    whole = probe.fit(tiny_cache, progress=None).state()[1]
    monkeypatch.setattr(counts, "BLOCK_TOKENS", 200)
    calls: list[tuple[int, int]] = []
    parts = probe.fit(tiny_cache, progress=lambda done, total: calls.append((done, total)))
    tokens = sum(len(ids) for ids in texts(tiny_cache))
    assert {total for _, total in calls} == {passes * tokens}
    done = [done for done, _ in calls]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, passes * tokens)
    if not isinstance(probe, CrossFittedBigram):  # which reads blocks of a size of its own
        assert len(done) > 3 * passes
    for name, tensor in parts.state()[1].items():
        np.testing.assert_array_equal(tensor, whole[name])


def test_a_fit_in_a_batch_job_logs_what_it_does(tiny_cache, caplog):
    with caplog.at_level("INFO", logger="residua"):
        Trigram().fit(tiny_cache)
        evaluate(tiny_cache, [], offsets=[1], max_positions=64)
    lines = [line for line in caplog.messages if line.startswith("count: ")]
    assert len(lines) >= 2  # those of the trigram, and of the bigram beside the probes
    assert all(" tokens" in line for line in lines)


@pytest.mark.parametrize("probe", [Bigram((0,)), Trigram((0,)), LaggedBigram((-1,)), Unigram(())])
def test_offsets_that_say_nothing_are_refused(tiny_cache, probe):
    with pytest.raises(UsageError, match="or more"):
        probe.fit(tiny_cache)
    with pytest.raises(UsageError, match="nothing for bigram"):
        unfitted_baselines(["bigram", "trigram"], (0,))


@pytest.mark.parametrize("probe", [Unigram(), Bigram(), Trigram(), LaggedBigram()])
def test_an_unfitted_baseline_says_so(probe):
    with pytest.raises(Exception, match="not fitted"):
        probe.metrics()

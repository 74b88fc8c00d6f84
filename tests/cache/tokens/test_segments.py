"""Pairs stay inside one document, text goes on as it was read: against pairs listed one by one."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.cache.errors import UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.tokens.segments import (
    PairScope,
    crossing_shares,
    document_of,
    has_document_borders,
    neighbour_tokens,
    segment_indices,
)
from residua.cache.tokens.token_stream import KeptRuns
from residua.probes.baselines.ngrams import Bigram, LaggedBigram, Trigram, Unigram
from residua.probes.moments.kept_moments import moment_entries
from residua.probes.moments.moment_collection import collect_moments
from residua.probes.moments.moment_set import MomentSet
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.training.minibatches import MinibatchStream
from residua.probes.vocabulary.vocab_probe import VocabProbe

from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB, DEPTH, FOLDS, OFFSETS = 6, 17, 2, 2, (0, 1, 2, 5)
DOCUMENTS = [1, 1, 2, 30, 3, 7, 1, 16, 5, 60, 4, 4, 4, 2, 9, 1, 1, 1, 8, 12] * 3
"""Tokens of each document: of one, shorter than an offset, longer than a sequence of 16."""
ALL_PAIRS = [False, True]


def packed_documents(rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Document number of each token, and lengths of the packed sequences."""
    numbers = rng.permutation(len(DOCUMENTS) * 5)[: len(DOCUMENTS)]
    documents = np.repeat(numbers, DOCUMENTS)
    whole_sequences, remainder = divmod(len(documents), 16)
    return documents, [16] * whole_sequences + [remainder] * (remainder > 0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    rng = np.random.default_rng(0)
    documents, lengths = packed_documents(rng)
    layers = [rng.normal(size=(len(documents), WIDTH)) + 3 for _ in range(DEPTH + 1)]
    folder = tmp_path_factory.mktemp("packed")
    head = random_head(WIDTH, VOCAB)
    return make_cache(folder, layers, lengths, head, documents=documents)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """A cache of half the positions of packed contexts: single ones, runs, at ends and borders."""
    rng = np.random.default_rng(1)
    documents, lengths = packed_documents(rng)
    sequence, first, length = [], [], []
    for number, size in enumerate(lengths):
        indices = np.flatnonzero(rng.random(size) < 0.5)
        for run in np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1):
            if len(run):
                sequence, first = [*sequence, number], [*first, int(run[0])]
                length.append(len(run))
    runs = KeptRuns(*(np.array(values, np.int64) for values in (sequence, first, length)))
    layers = [rng.normal(size=(sum(length), WIDTH)) for _ in range(DEPTH + 1)]
    folder, head = tmp_path_factory.mktemp("sparse"), random_head(WIDTH, VOCAB)
    return make_cache(folder, layers, lengths, head, documents=documents, runs=runs)


class ModelText:
    """Token ids and document numbers of the contexts, and the token of each row of the cache."""

    def __init__(self, cache: ActivationCache) -> None:
        sparse = cache.has("context/ids")
        contexts = cache.array("sequences/context")[:] if sparse else np.arange(10**6)
        starts = cache.array("contexts/start" if sparse else "sequences/start")[:]
        lengths = cache.array("contexts/length" if sparse else "sequences/length")[:]
        self.ids = cache.array("context/ids" if sparse else "tokens/ids")[:].tolist()
        self.documents = cache.array("context/row_id" if sparse else "tokens/row_id")[:].tolist()
        self.context = np.repeat(np.arange(len(starts)), lengths).tolist()
        self.index = [i for length in lengths.tolist() for i in range(length)]
        sequence = cache.array("tokens/sequence")[:]
        self.sequence = sequence.tolist()
        self.token_of_row = (starts[contexts[sequence]] + cache.array("tokens/index")[:]).tolist()

    def are_together(self, a: int, b: int, across: bool) -> bool:
        """Whether tokens `a` and `b` lie in the same context and, unless `across`, document."""
        if not 0 <= a < len(self.ids) or not 0 <= b < len(self.ids):
            return False
        same = self.documents[a] == self.documents[b]
        return self.context[a] == self.context[b] and (across or same)

    def token(self, a: int, step: int, across: bool) -> int:
        return self.ids[a + step] if self.are_together(a, a + step, across) else -1

    def pairs(
        self, rows: np.ndarray, offset: int, across: bool, drop: int
    ) -> list[tuple[int, int]]:
        """All (t, t+N) of `rows`, both rows of one sequence of the cache."""
        return [
            (t, t + offset)
            for t in rows.tolist()
            if t + offset < len(self.sequence)
            and self.sequence[t] == self.sequence[t + offset]
            and self.are_together(self.token_of_row[t], self.token_of_row[t + offset], across)
            and self.index[self.token_of_row[t]] >= drop
        ]


@pytest.fixture(params=["packed", "sparse"])
def cache(request: pytest.FixtureRequest) -> ActivationCache:
    return request.getfixturevalue(request.param)


def moments_by_hand(
    cache: ActivationCache, layer: int, offset: int, fold: int, across: bool, drop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows x and y of the pairs of one fold, float64."""
    numbers = cache.sequences("all")
    numbers = numbers[cache.sequence_folds(FOLDS)[numbers] == fold]
    pairs = np.array(ModelText(cache).pairs(cache.positions_of(numbers), offset, across, drop), int)
    x, y = (np.asarray(cache.residual_array(la)[:], np.float64) for la in (layer, cache.n_blocks))
    pairs = pairs.reshape(-1, 2)
    return x[pairs[:, 0]], y[pairs[:, 1]]


@pytest.mark.parametrize("across", ALL_PAIRS)
@pytest.mark.parametrize(
    ("drop", "rows", "tasks"), [(0, 1, 1), (0, 64, 3), (1, 7, 2), (3, None, 1)]
)
def test_moments_are_those_of_the_pairs_one_by_one(
    cache: ActivationCache, across: bool, drop: int, rows: int | None, tasks: int
) -> None:
    found = collect_moments(
        cache, None, OFFSETS, folds=FOLDS, split="all", across_documents=across, drop_first=drop,
        rows=rows, tasks=tasks,
    )  # fmt: skip
    for layer, offset, fold in itertools.product((0, 1, 2), OFFSETS, range(FOLDS)):
        x, y = moments_by_hand(cache, layer, offset, fold, across, drop)
        part = found.parts(layer, offset)[fold]
        assert part.n == len(x)
        if len(x) == 0:
            continue
        dx, dy = x - x.mean(0), y - y.mean(0)
        np.testing.assert_allclose(part.mean_x, x.mean(0), rtol=1e-9)
        np.testing.assert_allclose(part.xx, dx.T @ dx, rtol=1e-9, atol=1e-8)
        np.testing.assert_allclose(part.xy, dx.T @ dy, rtol=1e-9, atol=1e-8)
        assert part.yy == pytest.approx((dy**2).sum(), rel=1e-9)


def test_pairs_of_two_documents_are_a_share_of_all(packed: ActivationCache) -> None:
    text, rows = ModelText(packed), packed.positions_of(packed.sequences("all"))
    shares = crossing_shares(packed, packed.sequences("all"), OFFSETS, PairScope())
    for offset in OFFSETS:
        every = len(text.pairs(rows, offset, True, 0))
        inside = len(text.pairs(rows, offset, False, 0))
        assert shares[offset] == pytest.approx(1 - inside / every)
    assert shares[0] == 0
    assert shares[5] > 0.3


def test_ridge_is_scikit_learns_on_pairs_inside_documents(packed: ActivationCache) -> None:
    from sklearn.linear_model import Ridge

    rows = packed.positions_of(packed.sequences("train"))
    for across in ALL_PAIRS:
        probe = RidgeProbe(1, [0], alpha=3.0, across_documents=across).fit(packed, keep=False)
        pairs = np.array(ModelText(packed).pairs(rows, 1, across, 0))
        x, y = (
            packed.residual_array(0)[:][pairs[:, 0]],
            packed.residual_array(DEPTH)[:][pairs[:, 1]],
        )
        want = Ridge(alpha=3.0).fit(x.astype(float), y.astype(float))
        np.testing.assert_allclose(probe.map().weight.T, want.coef_, rtol=1e-4, atol=1e-5)
        assert probe.n_[0, 1] == len(pairs)
        every = len(ModelText(packed).pairs(rows, 1, True, 0))
        inside = len(ModelText(packed).pairs(rows, 1, False, 0))
        assert probe.metrics()[0]["crossing"] == pytest.approx(1 - inside / every)


@pytest.mark.parametrize("across", ALL_PAIRS)
@pytest.mark.parametrize("drop", [0, 2])
def test_a_feed_gives_every_pair_with_its_text(
    cache: ActivationCache, across: bool, drop: int
) -> None:
    text = ModelText(cache)
    rows = cache.positions_of(cache.sequences("train"))
    feed = MinibatchStream(
        cache, [0], OFFSETS, batch=13, buffer_rows=50, slab_rows=9, across_documents=across,
        drop_first=drop,
    )  # fmt: skip
    for offset in OFFSETS:
        found, last = [], cache.residual_array(cache.n_blocks)[:]
        for draw in feed.epoch():
            ahead = draw.ahead[offset]
            assert ahead.residual is not None
            for i in ahead.valid.nonzero()[:, 0].tolist():
                t = int(draw.positions[i])
                found.append((t, t + offset))
                assert int(ahead.token[i]) == text.ids[text.token_of_row[t + offset]]
                assert int(ahead.text[i]) == text.token(text.token_of_row[t + offset], 1, across)
                assert torch.equal(ahead.residual[i], torch.from_numpy(last[t + offset]))
            assert bool((ahead.text[~ahead.valid] == -1).all())
        assert sorted(found) == text.pairs(rows, offset, across, drop)


@pytest.mark.parametrize("across", ALL_PAIRS)
@pytest.mark.parametrize("step", [1, -1])
def test_neighbours_are_those_of_the_text(cache: ActivationCache, across: bool, step: int) -> None:
    text, rows = ModelText(cache), np.random.default_rng(0).permutation(cache.positions)
    found = neighbour_tokens(cache, rows, step, across)
    assert found.tolist() == [text.token(text.token_of_row[t], step, across) for t in rows.tolist()]


def counts_by_hand(cache: ActivationCache, lags: tuple[int, ...], across: bool) -> np.ndarray:
    """How often tokens came at distances `lags` after each other in the train contexts."""
    text, found = ModelText(cache), np.zeros((VOCAB,) * (len(lags) + 1), int)
    train = cache.sequence_split == 0
    contexts = cache.sequence_context[train]
    for a in range(len(text.ids)):
        if text.context[a] in contexts and text.are_together(a, a + lags[-1], across):
            found[tuple(text.ids[a + lag] for lag in (0, *lags))] += 1
    return found


@pytest.mark.parametrize("across", ALL_PAIRS)
def test_baselines_count_the_text_of_the_train_split(cache: ActivationCache, across: bool) -> None:
    bigram = Bigram(across_documents=across).fit(cache)
    pairs = counts_by_hand(cache, (1,), across)
    np.testing.assert_array_equal(bigram.counts_.toarray(), pairs)
    unigram = Unigram(across_documents=across).fit(cache)
    np.testing.assert_array_equal(unigram.counts_, pairs.sum(0))
    lagged = LaggedBigram((2,), across_documents=across).fit(cache)
    np.testing.assert_array_equal(lagged.counts_[2].toarray(), counts_by_hand(cache, (3,), across))
    trigram = Trigram(across_documents=across).fit(cache)
    triples = counts_by_hand(cache, (1, 2), across).reshape(-1, VOCAB)
    np.testing.assert_array_equal(trigram.counts_.toarray(), triples[trigram.contexts_])
    assert trigram.counts_.sum() == triples.sum()


@pytest.mark.parametrize("across", ALL_PAIRS)
@pytest.mark.parametrize("drop", [0, 1])
def test_evaluation_counts_the_pairs_and_the_text_one_by_one(
    cache: ActivationCache, across: bool, drop: int
) -> None:
    text, rows = ModelText(cache), cache.positions_of(cache.sequences("all"))
    found = evaluate(
        cache, split="all", offsets=OFFSETS, layers=[1], across_documents=across, drop_first=drop
    )
    log_q = cache.head.logits(cache.residual_array(1)[:]).astype(np.float64)
    log_q -= np.log(np.exp(log_q).sum(-1, keepdims=True))
    for offset in OFFSETS:
        pairs = text.pairs(rows, offset, across, drop)
        follows = [(t, text.token(text.token_of_row[s], 1, across)) for t, s in pairs]
        follows = [(t, token) for t, token in follows if token >= 0]
        row = found.select("logit", offset)[0]
        assert (row.n, row.n_text) == (len(pairs), len(follows))
        want = -np.mean([log_q[t, token] for t, token in follows])
        assert row.nll_text == pytest.approx(want, rel=1e-5)
        every = len(text.pairs(rows, offset, True, drop))
        inside = len(text.pairs(rows, offset, False, drop))
        assert found.crossing[offset] == pytest.approx(1 - inside / every)


def test_text_targets_of_single_positions_come_from_their_contexts(tmp_path: Path) -> None:
    """One kept position per context: no row follows another, the text goes on all the same."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.array([3, 5, 7, 11]) for _ in range(40)])
    runs = KeptRuns(np.arange(40), np.full(40, 1), np.ones(40, np.int64))
    layers = [rng.normal(size=(40, WIDTH)) for _ in range(DEPTH + 1)]
    head = random_head(WIDTH, VOCAB)
    ids = ids + np.repeat(np.arange(40) % 3, 4)  # so that hashes differ, and splits are filled
    cache = make_cache(tmp_path, layers, [4] * 40, head, ids=ids, runs=runs)
    bigram = Bigram().fit(cache)
    assert bigram.counts_.sum() == 3 * len(cache.sequences("train"))
    probe = VocabProbe(loss="text", layers=[0], epochs=1, lr=0.01, batch=8).fit(cache)
    assert np.isfinite(probe.metrics()[0]["train"])
    row = evaluate(cache, [probe], split="all", offsets=[0]).select("vocab", 0)[0]
    assert (row.n, row.n_text) == (40, 40)


def test_single_token_documents_leave_no_pair_and_say_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(64, WIDTH)) for _ in range(DEPTH + 1)]
    head, documents = random_head(WIDTH, VOCAB), np.arange(64)
    cache = make_cache(tmp_path, layers, [8] * 8, head, documents=documents)
    for fit in (
        lambda: VocabProbe(1, [0]).fit(cache),
        lambda: RidgeProbe(1, [0]).fit(cache),
        lambda: Bigram().fit(cache),
    ):
        with pytest.raises(UsageError, match="no pair"):
            fit()
    with pytest.raises(UsageError, match="across_documents"):
        evaluate(cache, split="all", offsets=[1])
    assert RidgeProbe(1, [0], across_documents=True).fit(cache, keep=False).n_[0, 1] > 0


@pytest.mark.parametrize("wrong", [{"drop_first": -1}, {"drop_first": 1.5}, {"drop_first": True},
                                   {"across_documents": "yes"}])  # fmt: skip
def test_scopes_that_cannot_be_right_are_refused(
    packed: ActivationCache, wrong: dict[str, Any]
) -> None:
    for act in (
        lambda: RidgeProbe(**wrong).fit(packed),
        lambda: VocabProbe(**wrong).fit(packed),
        lambda: MinibatchStream(packed, [0], [0], **wrong),
        lambda: evaluate(packed, **wrong),
    ):
        with pytest.raises(UsageError, match="must be"):
            act()


def test_kept_moments_of_other_pairs_are_not_taken(packed: ActivationCache, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    documents, lengths = packed_documents(rng)
    layers = [rng.normal(size=(len(documents), WIDTH)) for _ in range(DEPTH + 1)]
    head = random_head(WIDTH, VOCAB)
    cache = make_cache(tmp_path, layers, lengths, head, documents=documents)
    for across, drop in itertools.product(ALL_PAIRS, (0, 1)):
        scope: dict[str, Any] = {"across_documents": across, "drop_first": drop}
        fitted = RidgeProbe(1, [0], **scope).fit(cache, keep=True)
        assert fitted.moments_["computed"] == 1
        again = RidgeProbe(1, [0], **scope).fit(cache)
        assert again.moments_["kept"] == 1
        assert again.n_ == fitted.n_
    assert len({MomentSet.load(entry.path).total(0, 1).n for entry in moment_entries(cache)}) == 4


def test_moments_are_fitted_by_probes_of_the_same_pairs(
    packed: ActivationCache, tmp_path: Path
) -> None:
    collect_moments(packed, [0], [1], across_documents=True, drop_first=2).save(tmp_path)
    back = MomentSet.load(tmp_path)
    assert (back.across_documents, back.drop_first) == (True, 2)
    others: list[dict[str, Any]] = [{}, {"across_documents": True}, {"drop_first": 2}]
    for other in others:
        with pytest.raises(UsageError, match="give both the same"):
            RidgeProbe(1, [0], **other).fit(back)
    probe = RidgeProbe(1, [0], across_documents=True, drop_first=2)
    pairs = ModelText(packed).pairs(packed.positions_of(packed.sequences("train")), 1, True, 2)
    assert probe.fit(back).n_[0, 1] == len(pairs)


def test_moments_of_before_count_all_pairs(tmp_path: Path) -> None:
    from residua.cache.files.json_files import read_json, write_json

    rng = np.random.default_rng(3)
    head = random_head(WIDTH, VOCAB)
    for name, documents in ("borders", np.arange(160) // 7), ("none", np.arange(160) // 16):
        layers = [rng.normal(size=(160, WIDTH)) for _ in range(DEPTH + 1)]
        cache = make_cache(tmp_path / name, layers, [16] * 10, head, documents=documents)
        assert has_document_borders(cache) == (name == "borders")
        RidgeProbe(1, [0], across_documents=True).fit(cache, keep=True)
        for entry in moment_entries(cache):
            about = read_json(entry.path / "moments.json")
            for key in ("across_documents", "drop_first", "sha256"):
                about.pop(key, None)
            write_json(entry.path / "moments.json", about)
        across = RidgeProbe(1, [0], across_documents=True).fit(cache)
        assert across.moments_["kept"] == 1
        default = RidgeProbe(1, [0]).fit(cache, keep=False)
        assert default.moments_["kept"] == (name == "none")
        pairs = len(
            ModelText(cache).pairs(cache.positions_of(cache.sequences("train")), 1, False, 0)
        )
        assert default.n_[0, 1] == pairs


def test_a_cache_without_documents_has_one_per_sequence(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(30, WIDTH)) for _ in range(DEPTH + 1)]
    cache = make_cache(tmp_path, layers, [10, 1, 19], random_head(WIDTH, VOCAB))
    index, left = segment_indices(cache, cache.sequences("all"))
    assert index.tolist() == [*range(10), 0, *range(19)]
    assert left.tolist() == [*range(9, -1, -1), 0, *range(18, -1, -1)]
    assert document_of(cache, np.array([0, 9, 10, 11, 29])).tolist() == [0, 0, 1, 2, 2]

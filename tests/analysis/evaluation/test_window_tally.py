"""Claims about devices, buffers and products: results do not depend on where and how they run."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from residua.analysis.evaluation import comparison, metrics, windows
from residua.analysis.evaluation.comparison import rank_of
from residua.analysis.evaluation.confidence_buckets import BucketTally
from residua.analysis.evaluation.distributions import Reference
from residua.analysis.evaluation.lens_heatmap import heatmap, heatmaps
from residua.analysis.evaluation.pair_tiles import matching_tiles
from residua.analysis.evaluation.plan import plan_evaluation
from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.analysis.evaluation.probe_head import VocabBuffers, choose_products
from residua.analysis.evaluation.result import Evaluation
from residua.analysis.evaluation.window_tally import tally_windows
from residua.analysis.evaluation.windows import EvaluationSample, default_window_rows
from residua.cache.errors import ModelError, ResiduaWarning, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.tokens.segments import PairScope
from residua.probes.base.readout import ReadoutBatch
from residua.probes.base.resampling import ResamplingUnits
from residua.probes.baselines.marginal_bigram import MarginalBigram
from residua.probes.baselines.ngrams import Bigram, Trigram
from residua.probes.controls.control_probe import ControlProbe
from residua.probes.lens.logit_lens import LogitLens
from residua.probes.lens.tuned_lens import TunedLens
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.vocabulary.vocab_probe import VocabProbe

from ...support.pretended_device import pretended_device
from ...support.synthetic import make_cache, random_head

VOCAB, D_MODEL = 61, 8
OFFSETS = (0, 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> ActivationCache:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, 60).tolist()
    last = rng.normal(size=(sum(lengths), D_MODEL))
    layers = [last + rng.normal(0, scale, last.shape) for scale in (1.0, 0.3)] + [last]
    head = random_head(D_MODEL, VOCAB)
    return make_cache(tmp_path_factory.mktemp("caches"), layers, lengths, head)


@pytest.fixture(scope="module")
def probes(cache: ActivationCache) -> list[Any]:
    pairs: dict[str, Any] = {"offsets": [0, 1], "layers": [0, 1]}
    return [
        RidgeProbe(folds=2, **pairs).fit(cache),
        TunedLens(steps=2, batch=64, **pairs).fit(cache),
        VocabProbe(epochs=1, **pairs).fit(cache),
        ControlProbe(RidgeProbe(folds=2, **pairs), "shuffled").fit(cache),
        MarginalBigram([1]).fit(cache),
        Trigram([1]).fit(cache),
    ]


def assert_same_rows(found: Evaluation, expected: Evaluation, rtol: float = 1e-5) -> None:
    assert len(found.rows) == len(expected.rows) > 0
    assert len(found.buckets) == len(expected.buckets)
    for left, right in zip(
        (*found.rows, *found.buckets), (*expected.rows, *expected.buckets), strict=True
    ):
        for name, value in asdict(right).items():
            if isinstance(value, float):
                assert asdict(left)[name] == pytest.approx(value, rel=rtol, abs=1e-6), name
            else:
                assert asdict(left)[name] == value, name


@pytest.mark.parametrize("float64", [True, False])
def test_an_evaluation_on_a_device_equals_that_of_the_cpu(cache, probes, float64):
    expected = evaluate(cache, probes, split="all", offsets=OFFSETS, device="cpu")
    with pretended_device(float64=float64) as device:
        found = evaluate(cache, probes, split="all", offsets=OFFSETS, device="meta")
    assert {"addmm.out", "softmax.int_out", "amax.out"} <= device.operations
    assert found.device == "meta"
    assert_same_rows(found, expected)


@pytest.mark.slow
def test_a_window_that_does_not_fit_into_memory_is_halved(cache, probes):
    expected = evaluate(cache, probes[:2], split="all", device="cpu")
    # A matrix of 40 rows fits, the window of all rows does not.
    with pretended_device(largest=4 * VOCAB * 40) as device:
        found = evaluate(cache, probes[:2], split="all", device="meta")
    assert device.refused > 0
    assert_same_rows(found, expected)


def test_a_single_row_that_does_not_fit_is_the_error_of_the_device(cache):
    with (
        pretended_device(largest=4 * VOCAB - 1),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        evaluate(cache, device="meta")


def test_heatmaps_on_a_device_equal_those_of_the_cpu(cache, probes):
    expected = heatmaps(cache, probes[:2], split="all", width=6, device="cpu")
    with pretended_device():
        found = heatmaps(cache, probes[:2], split="all", width=6, device="meta")
    assert len(found) == len(expected) == 3
    for left, right in zip(found, expected, strict=True):
        assert (left.probe, left.start, left.top) == (right.probe, right.start, right.top)
        for name in ("probability", "entropy", "kl"):
            np.testing.assert_allclose(
                getattr(left, name), getattr(right, name), rtol=1e-5, atol=1e-6
            )


def test_an_unknown_device_is_one_message(cache):
    for call in (evaluate, heatmap):
        with pytest.raises(ModelError, match="device 'quantum' cannot be used"):
            call(cache, device="quantum")


def test_products_in_bfloat16_move_a_kl_by_little_of_itself(cache, probes):
    kinds = [probes[0], probes[1]]
    exact, rounded = (
        evaluate(cache, kinds, split="all", layers=[0, 1, 2], products=products)
        for products in ("float32", "bfloat16")
    )
    assert any("bfloat16" in note for note in rounded.notes)
    assert not any("bfloat16" in note for note in exact.notes)
    for left, right in zip(rounded.rows, exact.rows, strict=True):
        assert (left.probe, left.layer, left.offset, left.n) == (
            right.probe, right.layer, right.offset, right.n,
        )  # fmt: skip
        assert left.kl == pytest.approx(right.kl, rel=2e-3, abs=1e-6)
        assert left.nll_text == pytest.approx(right.nll_text, rel=2e-3)
    # The last layer is the model itself: there is no difference to round.
    last = [row for row in rounded.rows if row.layer == cache.n_blocks and row.offset == 0]
    assert [row.kl for row in last] == [pytest.approx(0, abs=1e-7)]


def test_bfloat16_products_on_a_device_equal_those_of_the_cpu(cache, probes):
    expected = evaluate(cache, probes[:1], split="all", products="bfloat16", device="cpu")
    with pretended_device():
        found = evaluate(cache, probes[:1], split="all", products="bfloat16", device="meta")
    assert_same_rows(found, expected, rtol=1e-4)


def test_a_model_that_is_undefined_somewhere_leaves_the_measures_of_the_text(tmp_path):
    """Windows with NaN of the model take float32: a probe's own logits have no NaN there."""
    rng = np.random.default_rng(1)
    layers = [rng.normal(size=(200, D_MODEL)) for _ in range(2)]
    layers[1][7] = np.nan
    spoilt = make_cache(tmp_path, layers, [20] * 10, random_head(D_MODEL, VOCAB))
    found = []
    for products in ("float32", "bfloat16"):
        with pytest.warns(ResiduaWarning, match="no distribution"):
            found.append(evaluate(spoilt, split="all", layers=[0], offsets=[0], products=products))
    assert found[0].rows[0].n_undefined == 1
    assert found[0].rows[0].nll_text is not None
    assert_same_rows(found[1], found[0])


def test_products_are_chosen_by_the_size_of_the_vocabulary(cache):
    head = cache.head.torch()
    assert choose_products("auto", head, torch.device("cpu")) == "float32"
    assert choose_products("bfloat16", head, torch.device("cpu")) == "bfloat16"
    with pytest.raises(UsageError, match="products must be one of auto, float32, bfloat16"):
        evaluate(cache, products="float8")


class CountedBigram(Bigram):
    """A bigram that counts the rows it is asked for."""

    rows = 0

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> torch.Tensor:
        type(self).rows += len(batch.last_token)
        return super().logits(batch, layer, offset)


def test_a_baseline_that_reads_the_target_alone_is_asked_once_for_a_target(cache):
    bigram = CountedBigram((1, 2, 3)).fit(cache)
    found = evaluate(cache, bigram, split="test", offsets=(1, 2, 3), batch_rows=30)
    rows = [row for row in found.rows if row.probe.startswith("bigram")]
    offsets = {row.offset: row for row in rows}
    assert CountedBigram.rows == offsets[1].n
    # At every offset, its measures are those of an evaluation of the offset alone.
    for offset in (1, 2, 3):
        alone = evaluate(cache, bigram, split="test", offsets=offset)
        (row,) = (row for row in alone.rows if row.probe == offsets[offset].probe)
        assert row.n == offsets[offset].n
        assert row.kl == pytest.approx(offsets[offset].kl, rel=1e-6)
        assert row.nll_text == pytest.approx(offsets[offset].nll_text, rel=1e-6)


class TwoHeads:
    """A readout that calls the head twice, and returns the sum."""

    kind = "two"

    def pairs(self) -> list[tuple[int | None, int]]:
        return [(0, 0)]

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> torch.Tensor:
        assert batch.hidden is not None
        first, second = batch.head(batch.hidden), batch.head(-batch.hidden)
        return first + second


def test_a_probe_may_call_the_head_twice(cache):
    row = next(r for r in evaluate(cache, TwoHeads(), split="all").rows if r.probe == "two")
    states = cache.residual_array(0)[:]
    logits = cache.head.logits(states) + cache.head.logits(-states)
    model = cache.head.logits(cache.residual_array(cache.n_blocks)[:])
    log_p, log_q = (torch.from_numpy(z).double().log_softmax(-1) for z in (model, logits))
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert row.kl == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("limit", [None, 1, 10])
@pytest.mark.parametrize("vocab", [7, 3000])
def test_a_rank_up_to_the_limit_is_that_of_a_stable_sort(limit, vocab):
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(size=(40, vocab)) * 2).astype(np.float32)  # many ties
    token = rng.integers(0, vocab, 40)
    order = np.argsort(-logits, axis=-1, kind="stable")
    expected = np.argmax(order == token[:, None], axis=-1)
    found = rank_of(torch.from_numpy(logits), torch.from_numpy(token), limit).numpy()
    if limit is None:
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_array_equal(np.minimum(found, limit), np.minimum(expected, limit))


@pytest.mark.parametrize("limit", [None, 5])
def test_nan_comes_first_in_a_segment_and_a_token_that_is_nan_last(limit, monkeypatch):
    monkeypatch.setattr(comparison, "GATHERED", 7)  # many parts
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(size=(60, 100)) * 2).astype(np.float32)
    logits[::2][rng.random((30, 100)) < 0.01] = np.nan
    logits[4], token = np.nan, rng.integers(0, 100, 60)
    found = rank_of(torch.from_numpy(logits), torch.from_numpy(token), limit).numpy()
    for row, (values, own) in enumerate(zip(logits, token, strict=True)):
        order = np.argsort(np.where(np.isnan(values), -np.inf, -values), kind="stable")
        expected = 100 if np.isnan(values[own]) else int(np.argmax(order == own))
        if limit is None or expected < limit:
            assert found[row] == expected
        else:
            assert found[row] >= limit


def test_a_reference_written_in_place_is_the_softmax():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)) * 5 - 100
    logits[3, 4] = -torch.inf
    expected = logits.double().log_softmax(-1)
    written = logits.clone()
    found = Reference.of(written, torch.zeros(5, dtype=torch.int64), log_p=written)
    assert found.log_p is written
    torch.testing.assert_close(found.log_p.double(), expected, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(found.log_p.exp().double(), expected.exp(), rtol=2e-5, atol=1e-9)


def test_small_divergences_are_as_exact_as_large_ones():
    """A good probe's KL is a small difference of large sums: it is summed by its terms."""
    rng = np.random.default_rng(0)
    model = (rng.normal(0, 3, (50, 2000)) - 100).astype(np.float32)
    probe = (model + rng.normal(0, 0.01, model.shape)).astype(np.float32)
    log_p, log_q = (torch.from_numpy(z).double().log_softmax(-1) for z in (model, probe))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    reference = Reference.of(torch.from_numpy(model), torch.zeros(50, dtype=torch.int64))
    found = metrics.measure_distribution(reference, torch.from_numpy(probe))
    np.testing.assert_allclose(found[:, metrics.COLUMNS.index("kl")], expected, atol=3e-6)


@pytest.mark.parametrize("tile_rows", [1, 4, 16, 1000])
def test_tiles_cover_all_pairs_in_order(tile_rows):
    rng = np.random.default_rng(0)
    for share in (0.0, 0.05, 0.5, 1.0):
        steps = np.where(rng.random(200) < share, 2, 1)
        targets, rows = np.cumsum(steps), np.arange(200) + 3
        tiles = list(matching_tiles(targets, rows, tile_rows))
        numbers = np.concatenate([np.arange(tile.start, tile.stop) for tile in tiles])
        np.testing.assert_array_equal(numbers, np.arange(200))
        assert max(tile.stop - tile.start for tile in tiles) <= tile_rows
    assert list(matching_tiles(np.zeros(0, int), np.zeros(0, int), tile_rows)) == []


def test_a_wide_vocabulary_has_windows_of_256_rows():
    assert default_window_rows(1 << 17) == 256
    assert default_window_rows(50_000) == 256
    assert default_window_rows(8) == windows.MAX_ROWS
    assert default_window_rows(50_000, torch.device("meta")) > 256


def test_a_part_of_a_window_has_the_sources_of_its_targets(cache):
    sample = EvaluationSample(cache, cache.sequences("all"), PairScope())
    for window in windows.evaluation_windows(sample, OFFSETS, batch_rows=50):
        part = window.part(slice(10, min(23, window.stop - window.start)), OFFSETS)
        for offset in OFFSETS:
            numbers = part.targets(offset)
            targets = part.positions[part.target_rows[numbers]]
            whole = window.targets(offset)
            whole = whole[(whole >= 10) & (whole < 23)]
            np.testing.assert_array_equal(targets, window.positions[window.target_rows[whole]])
            sources = part.sources(numbers, offset)
            np.testing.assert_array_equal(part.positions[sources], targets - offset)
            np.testing.assert_array_equal(
                part.token[sources], cache.tokens[targets - offset].astype(np.int64)
            )


def test_buffers_grow_and_are_given_up():
    buffers = VocabBuffers(5, torch.device("cpu"))
    first = buffers.rows("logits", 3)
    assert buffers.rows("logits", 2).data_ptr() == first.data_ptr()
    assert buffers.rows("logits", 9).shape == (9, 5)
    assert buffers.rows("other", 1).data_ptr() != buffers.rows("logits", 1).data_ptr()
    buffers.clear()
    assert buffers.rows("logits", 1).shape == (1, 5)


def test_an_observer_sees_every_pair_once_with_the_measures_that_are_summed(
    cache: ActivationCache,
) -> None:
    sequences = cache.sequences("test")
    sample = EvaluationSample(cache, sequences)
    plan = plan_evaluation(cache, {"lens": LogitLens([0, 1], [0, 2])}, progress=None)
    units = ResamplingUnits.of(cache, sequences, 0)
    tally = BucketTally(plan.keys, units.n_resampled, sample.targets.count)
    seen: dict = {}

    def observe(key, window, targets, measures):
        rows = window.sample_index[window.target_rows[targets]]
        seen.setdefault(key, []).append((rows, measures))

    tally_windows(
        sample, plan, units, tally, device=torch.device("cpu"), batch_rows=37, observe=observe
    )
    assert set(seen) == set(plan.keys)
    for key, parts in seen.items():
        rows = np.concatenate([rows for rows, _ in parts])
        measures = np.concatenate([measures for _, measures in parts])
        assert len(rows) == len(set(rows.tolist())) > 0
        sums = np.zeros((units.n_resampled, len(metrics.COLUMNS)))
        np.add.at(sums, units.unit_numbers[rows], measures)
        np.testing.assert_allclose(tally.unit_sums(key).sums, sums, rtol=1e-6, atol=1e-6)

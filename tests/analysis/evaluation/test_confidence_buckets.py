"""Claims about confidence buckets and masks: parts of the whole, for any window size."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from residua.analysis.evaluation import pair_tiles
from residua.analysis.evaluation.confidence_buckets import (
    BUCKETS,
    EDGES,
    BucketRow,
    BucketTally,
    ResultKey,
    bucket_of,
)
from residua.analysis.evaluation.distributions import Reference
from residua.analysis.evaluation.metrics import (
    COLUMNS,
    measure_distribution,
)
from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.analysis.evaluation.result import Evaluation
from residua.analysis.evaluation.windows import choose_sequences
from residua.cache.errors import UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.resampling import resampling_counts
from residua.probes.baselines.ngrams import Bigram

from ...support.synthetic import make_cache, random_head

VOCAB, D_MODEL, LAYERS, OFFSETS = 13, 8, 3, (0, 1, 3)
MEANS = (
    "kl",
    "kl_reverse",
    "precision_at_1",
    "precision_at_5",
    "precision_at_10",
    "nll",
    "surprisal",
    "nll_text",
    "precision_at_1_text",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> ActivationCache:
    """States so large that the model is sure at some positions and unsure at others."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 25, 50).tolist()
    states = [rng.normal(0, 1, (sum(lengths), D_MODEL)) for _ in range(LAYERS)]
    folder = tmp_path_factory.mktemp("caches")
    return make_cache(folder, states, lengths, random_head(D_MODEL, VOCAB, seed=4))


@pytest.fixture(scope="module")
def mask(cache) -> np.ndarray:
    return np.random.default_rng(5).random(cache.positions) < 0.2


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(float) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def measures_in_memory(
    cache: ActivationCache, layer: int | None, offset: int, where: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Sequence, confidence and measures of every pair of the train split, in float64.

    Of the logit lens, or of the bigram without a layer; one pair at a time, in memory.
    """
    log_p = log_softmax(cache.head.logits(cache.residual_array(cache.n_blocks)[:]))
    if layer is None:
        log_q = np.array(Bigram().fit(cache).log_probabilities(np.arange(VOCAB)), float)
    else:
        log_q = log_softmax(cache.head.logits(cache.residual_array(layer)[:]))
    ids, found, names = cache.tokens[:], [], [*MEANS, "slot", "confidence"]
    for slot, number in enumerate(cache.sequences("train")):
        start, length = int(cache.sequence_start[number]), int(cache.sequence_length[number])
        for s in range(start + offset, start + length):
            if not where[s]:
                continue
            p, q = log_p[s], log_q[ids[s] if layer is None else s - offset]
            order, top = np.argsort(-q, kind="stable").tolist(), int(p.argmax())
            text = int(ids[s + 1]) if s + 1 < start + length else None
            found.append(
                [
                    np.exp(p) @ (p - q),
                    np.exp(q) @ (q - p),
                    *(top in order[:k] for k in (1, 5, 10)),
                    -q[top],
                    -p[order[0]],
                    np.nan if text is None else -q[text],
                    np.nan if text is None else text == order[0],
                    slot,
                    np.exp(p).max(),
                ]
            )
    table = dict(zip(names, np.array(found, float).reshape(-1, len(names)).T, strict=True))
    return table.pop("slot").astype(int), table.pop("confidence"), table


def buckets_of(found: Evaluation, layer: int | None, offset: int) -> list[BucketRow]:
    probe = "bigram" if layer is None else "logit"
    return [row for row in found.select_buckets(probe, offset) if row.layer == layer]


def bootstrap_interval(
    slots: np.ndarray, values: np.ndarray, weights: np.ndarray
) -> tuple[float, float]:
    """Percentiles of the means of the resamples, resample by resample."""
    means = []
    for drawn in weights:
        times = drawn[slots]
        if times.sum():
            means.append((times * values).sum() / times.sum())
    low, high = np.percentile(means, (2.5, 97.5))
    return low, high


@pytest.mark.parametrize("rows", [1, 17, None])
@pytest.mark.parametrize("masked", [False, True])
def test_streamed_buckets_equal_the_whole_in_float64(cache, mask, rows, masked):
    where = mask if masked else None
    bigram = Bigram().fit(cache)
    found = evaluate(cache, [bigram], split="train", offsets=OFFSETS, batch_rows=rows, where=where)
    everywhere = np.ones(cache.positions, bool)
    for layer, offset in [(None, 1), (None, 3), (0, 0), (1, 1), (2, 0), (2, 3)]:
        pairs = measures_in_memory(cache, layer, offset, mask if masked else everywhere)
        check_buckets(cache, buckets_of(found, layer, offset), *pairs)


def check_buckets(cache, rows: list[BucketRow], slots, confidence, table) -> None:
    weights = resampling_counts(len(cache.sequences("train")), 0)
    ends = [(row.confidence_from, row.confidence_to) for row in rows]
    counts = [((confidence >= low) & (confidence < high)).sum() for low, high in BUCKETS]
    assert ends == [bucket for bucket, count in zip(BUCKETS, counts, strict=True) if count]
    for row in rows:
        inside = (confidence >= row.confidence_from) & (confidence < row.confidence_to)
        assert row.n == inside.sum()
        assert row.share == pytest.approx(inside.mean(), rel=1e-12)
        for name in MEANS:
            want = table[name][inside]
            if np.isnan(want).all():
                assert getattr(row, name) is None
            else:
                mean = np.nanmean(want)
                assert getattr(row, name) == pytest.approx(mean, rel=1e-5, abs=1e-6), name
        for name in ("kl", "precision_at_1"):
            low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
            if len(set(slots[inside])) < 2:
                assert low is high is None
            else:
                want = bootstrap_interval(slots[inside], table[name][inside], weights)
                np.testing.assert_allclose((low, high), want, 1e-5, 1e-6, err_msg=name)


def test_buckets_sum_to_the_whole_row(cache):
    found = evaluate(cache, split="train", offsets=OFFSETS)
    assert {row.bucket for row in found.buckets} == {"0-30 %", "30-60 %", "60-90 %", "90-100 %"}
    parts = iter(found.buckets)
    for row in found.rows:
        own = [part for part in found.buckets if same_key(part, row)]
        assert own == [next(parts) for _ in own]
        assert sum(part.n for part in own) == row.n
        assert sum(part.n_text for part in own) == row.n_text
        assert sum(part.share for part in own) == pytest.approx(1)
        for name in MEANS:
            weight = "n_text" if name.endswith("_text") else "n"
            total = sum((getattr(part, name) or 0.0) * getattr(part, weight) for part in own)
            assert total == pytest.approx(getattr(row, name) * getattr(row, weight), rel=1e-9), name


def same_key(one, other) -> bool:
    return (one.probe, one.layer, one.offset) == (other.probe, other.layer, other.offset)


def test_a_bucket_holds_its_lower_end_and_the_last_one_both():
    inner = np.array(EDGES[1:4], "f4")
    confidence = np.array([0, 0.3, 0.6, 0.9, 1, *np.nextafter(inner, np.float32(0))], "f4")
    assert bucket_of(confidence).tolist() == [0, 1, 2, 3, 3, 0, 1, 2]
    assert bucket_of(np.array(EDGES)).tolist() == [0, 1, 2, 3, 3]


def test_cells_take_no_more_room_than_positions():
    tally = BucketTally([ResultKey("logit", 0, 0)], units=5, positions=5)
    assert tally.sums[ResultKey("logit", 0, 0)].sums.shape == (5, len(COLUMNS))
    slots, confidence = np.array([4, 2, 0, 1, 3]), np.array([0.1, 0.95, 0.4, 0.1, 0.7])
    assert sorted(tally.cells(slots, confidence)) == list(range(5))
    assert np.array_equal(tally.cells(slots, confidence), tally.cells(slots, confidence))


def assert_same_rows(one: Evaluation, other: Evaluation) -> None:
    """All rows are the same, up to rounding in float32."""
    for rows, others in ((one.rows, other.rows), (one.buckets, other.buckets)):
        for row, same in zip(rows, others, strict=True):
            for name, value in asdict(row).items():
                want = getattr(same, name)
                close = value == want or value == pytest.approx(want, rel=1e-5, abs=1e-6)
                assert close, name


def test_a_full_mask_changes_nothing(cache):
    all_of_it = np.ones(cache.positions, bool)
    one = evaluate(cache, split="train", offsets=OFFSETS)
    other = evaluate(cache, split="train", offsets=OFFSETS, where=all_of_it)
    assert (one.n, one.positions) == (other.n, other.positions) == (one.n, one.n)
    assert_same_rows(one, other)


def test_n_counts_targets_in_the_mask(cache, mask):
    seen: list[tuple[int, int]] = []
    found = evaluate(
        cache, split="train", offsets=(0, 3), where=mask, progress=lambda *done: seen.append(done)
    )
    taken = cache.positions_of(cache.sequences("train"))
    index = np.arange(cache.positions) - np.repeat(cache.sequence_start, cache.sequence_length)
    assert found.n == mask[taken].sum() < found.positions == len(taken)
    assert seen[-1] == (found.n, found.n)
    for offset in (0, 3):
        assert found.select("logit", offset)[0].n == (mask & (index >= offset))[taken].sum()


def test_a_mask_of_another_shape_or_dtype_is_refused(cache):
    count = cache.positions
    for wrong in (np.ones(count - 1, bool), np.ones(count), np.ones((count, 1), bool), [True]):
        with pytest.raises(UsageError, match=rf"bool array \({count},\)"):
            evaluate(cache, where=wrong)  # pyright: ignore[reportArgumentType]


def test_a_mask_without_a_pair_is_refused(cache):
    taken = cache.positions_of(choose_sequences(cache, "train", 40, 0))
    where = np.zeros(cache.positions, bool)
    with pytest.raises(UsageError, match=f"`where` holds 0 of the {len(taken)} positions"):
        evaluate(cache, split="train", max_positions=40, where=where)
    where[cache.sequence_start] = True
    with pytest.raises(UsageError, match="none with a token 2 before it"):
        evaluate(cache, split="train", offsets=(2,), where=where)


@pytest.mark.parametrize("tile", [1, 200, 1 << 20])
def test_measures_do_not_depend_on_the_tiles(cache, monkeypatch, tile):
    want = evaluate(cache, split="train", offsets=OFFSETS)
    monkeypatch.setitem(pair_tiles.TILE_BYTES, "cpu", tile)
    found = evaluate(cache, split="train", offsets=OFFSETS)
    assert_same_rows(found, want)


def kl_reverse(model: list[float], probe: list[float]) -> float:
    reference = Reference.of(torch.tensor([model]), torch.tensor([0]))
    return float(
        measure_distribution(reference, torch.tensor([probe]))[0, COLUMNS.index("kl_reverse")]
    )


def test_reverse_kl_where_probabilities_are_zero():
    inf = float("inf")
    # Excluded by the probe: adds nothing. By the model, with mass of the probe: infinite.
    assert kl_reverse([0.0, 1.0, 2.0], [0.0, 1.0, -inf]) == pytest.approx(
        np.log(np.exp([0, 1, 2]).sum() / np.exp([0, 1]).sum()), rel=1e-6
    )
    assert kl_reverse([0.0, 1.0, -inf], [0.0, 1.0, 2.0]) == inf
    assert kl_reverse([0.0, 1.0, -inf], [0.0, 1.0, -inf]) == pytest.approx(0, abs=1e-6)
    # exp(-200) is 0 in float32, its logarithm is not.
    assert kl_reverse([0.0, -200.0], [0.0, 0.0]) == pytest.approx(100 - np.log(2), rel=1e-6)
    assert kl_reverse([0.0, 0.0], [0.0, -200.0]) == pytest.approx(np.log(2), rel=1e-6)


def test_the_dictionaries_are_plain(cache, tmp_path: Path):
    import json

    found = evaluate(cache, split="train", offsets=(1,))
    first = json.loads(json.dumps(found.bucket_dicts()))[0]
    assert (first["confidence_from"], first["confidence_to"]) == BUCKETS[0]
    assert {"probe", "layer", "offset", "n", "share", "kl", "kl_low", "surprisal"} <= set(first)

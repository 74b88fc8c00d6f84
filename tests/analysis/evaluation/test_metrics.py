"""Claims about the measures: each equals a plain float64 computation, in any batches."""

import numpy as np
import pytest
import torch

from residua.analysis.evaluation.distributions import MeasureBuffers, Reference
from residua.analysis.evaluation.metrics import (
    COLUMNS,
    KS,
    MetricSums,
    measure_distribution,
)
from residua.probes.base.resampling import resampling_counts

from ...support.defined import not_none

SEQUENCES, ROWS, VOCAB = 7, 90, 23


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def measures_in_float64(
    model: np.ndarray, probe: np.ndarray, text: np.ndarray
) -> dict[str, np.ndarray]:
    """Every measure of every row, one row at a time, in float64."""
    out: dict[str, list[float]] = {name: [] for name in COLUMNS}
    log_ps, log_qs = log_softmax(model.astype(float)), log_softmax(probe.astype(float))
    for row, (log_p, log_q) in enumerate(zip(log_ps, log_qs, strict=True)):
        known = bool(text[row] >= 0)
        order = sorted(range(len(log_q)), key=lambda token: (-probe[row, token], token))
        top = int(np.argmax(model[row]))
        terms = [np.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True) if p > -np.inf]
        out["n"].append(1)
        out["n_undefined"].append(0)
        out["kl"].append(sum(terms))
        back = [np.exp(q) * (q - p) for p, q in zip(log_p, log_q, strict=True) if q > -np.inf]
        out["kl_reverse"].append(sum(back))
        out["nll"].append(-log_q[top])
        out["surprisal"].append(-log_p[order[0]])
        out["confidence"].append(np.exp(log_q.max()))
        out["n_text"].append(known)
        out["nll_text"].append(-log_q[text[row]] if known else 0)
        for k in KS:
            out[f"precision_at_{k}"].append(top in order[:k])
            out[f"precision_at_{k}_text"].append(known and text[row] in order[:k])
    return {name: np.array(values, float) for name, values in out.items()}


@pytest.fixture
def example() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    model = rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    probe = (0.5 * model + rng.normal(0, 2, (ROWS, VOCAB))).astype(np.float32)
    # Half-integers: many exact ties between tokens, also at the top.
    model[::3], probe[::3] = np.round(model[::3] * 2) / 2, np.round(probe[::3] * 2) / 2
    text = rng.integers(-1, VOCAB, ROWS)
    return model, probe, text, rng.integers(0, SEQUENCES, ROWS)


def as_tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(array) for array in arrays]


def test_every_measure_equals_plain_float64(example):
    model, probe, text, _ = example
    want = measures_in_float64(model, probe, text)
    model, probe, text = as_tensors(model, probe, text)
    found = measure_distribution(Reference.of(model, text), probe).numpy()
    for column, name in enumerate(COLUMNS):
        np.testing.assert_allclose(found[:, column], want[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("rows", [1, 7, 64, ROWS])
def test_sums_do_not_depend_on_the_batches(example, rows):
    model, probe, text, slots = example
    want = measures_in_float64(model, probe, text)
    parts = [MetricSums(SEQUENCES), MetricSums(SEQUENCES)]
    for number, start in enumerate(range(0, ROWS, rows)):
        here = slice(start, start + rows)
        batch = as_tensors(model[here], probe[here], text[here])
        parts[number % 2].add(slots[here], Reference.of(batch[0], batch[2]), batch[1])
    parts[0].merge(parts[1])
    for column, name in enumerate(COLUMNS):
        sums = np.bincount(slots, want[name], SEQUENCES)
        np.testing.assert_allclose(parts[0].sums[:, column], sums, rtol=1e-5, atol=1e-4)


def test_row_is_the_mean_over_positions_and_over_text(example):
    model, probe, text, slots = example
    want = measures_in_float64(model, probe, text)
    sums = MetricSums(SEQUENCES)
    batch = as_tensors(model, probe, text)
    sums.add(slots, Reference.of(batch[0], batch[2]), batch[1])
    row = sums.row("ridge", 3, 1, resampling_counts(SEQUENCES, 0))
    assert row is not None
    assert (row.probe, row.layer, row.offset, row.n) == ("ridge", 3, 1, ROWS)
    assert row.n_text == (text >= 0).sum()
    for name in set(COLUMNS) - {"n", "n_text", "confidence"}:
        mean = want[name].sum() / (row.n_text if name.endswith("_text") else row.n)
        assert getattr(row, name) == pytest.approx(mean, rel=1e-5), name


def test_interval_holds_the_mean_and_narrows_with_sequences():
    rng = np.random.default_rng(0)
    widths = []
    for count in (10, 1000):
        sums = MetricSums(count)
        sums.sums[:, 0] = 20
        sums.sums[:, COLUMNS.index("kl")] = 20 * rng.gamma(2.0, 1.0, count)
        row = sums.row("ridge", 0, 0, resampling_counts(count, 0))
        assert row is not None
        assert row.kl_low is not None
        assert row.kl_high is not None
        assert row.kl_low < not_none(row.kl) < row.kl_high
        widths.append(row.kl_high - row.kl_low)
    # Gamma(2, 1) has standard deviation 2 ** 0.5.
    assert widths[1] == pytest.approx(2 * 1.96 * (2 / 1000) ** 0.5, rel=0.15)
    assert widths[0] > 4 * widths[1]


def test_interval_is_seeded():
    assert np.array_equal(resampling_counts(9, 4), resampling_counts(9, 4))
    assert not np.array_equal(resampling_counts(9, 4), resampling_counts(9, 5))


def test_one_sequence_has_no_interval(example):
    model, probe, text = as_tensors(*example[:3])
    sums = MetricSums(3)
    sums.add(np.full(ROWS, 1), Reference.of(model, text), probe)
    row = sums.row("ridge", 0, 0, resampling_counts(3, 0))
    assert row is not None
    assert row.kl_low is None
    assert row.precision_at_1_high is None


def test_no_pair_gives_no_row():
    assert MetricSums(2).row("ridge", 0, 3, resampling_counts(2, 0)) is None


def test_text_that_never_goes_on_is_none(example):
    model, probe, _ = as_tensors(*example[:3])
    sums = MetricSums(SEQUENCES)
    sums.add(example[3], Reference.of(model, torch.full((ROWS,), -1)), probe)
    row = sums.row("ridge", 0, 0, resampling_counts(SEQUENCES, 0))
    assert row is not None
    assert row.n_text == 0
    assert row.nll_text is None
    assert row.precision_at_10_text is None


def test_a_token_that_both_exclude_adds_nothing():
    model = torch.tensor([[0.0, 1.0, -torch.inf]])
    reference = Reference.of(model, torch.tensor([0]))
    assert measure_distribution(reference, model)[0, COLUMNS.index("kl")] == 0
    outside = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert measure_distribution(reference, outside)[0, COLUMNS.index("kl")] == torch.inf


def test_equal_logits_are_ranked_by_id_in_a_small_vocabulary():
    flat = torch.zeros(1, 4)
    model = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    found = measure_distribution(Reference.of(model, torch.tensor([0])), flat)[0]
    values = dict(zip(COLUMNS, found.tolist(), strict=True))
    assert values["precision_at_1"] == 0
    assert values["precision_at_5"] == 1
    assert values["precision_at_1_text"] == 1


def test_large_logits_do_not_overflow():
    model = torch.tensor([[1e4, 0.0, -1e4]])
    found = measure_distribution(Reference.of(model, torch.tensor([0])), model.flip(-1))
    assert torch.isfinite(found).all()


def test_a_probe_that_is_sure_of_another_token_is_measured_exactly(example) -> None:
    """Logits hundreds above that of the model's top token overflow an exponential shifted by it."""
    model, probe, text, _ = example
    probe = 40 * probe
    assert (probe.max(-1) - probe[np.arange(ROWS), model.argmax(-1)]).max() > 200
    want = measures_in_float64(model, probe, text)
    model, probe, text = as_tensors(model, probe, text)
    found = measure_distribution(Reference.of(model, text), probe).numpy()
    for column, name in enumerate(COLUMNS):
        np.testing.assert_allclose(found[:, column], want[name], rtol=1e-5, atol=1e-4, err_msg=name)


def test_pairs_of_some_rows_are_those_of_all_rows(example) -> None:
    """Rows of the reference and of the logits with gaps at any place, in tiles of any size."""
    model, probe, text, _ = example
    model, probe, text = as_tensors(model, probe, text)
    reference = Reference.of(model, text)
    targets = np.flatnonzero(np.arange(ROWS) % 7 != 3)
    rows = np.sort(np.random.default_rng(1).permutation(ROWS)[: len(targets)])
    whole = measure_distribution(Reference.of(model[targets], text[targets]), probe[rows])
    for tile_rows in (1, 5, ROWS):
        buffers = MeasureBuffers(tile_rows, VOCAB)
        found = measure_distribution(reference, probe, targets, rows, buffers=buffers)
        torch.testing.assert_close(found, whole)


def test_an_interval_is_of_the_mean_over_the_positions_that_were_drawn() -> None:
    """Sequences of very different lengths: a resample's mean has its own number of positions."""
    sums = MetricSums(3)
    n, kl = np.array([1.0, 10.0, 100.0]), np.array([4.0, 20.0, 90.0])
    sums.sums[:, COLUMNS.index("n")], sums.sums[:, COLUMNS.index("kl")] = n, kl
    weights = resampling_counts(3, seed=0)
    row = sums.row("lens", 0, 0, weights)
    assert row is not None
    want = np.percentile([(w * kl).sum() / (w * n).sum() for w in weights], (2.5, 97.5))
    assert (row.kl_low, row.kl_high) == pytest.approx(tuple(want), rel=1e-12)
    assert row.kl == pytest.approx(kl.sum() / n.sum())


@pytest.mark.parametrize("low", [-np.inf, -1e4])
def test_a_token_that_both_sides_exclude_adds_nothing_to_either_divergence(low: float) -> None:
    rng = np.random.default_rng(3)
    model, probe = rng.normal(size=(2, 5, 6)).astype("f4")
    model[:, 2], probe[:, 2] = -np.inf, low
    reference = Reference.of(torch.from_numpy(model), torch.zeros(5, dtype=torch.int64))
    found = measure_distribution(reference, torch.from_numpy(probe)).numpy()
    rest = [0, 1, 3, 4, 5]
    log_p, log_q = (log_softmax(v[:, rest].astype(np.float64)) for v in (model, probe))
    for name, a, b in ("kl", log_p, log_q), ("kl_reverse", log_q, log_p):
        want = (np.exp(a) * (a - b)).sum(-1)
        np.testing.assert_allclose(found[:, COLUMNS.index(name)], want, rtol=1e-5, atol=1e-6)
